"""Files of texts that options name: a text a line, or JSON lines."""

import json
from pathlib import Path

from .parsing import CommandError


def read_texts(file: Path, option: str, column: str) -> list[str]:
    """
    The lines of a text file, without empty ones, or a column of a `.jsonl` file.

    Raises:
        CommandError: it cannot be read, is not UTF-8, or holds no text.
    """
    if not file.is_file():
        raise CommandError(f"{option} {file}: there is no such file.")
    try:
        content = file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first text
    except UnicodeDecodeError as error:
        raise CommandError(f"{option} {file}: is not valid UTF-8 text: {error}.") from error
    except OSError as error:
        raise CommandError(f"{option} {file}: cannot be read: {error.strerror}.") from error
    lines = [line for line in content.split("\n") if line.strip()]
    if file.suffix == ".jsonl":
        lines = [_text_of(line, f"{option} {file}", number, column) for number, line in enumerate(lines, 1)]
    if not lines:
        raise CommandError(f"{option} {file}: holds no text.")
    return lines


def _text_of(line: str, where: str, number: int, column: str) -> str:
    try:
        text = json.loads(line)[column]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise CommandError(f"{where}: row {number} has no `{column}`.") from None
    if not isinstance(text, str) or not text:
        raise CommandError(f"{where}: the `{column}` of row {number} is no text.")
    return text
