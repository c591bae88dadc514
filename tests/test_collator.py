"""What the collator makes of rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, PAD, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from blockgen_hf.evaluation.rows import pad_rows
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
    with pytest.raises(
        ValueError, match=r"document 5.*`input_ids` of the shape \[2\] and `labels` of the shape \[1\]"
    ):
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


def test_padding_of_a_tokenizer_is_neither_attended_to_nor_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    for side, mask in (("right", [1, 1, 0, 0]), ("left", [0, 0, 1, 1])):
        row = {"input_ids": [int(seen) for seen in mask], "attention_mask": mask}
        batch = BlockGenDataCollator(tokenizer)([row, {"input_ids": [1, 2, 3]}])
        assert batch["attention_mask"].tolist() == [mask, [1, 1, 1, 0]], side
        assert batch["labels"].tolist() == [[1 if seen else -100 for seen in mask], [1, 2, 3, -100]], side
        given = {**row, "labels": [7] * 4}
        assert BlockGenDataCollator(tokenizer)([given])["labels"].tolist() == [[7 if seen else -100 for seen in mask]]


@pytest.mark.parametrize(
    "packed",
    [
        {"document_ids": [3, 3, 5, 5, 5]},
        {"seq_idx": [0, 0, 1, 1, 1]},
        {"seq_lengths": [2, 3]},
        {"position_ids": [0, 1, 0, 1, 2]},
        {"position_ids": [0, 1, 0, 1, 2], "document_ids": [3, 3, 5, 5, 5]},
    ],
    ids=str,
)
def test_packed_documents_are_told_apart_by_each_column_that_tells_them(
    tokenizer: PreTrainedTokenizerFast, packed: dict[str, Any]
) -> None:
    documents = BlockGenDataCollator(tokenizer)([{"input_ids": [1, 2, 3, 4, 5], **packed}])["document_ids"][0]
    assert (documents[1:] != documents[:-1]).tolist() == [False, True, False, False]


def test_columns_mean_what_they_mean_to_collators_of_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    collator = BlockGenDataCollator(tokenizer)
    harmless = {
        "special_tokens_mask": [1, 0, 1],
        "token_type_ids": [0, 0, 0],
        "position_ids": [0, 1, 2],
        "offset_mapping": [(0, 1)] * 3,
        "length": 3,
        "labels": None,
        "source": "a web page",
    }
    assert collator([{"input_ids": [1, 2, 3], **harmless}]).keys() == {"input_ids", "labels"}
    assert collator([[1, 2, 3]])["labels"].tolist() == [[1, 2, 3]]
    for name in ("label", "label_ids", "labels"):
        assert collator([{"input_ids": [1, 2], name: [-100, 2]}])["labels"].tolist() == [[-100, 2]]
    for name in ("assistant_masks", "completion_mask"):
        row = {"input_ids": [1, 2], name: [0, 1]}
        assert collator([row])["labels"].tolist() == [[-100, 2]]
        assert collator([{**row, "labels": [1, 2]}])["labels"].tolist() == [[1, 2]], "labels say it already"


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"labels": 1}, r"`labels` of the shape \[\]"),
        ({"labels": ["a", "b", "c"]}, "`labels`.*must be numbers"),
        ({"labels": [1, 2, 3], "label": [1, 2, 3]}, "both `labels` and `label`"),
        ({"attention_mask": [1, 2, 2]}, "`attention_mask`.*`document_ids`"),
        ({"attention_mask": [0, 0, 0]}, "no tokens"),
        ({"token_type_ids": [0, 1, 1]}, "`token_type_ids`"),
        ({"position_ids": [5, 6, 7]}, "`position_ids`.*count from 0"),
        ({"position_ids": [0, 1, 0], "document_ids": [0, 0, 0]}, "`position_ids`"),
        ({"seq_lengths": [1, 1]}, "`seq_lengths`.*3 tokens"),
        ({"cu_seq_lens_q": [0, 3]}, "`cu_seq_lens_q`.*`position_ids`"),
        ({"inputs_embeds": [[0.0]] * 3}, "`inputs_embeds`"),
        ({"noise_level": 0.5}, "`noise_level`.*drawn by the trainer"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, columns: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        BlockGenDataCollator(tokenizer)([{"input_ids": [1, 2, 3], **columns}])
    if match != "no tokens":  # evaluation skips rows without a scored token, and counts them
        with pytest.raises(ValueError, match=match):
            pad_rows([{"input_ids": [1, 2, 3], **columns}])
