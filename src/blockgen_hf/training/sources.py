"""Where documents come from: files on this machine, a folder, or the Hub; at once or as a stream."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from transformers.utils import logging

from ..places import data_place
from ..text_files import json_rows
from .data_arguments import DataArguments
from .documents import ACCEPTED_FILES, FileStamp, RowForm, file_stamps, find_files, find_form, read_json, read_text


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.get_logger(__name__)
T = TypeVar("T")


class Documents(NamedTuple):
    """
    Args:
        rows: the columns of the form; those of text files also `begins` and `ends`, since long texts come in pieces.
        form: which columns make a document.
        where: names the data in errors.
    """

    rows: "Dataset | IterableDataset"
    form: RowForm
    where: str


def load_documents(
    args: DataArguments, argument: str, names: str | list[str], split: str | None, limit: int | None
) -> Documents:
    """
    Finds the data and opens them.

    Args:
        args: how to read.
        argument: the name of the argument that named the data, for errors.
        names: what it said.
        split: of the data; None for `validation` on the Hub, and for what there is in files.
        limit: so many documents at most.

    Raises:
        FileNotFoundError, ValueError: as [`load_datasets`].
    """
    names = [names] if isinstance(names, str) else names
    where = f"`{argument}` {', '.join(map(repr, names))}"
    place = data_place(names)
    if place == "folder":
        kind, files, split = _folder_files(args, os.path.expanduser(names[0]), split, where)
    elif place == "files":
        kind, files = find_files(names, argument)
        if split not in (None, "train"):
            raise ValueError(f"{where}: files have no splits, but `{split}` is asked for. Name other files instead.")
    else:
        # Configuration and revision are those of `dataset`.
        config = {"name": args.dataset_config, "revision": args.dataset_revision} if argument == "dataset" else {}
        rows = _load_from_hub(args, names[0], config, split or "validation", where)
        return _of_columns(args, _limited(rows, limit), where)
    if kind == "text":
        return _text_files(args, files, limit, where)
    if kind == "json":
        return _json_files(args, files, limit, where)
    rows = _load_parquet(args, files, where)
    return _of_columns(args, _limited(rows, limit), where)


def with_whole_cache(args: DataArguments, read: Callable[[DataArguments], T]) -> T:
    """
    What `read` makes of `args`; if the cache turns out to be damaged, it is made anew, once.

    Raises:
        ValueError: what lies in the cache is damaged beyond that.
    """
    try:
        return read(args)
    except json.JSONDecodeError as error:  # the description of a data set, which all else is found by
        raise ValueError(f"The data cache {_cache_folder(args)} is damaged ({error}): delete that folder.") from error
    except Exception as error:
        if args.streaming or args.overwrite_cache or not _is_damage(error):
            raise
        logger.warning("The data cache %s is damaged (%s): it is made anew.", _cache_folder(args), error)
    return read(replace(args, overwrite_cache=True))


def _is_damage(error: Exception) -> bool:
    """Whether Arrow says so. What the file system says has a number."""
    import pyarrow as pa  # type: ignore[import-untyped]

    return isinstance(error, pa.ArrowInvalid) or (type(error) is OSError and error.errno is None)


def _cache_folder(args: DataArguments) -> str:
    from datasets import config

    return str(args.cache_dir or config.HF_DATASETS_CACHE)


def _download_mode(args: DataArguments) -> str | None:
    """What was downloaded is kept; the cache that was made of it is made anew if that is asked for."""
    return "reuse_cache_if_exists" if args.overwrite_cache else None


def hold_out(documents: "Dataset", count: int, limit: int | None, where: str) -> "tuple[Dataset, Dataset]":
    """
    The documents but the last `count`, and those last. Of the former only the first `limit`.

    Raises:
        ValueError: nothing is left to train on.
    """
    if "ends" in documents.column_names:
        stops: np.ndarray = np.flatnonzero(documents.with_format("arrow")[:]["ends"].to_numpy()) + 1
    else:
        stops = np.arange(1, len(documents) + 1)
    if count >= len(stops):
        raise ValueError(
            f"`validation_documents` holds out {count} documents, and {where} has {len(stops)}: none is left. Hold "
            "out fewer (0: none), or say with `document_separator` what stands between the documents of a text."
        )
    border = int(stops[len(stops) - count - 1])
    train_stop = border if limit is None else min(border, int(stops[min(limit, len(stops)) - 1]))
    return documents.select(range(train_stop)), documents.select(range(border, len(documents)))


def _folder_files(
    args: DataArguments, folder: str, split: str | None, where: str
) -> tuple[str, list[str], str | None]:
    """Kind and files of a split of a folder, told by their names as `load_dataset` does: train.txt, valid.txt ..."""
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetNotFoundError

    try:
        builder = load_dataset_builder(folder, cache_dir=args.cache_dir)
    except (DatasetNotFoundError, EmptyDatasetError) as error:
        raise ValueError(f"{where} is a folder without data; what is read: {ACCEPTED_FILES}.") from error
    splits = {str(name): list(files) for name, files in builder.config.data_files.items()}
    if split is None:
        split = "validation" if "validation" in splits else next(iter(splits))
    if split not in splits:
        raise ValueError(f"{where}: there is no split `{split}` in this folder, only {', '.join(sorted(splits))}.")
    kind, files = find_files(splits[split], where)
    return kind, files, split


def _text_files(args: DataArguments, files: list[str], limit: int | None, where: str) -> Documents:
    from datasets import Features, Value

    form = find_form(["text"], where, **_named_columns(args))
    features = Features({"text": Value("large_string"), "begins": Value("bool"), "ends": Value("bool")})
    options = {"separator": args.document_separator, "limit": limit}
    return Documents(_read(args, read_text, files, features, options, where), form, where)


def _json_files(args: DataArguments, files: list[str], limit: int | None, where: str) -> Documents:
    from datasets import Features, Value

    first = next((row for file in files for _, row in json_rows(file)), None)
    if first is None:
        raise ValueError(f"{where} holds no documents.")
    form = _form_of_row(args, first, where)
    features = Features({column: Value("large_string") for column in form.columns})
    return Documents(_read(args, read_json, files, features, {"form": form, "limit": limit}, where), form, where)


def _read(
    args: DataArguments,
    reader: Callable[..., Iterator[dict[str, Any]]],
    files: list[str],
    features: Any,
    options: dict[str, Any],
    where: str,
) -> "Dataset | IterableDataset":
    """What a reader yields, as a stream or written to the cache, whose key has size and time of each file."""
    from datasets import IterableDataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.packaged_modules.generator.generator import Generator

    stamps = file_stamps(files)
    # `datasets` shares out the items of a list among processes; a limit holds for all files together.
    groups: list[list[FileStamp]] = [[stamp] for stamp in stamps] if options["limit"] is None else [stamps]
    gen_kwargs = {"groups": groups, **options}
    if next(reader(**gen_kwargs), None) is None:
        raise ValueError(f"{where} holds no documents.")
    if args.streaming:
        return IterableDataset.from_generator(reader, features=features, gen_kwargs=gen_kwargs)
    num_proc = min(args.num_proc, len(groups)) if args.num_proc else 1
    # `Dataset.from_generator`, which takes no download mode.
    builder = Generator(
        generator=reader,
        features=features,
        gen_kwargs=gen_kwargs,
        cache_dir=args.cache_dir,
        writer_batch_size=64,  # of documents that may be long
    )
    try:
        builder.download_and_prepare(download_mode=_download_mode(args), num_proc=num_proc if num_proc > 1 else None)
        return builder.as_dataset(split=builder.config.split)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def _load_parquet(args: DataArguments, files: list[str], where: str) -> "Dataset | IterableDataset":
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from datasets import load_dataset

    num_rows = 0
    for file in files:
        try:
            num_rows += pq.read_metadata(file).num_rows
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: not parquet, or damaged: {error}") from error
    if num_rows == 0:
        raise ValueError(f"{where} holds no documents.")
    return load_dataset(
        "parquet",
        data_files={"train": files},
        split="train",
        streaming=args.streaming,
        cache_dir=args.cache_dir,
        num_proc=args.num_proc,
        download_mode=_download_mode(args),
    )


def _load_from_hub(
    args: DataArguments, path: str, config: dict[str, str | None], split: str, where: str
) -> "Dataset | IterableDataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(
            path,
            **config,
            split=split,
            streaming=args.streaming,
            cache_dir=args.cache_dir,
            num_proc=args.num_proc,
            download_mode=_download_mode(args),
        )
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{where} is neither a file nor a folder here, nor a data set that the Hub gives: {error}"
        ) from error


def _of_columns(args: DataArguments, rows: "Dataset | IterableDataset", where: str) -> Documents:
    """Documents of rows that came with columns of their own."""
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{where} holds no documents.")
    form = _form_of_row(args, first, where)
    return Documents(rows.select_columns(list(form.columns)), form, where)


def _form_of_row(args: DataArguments, row: dict[str, Any], where: str) -> RowForm:
    form = find_form(row, where, **_named_columns(args))
    if form.kind == "prompt" and isinstance(row[form.columns[0]], list):
        return RowForm(form.kind, form.columns, conversational=True)
    return form


def _named_columns(args: DataArguments) -> dict[str, str | None]:
    names = ("text_column", "prompt_column", "completion_column", "messages_column")
    return {name: getattr(args, name) for name in names}


def _limited(rows: "Dataset | IterableDataset", limit: int | None) -> "Dataset | IterableDataset":
    from datasets import IterableDataset

    if limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))
