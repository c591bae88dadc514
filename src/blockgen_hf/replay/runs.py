"""What is replayed: one or several decodings, aligned by what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Run:
    """
    A decoding to be replayed.

    Args:
        document (`dict`): of `blockgen_hf.generation.frames.frames`.
        label (`str`): what it is called.
        details (`str`): its settings in words.
        facts (`dict`): further figures, each with its unit, such as `{"tokens/s": 52.1}`.
    """

    document: dict[str, Any]
    label: str = ""
    details: str = ""
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label or str(self.document["decoding"])

    @property
    def frames(self) -> list[dict[str, Any]]:
        frames: list[dict[str, Any]] = self.document["frames"]
        return frames

    def is_mask(self, position: dict[str, Any]) -> bool:
        return bool(position.get("noise")) and position["token"] == self.document["mask_token"]


def timeline(runs: Sequence[Run]) -> list[list[int]]:
    """
    For each moment the index of every run's frame: at each number of function evaluations as many moments as the run
    with the most frames has there. One run has a moment for each frame.
    """
    costs = sorted({frame["function_evaluations"] for run in runs for frame in run.frames})
    indices = [_by_cost(run) for run in runs]
    moments: list[list[int]] = []
    shown = [0] * len(runs)
    for cost in costs:
        here = [found.get(cost, []) for found in indices]
        for number in range(max(len(found) for found in here)):
            shown = [
                found[min(number, len(found) - 1)] if found else before
                for found, before in zip(here, shown, strict=True)
            ]
            moments.append(shown)
    return moments


def _by_cost(run: Run) -> dict[int, list[int]]:
    numbered = groupby(enumerate(run.frames), key=lambda item: int(item[1]["function_evaluations"]))
    return {cost: [index for index, _ in frames] for cost, frames in numbered}


def check_runs(runs: Sequence[Run]) -> None:
    """
    Raises:
        ValueError: there is no run, or a frame has no texts.
    """
    if not runs:
        raise ValueError("`runs` must hold a run at least, but is empty.")
    for run in runs:
        if any("text" not in position for frame in run.frames for position in frame["positions"]):
            raise ValueError(
                "`runs` must hold frames with the texts of their tokens: those that "
                "`blockgen_hf.generation.frames.frames(outputs, tokenizer)` returns."
            )


__all__ = ["Run", "check_runs", "timeline"]
