"""What every command's options and errors have in common."""

import argparse
from collections.abc import Callable
from typing import NoReturn


PROGRAM = "blockgen-hf"


class CommandError(Exception):
    """What a user can mend. It is printed as one line, without a traceback."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (`{self.prog} --help` tells the options)\n")


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
