"""From a data set, in whatever form it comes, to batches of rows for a likelihood evaluation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling.configuration_blockgen import BlockGenConfig
from .columns import Batch, model_columns, stack_rows, token_positions


Collator = Callable[[list[Any]], Mapping[str, Any]]


def iterate_rows(dataset: Any) -> Iterator[Any]:
    """
    The rows of a sequence, of an iterable, or of columns as a tokenizer returns them.

    Raises:
        ValueError: columns without `input_ids`, such as the splits of a `DatasetDict`.
    """
    if isinstance(dataset, Mapping):
        if "input_ids" not in dataset:
            raise ValueError(
                f"`dataset` must be rows or columns with `input_ids`, but is a mapping with the keys {list(dataset)}. "
                "If these are splits, pass one of them."
            )
        yield from (dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True))
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # torch's data sets have no __iter__
        yield from (dataset[index] for index in range(len(dataset)))
    else:
        yield from dataset


def left_padded(
    rows: Iterable[Sequence[int] | torch.Tensor], device: torch.device, pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """Prompts side by side for `generate`: `input_ids` and `attention_mask`, `[B, W]`."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id, padding_side="left")
    masks = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side="left")
    return {"input_ids": ids.to(device), "attention_mask": masks.to(device)}


def pad_rows(rows: Sequence[Any], first_row: int = 0) -> Batch:
    """
    Rows side by side, padded on the right.

    Args:
        rows: mappings with `input_ids` and the columns that [`model_columns`] lists, sequences or tensors of one
            dimension, or only the `input_ids`. Other columns are dropped. They may differ in their columns.
        first_row (`int`): number of the first row, for messages.

    Returns:
        long tensors `[B, L]`: `input_ids`, `labels` and `attention_mask`, and `document_ids` if a row has them.

    Raises:
        ValueError: a row without `input_ids`, or with columns that cannot be followed.
    """
    table = []
    for number, row in enumerate(rows, first_row):
        table.append(model_columns(row, f"Row {number} of `dataset`"))
        if table[-1]["input_ids"].ndim != 1:
            raise ValueError(
                f"Row {number} of `dataset` must have columns of one dimension, but its `input_ids` have the shape "
                f"{list(table[-1]['input_ids'].shape)}."
            )
    return stack_rows(table, max(1, *(len(row["input_ids"]) for row in table)), pad_token_id=0)


def collated(
    dataset: Iterable[Any] | Mapping[str, Any], rows_a_batch: int, data_collator: Collator | None
) -> Iterator[tuple[int, Batch]]:
    """Batches of so many rows, each with the number of its first row."""
    chunk: list[Any] = []
    start = 0
    for row in iterate_rows(dataset):
        chunk.append(row)
        if len(chunk) == rows_a_batch:
            yield start, _collate(chunk, start, data_collator)
            start, chunk = start + len(chunk), []
    if chunk:
        yield start, _collate(chunk, start, data_collator)


def _collate(rows: list[Any], start: int, data_collator: Collator | None) -> Batch:
    if data_collator is None:
        return pad_rows(rows, start)
    given = data_collator(rows)
    if "input_ids" not in given or len(given["input_ids"]) != len(rows):
        raise ValueError(
            f"`data_collator` must return a batch with `input_ids` of {len(rows)} rows, as many as it is given, but "
            f"returned {list(given)}."
        )
    batch = model_columns(given, "The batch of `data_collator`")
    if batch["input_ids"].ndim != 2:
        raise ValueError(
            "`data_collator` must return tensors [rows, length], but its `input_ids` have the shape "
            f"{list(batch['input_ids'].shape)}."
        )
    return batch


def check_batch(batch: Batch, start: int, config: BlockGenConfig, num_positions: int) -> torch.Tensor:
    """
    How many tokens of each row are scored, `[B]`; `num_positions` is how many it may have.

    Raises:
        ValueError: a row that is too long, or with ids that the model does not have or cannot predict; by its number.
    """
    valid = batch["attention_mask"].bool()
    scored = valid & (batch["labels"] != -100)
    positions = torch.where(valid, token_positions(batch["attention_mask"], batch.get("document_ids")), 0)
    tokens = torch.where(scored, batch["labels"], batch["input_ids"])
    for row in (positions >= num_positions).any(-1).nonzero().flatten().tolist():
        is_all = num_positions == config.max_position_embeddings
        bound = f"the model has {num_positions} positions (`max_position_embeddings`)"
        raise ValueError(
            f"Row {start + row} of `dataset` has {int(positions[row].max()) + 1} tokens, but "
            f"{bound if is_all else f'the longest of `lengths` has {num_positions}'}: cut the row."
        )
    outside = valid & ((tokens < 0) | (tokens >= config.vocab_size))
    for row in outside.any(-1).nonzero().flatten().tolist():
        raise ValueError(
            f"Row {start + row} of `dataset` has the token {int(tokens[row][outside[row]][0])}, but the vocabulary of "
            f"the model ends at {config.vocab_size - 1}: was it tokenised by another tokenizer?"
        )
    if config.diffusion_type == "masked":
        for row in (scored & (tokens == config.mask_token_id)).any(-1).nonzero().flatten().tolist():
            raise ValueError(
                f"Row {start + row} of `dataset` has the mask token {config.mask_token_id} among its scored tokens: a "
                "masked model never predicts it."
            )
    if config.predicts_from_clean:
        scored = scored & (positions > 0)
    return scored.sum(-1)
