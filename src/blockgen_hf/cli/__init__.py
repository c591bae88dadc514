"""
The command `blockgen-hf`. Each subcommand is a module with `EXAMPLE`, `USAGE` (its arguments, without the options),
`add_arguments(parser)` and `run(args) -> exit status`. Its docstring is its summary.

What is slow to import (torch, transformers) is imported when a subcommand runs, not to print its help.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from . import (
    adapt,
    bench,
    convert,
    demo,
    evaluate,
    evaluate_answers,
    evaluate_samples,
    finetune,
    generate,
    push,
    serve,
    train,
)
from .parsing import PROGRAM, CommandError, Parser


COMMANDS = {
    "generate": generate,
    "demo": demo,
    "train": train,
    "finetune": finetune,
    "adapt": adapt,
    "evaluate": evaluate,
    "evaluate-answers": evaluate_answers,
    "evaluate-samples": evaluate_samples,
    "convert": convert,
    "push": push,
    "serve": serve,
    "bench": bench,
}


def make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description=f"Run, train, evaluate and publish BlockGen language models. `{PROGRAM} COMMAND --help` shows the "
        "options of a command.",
        allow_abbrev=False,
    )
    parser.example = generate.EXAMPLE
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _add_traceback(parser)
    parser.set_defaults(run=_print_help, parser=parser)  # no command
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog=PROGRAM)
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).strip()
        usage = f"{PROGRAM} {name} [option ...] {module.USAGE}".rstrip()
        command = commands.add_parser(name, help=summary, description=summary, usage=usage, allow_abbrev=False)
        command.example = module.EXAMPLE
        module.add_arguments(command)
        _add_traceback(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    """Before the command or behind it: neither place may overwrite what the other says."""
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of every error, including errors that you can fix",
    )


def _print_help(args: argparse.Namespace) -> int:
    args.parser.print_help()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command line (default: that of the process) and returns its exit status. An error that the user can fix is
    one line, with `--traceback` below its traceback; any other is a mistake of this package, and is raised.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes what it likes, also what a terminal has no sign for
    args, unknown = make_parser().parse_known_args(argv)
    if "overrides" in args:  # argparse takes a list of words in one piece; those behind options are left over
        args.overrides += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except CommandError as error:
        sys.stdout.flush()
        if "traceback" in args:
            traceback.print_exception(error)
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\n{error}" if error.args else "", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; do not fail again on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


__all__ = ["COMMANDS", "main", "make_parser"]
