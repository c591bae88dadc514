"""A frame as HTML without scripts, for pages that show a text while it is generated."""

from html import escape
from pathlib import Path
from typing import Any

from .layout import SIGNS, shown
from .runs import Run


def live_style() -> str:
    """The style of the viewer, which [`live_html`] needs."""
    return (Path(__file__).parent / "viewer.css").read_text(encoding="utf-8")


def live_html(run: Run, frame: dict[str, Any]) -> str:
    """
    A frame of a run, with the colors and shapes of the viewer.

    Args:
        run ([`Run`]): whose document needs no frames but `mask_token`.
        frame (`dict`): with the texts of its tokens.
    """
    tokens = "".join(_token(run, position) for position in frame["positions"])
    evaluations, tokens_now = frame["function_evaluations"], frame["new_tokens"]
    rate = f" · <b>{tokens_now / evaluations:.2f}</b> per forward" if evaluations else ""
    return (
        f'<section class="run"><header><h2>{escape(run.name)}</h2><span class="details">{escape(run.details)}</span>'
        f'</header><div class="text">{tokens}</div><p class="cost"><b>{evaluations}</b> function evaluations · '
        f"<b>{tokens_now}</b> new tokens{rate}</p></section>"
    )


def _token(run: Run, position: dict[str, Any]) -> str:
    classes = ["token", position["state"]]
    if position.get("noise"):
        classes.append("noise")
    if position["text"].startswith(" ") or run.is_mask(position):
        classes.append("space")
    mark = position.get("mark")
    sign = ""
    if mark:
        classes.append(mark)
        sign = f'<span class="mark" aria-hidden="true">{SIGNS[mark]}</span>'
    line_end = "<br>" if "\n" in position["text"] and not position.get("noise") else ""
    return f'<span class="{" ".join(classes)}">{escape(shown(run, position))}{sign}</span>{line_end}'


__all__ = ["live_html", "live_style"]
