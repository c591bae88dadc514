"""The small trained model that the package brings."""

from importlib.resources import files
from pathlib import Path


SHIPPED = "tinystories-masked"


def shipped_checkpoint() -> Path:
    """Its folder: weights, tokenizer and generation config."""
    return Path(str(files(__name__))) / SHIPPED


def find_checkpoint(name: str) -> str:
    """The folder of the shipped model for its name, unless you have a folder of that name; other names as they are."""
    return str(shipped_checkpoint()) if name == SHIPPED and not Path(name).exists() else name


__all__ = ["SHIPPED", "find_checkpoint", "shipped_checkpoint"]
