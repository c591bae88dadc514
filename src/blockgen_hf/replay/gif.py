"""A GIF, for places that show no animated SVG. It needs Pillow."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .layout import HEIGHT, MARGIN, SIZE, Box, boxes, cost, look, seconds, shown
from .runs import Run, check_runs, timeline


# Fill and outline of a cell.
_COLORS = {
    "ar": ("#e3f4e6", "#2b7a3d"),
    "draft": ("#fff3d6", "#a86f00"),
    "committed": ("#dbeafe", "#5b8fd6"),
    "noise": ("#eef1f4", "#8b95a1"),
    "rejected": ("#fde2e0", "#b3202b"),
}
_INK, _QUIET, _PAGE, _GOOD, _BAD = "#1f2328", "#59636e", "#ffffff", "#2b7a3d", "#b3202b"


def replay_gif(
    runs: Run | Sequence[Run],
    path: str | Path,
    width: int = 860,
    step: float = 0.35,
    pause: float = 3.0,
    font: str | Path | None = None,
) -> None:
    """
    Writes an animation of one decoding, or of several of one prompt, aligned by their function evaluations.

    Args:
        runs ([`Run`] or `list[Run]`): what to replay.
        path (`str` or `Path`): the file.
        width (`int`): of the picture, in pixels.
        step (`float`): seconds of a step.
        pause (`float`): seconds of the last step, before the animation begins again.
        font (`str` or `Path`, *optional*): a TrueType font. Default: Pillow's own, which knows Latin letters only.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: there is no run, or a frame has no texts.
        OSError: the font cannot be read, or the file not written.
    """
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise ImportError("A GIF needs Pillow: `pip install 'blockgen-hf[demo]'` or `pip install pillow`.") from error
    runs = [runs] if isinstance(runs, Run) else list(runs)
    check_runs(runs)
    face = ImageFont.load_default(SIZE) if font is None else ImageFont.truetype(str(font), SIZE)
    painter = _Painter(boxes(runs, width, face.getlength), width, face)
    moments = timeline(runs)
    times = seconds(runs, step, pause)
    pictures = [painter.picture(moment) for moment in moments]
    # Milliseconds; a GIF counts hundredths.
    durations = [round(100 * (end - start)) * 10 for start, end in itertools.pairwise(times)]
    pictures[0].save(
        path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )


class _Painter:
    def __init__(self, placed: list[Box], width: int, font: Any) -> None:
        self.boxes, self.width, self.font = placed, width, font
        self.height = round(placed[-1].bottom + MARGIN)

    def picture(self, indices: list[int]) -> Any:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.width, self.height), _PAGE)
        draw = ImageDraw.Draw(image)
        for box, index in zip(self.boxes, indices, strict=True):
            frame = box.run.frames[index]
            draw.text((MARGIN, box.top), box.run.name, _INK, self.font)
            right = MARGIN + self.font.getlength(box.run.name) + 12
            draw.text((right, box.top), box.run.details, _QUIET, self.font)
            for slot, position in zip(box.slots, frame["positions"], strict=False):
                self._cell(draw, slot.x, slot.y, slot.width, box.run, position)
            draw.text((MARGIN, box.bottom - 24), cost(frame), _QUIET, self.font)
        return image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)

    def _cell(self, draw: Any, x: float, y: float, width: float, run: Run, position: dict[str, Any]) -> None:
        kind, middle = look(position), x + width / 2
        if kind != "given":
            self._frame(draw, kind, (x, y, x + width, y + HEIGHT))
        if run.is_mask(position):
            return  # its hatching says so
        color = _QUIET if kind in ("given", "noise") else _INK
        draw.text((middle, y + HEIGHT / 2), shown(run, position), color, self.font, anchor="mm")
        mark = position.get("mark")
        if kind == "rejected":
            draw.line((x + 3, y + HEIGHT / 2, x + width - 3, y + HEIGHT / 2), _BAD, 2)
        if mark == "accepted":
            draw.rectangle((x + width - 6, y - 3, x + width + 1, y + 4), _GOOD)
        elif mark:
            draw.ellipse((x + width - 6, y - 4, x + width + 2, y + 4), _BAD)

    @staticmethod
    def _frame(draw: Any, kind: str, corners: tuple[float, float, float, float]) -> None:
        """Each kind has a shape of its own: outlined, dashed, underlined, hatched."""
        fill, line = _COLORS[kind]
        left, top, right, bottom = corners
        if kind in ("committed", "rejected"):
            draw.rounded_rectangle(corners, 4, fill, line)
            return
        draw.rounded_rectangle(corners, 4, fill)
        if kind == "ar":
            draw.rectangle((left, bottom - 2, right, bottom), line)
        elif kind == "draft":
            for x in range(round(left), round(right), 7):
                draw.line([(x, top), (min(x + 4, right), top)], line)
                draw.line([(x, bottom), (min(x + 4, right), bottom)], line)
        else:
            for x in range(round(left) + 2, round(right - (bottom - top) / 2), 6):
                draw.line([(x, bottom - 2), (x + (bottom - top) / 2, top + 2)], line)


__all__ = ["replay_gif"]
