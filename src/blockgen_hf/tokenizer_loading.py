"""How a tokenizer is loaded here, whatever for, and the special tokens that a diffusion model cannot do without."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


MASK = "<|mask|>"
PAD = "[PAD]"  # as in the published uniform models
# Facts of this machine, which `save_pretrained` would write into tokenizer_config.json.
LOCAL_SETTINGS = ("is_local", "local_files_only")


def pretrained_tokenizer(name: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """
    `AutoTokenizer.from_pretrained`, which never asks on standard input whether to run code: False does not run it.

    Args:
        name: a folder or a tokenizer on the Hub.
        trust_remote_code: whether the tokenizer may be code of its own.
        options: of `from_pretrained`.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    for setting in LOCAL_SETTINGS:
        tokenizer.init_kwargs.pop(setting, None)
    return tokenizer


@contextmanager
def tokenizer_errors(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """
    Where texts are tokenised: a regular expression of tokenizer.json that explodes is a `ValueError`.

    The library that matches them stops after ten million retries at one place of the text, about half a second, and
    panics, with an exception that is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} cannot read the text ({error}): a regular "
            "expression in its tokenizer.json (`normalizer` or `pre_tokenizer`) takes too long. Take the tokenizer "
            "files that were saved with the model."
        ) from error


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, diffusion_type: str) -> None:
    """Adds the token without which the model has no vocabulary: the mask, or a pad as in the published models."""
    if diffusion_type == "masked" and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if diffusion_type == "uniform" and tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})


__all__ = ["LOCAL_SETTINGS", "MASK", "PAD", "add_special_tokens", "pretrained_tokenizer", "tokenizer_errors"]
