"""A self-contained page that replays frames: no network, no code but the viewer's."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import Run, check_runs


_HERE = Path(__file__).parent


def replay_html(runs: Run | Sequence[Run], title: str = "Replay") -> str:
    """
    A page that replays one decoding, or several of one prompt, aligned by their function evaluations.

    Args:
        runs ([`Run`] or `list[Run]`): what to replay.
        title (`str`): of the page.

    Raises:
        ValueError: there is no run, or a frame has no texts.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    check_runs(runs)
    data = {"title": title, "runs": [_packed(run) for run in runs]}
    parts = {
        "TITLE": html.escape(title),
        "TEXT": html.escape("".join(position["text"] for position in runs[0].frames[-1]["positions"])),
        "CSS": (_HERE / "viewer.css").read_text(encoding="utf-8"),
        "DATA": script_json(data),
        "JS": (_HERE / "viewer.js").read_text(encoding="utf-8"),
    }
    pieces = (_HERE / "viewer.html").read_text(encoding="utf-8").split("@@")
    # One pass: a token that reads like a placeholder is not one.
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def script_json(data: Any) -> str:
    """JSON for a `<script>` element, which no text in it can end: tokens are anything, `</script>` too."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _packed(run: Run) -> dict[str, Any]:
    """Most positions of a frame are as in the one before: each is written once, and frames count them."""
    cells: list[dict[str, Any]] = []
    known: dict[str, int] = {}
    frames = []
    for frame in run.frames:
        numbers = []
        for position in frame["positions"]:
            key = json.dumps(position, sort_keys=True)
            if key not in known:
                known[key] = len(cells)
                cells.append(position)
            numbers.append(known[key])
        frames.append({**frame, "positions": numbers})
    facts = {"label": run.name, "details": run.details, "facts": run.facts}
    return {**run.document, **facts, "cells": cells, "frames": frames}


__all__ = ["replay_html", "script_json"]
