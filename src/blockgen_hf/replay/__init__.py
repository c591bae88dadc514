"""
Pictures of a denoising: a page that replays it, an animated SVG, a GIF.

frames (`generation/frames.py`) -> `Run`s on one timeline (`runs.py`) -> `page.py`, with the viewer in `viewer.*`
                                                                      -> `layout.py` -> `svg.py`, `gif.py`
A frame while its text is still being written: `live.py`.
"""

from .gif import replay_gif
from .live import live_html, live_style
from .page import replay_html
from .runs import Run
from .svg import replay_svg


__all__ = ["Run", "live_html", "live_style", "replay_gif", "replay_html", "replay_svg"]
