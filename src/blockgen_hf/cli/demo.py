"""Open a page on this machine that shows a model at work: the app of a Space."""

import argparse
import runpy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .parsing import MODEL_HELP, CommandError, add_loading_arguments, integer, loading_options, model_name


EXAMPLE = "blockgen-hf demo tinystories-masked"
USAGE = "[MODEL]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=model_name, metavar="MODEL", help=f"{MODEL_HELP} (the default)")
    group = parser.add_argument_group("model")
    add_loading_arguments(group)
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    group.add_argument(
        "--port", type=integer(1, 65535), metavar="N", help="port (default: the first free one from 7860)"
    )
    group.add_argument("--title", metavar="TEXT", help="title of the page (default: the model's name)")


def run(args: argparse.Namespace) -> int:
    if find_spec("gradio") is None:
        raise CommandError("The demo needs Gradio: pip install 'blockgen-hf[demo]'.")
    from .loading import load, one_line_errors, quiet_transformers

    with quiet_transformers(), one_line_errors():
        model, tokenizer = load(args.model, **loading_options(args))
        title = args.title or Path(model.name_or_path).name
        with space_app() as names:
            names["App"](model, tokenizer, title).launch(server_name=args.host, server_port=args.port)
    return 0


@contextmanager
def space_app() -> Iterator[dict[str, Any]]:
    """The names of a Space's `app.py`, which runs in a folder as it does on the Hub."""
    from ..hub.spaces import write_space

    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "space"
        write_space(folder, above, license="apache-2.0")
        sys.path.insert(0, str(folder))
        try:
            yield runpy.run_path(str(folder / "app.py"), run_name="app")
        finally:
            sys.path.remove(str(folder))
