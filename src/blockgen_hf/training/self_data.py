"""Texts that a model samples from itself: what its drafts are to agree with, and so the best data to adapt it on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.answer_generation import end_token_ids
from ..evaluation.rows import left_padded
from ..hub.model_checks import fetch_model
from ..places import data_place
from ..prompts import PromptEncoder
from ..run_folders import json_lines
from ..whole_files import write_whole
from .arguments import BlockGenTrainingArguments
from .data_arguments import DataArguments
from .documents import file_stamps, find_files
from .recipe import Recipe
from .recipe_building import load_tokenizer, make_config, make_model, training_documents
from .sources import Documents
from .tokenization import DocumentTokenizer, is_conversation, read_messages


# Of a model whose answers do not end, no more are tried.
_PROMPTS_PER_ROW = 4
# What of the data settings the prompts depend on.
_OF_PROMPTS = (
    "dataset", "dataset_config", "dataset_split", "dataset_revision", "text_column", "prompt_column",
    "completion_column", "messages_column", "prompt_separator", "document_separator", "validation_documents",
    "max_documents", "sequence_length", "add_bos_token",
)  # fmt: skip


class Prompt(NamedTuple):
    """
    Args:
        token_ids: what the model continues.
        row: the row of the file that is made of the text.
        is_answered: whether that text is the answer alone, to its end. Else it is prompt and continuation.
    """

    token_ids: list[int]
    row: Callable[[str], dict[str, Any]]
    is_answered: bool


def text_prompts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Prompt]:
    """The first `length` tokens of texts; shorter ones are skipped."""
    return _beginnings(texts, tokenizer, length, "text")


@torch.no_grad()
def write_self_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    path: Path,
    *,
    count: int,
    length: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> int:
    """
    Writes a JSONL file of prompts and what the model samples behind them, autoregressively and by its own settings
    but for the temperature. The file is written when all are there.

    Args:
        prompts: as from [`text_prompts`]. Answers that do not end within `length` are left out.
        count: rows to write.
        length: tokens of a row, its prompt included.
        temperature: of the samples. Below 1, their tokens depend less on chance, so that several at once can be
            predicted better.
        batch_size: prompts that are continued at once.
        seed: of the samples.

    Returns:
        how many were written: fewer than `count` if there are not so many prompts.

    Raises:
        ValueError: no text comes out.
    """
    rows: list[dict[str, Any]] = []
    remaining = iter(prompts)
    settings = dict(decoding="ar", do_sample=True, temperature=temperature, top_k=0)
    ends = end_token_ids(model, tokenizer)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        while batch := list(islice(remaining, min(batch_size, count - len(rows)))):
            longest = max(len(prompt.token_ids) for prompt in batch)
            inputs = left_padded([prompt.token_ids for prompt in batch], model.device, tokenizer.pad_token_id or 0)
            sampled = model.generate(
                **inputs,
                max_new_tokens=length - longest,
                **settings,
                **({"eos_token_id": ends or None} if batch[0].is_answered else {}),
            )
            for prompt, new in zip(batch, sampled[:, longest:].tolist(), strict=True):
                tokens = _before_end(new, ends) if prompt.is_answered else prompt.token_ids + new
                if tokens is not None:
                    rows.append(prompt.row(tokenizer.decode(tokens, skip_special_tokens=True)))
    if not rows:
        raise ValueError(
            f"The model wrote no text of its own within {length} tokens: there was no prompt that is long enough and "
            "leaves room for more, or no answer ended."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json_lines(rows))
    return len(rows)


def _before_end(tokens: list[int], ends: list[int]) -> list[int] | None:
    """What stands before the first token that ends a text; None if none does."""
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), None)


# Prompts


def _prompts(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, data: DataArguments, length: int
) -> Iterator[Prompt]:
    """
    Beginnings of texts; or whole prompts and conversations up to the first answer, which take half of a row at most.
    The rows have the columns that the documents have.
    """
    form, rows = documents.form, documents.rows
    if form.kind == "text":
        (column,) = form.columns
        texts = (row[column] or "" for row in rows if row.get("begins", True))
        yield from _beginnings(texts, tokenizer, length, column)
        return
    DocumentTokenizer(tokenizer, form, documents.where)  # which says what it lacks for them
    encode = PromptEncoder(tokenizer, data.prompt_separator, data.add_bos_token)
    for row in rows:
        value = row[form.columns[0]]
        given = _before_answer(value, documents.where) if form.conversational else str(value or "")
        if not given:
            continue
        ids = _encoded(encode, given, documents.where)
        if 0 < len(ids) <= data.sequence_length // 2:
            yield Prompt(ids, _row_with_answer(documents, given), is_answered=True)


def _beginnings(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, column: str
) -> Iterator[Prompt]:
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if len(ids) == length:
            yield Prompt(ids, lambda whole: {column: whole}, is_answered=False)


def _before_answer(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages before the assistant's first one, so that all that is scored in training is the model's own."""
    messages: list[dict[str, Any]] = read_messages(value)
    if not is_conversation(messages):
        raise ValueError(f"{where}: a row is not a list of messages, each with a `role` and a `content`.")
    first = next((turn for turn, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[:first]


def _encoded(encode: PromptEncoder, given: Any, where: str) -> list[int]:
    from jinja2.exceptions import TemplateError

    try:
        return encode(given)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses a conversation: {error}") from error


def _row_with_answer(documents: Documents, given: Any) -> Callable[[str], dict[str, Any]]:
    columns, is_conversation = documents.form.columns, documents.form.conversational

    def row(text: str) -> dict[str, Any]:
        answer: Any = [{"role": "assistant", "content": text}] if is_conversation else text
        return dict(zip(columns, (given, answer) if len(columns) == 2 else (given + answer,), strict=True))

    return row


# The data of a recipe


def make_self_data(
    recipe: Recipe, args: BlockGenTrainingArguments, count: int, prompt_tokens: int, overwrite: bool = False
) -> tuple[Path, int]:
    """
    Writes a file of texts of the recipe's model, behind prompts of its training data, beside the output folder. A file
    of the same request is reused. With several processes, the first one of a machine samples, and the others wait.

    Args:
        args: `recipe.training_arguments()`.
        count: rows to write.
        prompt_tokens: of a text's beginning. Prompts and conversations are taken whole.
        overwrite: sample anew.

    Returns:
        the file, and how many rows it has.

    Raises:
        ValueError: nothing can be sampled, or validation data are a split of the data that the file replaces.
    """
    data, length = recipe.data, recipe.data.sequence_length
    if data.validation_split and not data.validation_dataset:
        raise ValueError(
            f"`data.validation_split` {data.validation_split!r} is a split of `data.dataset`, which texts of the "
            "model's own replace: name `data.validation_dataset` too, or hold out some with "
            "`data.validation_documents`."
        )
    if length <= prompt_tokens:
        raise ValueError(
            f"`data.sequence_length` must be more than the {prompt_tokens} tokens of a prompt, but is {length}."
        )
    with args.main_process_first(desc="sampling texts"):
        path = _place(recipe, args, count, prompt_tokens)
        if args.local_process_index == 0 and (overwrite or not path.is_file()):
            tokenizer = load_tokenizer(recipe, args)
            prompts = _prompts(training_documents(data), tokenizer, data, prompt_tokens)
            prompts = islice(prompts, _PROMPTS_PER_ROW * count)
            model = make_model(recipe, make_config(recipe, tokenizer)).to(args.device).eval()
            write_self_data(model, tokenizer, prompts, path, count=count, length=length, seed=args.seed)
    if not path.is_file():
        raise ValueError(f"{path} is missing: the first process of this machine wrote no texts.")
    with path.open("rb") as file:
        return path, sum(1 for _ in file)


def self_data_settings(data: DataArguments, path: Path, count: int) -> dict[str, Any]:
    """The data settings to train on the file; what they do not name stays as it is."""
    held_out = min(data.validation_documents, max(1, count // 10))
    return {
        "data.dataset": str(path),
        "data.dataset_config": None,
        "data.dataset_split": "train",
        "data.dataset_revision": None,
        "data.streaming": False,
        "data.shuffle_buffer_size": 0,
        "data.max_documents": None,
        "data.validation_documents": held_out,
    }


def _place(recipe: Recipe, args: BlockGenTrainingArguments, count: int, prompt_tokens: int) -> Path:
    """A file beside the output folder, whose name tells what was asked for: another request has another one."""
    model = fetch_model(str(recipe.checkpoint), recipe.model.get("revision")).resolve()
    request = [
        _stamps(model.glob("*.safetensors")),
        str(recipe.tokenizer_name),
        {name: getattr(recipe.data, name) for name in _OF_PROMPTS},
        _stamps(_data_files(recipe.data.dataset)),
        [count, prompt_tokens, args.seed],
    ]
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
    output = Path(str(args.output_dir))
    return output.with_name(f"{output.name}-self-data-{key}.jsonl")


def _data_files(names: list[str] | str) -> Iterable[Path]:
    names = [names] if isinstance(names, str) else names
    place = data_place(names)
    if place == "hub":  # known by name and revision
        return ()
    if place == "folder":
        return Path(os.path.expanduser(names[0])).resolve().rglob("*")
    return map(Path, find_files(names, "dataset")[1])


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return file_stamps(sorted(str(file) for file in files if file.is_file()))


__all__ = ["Prompt", "make_self_data", "self_data_settings", "text_prompts", "write_self_data"]
