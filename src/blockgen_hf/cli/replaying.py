"""What `blockgen-hf generate --save-html`, `--save-svg` and `--save-gif` write, and the picture of a card."""

import sys
import textwrap
from pathlib import Path

from ..replay import Run, replay_gif, replay_html, replay_svg
from ..whole_files import write_whole
from .loading import load
from .parsing import CommandError
from .sampling import Generation, Sampler, describe


_NEW_TOKENS = 48  # of the picture of a card


def save_replay(
    generations: list[Generation], prompt: str, html: Path | None, svg: Path | None, gif: Path | None
) -> None:
    """
    Replays of generations of one prompt.

    Raises:
        CommandError: a file cannot be written.
    """
    runs, title = _runs(generations), _title(prompt)
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


def card_picture(folder: str, prompt: str) -> str:
    """
    An animated SVG in which the model of a folder continues a prompt, with its own settings and seed 0.

    Raises:
        CommandError: it cannot be loaded, or not continue this prompt.
    """
    model, tokenizer = load(
        folder, revision=None, device="auto", dtype="auto", attn_implementation=None, trust_remote_code=False
    )
    sampler = Sampler(model, tokenizer, prompt, num_samples=1, seed=0)
    room = model.config.max_position_embeddings - sampler.input_ids.shape[1]
    generation = sampler.generate({"max_new_tokens": max(1, min(_NEW_TOKENS, room)), "output_trajectory": True})
    return replay_svg(_runs([generation]), _title(prompt))


def _runs(generations: list[Generation]) -> list[Run]:
    return [
        Run(document, generation.settings["decoding"], describe(generation.settings))
        for generation in generations
        for document in generation.frames
    ]


def _title(prompt: str) -> str:
    return textwrap.shorten(prompt, 80, placeholder=" ...") or "No prompt"


__all__ = ["card_picture", "save_replay"]
