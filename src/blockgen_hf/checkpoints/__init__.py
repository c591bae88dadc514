"""The small trained models that the package brings."""

from importlib.resources import files
from pathlib import Path


SHIPPED = ("tinystories-masked", "tinystories-uniform")


def shipped_checkpoint(name: str = SHIPPED[0]) -> Path:
    """
    The folder of a model of the package: weights, tokenizer, generation config, card and code.

    Args:
        name (`str`): `"tinystories-masked"` or `"tinystories-uniform"`.

    Raises:
        ValueError: the package has no model of this name.
    """
    if name not in SHIPPED:
        raise ValueError(f"`name` must be one of {', '.join(SHIPPED)}, but is {name!r}.")
    return Path(str(files(__name__))) / name


def find_checkpoint(name: str) -> str:
    """The folder of a shipped model for its name, unless you have a folder of that name; other names as they are."""
    return str(shipped_checkpoint(name)) if name in SHIPPED and not Path(name).exists() else name


__all__ = ["SHIPPED", "find_checkpoint", "shipped_checkpoint"]
