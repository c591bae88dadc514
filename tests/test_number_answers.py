"""Prompts and completions that are numbers."""

import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from blockgen_hf.training.data import DataArguments, load_datasets


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_numbers_are_their_texts(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    def rows(name: str, answer: int | str) -> list[list[int]]:
        file = tmp_path / f"{name}.{kind}"
        row = {"prompt": "a b", "completion": answer}
        if kind == "parquet":
            Dataset.from_list([row]).to_parquet(file)
        else:
            file.write_text(json.dumps(row))
        arguments = DataArguments(str(file), packing="none", sequence_length=32, cache_dir=str(tmp_path / "cache"))
        return load_datasets(arguments, tiny_tokenizer())[0]["input_ids"][:]

    assert rows("number", 42) == rows("text", "42")
