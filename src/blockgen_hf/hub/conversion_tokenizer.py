"""The tokenizer of a checkpoint that came without one, with the special tokens of its vocabulary."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import first_line
from ..places import local_folder
from ..tokenizer_loading import add_special_tokens, pretrained_tokenizer
from .sources import download


_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_NEEDED = ("tokenizer*.json", "vocab.*", "*.model")  # one of them


def load_fitting_tokenizer(
    name: str | Path, rows: int, diffusion_type: str | None, length: int
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, which pads on the left as generation needs it.

    Args:
        name: a folder or a tokenizer on the Hub.
        rows: of the model's embedding.
        diffusion_type: the mask token of a masked model, and the padding token of a uniform one, are added if they
            are what the tokenizer lacks of the model's rows. None: an autoregressive model, whose last row may be one
            that no token has.
        length: the longest text of the model.

    Raises:
        ValueError: it cannot be loaded, or its tokens are not the rows of the model.
    """
    tokenizer = load_any_tokenizer(str(name), padding_side="left", model_max_length=length)
    found = len(tokenizer)
    if diffusion_type is not None:
        lacks_mask = diffusion_type == "masked" and tokenizer.mask_token_id is None
        if lacks_mask or found + 1 == rows:
            add_special_tokens(tokenizer, diffusion_type)
    spare = 1 if diffusion_type is None else 0
    if not len(tokenizer) <= rows <= len(tokenizer) + spare:
        added = f" and {len(tokenizer)} with a mask token" if len(tokenizer) > found else ""
        raise ValueError(
            f"`tokenizer` {str(name)!r} has {found} tokens{added}, but the model has {rows} rows: it is not "
            "the tokenizer that the model was trained with."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_any_tokenizer(name: str, **settings: Any) -> PreTrainedTokenizerBase:
    """
    A tokenizer of a folder or of the Hub, as it is but for these settings.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        folder = local_folder(name)
    except FileNotFoundError as error:
        raise ValueError(f"`tokenizer` must be a folder or a name on the Hub. {error}") from error
    try:
        # Not by AutoTokenizer: where there is no network it tries each file again for half a minute.
        path = download(name, _FILES) if folder is None else folder
        if not any(any(path.glob(pattern)) for pattern in _NEEDED):
            raise ValueError("there are no files of a tokenizer")
        return pretrained_tokenizer(str(path), local_files_only=True, **settings)
    except Exception as error:  # transformers, tokenizers and the Hub's client raise all kinds
        raise ValueError(
            f"`tokenizer` {name!r} cannot be loaded: {first_line(error).rstrip(':.')}. Name a folder with a "
            "tokenizer, or one on the Hub."
        ) from error


__all__ = ["load_any_tokenizer", "load_fitting_tokenizer"]
