"""From rows of a dataset to the tensors of a batch."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.columns import IGNORED_LABEL, model_columns, stack_rows, token_positions


class BlockGenDataCollator:
    """
    Makes a batch of rows of unequal length, padded on the right. Rows that are already padded stay unchanged.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the tokenizer whose padding token is used. Without one, its
            end-of-text token works as well: padding is neither attended to nor scored.
        pad_to_multiple_of (`int`, *optional*): makes the length of every batch a multiple of this.
        default_pad_token_id (`int`, *optional*): token for padding if the tokenizer has none.
        score_first_token (`bool`): False for models whose clean tokens predict, which cannot predict the first
            token of a text.

    Raises:
        ValueError: `pad_to_multiple_of` is below 1, or there is no token for padding.
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
            rows: mappings with `input_ids`, and the columns that [`model_columns`] lists, each of which means what it
                means to transformers' own collators: `labels`, `attention_mask`, `document_ids`, `position_ids` ... Or
                the `input_ids` alone. Also `source`, the number of the document that a row begins with. Rows without
                `labels` are scored throughout. Other columns are dropped.

        Returns:
            `input_ids` and `labels`, long `[B, L]`, labels -100 at padding; `attention_mask`, long `[B, L]`, only when
            there is padding, of the rows or of the batch; `document_ids`, long `[B, L]`, if a row has some, and
            `source`, long `[B]`, if all have one. Padding at the end belongs to the last document of its row.

        Raises:
            ValueError: no rows, a row without tokens, or columns that cannot be followed, by name.
        """
        if not rows:
            raise ValueError("A batch has at least one row.")
        table = [model_columns(row, f"A row{_source(row)}") for row in rows]
        for row, columns in zip(rows, table, strict=True):
            if columns["input_ids"].ndim != 1 or not columns["attention_mask"].any():
                raise ValueError(
                    f"A row has no tokens, or more than one dimension{_source(row)}: its `input_ids` have the shape "
                    f"{list(columns['input_ids'].shape)}."
                )
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(columns["input_ids"]) for columns in table) // multiple) * multiple
        batch = stack_rows(table, width, self.pad_token_id)
        if not self.score_first_token:
            first = token_positions(batch["attention_mask"], batch.get("document_ids")) == 0
            batch["labels"] = batch["labels"].masked_fill(first, IGNORED_LABEL)
        if batch["attention_mask"].all():
            del batch["attention_mask"]
        sources = [_number_of_document(row) for row in rows]
        if None not in sources:
            batch["source"] = torch.tensor(sources)
        return batch


def _number_of_document(row: Any) -> int | None:
    """Other data calls a source what is none of ours, such as a name."""
    source = row.get("source") if isinstance(row, Mapping) else None
    if isinstance(source, torch.Tensor) and source.ndim == 0 and not source.is_floating_point():
        return int(source)
    return int(source) if isinstance(source, Integral) else None


def _source(row: Any) -> str:
    number = _number_of_document(row)
    return "" if number is None else f" (document {number} of the data, counted from 0)"
