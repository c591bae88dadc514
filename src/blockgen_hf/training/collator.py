"""From rows of a dataset to the tensors of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.positions_blockgen import document_positions


IGNORED_LABEL = -100  # not scored, as everywhere in transformers


class BlockGenDataCollator:
    """
    Rows of unequal length, side by side, padded on the right.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its padding token fills what is left, or else its token for
            the end of text, which is as good: padding is neither attended to nor scored.
        pad_to_multiple_of (`int`, *optional*): makes the length of every batch a multiple of it.
        default_pad_token_id (`int`, *optional*): fills what is left where no tokenizer says with what.
        score_first_token (`bool`): False for models with `next_token_prediction`, which cannot predict the first token
            of a text.

    Raises:
        ValueError: `pad_to_multiple_of` below 1, or nothing to fill with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_to_multiple_of: int | None = None,
        default_pad_token_id: int | None = None,
        score_first_token: bool = True,
    ) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` is a positive number or None, not {pad_to_multiple_of}.")
        candidates = [] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]
        found = [token_id for token_id in [*candidates, default_pad_token_id] if token_id is not None]
        if not found:
            raise ValueError(
                "Nothing to pad with: a tokenizer needs a padding or an end-of-text token (set "
                "`tokenizer.pad_token`); without one, give `default_pad_token_id`."
            )
        self.pad_token_id: int = found[0]
        self.pad_to_multiple_of = pad_to_multiple_of
        self.score_first_token = score_first_token

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: mappings with `input_ids`, and as the case may be `labels`, `document_ids` (all of the row's length)
                and `source` (a number). Other columns are dropped. Rows without `labels` are scored throughout.

        Returns:
            `input_ids` and `labels`, long `[B, L]`, labels -100 at padding; `attention_mask`, long `[B, L]`, only when
            some row is padded; `document_ids`, long `[B, L]`, and `source`, long `[B]`, if the rows have them. Padding
            belongs to the last document of its row.

        Raises:
            ValueError: no rows, a row without tokens, or columns of a row that differ in length.
        """
        if not rows:
            raise ValueError("A batch has at least one row.")
        lengths = [len(row["input_ids"]) for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            if length == 0:
                raise ValueError(f"A row has no tokens{_source(row)}.")
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(lengths) // multiple) * multiple

        input_ids = self._stack(rows, "input_ids", width, self.pad_token_id)
        batch = {"input_ids": input_ids}
        if all("labels" in row for row in rows):
            batch["labels"] = self._stack(rows, "labels", width, IGNORED_LABEL)
        else:
            batch["labels"] = torch.stack([_labels(row, width) for row in rows])
        if min(lengths) < width:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        if all("document_ids" in row for row in rows):
            batch["document_ids"] = self._stack(rows, "document_ids", width, None)
        if all("source" in row for row in rows):
            batch["source"] = torch.tensor([int(row["source"]) for row in rows])
        if not self.score_first_token:
            documents = batch.get("document_ids", torch.zeros_like(input_ids))
            batch["labels"] = batch["labels"].masked_fill(document_positions(documents) == 0, IGNORED_LABEL)
        return batch

    @staticmethod
    def _stack(rows: Sequence[Mapping[str, Any]], column: str, width: int, fill: int | None) -> torch.Tensor:
        """A column of all rows, long `[B, width]`; where `fill` is None the last value of a row goes on."""
        stacked = torch.empty(len(rows), width, dtype=torch.long)
        for place, row in zip(stacked, rows, strict=True):
            values = torch.as_tensor(row[column])
            length = len(row["input_ids"])
            if len(values) != length:
                raise ValueError(f"A row has {length} `input_ids` and {len(values)} `{column}`{_source(row)}.")
            place[:length] = values
            place[length:] = values[-1] if fill is None else fill
        return stacked


def _labels(row: Mapping[str, Any], width: int) -> torch.Tensor:
    """Labels of one row, its `input_ids` if it has none, long `[width]`."""
    column = "labels" if "labels" in row else "input_ids"
    return BlockGenDataCollator._stack([row], column, width, IGNORED_LABEL)[0]


def _source(row: Mapping[str, Any]) -> str:
    return f" (document {row['source']} of the data, counted from 0)" if "source" in row else ""
