"""
Training data: from files or names of data sets to rows for the collator.

    documents -> tokens (`Dataset.map`, cached) -> rows (`Dataset.map`, cached) -> BlockGenDataCollator

Every step lies on disk as Arrow and is memory-mapped, so that memory does not grow with the data. With `streaming`
nothing is kept.
"""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import is_datasets_available, logging

from .data_arguments import DataArguments
from .packing import (
    check_one_is_kept,
    count_status,
    log_reasons,
    none_is_kept,
    one_a_row,
    pack,
    row_features,
    stream_rows,
    token_features,
    token_offsets,
)
from .sources import Documents, hold_out, load_documents, with_whole_cache
from .tokenization import DocumentTokenizer


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.get_logger(__name__)

# A part of the cache's keys: another number where the same data give other rows.
_VERSION = 2
_DOCUMENTS_AT_A_TIME = 64


def load_datasets(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> "tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]":
    """
    Training and validation data.

    With several processes of one machine, let one go first: `with training_args.main_process_first():`. The others
    then find its cache. A cache that is damaged is made anew.

    Args:
        args: what to load.
        tokenizer: with an end-of-text token, and with a chat template for conversations.
        seed: of the shuffling of a stream.

    Returns:
        Training data, and validation data or None. Rows have `input_ids` (list of int), `source` (number of the
        document that the row begins with, counted from 0 among the rows that were read) and, where they apply,
        `labels` (-100 where not scored; without them everything is) and `document_ids` (counted from 0 in a row).

    Raises:
        FileNotFoundError: no such file, or no such data set on the Hub.
        ValueError: data that cannot be used; the message names file and line where there are any.
        ImportError: `datasets` is not installed.
    """
    if not is_datasets_available():
        raise ImportError("Training data need the package datasets: pip install 'blockgen-hf[train]'.")
    return with_whole_cache(args, lambda args: _load_datasets(args, tokenizer, seed))


def _load_datasets(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> "tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]":
    if args.validation_documents:
        documents, form, where = load_documents(args, "dataset", args.dataset, args.dataset_split, None)
        parts = hold_out(documents, args.validation_documents, args.max_documents, where)
        train, held_out = (Documents(part, form, where) for part in parts)
        return _make_rows(args, train, tokenizer), _make_rows(args, held_out, tokenizer)

    train = load_documents(args, "dataset", args.dataset, args.dataset_split, args.max_documents)
    validation = None
    if args.validation_dataset:
        names, split = args.validation_dataset, args.validation_split
        validation = load_documents(args, "validation_dataset", names, split, None)
    elif args.validation_split:
        validation = load_documents(args, "dataset", args.dataset, args.validation_split, None)
    train_rows = _make_rows(args, train, tokenizer)
    if args.shuffle_buffer_size:
        train_rows = train_rows.shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
    return train_rows, None if validation is None else _make_rows(args, validation, tokenizer)


def _make_rows(
    args: DataArguments, documents: Documents, tokenizer: PreTrainedTokenizerBase
) -> "Dataset | IterableDataset":
    """Tokenises documents and makes rows of them."""
    tokenize = DocumentTokenizer(
        tokenizer,
        documents.form,
        documents.where,
        max_length=args.sequence_length if args.packing == "none" else None,
        train_on_prompt=args.train_on_prompt,
        prompt_separator=args.prompt_separator,
        train_on_padding=args.train_on_padding,
        add_bos_token=args.add_bos_token,
    )
    make = _stream if args.streaming else _prepare
    return make(args, documents, tokenize)


def _prepare(args: DataArguments, documents: Documents, tokenize: DocumentTokenizer) -> "Dataset":
    """Rows on disk. Each step's key in the cache is the data's, with all that the step depends on."""
    from datasets.fingerprint import Hasher

    rows, _, where = documents
    options = dict(num_proc=args.num_proc, load_from_cache_file=not args.overwrite_cache)
    key = Hasher.hash([_VERSION, rows._fingerprint, tokenize.fingerprint()])
    tokens = rows.map(
        tokenize,
        **_map_options(rows, tokenize),
        new_fingerprint=key,
        desc="Tokenizing",
        **options,
    )
    counts, num_tokens = count_status(tokens), int(token_offsets(tokens.with_format("arrow"))[-1])
    log_reasons(counts, where)
    if num_tokens == 0:
        raise ValueError(none_is_kept(counts, where))
    if args.packing == "none":
        return one_a_row(tokens, new_fingerprint=Hasher.hash([key, "one a row"]), **options)
    num_rows = num_tokens // args.sequence_length
    if num_rows == 0:
        raise ValueError(
            f"{where}: its {num_tokens} tokens do not fill one row of `sequence_length` {args.sequence_length}. Take "
            "more data, shorter rows, or `packing='none'`."
        )
    key = Hasher.hash([key, args.sequence_length, args.isolate_documents])
    packed = pack(tokens, args.sequence_length, args.isolate_documents, new_fingerprint=key, **options)
    if len(packed) < num_rows:
        logger.warning("%s: in %d of %d rows nothing is scored; skipped.", where, num_rows - len(packed), num_rows)
    if len(packed) == 0:
        raise ValueError(f"{where}: in none of {num_rows} rows anything is scored: prompts are too long for them.")
    return packed


def _stream(args: DataArguments, documents: Documents, tokenize: DocumentTokenizer) -> "IterableDataset":
    """Rows as they come."""
    from datasets import IterableDataset

    rows, _, where = documents
    tokens = rows.map(
        tokenize,
        **_map_options(rows, tokenize),
    )
    if args.packing == "none":
        check_one_is_kept(tokens, where)
        return one_a_row(tokens)
    return IterableDataset.from_generator(
        stream_rows,
        features=row_features(tokenize.has_labels, args.isolate_documents),
        gen_kwargs=dict(
            documents=tokens,
            sequence_length=args.sequence_length,
            isolate_documents=args.isolate_documents,
            where=where,
        ),
    )


def _map_options(rows: "Dataset | IterableDataset", tokenize: DocumentTokenizer) -> dict[str, Any]:
    """Of `map` with the tokenizer."""
    return dict(
        batched=True,
        batch_size=_DOCUMENTS_AT_A_TIME,
        with_indices=True,
        remove_columns=rows.column_names,
        features=token_features(tokenize.has_labels),
    )


__all__ = ["DataArguments", "load_datasets"]
