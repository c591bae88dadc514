"""What every command's options and errors have in common."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..checkpoints import SHIPPED, find_checkpoint


PROGRAM = "blockgen-hf"
Value = TypeVar("Value")


class CommandError(Exception):
    """An error that the user can fix. It is printed as one line, without a traceback."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with an example and whose errors are one line."""

    example = ""

    def format_help(self) -> str:
        example = "\n".join(f"  {line}" for line in self.example.splitlines())
        return f"example:\n{example}\n\n{super().format_help()}" if example else super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see `{self.prog} --help`)\n")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        accepted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {accepted}, but is {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {accepted}, but is {text!r}")
        return value

    return parse


MODEL_HELP = f"a model folder, a model on the Hub, or {SHIPPED}, which comes with the package"


def model_name(text: str) -> str:
    """The type of an option: a model folder, with the shipped model found by its name, or a model on the Hub."""
    name = find_checkpoint(text)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"The folder {text} is not a model folder: it has no config.json.")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise argparse.ArgumentTypeError(f"There is no folder {text}.")
    return name


def add_loading_arguments(group: argparse._ArgumentGroup) -> None:
    """How a model is loaded, whatever it is called."""
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if available")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights (default: auto, as saved)",
    )
    group.add_argument(
        "--attn-implementation", metavar="NAME", help="eager, sdpa, flex_attention ... (default: that of transformers)"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of the checkpoint instead of this package's"
    )


def positive(text: str) -> float:
    """The type of an option: a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, but is {text!r}")
    return value


def list_of(parse: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """The type of an option: values of a type, between commas."""

    def parse_list(text: str) -> list[Value]:
        return [parse(word) for word in text.split(",")]

    return parse_list


def cpu_weights(text: str) -> str:
    """A format of `quantize_for_cpu`, known here without importing torch."""
    if text not in ("int8", "float16", "float32"):
        raise argparse.ArgumentTypeError(f"must be int8, float16 or float32, but is {text!r}")
    return text


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of [`add_loading_arguments`], for `loading.load`."""
    names = ("revision", "device", "dtype", "attn_implementation", "trust_remote_code")
    return {name: getattr(args, name) for name in names}
