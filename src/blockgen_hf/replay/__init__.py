"""
Pictures of a denoising: a page that replays it, an animated SVG, a GIF.

frames (`generation/frames.py`) -> `Run`s on one timeline (`runs.py`) -> `page.py`, with the viewer in `viewer.*`
                                                                      -> `layout.py` -> `svg.py`, `gif.py`
"""

from .gif import replay_gif
from .page import replay_html
from .runs import Run
from .svg import replay_svg


__all__ = ["Run", "replay_gif", "replay_html", "replay_svg"]
