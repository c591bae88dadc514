"""Drawing texts that are numbered: text i is the same in every batch and in every process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..generation.generation_blockgen import BlockGenGenerateOutput, decoder_class
from ..modeling.releases_blockgen import take_cache
from ..modeling.sampling_blockgen import CounterGenerator
from ..prompts import PromptEncoder
from .rows import left_padded
from .samples_grid import SampleCell
from .throughput import timed


@dataclass(frozen=True)
class DrawnText:
    """
    A text, and what it took.

    Args:
        index (`int`): its number.
        prompt (`str`): what it continues; may be empty.
        text (`str`): what was drawn, special tokens included.
        token_ids (`list[int]`): the same in the generator's tokens.
        num_function_evaluations (`int`): denoiser and AR passes, as `generate` counts them.
    """

    index: int
    prompt: str
    text: str
    token_ids: list[int]
    num_function_evaluations: int


def draw_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: SampleCell,
    indices: Sequence[int],
    *,
    max_new_tokens: int,
    prompts: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[list[DrawnText], tuple[float, float]]:
    """
    Texts of exactly `max_new_tokens` tokens, and the seconds that the calls of `generate` took, on the wall and of the
    CPU.

    The random numbers of text i are a function of the seed and of i alone. So it does not depend, but for rounding, on
    the batch size, on the other texts or on the process that draws it, and cells of one seed share the numbers. As in
    the paper no token ends a text. torch's random state stays what it is.

    Args:
        model ([`BlockGenForDiffusionLM`]): in evaluation mode.
        cell ([`SampleCell`]): how.
        indices (`Sequence[int]`): numbers of the texts. Text i continues prompt i modulo their number.
        prompts (`Sequence[str]`): none empty. Without any a text starts from nothing.
        batch_size (`int`): texts at once.

    Raises:
        ValueError: an empty prompt, or one that leaves no room for the text.
    """
    prompts = prompts or [""]
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    drawn: list[DrawnText] = []
    seconds = cpu_seconds = 0.0
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        chosen = [index % len(prompts) for index in batch]
        inputs = left_padded([encoded[number] for number in chosen], model.device)
        if start == 0:  # what is allocated or compiled once is not generation
            block = {} if cell.block_size is None else {"ar_seed_tokens": 0}
            _generate(model, inputs, batch, seed, min(max_new_tokens, cell.block_size or 1), cell.settings | block)
        with timed(model.device) as clocks:
            token_ids, costs = _generate(model, inputs, batch, seed, max_new_tokens, cell.settings)
        seconds, cpu_seconds = seconds + clocks[0], cpu_seconds + clocks[1]
        texts = tokenizer.batch_decode(token_ids, clean_up_tokenization_spaces=False)
        drawn += [
            DrawnText(index, prompts[number], text, ids, cost)
            for index, number, text, ids, cost in zip(batch, chosen, texts, token_ids, costs, strict=True)
        ]
    return drawn, (seconds, cpu_seconds)


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[torch.Tensor]:
    """
    Ids of the prompts, long `[length]` each.

    Raises:
        ValueError: an empty prompt among several, or one that leaves no room for the text.
    """
    if len(prompts) > 1 and not all(prompts):
        raise ValueError(f"`prompts` must not be empty, but prompt {list(prompts).index('')} is.")
    encoded = [*map(PromptEncoder(tokenizer), prompts)]
    positions = model.config.max_position_embeddings
    longest = max(map(len, encoded))
    if longest + max_new_tokens > positions:
        raise ValueError(
            f"`max_new_tokens` must be at most {max(0, positions - longest)} behind prompts of up to {longest} "
            f"tokens: the model has {positions} positions. It is {max_new_tokens}."
        )
    return [torch.tensor(ids, dtype=torch.long) for ids in encoded]


def _generate(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    indices: Sequence[int],
    seed: int,
    max_new_tokens: int,
    settings: dict[str, Any],
) -> tuple[list[list[int]], list[int]]:
    """New tokens and function evaluations of each text."""
    numbers = torch.tensor(indices, device=model.device)[:, None]
    with torch.random.fork_rng(devices=[]):  # `generate` takes a seed of its own, which is not used
        outputs = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            custom_generate=_decode_rows,
            rows=CounterGenerator.from_seed(seed, model.device).fold_in(numbers),
            **settings,
        )
    new_tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return new_tokens.tolist(), outputs.num_function_evaluations.tolist()


def _decode_rows(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    rows: CounterGenerator,
    **model_kwargs: Any,
) -> BlockGenGenerateOutput:
    """What `generate` does, with a key for each row, `[B, 1]`, instead of one seed for all."""
    cache = take_cache(model_kwargs)
    decoder = decoder_class(generation_config)(
        model, input_ids, logits_processor, stopping_criteria, generation_config, cache=cache, **model_kwargs
    )
    decoder.rows = rows
    decoder.run()
    return BlockGenGenerateOutput(
        sequences=decoder.sequences(),
        num_function_evaluations=decoder.num_function_evaluations,
        num_new_tokens=decoder.num_new_tokens,
    )


__all__ = ["DrawnText", "draw_texts", "encode_prompts"]
