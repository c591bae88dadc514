"""The small trained model that the package brings."""

from importlib.resources import files
from pathlib import Path


def shipped_checkpoint() -> Path:
    """Its folder: weights, tokenizer and generation config."""
    return Path(str(files(__name__))) / "tinystories-masked"
