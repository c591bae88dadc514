"""Tables: Markdown in files, aligned columns on a terminal."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest


MISSING = "–"
_WIDTH = 100  # where the output is not a terminal
_NARROWEST = 40
_GAP = "  "
_LABEL = 24  # columns that a label keeps when space is short
_WORD = 16  # and when it is very short, and characters of a heading that stay together
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Table:
    """
    A table of texts.

    Args:
        columns (`Sequence[str]`): headings.
        rows (`Sequence[Sequence[str]]`): a cell for each column. Cells may be Markdown code, such as "`ar`".
        num_labels (`int`): how many columns are words, the first ones, which are left-aligned. The others are numbers.
        num_keys (`int`, *optional*): how many columns tell a row from the others. Default: the labels.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_labels: int = 1
    num_keys: int | None = None

    def markdown(self) -> str:
        marks = ["---" if i < self.num_labels else "---:" for i in range(len(self.columns))]
        head = [_markdown_row(self.columns), f"|{'|'.join(marks)}|"]
        return "\n".join([*head, *map(_markdown_row, self.rows)])

    def text(self, width: int | None = None) -> str:
        """
        Aligned columns. Headings and labels that are too long are wrapped; columns that do not fit beside one another
        follow in a second part, with the keys repeated.

        Args:
            width: columns of the terminal. Default: those it has, 100 if the output is not a terminal.
        """
        width = terminal_width() if width is None else width
        rows = [[cell.replace("`", "") for cell in row] for row in self.rows]
        widths = [_natural_width(name, [row[i] for row in rows]) for i, name in enumerate(self.columns)]
        num_keys = self.num_keys or self.num_labels
        labels, keys, others = widths[: self.num_labels], widths[self.num_labels : num_keys], widths[num_keys:]
        narrow = _shrink(labels, width - _total([0, *keys, *others]), least=_LABEL)
        if _total([*narrow, *keys, *others]) > width:  # in parts, then, which leave more room for the labels
            narrow = _shrink(labels, width // 2 - _total([0, *keys]), least=_WORD)
        keys = [*narrow, *keys]
        parts = _parts(others, width - _total([*keys, 0]))
        return "\n\n".join(self._part(rows, keys, others, part) for part in parts)

    def _part(self, rows: list[list[str]], keys: list[int], others: list[int], part: list[int]) -> str:
        """The keys, and some of the other columns."""
        chosen = [*range(len(keys)), *(len(keys) + i for i in part)]
        widths = keys + [others[i] for i in part]
        lines = aligned([self.columns[i] for i in chosen], widths, self.num_labels, bottom=True)
        for row in rows:
            lines += aligned([row[i] for i in chosen], widths, self.num_labels)
        return "\n".join(lines)


def aligned(cells: Sequence[str], widths: Sequence[int], num_labels: int = 1, *, bottom: bool = False) -> list[str]:
    """
    Lines of one row. A cell that is longer than its column goes on in the next line.

    Args:
        num_labels: how many cells, the first ones, are left-aligned.
        bottom: whether short cells stand in the last line instead of the first.
    """
    wrapped = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(cells, widths, strict=True)
    ]
    step = -1 if bottom else 1
    lines = list(zip_longest(*(lines[::step] for lines in wrapped), fillvalue=""))[::step]
    return [
        _GAP.join(
            word.ljust(width) if i < num_labels else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def terminal_width() -> int:
    return max(_NARROWEST, shutil.get_terminal_size((_WIDTH, 24)).columns)


def number(value: float | None, layout: str) -> str:
    """A number in a format of `format`, without the sign of a negative zero; a dash for None."""
    if value is None:
        return MISSING
    text = format(value, layout)
    return text.removeprefix("-") if not text.strip("-0.") else text


def error_bar(error: float | None, value: float, layout: str = ".2g") -> str:
    """
    "± 0.12"; nothing where the error is not known. The spread of equal numbers is a rounding error, and written as 0.
    """
    if error is None:
        return ""
    return "± 0" if error <= _ROUNDING * abs(value) else f"± {error:{layout}}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _natural_width(name: str, cells: list[str]) -> int:
    """That of the longest cell, or of the longest word of the heading."""
    return max([1, *map(len, cells), *(min(_WORD, len(word)) for word in name.split())])


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * max(0, len(widths) - 1)


def _shrink(widths: list[int], most: int, least: int) -> list[int]:
    """Takes from the widest, down to a width where words can still be read."""
    widths = list(widths)
    while _total(widths) > most and max(widths, default=0) > least:
        widths[widths.index(max(widths))] -= 1
    return widths


def _parts(numbers: list[int], width: int) -> list[list[int]]:
    """Which columns stand beside one another. One that is wider than the terminal is made narrower, in place."""
    parts: list[list[int]] = [[]]
    for i in range(len(numbers)):
        numbers[i] = max(1, min(numbers[i], width))
        if parts[-1] and _total([numbers[k] for k in parts[-1]] + [numbers[i]]) > width:
            parts.append([])
        parts[-1].append(i)
    return parts


__all__ = ["MISSING", "Table", "aligned", "error_bar", "number", "terminal_width"]
