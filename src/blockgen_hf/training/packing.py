"""
From tokenised documents to rows.

Packed, the rows are what one gets by joining all documents, each with its end-of-text token, and cutting the whole at
every multiple of `sequence_length`; only what does not fill a last row is lost. A batch of documents makes the rows
that begin in it, and reads the tokens that they lack from the documents behind it, which lie memory-mapped on disk: so
the result depends neither on the size of the batches nor on the number of processes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from ..evaluation.columns import IGNORED_LABEL
from .tokenization import NUM_STATUS, REASONS, SKIPPED


if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset, IterableDataset

logger = logging.get_logger(__name__)

# Tokens of the documents of a batch, on average.
_TOKENS_AT_A_TIME = 2**21


def pack(documents: "Dataset", sequence_length: int, isolate_documents: bool, **map_options: Any) -> "Dataset":
    """
    Rows of `sequence_length` tokens.

    Args:
        documents: tokenised, with `input_ids`, `begins` and perhaps `labels`.
        sequence_length: tokens of a row.
        isolate_documents: give `document_ids`, which count the documents of a row from 0.
        map_options: `num_proc`, `new_fingerprint` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        `input_ids`, `source` (the number of the document that the row begins with), and as the case may be `labels`
        and `document_ids`. Rows in which nothing is scored are left out.
    """
    table = documents.with_format("arrow")
    offsets = token_offsets(table)
    is_start = _column(table, "begins").astype(bool) & (np.diff(offsets) > 0)  # and not the next piece of a document
    mean_length = max(1, int(offsets[-1]) // max(1, len(documents)))
    rows = table.map(
        rows_of_documents,
        batched=True,
        batch_size=int(np.clip(_TOKENS_AT_A_TIME // mean_length, 1, 1000)),
        with_indices=True,
        remove_columns=table.column_names,
        features=row_features("labels" in table.column_names, isolate_documents),
        fn_kwargs=dict(
            documents=table,
            offsets=offsets,
            starts=offsets[:-1][is_start] if isolate_documents else None,
            sequence_length=sequence_length,
        ),
        desc="Packing",
        **map_options,
    )
    return rows.with_format(None)


def token_offsets(table: "Dataset") -> np.ndarray:
    """Where each document begins among all tokens, and where the last one ends: int64 `[number of documents + 1]`."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    lengths = pc.list_value_length(table[:]["input_ids"]).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def rows_of_documents(
    batch: "pa.Table",
    indices: list[int],
    documents: "Dataset",
    offsets: np.ndarray,
    starts: np.ndarray | None,
    sequence_length: int,
) -> "pa.Table":
    """The rows that begin within the documents `indices`, which follow one another."""
    import pyarrow as pa

    first_row = -(-int(offsets[indices[0]]) // sequence_length)
    stop_row = min(-(-int(offsets[indices[-1] + 1]) // sequence_length), int(offsets[-1]) // sequence_length)
    stop_row = max(first_row, stop_row)
    begin, end = first_row * sequence_length, stop_row * sequence_length
    row_begins = np.arange(begin, end, sequence_length)
    columns = {}
    for name in ("input_ids", "labels"):
        if name in batch.column_names:
            columns[name] = _tokens(documents, name, offsets, begin, end).reshape(-1, sequence_length)
    if starts is not None:
        # The number of documents begun up to each token, counted from that of the row's first token.
        positions = np.arange(begin, end).reshape(-1, sequence_length)
        number = np.asarray(np.searchsorted(starts, positions, side="right"))
        columns["document_ids"] = (number - number[:, :1]).astype(np.int32)
    source = np.searchsorted(offsets, row_begins, side="right") - 1
    if "labels" in columns:
        keep = (columns["labels"] != IGNORED_LABEL).any(axis=1)
        columns, source = {name: values[keep] for name, values in columns.items()}, source[keep]
    edges: np.ndarray = np.arange(len(source) + 1, dtype=np.int32) * sequence_length
    arrays = {name: pa.ListArray.from_arrays(edges, values.ravel()) for name, values in columns.items()}
    return pa.table({**arrays, "source": pa.array(source, pa.int64())})


def _tokens(documents: "Dataset", column: str, offsets: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Tokens `begin` to `end` of all: int32 `[end - begin]`."""
    import pyarrow.compute as pc

    if begin == end:
        return np.zeros(0, np.int32)
    first = int(np.searchsorted(offsets, begin, side="right")) - 1
    stop = int(np.searchsorted(offsets, end, side="left"))
    values = pc.list_flatten(documents[first:stop][column]).to_numpy()
    return values[begin - offsets[first] : end - offsets[first]]


def _column(table: "Dataset", name: str) -> np.ndarray:
    return table[:][name].to_numpy()


def one_a_row(documents: "Dataset | IterableDataset", **map_options: Any) -> "Dataset | IterableDataset":
    """A row for each tokenised document that was not skipped: `input_ids`, `source`, perhaps `labels`."""
    rows = documents.filter(_is_kept, input_columns=["status"], batched=True, **map_options)
    return rows.remove_columns(["status", "begins"])


def _is_kept(status: list[int]) -> list[bool]:
    return [value not in SKIPPED for value in status]


def stream_rows(
    documents: "IterableDataset", sequence_length: int, isolate_documents: bool, where: str
) -> Iterator[dict[str, Any]]:
    """
    The rows of [`pack`], of documents as they come.

    Args:
        documents: as [`DocumentTokenizer`] gives them.
        where: names the data in the log.
    """
    columns: dict[str, np.ndarray] = {}
    counts: np.ndarray = np.zeros(NUM_STATUS, np.int64)
    num_documents = num_made = 0
    # `iter` and not `__iter__`: in a worker of a DataLoader the latter would give the worker's share of the documents.
    for batch in documents.iter(batch_size=64):
        lengths = [len(ids) for ids in batch["input_ids"]]
        begun = num_documents + np.cumsum(np.array(batch["begins"], bool) & (np.array(lengths) > 0))
        num_documents = begun[-1]
        counts += np.bincount(batch["status"], minlength=NUM_STATUS)
        new = {name: np.concatenate(batch[name]).astype(np.int32) for name in ("input_ids", "labels") if name in batch}
        new["number"] = np.repeat(begun, lengths)
        new["source"] = np.repeat(batch["source"], lengths)
        columns = {
            name: np.concatenate([columns[name], values]) if columns else values for name, values in new.items()
        }
        num_rows = len(columns["number"]) // sequence_length
        for row in range(num_rows):
            cut = {name: values[row * sequence_length :][:sequence_length] for name, values in columns.items()}
            if "labels" not in cut or (cut["labels"] != IGNORED_LABEL).any():
                num_made += 1
                yield _row(cut, isolate_documents)
        columns = {name: values[num_rows * sequence_length :] for name, values in columns.items()}
    log_reasons(counts, where)
    if num_made == 0:
        raise ValueError(
            f"{where}: its tokens do not fill one row of `sequence_length` {sequence_length} with something scored."
        )


def _row(cut: dict[str, np.ndarray], isolate_documents: bool) -> dict[str, Any]:
    row: dict[str, Any] = {name: cut[name].tolist() for name in ("input_ids", "labels") if name in cut}
    if isolate_documents:
        row["document_ids"] = (cut["number"] - cut["number"][0]).tolist()
    return {**row, "source": int(cut["source"][0])}


def count_status(documents: "Dataset") -> np.ndarray:
    """How many documents have each status, int64."""
    return np.bincount(_column(documents.with_format("arrow"), "status"), minlength=NUM_STATUS)


def check_one_is_kept(documents: "IterableDataset", where: str) -> None:
    """
    Reads a stream of tokenised documents up to the first that makes a row.

    Raises:
        ValueError: there is none; says why.
    """
    counts: np.ndarray = np.zeros(NUM_STATUS, np.int64)
    for batch in documents.iter(batch_size=64):
        if any(_is_kept(batch["status"])):
            return
        counts += np.bincount(batch["status"], minlength=NUM_STATUS)
    raise ValueError(none_is_kept(counts, where))


def none_is_kept(counts: np.ndarray, where: str) -> str:
    """What is wrong with data of which nothing can be trained on."""
    skipped = "; ".join(f"{counts[status]} {reason}" for status, reason in REASONS.items() if counts[status])
    return f"{where}: of {counts.sum()} documents none can be trained on: {skipped}."


def log_reasons(counts: np.ndarray, where: str) -> None:
    """Says how many documents were skipped or truncated, and why."""
    for status, reason in REASONS.items():
        if counts[status]:
            logger.warning("%s: %d of %d documents were %s.", where, counts[status], counts.sum(), reason)


def token_features(has_labels: bool) -> Any:
    """Types of the columns of tokenised documents."""
    from datasets import Features, List, Value

    tokens = {"input_ids": List(Value("int32"))} | ({"labels": List(Value("int32"))} if has_labels else {})
    return Features({**tokens, "begins": Value("bool"), "status": Value("int8"), "source": Value("int64")})


def row_features(has_labels: bool, isolate_documents: bool) -> Any:
    """Types of the columns of rows."""
    from datasets import Features, List, Value

    names = ["input_ids"] + ["labels"] * has_labels + ["document_ids"] * isolate_documents
    return Features({**{name: List(Value("int32")) for name in names}, "source": Value("int64")})
