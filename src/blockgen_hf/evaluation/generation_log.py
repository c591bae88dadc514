"""
What was generated so far, on disk: a file of JSON lines that survives a kill, and one more for each process at work.

The first line holds the settings that every row was made with. Rows are appended and synced; a last line that was cut
in writing is dropped.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..run_folders import append_rows, as_stored, check_settings, json_lines
from ..text_files import rows_of_lines
from ..whole_files import write_whole


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
        self.settings = as_stored(settings)
        self.decodings: dict[str, Any] = as_stored(decodings)

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
        write_whole(self.file, json_lines([self._header(), *rows]))

    def open_part(self, number: int) -> "Part":
        """A file of its own for the process of this number."""
        return Part(self.folder / f"generations.{number}.part.jsonl", self._header())

    def _header(self) -> Row:
        return {"format": _FORMAT, "settings": self.settings, "decodings": self.decodings}

    def _read(self, file: Path) -> Iterator[Row]:
        if not file.exists():
            return
        ended, _, _ = file.read_bytes().rpartition(b"\n")  # behind it is a line that was being written
        try:
            rows = [row for _, row in rows_of_lines(ended.decode().split("\n"), file.name)]
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged ({str(error).rstrip('.')}): delete it, or overwrite the evaluation."
            ) from error
        if rows:
            self._check(file, rows[0])
        yield from rows[1:]

    def _check(self, file: Path, header: Row) -> None:
        if header.get("format") != _FORMAT:
            raise ValueError(f"{file} is no file of generations of this version: name another folder.")
        check_settings(file, header["settings"], self.settings)
        for name, settings in header["decodings"].items():
            check_settings(file, settings, self.decodings.setdefault(name, settings), name)


class Part:
    """Rows that a process appends; each call is on the disk when it returns."""

    def __init__(self, file: Path, header: Row) -> None:
        self._stream: BinaryIO = file.open("wb")
        self.append([header])

    def append(self, rows: Iterable[Row]) -> None:
        append_rows(self._stream, rows)

    def close(self) -> None:
        self._stream.close()


__all__ = ["GenerationLog", "Part", "Row"]
