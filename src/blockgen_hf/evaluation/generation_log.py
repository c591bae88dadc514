"""
What was generated so far, on disk: a file of JSON lines that survives a kill, and one more for each process at work.

The first line holds the settings that every row was made with. Rows are appended and synced; a last line that was cut
in writing is dropped.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


Row = dict[str, Any]
_FORMAT = "blockgen-generations-1"


class GenerationLog:
    """
    The generations of a folder: `generations.jsonl`, and while processes work `generations.N.part.jsonl`.

    Args:
        folder: made if it does not exist.
        settings: what all rows have in common, as JSON has it.
        decodings: by name the settings of each decoding. A log may be gone on with by more decodings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], decodings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.file = folder / "generations.jsonl"
        self.settings = _as_json(settings)
        self.decodings: dict[str, Any] = _as_json(decodings)

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("generations.*.part.jsonl"))

    def clear(self) -> None:
        """Deletes what was generated before."""
        for file in [self.file, *self.parts()]:
            file.unlink(missing_ok=True)

    def merge(self) -> list[Row]:
        """
        Makes one file of all, sorted, without duplicates; by one process, while no other writes.

        Returns:
            Its rows.

        Raises:
            ValueError: rows of other settings, or a file that is damaged elsewhere than at its end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found: dict[tuple[str, int, int], Row] = {}
        parts = self.parts()
        for file in [self.file, *parts]:
            for row in self._read(file):
                found.setdefault((row["decoding"], row["question"], row["sample"]), row)
        order = {name: place for place, name in enumerate(self.decodings)}
        rows = [found[key] for key in sorted(found, key=lambda key: (order[key[0]], *key[1:]))]
        self.replace(rows)
        for part in parts:
            part.unlink()
        return rows

    def rows(self) -> list[Row]:
        """Those of the merged file."""
        return list(self._read(self.file))

    def replace(self, rows: Iterable[Row]) -> None:
        """Writes the merged file anew, all of it or nothing."""
        unfinished = self.file.with_name(self.file.name + ".unfinished")
        with unfinished.open("wb") as stream:
            _append(stream, [self._header(), *rows])
        os.replace(unfinished, self.file)

    def open_part(self, number: int) -> "Part":
        """A file of its own for the process of this number."""
        return Part(self.folder / f"generations.{number}.part.jsonl", self._header())

    def _header(self) -> Row:
        return {"format": _FORMAT, "settings": self.settings, "decodings": self.decodings}

    def _read(self, file: Path) -> Iterator[Row]:
        if not file.exists():
            return
        # A line that was not ended was being written. Lines are split at \n alone: texts may hold other separators.
        lines = file.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is damaged: {error}. Delete it, or begin anew.") from error
            if number == 1:
                self._check(file, row)
            else:
                yield row

    def _check(self, file: Path, header: Row) -> None:
        if header.get("format") != _FORMAT:
            raise ValueError(f"{file} is no file of generations of this version: name another folder.")
        _compare(file, "", header["settings"], self.settings)
        for name, settings in header["decodings"].items():
            _compare(file, f"{name}: ", settings, self.decodings.setdefault(name, settings))


class Part:
    """Rows that a process appends; each call is on the disk when it returns."""

    def __init__(self, file: Path, header: Row) -> None:
        self._stream: BinaryIO = file.open("wb")
        self.append([header])

    def append(self, rows: Iterable[Row]) -> None:
        _append(self._stream, rows)

    def close(self) -> None:
        self._stream.close()


def _append(stream: BinaryIO, rows: Iterable[Row]) -> None:
    for row in rows:
        stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n")
    stream.flush()
    os.fsync(stream.fileno())


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _compare(file: Path, where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{file} was made with other settings ({where}`{name}` was {_short(before.get(name))}, and is "
                f"{_short(now.get(name))} now): overwrite it, or name another folder."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["GenerationLog", "Part", "Row"]
