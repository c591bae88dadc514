"""How a tokenizer is loaded here, whatever for."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


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


__all__ = ["LOCAL_SETTINGS", "pretrained_tokenizer"]
