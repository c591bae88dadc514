"""The folder of a sample evaluation: a file of texts and one of figures for each cell, written whole or not at all."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..run_folders import LOCK, as_stored, check_settings, differences, digest, json_lines
from ..text_files import json_rows, read_json
from ..whole_files import write_json, write_whole
from .samples_drawing import DrawnText


_SETTINGS = "settings.json"


class SampleFolder:
    """
    Where texts and figures are kept, so that an interrupted evaluation goes on with the missing cells.

    - `settings.json`: what all cells have in common.
    - `texts/<cell>.jsonl`: a text a line.
    - `cells/<cell>.json`: what the cell is, what it cost and its scores, and a digest of its texts: a cell whose texts
      are missing or were changed is drawn anew.

    Args:
        path (`Path`): made if it is not there.
        drawing (`dict`): settings that the texts and their cost depend on.
        scoring (`dict`): settings that the scores depend on.
        overwrite (`bool`): replace what was made with other settings; texts stay where only the scoring differs.

    Raises:
        ValueError: the folder was written with other settings, or holds other things.
    """

    def __init__(
        self, path: Path | str, drawing: dict[str, Any], scoring: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.scoring = scoring
        self.overwrite = overwrite
        self._check(drawing)
        for name in ("texts", "cells"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        write_json(self.path / _SETTINGS, {"drawing": drawing, "scoring": scoring})

    def _check(self, drawing: dict[str, Any]) -> None:
        file = self.path / _SETTINGS
        if not file.is_file():
            if self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir()):
                raise ValueError(
                    f"`output_dir` must be new, empty or of a former evaluation, but {self.path} holds other things."
                )
            return
        before, now = read_json(file), as_stored({"drawing": drawing, "scoring": self.scoring})
        if not self.overwrite:
            for group in ("drawing", "scoring"):
                check_settings(self.path, before[group], now[group])
        elif differences(before["drawing"], now["drawing"]):
            for name in ("cells", "texts"):  # figures first: without them there is no cell
                shutil.rmtree(self.path / name, ignore_errors=True)

    def all_figures(self) -> dict[str, dict[str, Any]]:
        """By name what is known of the cells that have been drawn, in this evaluation or in an earlier one."""
        names = sorted(file.stem for file in self._cells.glob("*.json"))
        figures = {name: self.read_figures(name) for name in names if self.has_texts(name)}
        return {name: found for name, found in figures.items() if found is not None}

    def read_figures(self, name: str) -> dict[str, Any] | None:
        """What is known of a cell; None if it has not been drawn."""
        file = self._cells / f"{name}.json"
        try:
            figures = read_json(file)
        except ValueError:  # a file that was damaged says as little as none
            return None
        return figures if "scores" in figures and "cell" in figures else None

    def has_texts(self, name: str) -> bool:
        """Whether a cell has been drawn, and its texts are those that its figures tell of."""
        figures = self.read_figures(name)
        file = self._texts(name)
        return figures is not None and file.is_file() and figures.get("texts_sha256") == digest([file.read_bytes()])

    def has_scores(self, figures: dict[str, Any]) -> bool:
        return figures["scores"] is not None and figures["scores"]["settings"] == self.scoring

    def write_figures(self, name: str, figures: dict[str, Any]) -> None:
        write_json(self.path / "cells" / f"{name}.json", figures)

    def read_texts(self, name: str) -> list[DrawnText]:
        return [DrawnText(**row) for _, row in json_rows(str(self._texts(name)))]

    def write_drawn(self, name: str, texts: Sequence[DrawnText], figures: dict[str, Any]) -> None:
        """Texts, then figures, which know the texts."""
        content = json_lines(asdict(text) for text in texts)
        write_whole(self._texts(name), content)
        self.write_figures(name, {**figures, "texts_sha256": digest([content])})

    @property
    def _cells(self) -> Path:
        return self.path / "cells"

    def _texts(self, name: str) -> Path:
        return self.path / "texts" / f"{name}.jsonl"


__all__ = ["SampleFolder"]
