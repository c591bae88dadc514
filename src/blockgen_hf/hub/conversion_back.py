"""The way back: a folder of this package becomes a checkpoint in a published layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..modeling.configuration_blockgen import BlockGenConfig
from ..whole_files import write_json
from .families import rope_theta
from .files import CONFIG, CONVERSION, WEIGHTS, read_json
from .layouts import FAMILIES, inv_freq_name, published_tensors, setting_names
from .sources import Source
from .weights import Weights, check_weights


# What the published architectures have built in.
_BUILT_IN = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-5, "tie_word_embeddings": False}
_DEFAULT_BASE = 10000.0


@dataclass(frozen=True)
class Written:
    family: str
    num_parameters: int
    dtype: torch.dtype
    notes: tuple[str, ...]


def write_published(
    source: Source,
    config: BlockGenConfig,
    weights: Weights,
    family: str | None,
    dtype_name: str | None,
    folder: Path,
) -> Written:
    """
    Writes `model.safetensors` and `config.json`.

    Args:
        source: a folder of this package; if it was converted, its notes give config.json and buffers back.
        config: its configuration.
        weights: its weights.
        family: default: that of the source of the conversion, or what the configuration is.
        dtype_name: default: as they are.
        folder: where to write.

    Raises:
        ValueError: the published layout cannot hold the model.
    """
    notes = {}
    if (source.folder / CONVERSION).is_file():
        notes = read_json(source.folder / CONVERSION)
    buffers = {name: _tensor(value) for name, value in notes.get("buffers", {}).items()}
    if family is not None and notes.get("family", family) != family:
        raise ValueError(
            f"`family` is {family!r}, but {source.name} was converted from a {notes['family']!r}: leave it out."
        )
    family = family or notes.get("family") or _family(config)
    _check(config, family, buffers)
    published = _settings(config, family, notes.get("source_config"))
    check_weights(config, weights.shapes, source.name)
    dtype = weights.dtype(weights.shapes, dtype_name)
    state = {}
    for tensor in published_tensors(family, config):
        parts = [weights.read(name) for name in tensor.names_here]
        state[tensor.name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)
    save_file({**state, **buffers}, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, published)
    return Written(family, sum(value.numel() for value in state.values()), dtype, (_lost(config, family),))


def _family(config: BlockGenConfig) -> str:
    if config.next_token_prediction:
        return "ar"
    is_full = config.block_sizes == [config.max_position_embeddings] and config.clean_attention == "block_causal"
    return "dense-dit" if is_full else "block-dit"


def _check(config: BlockGenConfig, family: str, buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuses what another model would come out of."""
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {list(FAMILIES)}, but is {family!r}.")
    problems = [
        f"`{name}` is {getattr(config, name)!r} instead of {value!r}"
        for name, value in {**_BUILT_IN, "intermediate_size": 4 * config.hidden_size}.items()
        if getattr(config, name) != value
    ]
    rope, frequencies = config.rope_parameters, buffers.get(inv_freq_name(family))
    head_dim = config.hidden_size // config.num_attention_heads
    base = _DEFAULT_BASE if frequencies is None else rope_theta(frequencies, head_dim)
    if rope != {"rope_type": "default", "rope_theta": base}:
        problems.append(f"`rope_parameters` are {rope!r} instead of the default with base {base:g}")
    is_full = config.block_sizes == [config.max_position_embeddings]
    block_causal = config.clean_attention == "block_causal"
    fitting = {
        "ar": config.next_token_prediction and not config.adaptive_layer_norm,
        "dense-dit": not config.next_token_prediction and is_full and block_causal,
        "block-dit": not config.next_token_prediction and not config.time_conditioning,
        "bd3lm": block_causal and config.diffusion_type == "masked" and config.mask_token_id == config.vocab_size - 1,
    }
    if not fitting[family]:
        problems.append(f"the configuration is not that of the family {family!r}")
    if problems:
        raise ValueError(f"The published layout cannot hold this model: {'; '.join(problems)}.")


def _settings(config: BlockGenConfig, family: str, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """config.json: that of the source of a conversion, if it still says what the model is, or a new one."""
    settings = {name: getattr(config, here) for name, here in setting_names(family).items()}
    if family == "block-dit":
        settings["x0_causal"] = config.clean_attention == "causal"
    if family == "bd3lm":
        settings |= {
            "block_size": config.block_sizes[0],
            "vocab_size": config.vocab_size,
            "time_conditioning": config.time_conditioning,
        }
    if recorded is None:
        if family == "bd3lm":
            head = {"model_type": "bd3lm", "cross_attn": True, "adaln": config.adaptive_layer_norm}
        else:
            head = {"name": "small", "type": "block-dit" if family == "block-dit" else "dit"}
        return {**head, **settings, "attn_backend": "sdpa"}
    changed = [name for name, value in settings.items() if recorded.get(name, value) != value]
    if changed:
        raise ValueError(
            f"{CONVERSION} of the source has another {', '.join(f'`{name}`' for name in changed)} than its {CONFIG}: "
            "the model is not the one that was converted. Delete that file to have a new config.json written."
        )
    return recorded


def _tensor(value: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))


def _lost(config: BlockGenConfig, family: str) -> str:
    """What has to be said again on the way back."""
    names = {
        "ar": [],
        "dense-dit": ["diffusion_type"],
        "block-dit": ["diffusion_type", "block_sizes"],
        "bd3lm": [],
    }[family]
    if family == "block-dit" and config.block_size_weights is not None:
        names = [*names, "block_size_weights"]
    if family == "dense-dit" and config.time_conditioning != (config.diffusion_type == "uniform"):
        names = [*names, "time_conditioning"]
    if config.noise_schedule != "linear" or config.noise_schedule_eps != 1e-3:
        names = [*names, "noise_schedule"]
    settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
    kept = f" {settings}," if settings else ""
    return f"The published layout does not keep{kept} the tokenizer and the settings of generation."


__all__ = ["Written", "write_published"]
