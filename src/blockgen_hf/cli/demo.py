"""Open a page on this machine that shows a model at work: the app of a Space."""

import argparse
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .parsing import (
    API_KEY,
    MODEL_HELP,
    CommandError,
    add_loading_arguments,
    integer,
    loading_options,
    model_source,
)


EXAMPLE = "blockgen-hf demo tinystories-masked"
USAGE = "[MODEL]"
_LOADING = dict(revision=None, device="auto", dtype="auto", attn_implementation=None, trust_remote_code=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (the default)")
    group = parser.add_argument_group("model")
    add_loading_arguments(group)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="URL",
        help="let a running `blockgen-hf serve` do the work, such as http://127.0.0.1:8000/v1; MODEL is then what it "
        "calls the model (default: its first one)",
    )
    group.add_argument("--api-key", metavar="KEY", help=f"key of the server (default: ${API_KEY}, or none)")
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    group.add_argument(
        "--port", type=integer(1, 65535), metavar="N", help="port (default: the first free one from 7860)"
    )
    group.add_argument("--title", metavar="TEXT", help="title of the page (default: the model's name)")


def run(args: argparse.Namespace) -> int:
    if find_spec("gradio") is None:
        raise CommandError("The demo needs Gradio: pip install 'blockgen-hf[demo]'.")
    if args.server is not None:
        given = [name for name, default in _LOADING.items() if getattr(args, name) != default]
        if given:
            option = given[0].replace("_", "-")
            raise CommandError(f"--{option} loads a model here, but with --server the server has loaded it.")
    from .loading import load, one_line_errors, quiet_transformers

    with quiet_transformers(), one_line_errors(), space_app() as names:
        if args.server is not None:
            writer = names["ServerWriter"](args.server, args.model, args.api_key or os.environ.get(API_KEY))
            title = writer.model
        else:
            model, tokenizer = load(args.model and model_source(args.model), **loading_options(args))
            writer, title = names["ModelWriter"](model, tokenizer), Path(model.name_or_path).name
        names["App"](writer, args.title or title).launch(server_name=args.host, server_port=args.port)
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
