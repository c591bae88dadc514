"""What the collator makes of rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, PAD, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from blockgen_hf.training.collator import BlockGenDataCollator


def test_rows_of_equal_length_need_no_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = BlockGenDataCollator(tokenizer)([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2], [3, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_short_rows_are_padded_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whatever the tokenizer's side is for generation."""
    assert tokenizer.padding_side == "left"
    batch = BlockGenDataCollator(tokenizer)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_without_a_padding_token_the_end_of_text_fills_up(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    batch = BlockGenDataCollator(tokenizer)([{"input_ids": [1, 2]}, {"input_ids": [EOS]}])
    assert batch["input_ids"].tolist() == [[1, 2], [EOS, EOS]]
    assert batch["labels"].tolist() == [[1, 2], [EOS, -100]], "the end itself is scored, the filling is not"


def test_a_tokenizer_without_both_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer.pad_token"):
        BlockGenDataCollator(tokenizer)
    assert BlockGenDataCollator(tokenizer, default_pad_token_id=3).pad_token_id == 3
    assert BlockGenDataCollator(default_pad_token_id=0).pad_token_id == 0


@pytest.mark.parametrize(("length", "width"), [(3, 4), (4, 4), (5, 8)])
def test_lengths_round_up_to_a_multiple(tokenizer: PreTrainedTokenizerFast, length: int, width: int) -> None:
    batch = BlockGenDataCollator(tokenizer, pad_to_multiple_of=4)([{"input_ids": [1] * length}])
    assert batch["input_ids"].shape == (1, width)
    assert ("attention_mask" in batch) is (width > length)


def test_labels_of_the_rows_are_kept_and_absent_ones_score_all(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3]}]
    assert BlockGenDataCollator(tokenizer)(rows)["labels"].tolist() == [[-100, 2], [3, -100]]


def test_documents_and_sources_come_along_and_other_columns_do_not(tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 2, 3], "document_ids": [0, 0, 1], "source": 7, "text": "abc"},
        {"input_ids": [4, 5], "document_ids": [0, 1], "source": 9, "text": "de"},
    ]
    batch = BlockGenDataCollator(tokenizer)(rows)
    assert batch.keys() == {"input_ids", "labels", "attention_mask", "document_ids", "source"}
    assert batch["document_ids"].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert batch["source"].tolist() == [7, 9] and batch["source"].dtype == torch.long


def test_bad_rows_are_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    collator = BlockGenDataCollator(tokenizer)
    with pytest.raises(ValueError, match="no tokens.*document 5"):
        collator([{"input_ids": [], "source": 5}])
    with pytest.raises(ValueError, match="2 `input_ids` and 1 `labels`.*document 5"):
        collator([{"input_ids": [1, 2], "labels": [1], "source": 5}])
    with pytest.raises(ValueError, match="at least one row"):
        collator([])
    with pytest.raises(ValueError, match="pad_to_multiple_of.*0"):
        BlockGenDataCollator(tokenizer, pad_to_multiple_of=0)


@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 4))
def test_what_is_attended_to_is_what_came_in(rows: list[list[int]], multiple: int) -> None:
    batch = BlockGenDataCollator(tiny_tokenizer(), multiple)([{"input_ids": row} for row in rows])
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert [ids[kept].tolist() for ids, kept in zip(batch["input_ids"], mask, strict=True)] == rows
    assert torch.equal(batch["labels"] != -100, mask)
    assert batch["input_ids"].shape[1] % multiple == 0
