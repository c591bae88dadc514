"""What every command's options and errors have in common."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..checkpoints import SHIPPED, find_checkpoint
from ..places import local_folder


PROGRAM = "blockgen-hf"
API_KEY = "BLOCKGEN_HF_API_KEY"  # a variable of the environment, for servers and their clients
Value = TypeVar("Value")
_CPU_WEIGHTS = ("int8", "float16", "float32")  # formats of `quantize_for_cpu`, known here without importing torch


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


MODEL_HELP = f"a model folder, a model on the Hub, or one of the package: {' or '.join(SHIPPED)}"


DECODINGS_HELP = "ar, speculative, block_diffusion:STEPS or arpc:EVALUATIONS (both per block)"


def model_name(text: str) -> str:
    """The type of an option: a model folder, with the shipped model found by its name, or a model on the Hub."""
    name = find_checkpoint(text)
    try:
        folder = local_folder(name)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if folder is None:
        return name
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"The folder {text} is not a model folder: it has no config.json.")
    return str(folder)


def model_source(name: str) -> str:
    """[`model_name`] of a name that was not checked by argparse, as it is shown as it was given."""
    try:
        return model_name(name)
    except argparse.ArgumentTypeError as error:
        raise CommandError(error) from error


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
        try:
            return [parse(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers between commas, but is {text!r}") from None

    return parse_list


def one_or_list_of(parse: Callable[[str], Value]) -> Callable[[str], Value | list[Value]]:
    """The type of an option: a value, or several between commas."""
    parse_list = list_of(parse)

    def parse_values(text: str) -> Value | list[Value]:
        values = parse_list(text)
        return values if "," in text else values[0]

    return parse_values


def unescaped(text: str) -> str:
    """The type of an option: a text in which `\\n` stands for a line end, which is hard to type in a shell."""
    return text.replace("\\n", "\n")


def output_file(text: str) -> Path:
    """The type of an option: a file that can be written, so that no work is done in vain."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: its folder does not exist")
    return path


def add_decodings(group: argparse._ArgumentGroup, default: str, names: str, example: str) -> None:
    """The option of the decodings that an evaluation compares."""
    group.add_argument(
        "--decodings",
        type=list_of(str),
        default=default,
        metavar="NAME,...",
        help=f"{names}; settings may follow, as in {example} (default: {default})",
    )


def add_hub_dataset_arguments(group: argparse._ArgumentGroup) -> None:
    """Which version of a data set on the Hub."""
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a data set on the Hub")
    group.add_argument("--dataset-revision", metavar="NAME", help="branch, tag or commit of a data set on the Hub")


def add_run_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What a training run does with what is in its output folder, and whether it is a trial only."""
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in the output folder, if there is one"
    )
    folder.add_argument(
        "--overwrite", action="store_true", help="replace the model and the checkpoints in the output folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print expected size, memory and time; downloads and writes nothing",
    )


def add_cpu_weights(group: argparse._ArgumentGroup) -> None:
    """The option of commands that generate."""
    group.add_argument(
        "--cpu-weights",
        choices=("auto", "none", *_CPU_WEIGHTS),
        default="auto",
        metavar="NAME",
        help="weights packed for an x86 CPU: float32 is faster and computes the same, int8 and float16 are smaller, "
        "none turns it off (default: auto, float32 where it is faster; docs/speed.md)",
    )


def cpu_weights(text: str) -> str:
    """The type of an option: a format of `quantize_for_cpu`."""
    if text not in _CPU_WEIGHTS:
        raise argparse.ArgumentTypeError(f"must be int8, float16 or float32, but is {text!r}")
    return text


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of [`add_loading_arguments`], for `loading.load`."""
    names = ("revision", "device", "dtype", "attn_implementation", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def read_texts(file: Path, option: str, column: str) -> list[str]:
    """
    The lines of a text file that an option names, without empty ones, or a column of a `.jsonl` file.

    Raises:
        CommandError: it cannot be read, is not UTF-8, or holds no text.
    """
    from ..text_files import json_rows, open_text

    where = f"{option} {file}"
    if not file.is_file():
        raise CommandError(f"{where}: there is no such file.")
    try:
        if file.suffix == ".jsonl":
            texts = [_text_of(row, f"{option} {place}", column) for place, row in json_rows(str(file))]
        else:
            with open_text(str(file)) as lines:
                texts = [line.removesuffix("\n") for line in lines if line.strip()]
    except ValueError as error:
        raise CommandError(f"{option} {error}") from error
    except OSError as error:
        raise CommandError(f"{where}: cannot be read: {error.strerror}.") from error
    if not texts:
        raise CommandError(f"{where}: holds no text.")
    return texts


def _text_of(row: dict[str, Any], where: str, column: str) -> str:
    if column not in row:
        raise CommandError(f"{where}: no column `{column}`.")
    text = row[column]
    if not isinstance(text, str) or not text:
        raise CommandError(f"{where}: `{column}` is not a text.")
    return text
