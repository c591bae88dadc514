"""A cache of data that is damaged: made anew, with a warning, or refused in words."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from recipes import write_rows
from tiny import tiny_tokenizer

from blockgen_hf.training.data import DataArguments, load_datasets
from blockgen_hf.training.recipe_building import training_texts


def write_documents(path: Path) -> Path:
    rows = [{"text": "abc"}] * 70
    write_rows(path, rows) if path.suffix == ".jsonl" else datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def rows_of(args: DataArguments) -> list[list[int]]:
    rows: list[list[int]] = load_datasets(args, tiny_tokenizer())[0]["input_ids"][:]
    return rows


@pytest.mark.parametrize(
    ("file", "kept"), [("a.jsonl", 0), ("a.parquet", 10), ("a.jsonl", 0.5), ("a.parquet", 0.5), ("a.jsonl", -9)]
)
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, file: str, kept: float, loud_transformers: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever of its files is cut short, and wherever. The next start finds it whole."""
    path, cache = write_documents(tmp_path / file), tmp_path / "cache"
    args = DataArguments(str(path), sequence_length=8, cache_dir=str(cache))
    first = rows_of(args)
    found = sorted(cache.rglob("*.arrow"))
    assert len(found) == 3, "documents, tokens, rows"
    for damaged in found:
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
        with caplog.at_level(logging.WARNING):
            assert rows_of(args) == first
        assert f"The data cache {cache} is damaged" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert rows_of(args) == first
            assert list(training_texts(args, 2)) == ["abc", "abc"]
        assert "damaged" not in caplog.text


@pytest.mark.parametrize("file", ["a.jsonl", "a.parquet"])
def test_a_cache_that_is_overwritten_may_be_damaged(
    tmp_path: Path, file: str, loud_transformers: None, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache = write_documents(tmp_path / file), tmp_path / "cache"
    options: dict[str, Any] = {"sequence_length": 8, "cache_dir": str(cache)}
    first = rows_of(DataArguments(str(path), **options))
    for damaged in cache.rglob("*.arrow"):
        damaged.write_bytes(damaged.read_bytes()[:100])
    args = DataArguments(str(path), overwrite_cache=True, **options)
    with caplog.at_level(logging.WARNING):
        assert rows_of(args) == first
    assert "damaged" not in caplog.text
    for damaged in cache.rglob("*-train*.arrow"):
        damaged.write_bytes(b"")
    assert list(training_texts(DataArguments(str(path), **options), 2)) == ["abc", "abc"]
    (info,) = cache.rglob("dataset_info.json")
    info.write_text("")
    with pytest.raises(ValueError, match=f"data cache {cache} is damaged .*: delete that folder"):
        load_datasets(args, tiny_tokenizer())
