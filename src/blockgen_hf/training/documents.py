"""
From files and dataset names to documents: a row each, with the columns of its form.

Text and JSON files are read here, so that an error can name file and line, a text can be split at any separator, and a
text of any length is read in bounded memory. All else (parquet, the Hub) is `datasets.load_dataset`.
"""

import glob
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
from transformers.utils import logging

from ..places import COMPRESSIONS, DATA_KINDS
from ..text_files import json_rows, open_text


logger = logging.get_logger(__name__)

# A text is tokenised in pieces of at least so many characters, cut before a white space.
PIECE_CHARACTERS = 2**18
# A text without white space is cut at this length, wherever that is.
_LONGEST_PIECE = 4 * PIECE_CHARACTERS
_BLOCK = 2**20  # characters read at a time
_CUT = re.compile(r"(?<=\S)(?=\s)")

ACCEPTED_FILES = f"{', '.join(DATA_KINDS)}, text and JSON also with {', '.join(COMPRESSIONS)}"

# Path, size and time of the last change: what tells a file from its later versions.
FileStamp = tuple[str, int, int]


@dataclass(frozen=True)
class RowForm:
    """
    Which columns of a row make a document.

    Args:
        kind: `"text"` (one column), `"prompt"` (prompt and completion) or `"messages"` (one column).
        columns: their names.
        conversational: whether they hold lists of messages with `role` and `content`, or strings.
    """

    kind: Literal["text", "prompt", "messages"]
    columns: tuple[str, ...]
    conversational: bool = False


def find_form(
    available: Iterable[str],
    where: str,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
) -> RowForm:
    """
    The columns that the user named, else the first of `prompt` with `completion`, `messages`, `text` that there is.

    Raises:
        ValueError: no such columns in `available`.
    """
    prompt = RowForm("prompt", (prompt_column or "prompt", completion_column or "completion"))
    messages = RowForm("messages", (messages_column or "messages",), conversational=True)
    text = RowForm("text", (text_column or "text",))
    named = {prompt: prompt_column or completion_column, messages: messages_column, text: text_column}
    candidates = [form for form, name in named.items() if name] or [prompt, messages, text]
    available = list(available)
    for form in candidates:
        if set(form.columns) <= set(available):
            return form
    wanted = " or ".join(" with ".join(f"`{column}`" for column in form.columns) for form in candidates)
    raise ValueError(
        f"{where} has no column {wanted}; its columns are {', '.join(f'`{column}`' for column in available)}. Name "
        "the right ones with `text_column`, `prompt_column` and `completion_column`, or `messages_column`."
    )


# Finding files


def file_kind(path: str) -> str | None:
    """`"text"`, `"json"` or `"parquet"` by the end of the name, None for others."""
    stem, suffix = os.path.splitext(path.lower())
    compressed = suffix in COMPRESSIONS
    kind = DATA_KINDS.get(os.path.splitext(stem)[1] if compressed else suffix)
    return None if compressed and kind == "parquet" else kind


def find_files(patterns: list[str], argument: str) -> tuple[str, list[str]]:
    """
    Kind and absolute paths of the files that names and globs stand for, those of a glob sorted.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a kind that is not read, or several kinds.
    """
    files: list[str] = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            raise FileNotFoundError(f"`{argument}`: there is no file {pattern!r} (in the folder {os.getcwd()!r}).")
        files += [os.path.abspath(file) for file in found]
    kinds = {file: file_kind(file) for file in files}
    for file, kind in kinds.items():
        if kind is None:
            raise ValueError(f"`{argument}`: {file!r} is of no kind that is read: {ACCEPTED_FILES}.")
        if file.endswith(".zst") and "zstd" not in fsspec.available_compressions():
            raise ValueError(f"`{argument}`: {file!r} needs the package zstandard to be unpacked.")
    if len(set(kinds.values())) > 1:
        raise ValueError(f"`{argument}` mixes files of several kinds: {sorted(set(map(str, kinds.values())))}.")
    return str(kinds[files[0]]), files


def file_stamps(files: list[str]) -> list[FileStamp]:
    stats = [os.stat(file) for file in files]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]


# Reading text


def split_text(text: str) -> Iterator[str]:
    """The pieces of a text that are tokenised one by one; joined they are the text."""
    start = 0
    while (cut := find_cut(text, start)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:]


def find_cut(text: str, start: int = 0) -> int | None:
    """
    Where the piece that begins at `start` ends, None if the rest is one piece.

    A cut before white space does not change what byte-level BPE (GPT-2, Llama 3, SmolLM, Qwen) and WordPiece make of
    a text.
    """
    if len(text) - start <= _LONGEST_PIECE:
        return None
    match = _CUT.search(text, start + PIECE_CHARACTERS, start + _LONGEST_PIECE)
    return match.start() if match else start + _LONGEST_PIECE


def read_text(groups: list[list[FileStamp]], separator: str | None, limit: int | None) -> Iterator[dict[str, Any]]:
    """
    The documents of text files: what stands between separators, without line ends around it, or whole files.

    Args:
        groups: the files. `datasets` shares groups out among processes; the limit is for all groups of a process.
        separator: None for whole files.
        limit: read so many documents at most.

    Yields:
        `text`, and whether a document `begins` and `ends` with it: very long ones come in pieces.
    """
    num_documents = 0
    for path, *_ in itertools.chain.from_iterable(groups):
        num_before = num_documents
        with open_text(path) as file:
            blocks = iter(lambda: file.read(_BLOCK), "")
            for piece in _pieces(_split_at(blocks, separator), strip=separator is not None):
                if num_documents == limit:
                    return
                yield piece
                num_documents += piece["ends"]
        if num_documents == num_before:
            logger.warning("%s is empty.", path)


def _split_at(blocks: Iterable[str], separator: str | None) -> Iterator[tuple[str, bool]]:
    """Parts of documents, and whether a separator follows."""
    rest = ""
    for block in blocks:
        if separator is None:
            yield block, False
            continue
        *ended, rest = (rest + block).split(separator)
        for document in ended:
            yield document, True
        if len(rest) > _LONGEST_PIECE:
            cut = len(rest) - len(separator) + 1  # a separator may have begun behind it
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest, False


def _pieces(parts: Iterable[tuple[str, bool]], strip: bool) -> Iterator[dict[str, Any]]:
    """Parts of documents, as long as the tokenizer wants them. White space at the end of a file is no document."""
    text, begins = "", True
    for part, is_last in parts:
        text += part
        if strip and begins:
            text = text.lstrip("\n")
        while (cut := find_cut(text)) is not None:
            yield {"text": text[:cut], "begins": begins, "ends": False}
            text, begins = text[cut:], False
        if is_last:
            yield {"text": text.rstrip("\n"), "begins": begins, "ends": True}
            text, begins = "", True
    if text.strip() or not begins:
        yield {"text": text.rstrip("\n") if strip else text, "begins": begins, "ends": True}


# Reading JSON


def read_json(groups: list[list[FileStamp]], form: RowForm, limit: int | None) -> Iterator[dict[str, str]]:
    """
    The columns of `form` of JSON lines, or of a list in one file; conversations are written as JSON, since their
    messages may differ in their fields. What is null or an empty list becomes "".

    Raises:
        ValueError: bad JSON, a row that is no object, a missing column, a value of another type; names file and line.
    """
    rows = itertools.chain.from_iterable(json_rows(path) for path, *_ in itertools.chain.from_iterable(groups))
    for where, row in itertools.islice(rows, limit):
        missing = [column for column in form.columns if column not in row]
        if missing:
            raise ValueError(f"{where}: no column `{missing[0]}`; there are {', '.join(f'`{name}`' for name in row)}.")
        values = [number_as_text(row[column], form) for column in form.columns]
        yield {
            column: _json_value(value, form.conversational, f"{where}, `{column}`")
            for column, value in zip(form.columns, values, strict=True)
        }


def number_as_text(value: Any, form: RowForm) -> Any:
    """A prompt or completion that is a number, such as the answer 4, as its text; all else as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number and form.kind == "prompt" and not form.conversational else value


def _json_value(value: Any, conversational: bool, where: str) -> str:
    if value is None or value == []:
        return ""
    if conversational:
        if not isinstance(value, list):
            raise ValueError(f"{where}: a {type(value).__name__} instead of a list of messages.")
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise ValueError(f"{where}: a {type(value).__name__} instead of a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: holds half of a surrogate pair, which is no text.") from error
    return value
