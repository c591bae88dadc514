"""Text and JSON files, read so that an error names file and line."""

import codecs
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import fsspec  # type: ignore[import-untyped]
from transformers.utils import logging


logger = logging.get_logger(__name__)

_BLOCK = 2**20  # bytes read at a time


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """
    A text in UTF-8, with or without byte order mark, unpacked on the fly; line ends become `\\n`.

    Raises:
        ValueError: the file is not UTF-8, or its compression is damaged; names file and place.
    """
    with _unpack(path, "rt", encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(invalid_utf8(path)) from error


@contextmanager
def _unpack(path: str, mode: str, **options: str) -> Iterator[Any]:
    try:
        with fsspec.open(path, mode, compression="infer", **options) as file:
            yield file
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, and says all
        raise ValueError(f"{path}: damaged, or not compressed as its name says: {error}") from error


def invalid_utf8(path: str) -> str:
    """File, line and offset of the first invalid byte, in words."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset = 1, 0
    with _unpack(path, "rb") as file:
        while block := file.read(_BLOCK):
            pending = decoder.getstate()[0]
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                data = pending + block
                line += data.count(b"\n", 0, error.start)
                offset += error.start - len(pending)
                return f"{path}, line {line}: byte {offset} ({data[error.start]:#04x}) is not UTF-8. Convert the file."
            line += block.count(b"\n")
            offset += len(block)
    return f"{path}, line {line}: the file ends within a character of UTF-8."


# JSON


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deep.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(values).__name__}.")
    return values


def json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    The objects of a file of JSON lines, or of a list in one file, each with file and line (or its number in the file's
    list) in words.

    Raises:
        ValueError: not UTF-8, bad JSON, or something other than an object; names file and line.
    """
    with open_text(path) as file:
        is_list = file.read(1024).lstrip().startswith("[")
    with open_text(path) as file:
        if is_list:
            rows = enumerate(_parse(file.read(), path), 1)
            places: Iterator[tuple[str, dict[str, Any]]] = (
                _checked(row, f"{path}, row {number}") for number, row in rows
            )
        else:
            places = rows_of_lines(file, path)
        is_empty = True
        for place in places:
            is_empty = False
            yield place
    if is_empty:
        logger.warning("%s is empty.", path)


def rows_of_lines(lines: Iterable[str], path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    The objects of JSON lines, each with file and line in words; empty lines are passed over. Where a text has been
    read already, its lines are `text.split("\\n")`: `str.splitlines` would split at U+2028 and others too, which may
    stand in JSON.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _checked(_parse(line, where), where)


def _checked(row: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__} instead of an object with columns.")
    return where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{where}: not JSON ({error.msg}, {line}column {error.colno}).") from error
    except RecursionError as error:
        raise ValueError(f"{where}: JSON nested too deeply.") from error


__all__ = ["invalid_utf8", "json_rows", "open_text", "read_json", "rows_of_lines"]
