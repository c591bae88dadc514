"""What the models are trained on: openings of stories, and rows of small sums."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blockgen_hf.training import DataArguments, load_datasets, train_tokenizer
from blockgen_hf.training.recipe_building import training_texts
from blockgen_hf.training.tokenizers import END_OF_TEXT, PAD

from .settings import Settings


_DATASET = "roneneldan/TinyStories"
_MASK = "<|mask|>"
_NUM_EQUATIONS = 5
_EQUATION_LENGTH = len("1+2=3;")


@dataclass(frozen=True)
class Task:
    """
    Args:
        length: tokens per row.
        tokenizer: of all models of the task.
        train, validation: rows with `input_ids`, all of this length.
    """

    name: str
    length: int
    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: Any


def load_task(name: str, settings: Settings) -> Task:
    folder = Path(settings.output_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    return _stories(folder, settings) if name == "tinystories" else _arithmetic(folder, settings)


def story_data(settings: Settings, folder: Path, **options: Any) -> DataArguments:
    source: dict[str, Any] = dict(dataset=_DATASET, validation_split="validation[:2000]")
    if settings.train_file:
        files = dict(dataset=settings.train_file, validation_dataset=settings.validation_file)
        source = dict(**files, document_separator=END_OF_TEXT)
    return DataArguments(**source, max_documents=settings.max_documents, cache_dir=str(folder / "cache"), **options)


def _stories(folder: Path, settings: Settings) -> Task:
    """The first tokens of every story, so that a text can be drawn from nothing and looks like the data."""
    length = settings.story_length
    data = story_data(settings, folder, sequence_length=length, packing="none")
    saved = folder / "tokenizer"
    if not saved.exists():
        train_tokenizer(training_texts(data, settings.max_documents), settings.vocab_size, length).save_pretrained(
            saved
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    train, validation = load_datasets(data, tokenizer)
    train, validation = (
        rows.filter(lambda row: len(row["input_ids"]) == length, load_from_cache_file=False)
        for rows in (train, validation)
    )
    validation = validation.select(range(min(len(validation), settings.eval_rows)))
    return Task("tinystories", length, tokenizer, train, validation)


def long_rows(task: Task, settings: Settings, times: int) -> Any:
    """Rows that are so many times as long as those of training: stories one behind the other, or rows of sums."""
    count = settings.eval_rows // times
    if task.name == "tinystories":
        folder = Path(settings.output_dir) / task.name
        data = story_data(settings, folder, sequence_length=times * task.length, packing="packed")
        _, rows = load_datasets(data, task.tokenizer)
        return rows.select(range(count))
    texts = [row["input_ids"] for row in task.validation]
    return [{"input_ids": list(chain(*texts[n * times : (n + 1) * times]))} for n in range(count)]


def equations(seed: int) -> Iterator[str]:
    """
    Rows of sums of two digits from 0 to 4, which are drawn uniformly. So it is known whether a sum is right.

    >>> next(equations(0))
    '3+3=6;0+2=2;4+3=7;3+2=5;3+2=5;'
    """
    draw = random.Random(seed)
    while True:
        terms = [(draw.randint(0, 4), draw.randint(0, 4)) for _ in range(_NUM_EQUATIONS)]
        yield "".join(f"{left}+{right}={left + right};" for left, right in terms)


def share_of_right_equations(texts: Sequence[str]) -> float:
    """Of the equations that should be in the texts, those that are there in their form and right."""
    found = (
        re.fullmatch(r"(\d)\+(\d)=(\d);", text[start : start + _EQUATION_LENGTH])
        for text in texts
        for start in range(0, _EQUATION_LENGTH * _NUM_EQUATIONS, _EQUATION_LENGTH)
    )
    right = [match is not None and int(match[1]) + int(match[2]) == int(match[3]) for match in found]
    return sum(right) / len(right)


def _character_tokenizer(characters: str, length: int) -> PreTrainedTokenizerFast:
    """A token per character and no others: in a larger vocabulary, uniform noise would be easy to tell from text."""
    vocabulary = {token: index for index, token in enumerate([*characters, END_OF_TEXT, PAD, _MASK])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=_MASK,
        padding_side="left",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _arithmetic(folder: Path, settings: Settings) -> Task:
    length = _EQUATION_LENGTH * _NUM_EQUATIONS + 1
    tokenizer = _character_tokenizer("012345678+=;", length)
    for seed, (name, count) in enumerate({"train": settings.max_documents, "validation": settings.eval_rows}.items()):
        rows = (json.dumps({"text": text}) + "\n" for text in islice(equations(seed), count))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    data = DataArguments(
        dataset=str(folder / "train.jsonl"),
        validation_dataset=str(folder / "validation.jsonl"),
        packing="none",
        sequence_length=length,
        cache_dir=str(folder / "cache"),
    )
    return Task("arithmetic", length, tokenizer, *load_datasets(data, tokenizer))
