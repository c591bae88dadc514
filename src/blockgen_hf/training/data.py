"""
Training data: from files or names of data sets to rows for the collator.

    documents -> tokens (`Dataset.map`, cached) -> rows (`Dataset.map`, cached) -> BlockGenDataCollator

Every step lies on disk as Arrow and is memory-mapped, so that memory does not grow with the data. With `streaming`
nothing is kept.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import is_datasets_available, logging

from .documents import ACCEPTED_FILES
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
PACKINGS = ("packed", "none")


@dataclass
class DataArguments:
    """
    What to train on, and how to make rows of it. For `HfArgumentParser`, YAML files and Python.

    Raises:
        ValueError: a value that is not accepted, or settings that contradict one another.
    """

    dataset: list[str] | str = field(
        metadata={
            "help": f"The data: a data set on the Hub, or files, globs or a folder on this machine ({ACCEPTED_FILES})."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of `dataset` on the Hub."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on; on the Hub also a slice such as `train[:1%]`."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `dataset` on the Hub."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training, and keep nothing on disk."})
    shuffle_buffer_size: int = field(
        default=0,
        metadata={
            "help": "With streaming: size of the buffer that rows are drawn from; 0 keeps the order of the data."
        },
    )

    text_column: str | None = field(default=None, metadata={"help": "Column of plain text. Default: `text`."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of prompts, such as `question`. Default: `prompt`."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of completions, such as `answer`. Default: `completion`."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column of conversations. Default: `messages`."}
    )
    prompt_separator: str = field(
        default="", metadata={"help": "Text between prompt and completion; part of the prompt."}
    )
    train_on_prompt: bool = field(
        default=False, metadata={"help": "Score prompts and user turns too, not only completions."}
    )
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "Text between the documents of a .txt file: `<|endoftext|>`, `\\n` for one per line ... "
            "Default: a file is one document."
        },
    )

    validation_dataset: list[str] | str | None = field(
        default=None, metadata={"help": "Validation data, in the form of `dataset`."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to validate on, of `validation_dataset` (default `validation`) or of `dataset`."},
    )
    validation_documents: int = field(
        default=0, metadata={"help": "Number of documents to hold out at the end of the training data instead."}
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "Largest number of documents to train on; the first ones are used."}
    )

    sequence_length: int = field(default=1024, metadata={"help": "Tokens per row; if not packed, the longest row."})
    packing: str = field(
        default="packed",
        metadata={
            "help": "`packed`: documents joined with the end-of-text token and cut into rows of `sequence_length`. "
            "`none`: one document per row, truncated to `sequence_length`.",
            "choices": PACKINGS,
        },
    )
    isolate_documents: bool = field(
        default=False, metadata={"help": "Packed: separate the documents of a row in attention and positions."}
    )
    train_on_padding: int = field(
        default=0,
        metadata={
            "help": "Not packed: number of end-of-text tokens scored after the first, as far as `sequence_length` "
            "allows. 0: none. `sequence_length`: rows are filled with them."
        },
    )
    add_bos_token: bool = field(
        default=False, metadata={"help": "Begin documents and prompts with the tokenizer's BOS token."}
    )

    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that read, tokenise and pack."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared data. Default: that of `datasets`, $HF_DATASETS_CACHE."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read, tokenise and pack again."})

    def __post_init__(self) -> None:
        if not self.dataset or not all(self.dataset):
            raise ValueError("`dataset` names a data set on the Hub or files; it is empty.")
        if self.packing not in PACKINGS:
            raise ValueError(f"`packing` is one of {', '.join(map(repr, PACKINGS))}, not {self.packing!r}.")
        _check_number("sequence_length", self.sequence_length, 1)
        for name in ("validation_documents", "shuffle_buffer_size", "train_on_padding"):
            _check_number(name, getattr(self, name), 0)
        for name in ("max_documents", "num_proc"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 1)
        if self.document_separator is not None:
            # As a terminal hands it over, and as the lines of any text end once they are read.
            self.document_separator = self.document_separator.replace("\\n", "\n").replace("\r\n", "\n")
            if not self.document_separator:
                raise ValueError("`document_separator` is a text, or None where a file is one document; it is empty.")
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        forms = [self.text_column, self.prompt_column or self.completion_column, self.messages_column]
        if sum(name is not None for name in forms) > 1:
            raise ValueError(
                "Of `text_column`, `prompt_column` with `completion_column`, and `messages_column`, only one can be "
                "what documents are made of."
            )
        if self.isolate_documents and self.packing == "none":
            raise ValueError(
                "`isolate_documents` is for packed rows; with `packing='none'` rows are single documents."
            )
        if self.train_on_padding and self.packing != "none":
            raise ValueError("`train_on_padding` is for `packing='none'`; packed rows have no padding.")
        if self.validation_documents and (self.validation_dataset or self.validation_split):
            raise ValueError("`validation_documents` stands instead of `validation_dataset` and `validation_split`.")
        if self.streaming and self.validation_documents:
            raise ValueError(
                "`validation_documents` is unknown while streaming, since nobody knows where the data end: name a "
                "`validation_dataset` or `validation_split`."
            )
        if self.streaming and self.num_proc is not None:
            raise ValueError("`num_proc` prepares data on disk; with `streaming` there are none.")
        if self.shuffle_buffer_size and not self.streaming:
            raise ValueError("`shuffle_buffer_size` is for `streaming`; other rows are shuffled by the trainer.")


def load_datasets(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> "tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]":
    """
    Training and validation data.

    With several processes on one machine, let one go first: `with training_args.main_process_first():`. The others
    then find its cache. A damaged cache is rebuilt.

    Args:
        args: what to load.
        tokenizer: a tokenizer with an end-of-text token, and with a chat template for conversations.
        seed: seed for shuffling a stream.

    Returns:
        Training data, and validation data or None. Rows have `input_ids` (list of int), `source` (number of the
        document that the row begins with, counted from 0 among the rows that were read) and, where they apply,
        `labels` (-100 where not scored; without them everything is) and `document_ids` (counted from 0 in a row).

    Raises:
        FileNotFoundError: a file, or a data set on the Hub, does not exist.
        ValueError: data cannot be used; the message names file and line if there are any.
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
        batched=True,
        batch_size=_DOCUMENTS_AT_A_TIME,
        with_indices=True,
        remove_columns=rows.column_names,
        features=token_features(tokenize.has_labels),
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
        batched=True,
        batch_size=_DOCUMENTS_AT_A_TIME,
        with_indices=True,
        remove_columns=rows.column_names,
        features=token_features(tokenize.has_labels),
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


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is a whole number from {least} on, not {value!r}.")
