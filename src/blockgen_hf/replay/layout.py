"""Where the tokens of a picture stand: every token has a slot of its own, the same in all frames."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .runs import Run, timeline


SIZE = 15  # of the letters
LINE, HEIGHT = 31, 23  # from line to line, and of a cell
MARGIN, PADDING, GAP, SPACE = 14, 4, 3, 5
HEAD, FOOT = 26, 30  # of a run: its name above, its cost below
SIGNS = {"accepted": "✓", "rejected": "✕", "renoised": "↺", "revised": "✎"}


@dataclass(frozen=True)
class Slot:
    """Of a token: left and upper edge, width."""

    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Box:
    """Of a run: where it begins, and a slot for each of its positions."""

    run: Run
    top: float
    bottom: float
    slots: list[Slot]


def shown(run: Run, position: dict[str, Any]) -> str:
    """What stands in a cell."""
    if run.is_mask(position):
        return "░"
    text = position["text"]
    return text.removeprefix(" ").replace("\n", "⏎").replace("\t", "⇥") or ("␣" if text else "·")


def look(position: dict[str, Any]) -> str:
    """How a cell is painted: a state, or what is more than that."""
    if position.get("noise"):
        return "noise"
    if position.get("mark") == "rejected" and position["state"] == "draft":
        return "rejected"
    return str(position["state"])


def boxes(runs: Sequence[Run], width: float, measure: Callable[[str], float]) -> list[Box]:
    """
    Places for everything that the runs ever show.

    Args:
        width (`float`): of the picture.
        measure (`Callable`): the width of a text.
    """
    found: list[Box] = []
    top = float(MARGIN)
    for run in runs:
        x, y = float(MARGIN), top + HEAD
        slots: list[Slot] = []
        for contents in _contents(run):
            own = max(measure(shown(run, position)) for position in contents) + 2 * PADDING
            own = min(own, width - 2 * MARGIN)
            gap = SPACE if contents[-1]["text"].startswith(" ") else GAP
            if slots and x + gap + own > width - MARGIN:
                x, y, gap = float(MARGIN), y + LINE, 0
            slots.append(Slot(x + (gap if slots else 0), y, own))
            x = slots[-1].x + own
        found.append(Box(run, top, y + LINE + FOOT - (LINE - HEIGHT), slots))
        top = found[-1].bottom
    return found


def _contents(run: Run) -> list[list[dict[str, Any]]]:
    """Everything that ever stands at each position."""
    longest = max(len(frame["positions"]) for frame in run.frames)
    found: list[list[dict[str, Any]]] = [[] for _ in range(longest)]
    for frame in run.frames:
        for contents, position in zip(found, frame["positions"], strict=False):
            if not contents or contents[-1] is not position:
                contents.append(position)
    return found


def intervals(values: Sequence[Any]) -> Iterator[tuple[int, int, Any]]:
    """Runs of equal values, as first, end and value."""
    start = 0
    for value, same in groupby(values):
        end = start + len(list(same))
        yield start, end, value
        start = end


def seconds(runs: Sequence[Run], step: float, pause: float) -> list[float]:
    """When each moment begins, and at last the end, which stays for `pause`."""
    moments = len(timeline(runs))
    return [index * step for index in range(moments)] + [(moments - 1) * step + pause]


def cost(frame: dict[str, Any]) -> str:
    """What a frame has cost, in words."""
    evaluations, tokens = frame["function_evaluations"], frame["new_tokens"]
    rate = f", {tokens / evaluations:.2f} tokens per forward" if evaluations else ""
    return f"{evaluations} function evaluation{'s' * (evaluations != 1)}, {tokens} new tokens{rate}"


__all__ = ["Box", "Slot", "boxes", "cost", "intervals", "look", "seconds", "shown"]
