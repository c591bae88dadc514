"""Serve a BlockGen model to clients of OpenAI's API."""

import argparse
import os
from typing import TYPE_CHECKING

from ..checkpoints import SHIPPED
from ..places import name_without_folder
from .parsing import (
    API_KEY,
    MODEL_HELP,
    CommandError,
    add_cpu_weights,
    add_loading_arguments,
    integer,
    loading_options,
    model_source,
)


if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..serving.service import ServerOptions

EXAMPLE = f"blockgen-hf serve {SHIPPED[0]}"
USAGE = "[MODEL]"
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=SHIPPED[0], metavar="MODEL", help=f"{MODEL_HELP} (the default)")
    group = parser.add_argument_group("model")
    add_loading_arguments(group)
    add_cpu_weights(group)
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call the model (default: MODEL, without its folders)"
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    group.add_argument(
        "--port", type=integer(0, 65535), default=8000, metavar="N", help="0: a free one (default: 8000)"
    )
    group.add_argument("--api-key", metavar="KEY", help=f"key that clients must send (default: ${API_KEY}, or none)")
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of a web page that may call the server, such as http://localhost:7860, or *; may be repeated",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=integer(1),
        default=60,
        metavar="SECONDS",
        help="time for running requests to end after SIGTERM or Ctrl-C (default: 60)",
    )
    group.add_argument("--log-level", choices=_LOG_LEVELS, default="info", help="default: info")
    _add_limits(parser.add_argument_group("limits"))


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-batch-rows",
        type=integer(1),
        default=64,
        metavar="N",
        help="answers that are generated at the same time (default: 64)",
    )
    group.add_argument(
        "--max-queue",
        type=integer(1),
        default=128,
        metavar="N",
        help="answers that wait for a place among these; further requests get status 429 (default: 128)",
    )
    group.add_argument(
        "--max-cached-tokens",
        type=integer(1),
        metavar="N",
        help="size of the cache: answers in the batch times the length that one may reach (default: no bound)",
    )
    group.add_argument(
        "--max-prompt-tokens", type=integer(1), metavar="N", help="tokens of a prompt (default: as the model allows)"
    )
    group.add_argument(
        "--max-tokens", type=integer(1), metavar="N", help="tokens of an answer (default: as the model allows)"
    )
    group.add_argument(
        "--max-choices",
        type=integer(1),
        default=16,
        metavar="N",
        help="choices of a request: `n` times its prompts (default: 16)",
    )
    group.add_argument(
        "--max-steps-per-block",
        type=integer(1),
        default=256,
        metavar="N",
        help="denoising steps or function evaluations of a block, unless the model's own settings have more "
        "(default: 256)",
    )
    group.add_argument(
        "--max-body-bytes", type=integer(1), default=1 << 20, metavar="N", help="size of a body (default: 1 MiB)"
    )


def server_options(args: argparse.Namespace) -> "ServerOptions":
    """Everything that the command line says of a server but its model and its socket."""
    from ..serving.bodies import Limits
    from ..serving.service import ServerOptions

    if args.api_key is not None and not args.api_key.strip():
        raise CommandError("--api-key is empty: clients would need no key. Give one, or leave the option out.")
    return ServerOptions(
        model_name=args.served_model_name or name_without_folder(args.model),
        api_key=args.api_key or os.environ.get(API_KEY) or None,
        allow_origins=tuple(args.allow_origin),
        max_batch_rows=args.max_batch_rows,
        max_queue=args.max_queue,
        max_cached_tokens=args.max_cached_tokens,
        limits=Limits(
            body_bytes=args.max_body_bytes,
            prompt_tokens=args.max_prompt_tokens,
            new_tokens=args.max_tokens,
            choices=args.max_choices,
            steps_per_block=args.max_steps_per_block,
        ),
    )


def load_app(args: argparse.Namespace, options: "ServerOptions") -> "FastAPI":
    """The application with the model of the command line."""
    from ..serving.app import create_app
    from .loading import load, pack_weights

    model, tokenizer = load(model_source(args.model), **loading_options(args))
    pack_weights(model, args.cpu_weights)
    return create_app(model, tokenizer, options)


def run(args: argparse.Namespace) -> int:
    try:
        from ..serving.server import Server

        options = server_options(args)
    except ImportError as error:
        raise CommandError(f"The server needs more packages ({error}): pip install 'blockgen-hf[serve]'.") from error
    from .loading import one_line_errors, quiet_transformers

    with quiet_transformers(), one_line_errors():
        app = load_app(args, options)
        server = Server(app, options.model_name, args.host, args.port, args.shutdown_timeout, args.log_level)
        server.serve_until_stopped()
    return 0
