"""From a data set, in whatever form it comes, to batches of rows for a likelihood evaluation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.positions_blockgen import document_positions


Batch = dict[str, torch.Tensor]
Collator = Callable[[list[Any]], Mapping[str, Any]]

# The columns of a row, and what stands in its padding. None: the last value goes on.
_COLUMNS: dict[str, int | None] = {"input_ids": 0, "labels": -100, "attention_mask": 0, "document_ids": None}


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
        columns = {name: dataset[name] for name in _COLUMNS if name in dataset}
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # torch's data sets have no __iter__
        yield from (dataset[index] for index in range(len(dataset)))
    else:
        yield from dataset


def pad_rows(rows: Sequence[Any], first_row: int = 0) -> Batch:
    """
    Rows side by side, padded on the right.

    Args:
        rows: mappings with `input_ids` and perhaps `labels`, `attention_mask` and `document_ids`, sequences or tensors
            of one dimension, or only the `input_ids`. Other columns are dropped. They may differ in their columns.
        first_row (`int`): number of the first row, for messages.

    Returns:
        long tensors `[B, L]`: `input_ids`, `labels` and `attention_mask`, and `document_ids` if a row has them.

    Raises:
        ValueError: a row without `input_ids`, or whose columns are not of one dimension and length.
    """
    table = [_row_tensors(row, first_row + number) for number, row in enumerate(rows)]
    width = max(1, *(len(row["input_ids"]) for row in table))
    batch: Batch = {}
    for name, fill in _COLUMNS.items():
        if name == "document_ids" and not any(name in row for row in table):
            continue
        columns = [row[name] if name in row else torch.zeros_like(row["input_ids"]) for row in table]
        batch[name] = torch.zeros(len(table), width, dtype=torch.long)
        for place, values in zip(batch[name], columns, strict=True):
            place[: len(values)] = values
            if len(values) < width:
                place[len(values) :] = fill if fill is not None else (values[-1] if len(values) else 0)
    return batch


def _row_tensors(row: Any, number: int) -> Batch:
    """The columns of a row, long `[length]` each, with `labels` and `attention_mask`."""
    if not isinstance(row, Mapping):
        row = {"input_ids": row}
    if "input_ids" not in row:
        raise ValueError(
            f"Row {number} of `dataset` has no `input_ids`, but only {list(row)}: tokenise the text first."
        )
    columns = {}
    for name in _COLUMNS:
        if row.get(name) is not None:
            columns[name] = torch.as_tensor(row[name])
            if columns[name].ndim != 1 or len(columns[name]) != len(row["input_ids"]):
                raise ValueError(
                    f"Row {number} of `dataset` must have columns of one dimension and of the length of its "
                    f"`input_ids`, but `{name}` has the shape {list(columns[name].shape)}."
                )
            columns[name] = columns[name].long()
    columns.setdefault("labels", columns["input_ids"])
    columns.setdefault("attention_mask", torch.ones_like(columns["input_ids"]))
    return columns


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
    batch = {name: torch.as_tensor(given[name]) for name in _COLUMNS if given.get(name) is not None}
    batch.setdefault("labels", batch["input_ids"])
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    shapes = {name: list(tensor.shape) for name, tensor in batch.items()}
    if batch["input_ids"].ndim != 2 or any(shape != shapes["input_ids"] for shape in shapes.values()):
        raise ValueError(f"`data_collator` must return tensors [rows, length] of one shape, but returned {shapes}.")
    return batch


def check_batch(batch: Batch, start: int, config: BlockGenConfig) -> torch.Tensor:
    """
    How many tokens of each row are scored, `[B]`.

    Raises:
        ValueError: a row that is too long, or with ids that the model does not have or cannot predict; by its number.
    """
    valid = batch["attention_mask"].bool()
    scored = valid & (batch["labels"] != -100)
    positions = valid.long().cumsum(-1) - 1
    if "document_ids" in batch:
        positions = torch.where(valid, document_positions(batch["document_ids"], batch["attention_mask"]), 0)
    tokens = torch.where(scored, batch["labels"], batch["input_ids"])
    for row in (positions >= config.max_position_embeddings).any(-1).nonzero().flatten().tolist():
        raise ValueError(
            f"Row {start + row} of `dataset` has {int(positions[row].max()) + 1} tokens, but the model has "
            f"{config.max_position_embeddings} positions (`max_position_embeddings`): cut the row."
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
    if config.next_token_prediction:
        scored = scored & (positions > 0)
    return scored.sum(-1)
