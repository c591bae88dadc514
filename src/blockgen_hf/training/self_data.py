"""Texts that a model samples from itself: what its drafts are to agree with, and so the best data to adapt it on."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..run_folders import json_lines
from ..whole_files import write_whole


@torch.no_grad()
def write_self_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    path: Path,
    *,
    count: int,
    prompt_tokens: int,
    length: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> int:
    """
    Writes a JSONL file of texts, each the beginning of a given one and what the model samples behind it,
    autoregressively and by its own settings but for the temperature. The file is written when all are there.

    Args:
        texts: whose first tokens are the prompts.
        count: how many to write.
        prompt_tokens: tokens of a prompt; shorter texts are skipped.
        length: tokens of a text, its prompt included.
        temperature: of the samples. Below 1, their tokens depend less on chance, so that several at once can be
            predicted better.
        batch_size: texts that are sampled at once.
        seed: of the samples.

    Returns:
        how many were written: fewer than `count` if there are not so many texts.

    Raises:
        ValueError: `length` leaves no room behind the prompt, or no text is long enough.
    """
    if length <= prompt_tokens:
        raise ValueError(f"`length` must be more than the {prompt_tokens} tokens of a prompt, but is {length}.")
    found: list[dict[str, str]] = []
    prompts = _prompts(texts, tokenizer, prompt_tokens)
    room = length - prompt_tokens
    settings = dict(decoding="ar", do_sample=True, temperature=temperature, top_k=0, max_new_tokens=room)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        while batch := list(islice(prompts, min(batch_size, count - len(found)))):
            ids = torch.tensor(batch, device=model.device)
            sampled = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            found += [{"text": text} for text in tokenizer.batch_decode(sampled, skip_special_tokens=True)]
    if not found:
        raise ValueError(f"None of the texts has the {prompt_tokens} tokens of a prompt.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json_lines(found))
    return len(found)


def _prompts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if len(ids) == length:
            yield ids


__all__ = ["write_self_data"]
