"""What `blockgen-hf generate --save-html`, `--save-svg` and `--save-gif` write."""

import sys
import textwrap
from pathlib import Path

from ..replay import Run, replay_gif, replay_html, replay_svg
from ..whole_files import write_whole
from .parsing import CommandError
from .sampling import Generation, describe


def save_replay(
    generations: list[Generation], prompt: str, html: Path | None, svg: Path | None, gif: Path | None
) -> None:
    """
    Replays of generations of one prompt.

    Raises:
        CommandError: a file cannot be written.
    """
    runs = [
        Run(document, generation.settings["decoding"], describe(generation.settings))
        for generation in generations
        for document in generation.frames
    ]
    title = textwrap.shorten(prompt, 80, placeholder=" ...") or "No prompt"
    try:
        if html is not None:
            write_whole(html, replay_html(runs, title))
        if svg is not None:
            write_whole(svg, replay_svg(runs, title))
        if gif is not None:
            replay_gif(runs, gif)
    except OSError as error:
        raise CommandError(f"The replay cannot be written: {error}.") from error
    for path in (html, svg, gif):
        if path is not None:
            print(f"Replay: {path}", file=sys.stderr)


__all__ = ["save_replay"]
