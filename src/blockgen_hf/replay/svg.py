"""An animated SVG: for READMEs, cards and papers. It follows the reader's light or dark mode and reduced motion."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from .layout import HEIGHT, MARGIN, SIGNS, SIZE, Box, boxes, cost, intervals, look, seconds, shown
from .runs import Run, check_runs, timeline


_STYLE = """
    text { font: 15px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328; }
    .name { font-weight: 600; }
    .note { font-size: 13px; fill: #59636e; }
    .t { text-anchor: middle; }
    .given { fill: #59636e; }
    .page { fill: #ffffff; }
    rect { rx: 4px; stroke-width: 1.5px; }
    .ar-box { fill: #e3f4e6; } .ar-line { stroke: #2b7a3d; stroke-width: 3px; }
    .draft-box { fill: #fff3d6; stroke: #a86f00; stroke-dasharray: 4 2; }
    .committed-box { fill: #dbeafe; stroke: #5b8fd6; }
    .noise-box { fill: #eef1f4; stroke: #8b95a1; stroke-dasharray: 1.5 2.5; } .noise { fill: #8b95a1; }
    .rejected-box { fill: #fde2e0; stroke: #b3202b; } .rejected { text-decoration: line-through; }
    .sign { font-size: 10px; font-weight: 700; fill: #ffffff; text-anchor: middle; } .dot { fill: #b3202b; }
    .dot.accepted { fill: #2b7a3d; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .note, .given { fill: #9da7b1; } .page { fill: #0d1117; }
      .ar-box { fill: #123524; } .ar-line { stroke: #4fb36a; }
      .draft-box { fill: #40310a; stroke: #d9a514; } .committed-box { fill: #12335c; stroke: #4a86cf; }
      .noise-box { fill: #242b33; stroke: #7d8894; } .noise { fill: #7d8894; }
      .rejected-box { fill: #4f1b1b; stroke: #f47067; } .sign { fill: #0d1117; } .dot { fill: #f47067; }
      .dot.accepted { fill: #4fb36a; }
    }
"""
_LETTER = 0.602 * SIZE  # of a monospaced font


def replay_svg(
    runs: Run | Sequence[Run], title: str = "Replay", width: int = 860, step: float = 0.35, pause: float = 3.0
) -> str:
    """
    An animation of one decoding, or of several of one prompt, aligned by their function evaluations.

    Args:
        runs ([`Run`] or `list[Run]`): what to replay.
        title (`str`): for screen readers.
        width (`int`): of the picture, in pixels.
        step (`float`): seconds of a step.
        pause (`float`): seconds of the last step, before the animation begins again.

    Raises:
        ValueError: there is no run, or a frame has no texts.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    check_runs(runs)
    drawing = _Drawing(seconds(runs, step, pause))
    moments = timeline(runs)
    placed = boxes(runs, width, lambda text: _LETTER * len(text))
    for index, box in enumerate(placed):
        drawing.add_run(box, [moment[index] for moment in moments])
    height = placed[-1].bottom + MARGIN
    text = "".join(position["text"] for position in runs[0].frames[-1]["positions"])
    names = " and ".join(run.name for run in runs)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" role="img" '
        f'aria-labelledby="title desc">\n  <title id="title">{_xml(title)}</title>\n'
        f'  <desc id="desc">{_xml(names)}, step by step. At the end: {_xml(text)}</desc>\n'
        f"  <style>{_STYLE}{drawing.keyframes()}  </style>\n"
        f'  <rect class="page" width="100%" height="100%"/>\n{"".join(drawing.elements)}</svg>\n'
    )


class _Drawing:
    """
    Elements that are there for a part of the time.

    Args:
        times (`list[float]`): when each moment begins, and the end.
    """

    def __init__(self, times: list[float]) -> None:
        self.times = times
        self.elements: list[str] = []
        self.parts: dict[tuple[int, int], str] = {}

    @property
    def num_moments(self) -> int:
        return len(self.times) - 1

    def add_run(self, box: Box, indices: list[int]) -> None:
        run = box.run
        heading = f'<tspan class="name">{_xml(run.name)}</tspan> <tspan class="note">{_xml(run.details)}</tspan>'
        self._add(0, self.num_moments, f'<text x="{MARGIN}" y="{box.top + 14:g}">{heading}</text>')
        frames = [run.frames[index] for index in indices]
        for number, slot in enumerate(box.slots):
            contents = [_cell(run, frame["positions"], number) for frame in frames]
            for start, end, cell in intervals(contents):
                if cell is not None:
                    self._add(start, end, _drawn(cell, slot.x, slot.y, slot.width))
        for start, end, words in intervals([cost(frame) for frame in frames]):
            y = box.bottom - 12
            self._add(start, end, f'<text class="note" x="{MARGIN}" y="{y:g}">{words}</text>')

    def _add(self, start: int, end: int, element: str) -> None:
        if (start, end) == (0, self.num_moments):
            self.elements.append(f"  {element}\n")
            return
        name = self.parts.setdefault((start, end), f"p{len(self.parts)}")
        self.elements.append(f'  <g class="{name}">{element}</g>\n')

    def keyframes(self) -> str:
        """Where motion is unwanted, the last moment stands still."""
        total = self.times[-1]
        rules = []
        hidden = [f".{name}" for (_, end), name in self.parts.items() if end < self.num_moments]
        still = f"    {', '.join(hidden)} {{ visibility: hidden; }}\n" if hidden else ""
        for (start, end), name in self.parts.items():
            stops = [(0.0, start == 0)] if start else []
            stops += [(self.times[start] / total, True)]
            stops += [(self.times[end] / total, False)] if end < self.num_moments else []
            points = " ".join(
                f"{100 * at:.3f}% {{ visibility: {'visible' if seen else 'hidden'}; }}" for at, seen in stops
            )
            rules.append(f"      @keyframes {name} {{ {points} }}\n")
            rules.append(f"      .{name} {{ animation: {name} {total:g}s step-end infinite; }}\n")
        return f"{still}    @media (prefers-reduced-motion: no-preference) {{\n{''.join(rules)}    }}\n"


def _cell(run: Run, positions: list[dict[str, Any]], number: int) -> tuple[str, str, str] | None:
    """What is seen of a position: its text, its look, its mark."""
    if number >= len(positions):
        return None
    position = positions[number]
    return shown(run, position), look(position), position.get("mark", "")


def _drawn(cell: tuple[str, str, str], x: float, y: float, width: float) -> str:
    text, kind, mark = cell
    parts = []
    if kind != "given":
        parts.append(f'<rect class="{kind}-box" x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}"/>')
    if kind == "ar":
        parts.append(f'<path class="ar-line" d="M{x:g} {y + HEIGHT:g}h{width:g}"/>')
    # Fonts differ in width: a text that is wider than its cell is pressed into it.
    fit = f' textLength="{_LETTER * len(text):.1f}" lengthAdjust="spacingAndGlyphs"' if len(text) > 1 else ""
    parts.append(f'<text class="t {kind}" x="{x + width / 2:g}" y="{y + 16.5:g}"{fit}>{_xml(text)}</text>')
    if mark:
        right = f"{x + width - 1:g}"
        parts.append(f'<circle class="dot {mark}" cx="{right}" cy="{y:g}" r="6"/>')
        parts.append(f'<text class="sign" x="{right}" y="{y + 3.5:g}">{SIGNS[mark]}</text>')
    return "".join(parts)


def _xml(text: str) -> str:
    """Escaped, and without the signs that no XML may have."""
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


__all__ = ["replay_svg"]
