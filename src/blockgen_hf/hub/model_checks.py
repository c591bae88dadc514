"""Model folders that are damaged or hostile: refused before a model is built from them, or right after loading."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_peft_available

from ..places import local_folder
from .card_facts import read_config
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATES,
    CONFIG,
    CONVERSION,
    GENERATION_CONFIG,
    MODEL_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    read_json,
)
from .sources import download
from .weights import SavedTensor, check_weights, read_file, read_tensors


_LARGEST = 1e6  # trained weights are below 100; some a thousand times as large overflow in half precision
_CHECKED_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_AGAIN = "Download the model again, or save it again."
_TOKEN_IDS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
)  # fmt: skip
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def fetch_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` if it is one, else its files from the Hub, or from the cache of the Hub."""
    folder = local_folder(name)
    if folder is not None:
        return folder
    return download(name, (CONFIG, CONVERSION, *ADAPTER_FILES, *WEIGHT_FILES, *MODEL_FILES, CHAT_TEMPLATES), revision)


def check_model_folder(folder: Path, *, own_code: bool = False, with_adapter: bool = False) -> dict[str, SavedTensor]:
    """
    Looks at every file that loading would read, without building the model or reading its weights.

    Args:
        own_code: whether the model is code of the folder's own, which may have other tensors than this package's.
        with_adapter: whether there may be an adapter beside the model, which is loaded with it.

    Returns:
        what is in the files of weights.

    Raises:
        ValueError: a file that is damaged or holds something else, an adapter beside the model, weights that are not
            those of config.json, or a generation config with ids that the vocabulary does not have, or that leaves no
            token to generate.
    """
    values = _read(folder / CONFIG)
    if (folder / ADAPTER_CONFIG).is_file():
        _check_adapter(folder, values, with_adapter)
    small = [name for name in (GENERATION_CONFIG, *TOKENIZER_FILES) if name.endswith(".json")]
    found = {name: _read(folder / name) for name in small if (folder / name).is_file()}
    tensors = read_tensors(folder)
    if not own_code:
        config = read_config(folder)
        values = {**values, "vocab_size": config.vocab_size, "mask_token_id": config.mask_token_id}
        if getattr(config, "quantization_config", None) is None:
            check_weights(config, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    if isinstance(values.get("vocab_size"), int):
        for file, settings in ((CONFIG, values), (GENERATION_CONFIG, found.get(GENERATION_CONFIG, {}))):
            _check_ids(settings, values["vocab_size"], values.get("mask_token_id"), folder / file)
    return tensors


def _check_adapter(folder: Path, config: dict[str, Any], is_accepted: bool) -> None:
    """Beside a model, only an adapter that cannot be merged into its weights makes sense."""
    is_joined = config.get("ar_prediction") == "clean" and (folder / ADAPTER_WEIGHTS).is_file()
    if not is_accepted or not is_joined:
        raise ValueError(
            f"{folder} holds a model and an adapter, {ADAPTER_CONFIG}, and transformers would load both. Move the "
            "adapter's files to a folder of their own."
        )
    _read(folder / ADAPTER_CONFIG)
    read_file(folder / ADAPTER_WEIGHTS)
    if not is_peft_available():
        raise ValueError(f"{folder} holds a model and its adapter, which needs the package peft: pip install peft.")


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{error} {_AGAIN}") from error


def _check_ids(settings: dict[str, Any], vocab_size: int, mask: int | None, file: Path) -> None:
    suppressed = set() if mask is None else {mask}  # which is never generated
    for name in _TOKEN_IDS:
        value = settings.get(name)
        if value is None:
            continue
        for token in _leaves(value):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{file}: `{name}` must be of token ids from 0 to {vocab_size - 1}, the model's vocabulary, but "
                    f"has {token!r}. Correct the file, or take the one that was saved with the model."
                )
        if name in _SUPPRESSED and isinstance(value, list):
            suppressed |= {found[0] for found in map(list, map(_leaves, value)) if len(found) == 1}
    if len(suppressed) >= vocab_size:
        names = " and ".join(f"`{name}`" for name in _SUPPRESSED if settings.get(name))
        raise ValueError(
            f"{file}: {names} suppress every token of the vocabulary, so that nothing can be generated. Correct the "
            "file."
        )


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested lists, however deep."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        else:
            yield value


def check_loaded_model(model: torch.nn.Module, folder: Path, tensors: dict[str, SavedTensor]) -> None:
    """
    Looks at every value of a model.

    Args:
        tensors: from [`check_model_folder`].

    Raises:
        ValueError: values that are NaN, infinite or too large for a trained model.
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.dtype not in _CHECKED_TYPES or value.is_meta or value.numel() == 0:
            continue
        low, high = (bound.item() for bound in torch.aminmax(value.detach()))
        if max(-low, high) <= _LARGEST:  # not so with NaN
            continue
        file = folder / (tensors[name].file if name in tensors else CONFIG)
        is_number = abs(low) < float("inf") and abs(high) < float("inf")
        what = f"the value {max(low, high, key=abs):.3g}" if is_number else "values that are NaN or infinite"
        dtype = str(value.dtype).removeprefix("torch.")
        raise ValueError(
            f"{file} gives {name} {what} in {dtype}: the model is damaged, or its training diverged. Take another "
            f"checkpoint{', or load it in float32' if value.dtype == torch.float16 else ''}."
        )


__all__ = ["check_loaded_model", "check_model_folder", "fetch_model"]
