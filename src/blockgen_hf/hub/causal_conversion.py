"""A causal language model becomes a BlockGen model that is still the same at block size 1, and the way back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .. import __version__
from ..errors import first_line
from ..generation.generation_configuration_blockgen import SAMPLING_SETTINGS, BlockGenGenerationConfig
from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM
from ..tokenizer_loading import pretrained_tokenizer
from ..whole_files import write_json
from .adapters import PLAIN_ADAPTER, check_plain_adapter, write_plain_adapter
from .causal_lm import MODEL_TYPES, NO_TOKEN, blockgen_config, causal_config, source_config
from .conversion_output import new_folder
from .conversion_tokenizer import load_any_tokenizer
from .families import Choices
from .files import CONFIG, CONVERSION, GENERATION_CONFIG, TOKENIZER_FILES, copy_tokenizer, read_json
from .gguf_files import check_gguf
from .layouts import CAUSAL_LM
from .portable import make_tokenizer_portable, without_paths
from .sources import HUB_PREFIX, Source
from .weights import Weights, check_shapes, model_shapes, name_of


NOISE = "model.noise_embedding.weight"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Fields that say what the layers compute.
_LAYERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "layer_norm_eps", "rope_parameters", "tie_word_embeddings",
    "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm", "no_rope_layers",
)  # fmt: skip
# What a generation_config.json may set, as transformers knows it.
_GENERATION_SETTINGS = frozenset(vars(GenerationConfig())) - {"transformers_version", "_from_model_config"}
_BUFFER = "rotary_emb.inv_freq"  # of old Llama checkpoints, which nobody reads


@dataclass(frozen=True)
class Original:
    """
    A causal language model as it was found.

    Attributes:
        config: of transformers.
        shapes: of its tensors.
        read: gives a tensor by its name.
        dtype: of the weights to be written.
        stored_as: the type that its weights have; None if they have several.
        tokenizer: None if there is none.
        generation: its generation_config.json, empty if there is none.
    """

    config: PreTrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    dtype: torch.dtype
    stored_as: str | None
    tokenizer: PreTrainedTokenizerBase | None
    generation: dict[str, Any]


@dataclass(frozen=True)
class Converted:
    config: BlockGenConfig
    num_parameters: int
    dtype: torch.dtype
    wrote_tokenizer: bool
    notes: tuple[str, ...]


def from_causal_lm(
    source: Source,
    output: Path,
    chosen: Choices,
    *,
    noisy_attention: str | None,
    tokenizer: str | Path | None,
    dtype: str | None,
    max_shard_size: str | None,
    overwrite: bool,
) -> Converted:
    """
    Converts a checkpoint of transformers or a GGUF file. The arguments are those of [`convert_checkpoint`].

    Raises:
        ValueError: a model that cannot be computed here, weights that are not those of its configuration, or a
            tokenizer with more tokens than the model has rows.
    """
    original = _read_gguf(source, tokenizer, dtype) if source.gguf else _read_folder(source, tokenizer, dtype)
    config = blockgen_config(original.config, chosen, noisy_attention)
    if original.tokenizer is not None and len(original.tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(original.tokenizer)} tokens, but the model only {config.vocab_size} rows: it is "
            "not the model's. Name the right one with `tokenizer` (--tokenizer)."
        )
    found = {name: shape for name, shape in original.shapes.items() if not name.endswith(_BUFFER)}
    expected, optional = model_shapes(config, source.name)
    expected.pop(NOISE, None)
    check_shapes(expected, found, optional, source.name)
    model = _build(config, original, [name for name in expected if name in found])
    model.generation_config = _generation(original.generation)
    provenance = {
        "source": source.name if source.commit else Path(source.name).expanduser().resolve().name,
        "revision": source.commit,
        "family": CAUSAL_LM,
        "source_config": without_paths(original.config.to_dict() if source.gguf else source.config),
        "dtype": original.stored_as,
        "generation_config": original.generation,
        "tensors": sorted(found),
        "blockgen_hf_version": __version__,
    }
    with new_folder(output, overwrite) as folder:
        model.save_pretrained(str(folder), max_shard_size=max_shard_size or "50GB")
        if original.tokenizer is not None:
            original.tokenizer.save_pretrained(folder)
            make_tokenizer_portable(folder, config.max_position_embeddings)
        files = sorted([*(path.name for path in folder.iterdir()), CONVERSION])
        write_json(folder / CONVERSION, {**provenance, "files": files})
    notes = _notes(source, original)
    return Converted(config, model.num_parameters(), original.dtype, original.tokenizer is not None, notes)


def _read_folder(source: Source, tokenizer: str | Path | None, dtype: str | None) -> Original:
    config = source_config(source.config)
    weights = Weights(source.folder)
    names = [name for name in weights.shapes if not name.endswith(_BUFFER)]
    if config.tie_word_embeddings and _has_own_head(weights):
        config.tie_word_embeddings = False  # as transformers does
    file = source.folder / GENERATION_CONFIG
    return Original(
        config,
        weights.shapes,
        weights.read,
        weights.dtype(names, dtype),
        weights.common_dtype(names),
        _tokenizer(source, tokenizer),
        read_json(file) if file.is_file() else {},
    )


def _has_own_head(weights: Weights) -> bool:
    """Whether the output matrix is there, and another one than the embedding."""
    if not {_HEAD, _EMBEDDING} <= set(weights.shapes):
        return False
    return not torch.equal(weights.read(_HEAD), weights.read(_EMBEDDING))


def _tokenizer(source: Source, name: str | Path | None) -> PreTrainedTokenizerBase | None:
    if name is None and not any((source.folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    return load_any_tokenizer(str(source.folder if name is None else name), padding_side="left")


def _read_gguf(source: Source, tokenizer: str | Path | None, dtype: str | None) -> Original:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: pip install gguf.") from error
    from transformers import AutoConfig, AutoModelForCausalLM

    check_gguf(source.folder / str(source.gguf))
    options: dict[str, Any] = {"gguf_file": source.gguf, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, **options)
        source_config(config.to_dict())
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            trust_remote_code=False,
            **options,
            dtype=getattr(torch, dtype or "float32"),
            config=config,
        )
        found = (
            pretrained_tokenizer(str(source.folder), padding_side="left", **options)
            if tokenizer is None
            else load_any_tokenizer(str(tokenizer), padding_side="left")
        )
    except (OSError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{source.name} cannot be read: {first_line(error)}") from error
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state[_HEAD]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    generation = {
        name: value for name, value in model.generation_config.to_diff_dict().items() if name in _GENERATION_SETTINGS
    }
    return Original(config, shapes, state.__getitem__, model.dtype, name_of(model.dtype), found, generation)


def _build(config: BlockGenConfig, original: Original, names: list[str]) -> BlockGenForDiffusionLM:
    """The model around the tensors of the file; the embedding of the noise is the mean of those of the tokens."""
    state = {name: original.read(name).to(original.dtype) for name in names}
    embedding = state[_EMBEDDING]
    if config.tie_word_embeddings:
        state[_HEAD] = embedding
    with torch.device("meta"):
        model = BlockGenForDiffusionLM(config)
    if model.model.noise_embedding is not None:
        state[NOISE] = embedding.float().mean(0, keepdim=True).to(original.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _generation(values: Mapping[str, Any]) -> BlockGenGenerationConfig:
    """
    As the original generates: autoregressively, and by its settings, of which none is left to a default here. Those
    that mean nothing, to transformers or where nothing is drawn, are left out: conversion.json has them.
    """
    kept = {name: value for name, value in values.items() if name in _GENERATION_SETTINGS}
    kept["do_sample"] = bool(kept.get("do_sample"))
    if kept["do_sample"]:
        kept.setdefault("top_k", 50)  # transformers' default, which is another here
    else:
        kept = {name: value for name, value in kept.items() if name not in SAMPLING_SETTINGS}
    if kept.get("pad_token_id") == NO_TOKEN:
        del kept["pad_token_id"]
    return BlockGenGenerationConfig.from_dict({**kept, "decoding": "ar"})


def _notes(source: Source, original: Original) -> tuple[str, ...]:
    notes = [
        "At block size 1 it is the original model. Train its larger blocks with `blockgen-hf adapt`.",
    ]
    if original.tokenizer is None:
        notes.append("No tokenizer was written: the source has none. Name one with `tokenizer` (--tokenizer).")
    if source.gguf:
        notes.append("The weights of the GGUF file were dequantised.")
    elif source.config.get("tie_word_embeddings") and not original.config.tie_word_embeddings:
        notes.append(f"`tie_word_embeddings` is false here: {_HEAD} of the source is not its embedding.")
    if getattr(original.config, "attention_dropout", 0):
        notes.append(f"`attention_dropout` {original.config.attention_dropout} of the source is not used.")
    return tuple(notes)


def to_causal_lm(
    source: Source, output: Path, *, dtype: str | None, max_shard_size: str | None, overwrite: bool
) -> Converted:
    """
    The causal language model that a BlockGen model with `ar_prediction="clean"` is at block size 1, as a checkpoint
    of transformers: of a conversion with the original's own config.json, and bit for bit its tensors. An adapter goes
    into the folder `adapter`.

    Raises:
        ValueError: the model is no such model, or an adapter would not be the same there.
    """
    config = BlockGenConfig.from_dict(dict(source.config))
    if source.adapter is not None:
        check_plain_adapter(source, config)
    notes = read_json(source.folder / CONVERSION) if (source.folder / CONVERSION).is_file() else {}
    written = _recorded_config(config, notes) or causal_config(config).to_dict()
    weights = Weights(source.folder)
    expected, optional = model_shapes(config, source.name)
    check_shapes(expected, weights.shapes, optional, source.name)
    names = [name for name in expected if name in weights.shapes and name != NOISE]
    used = weights.dtype(names, dtype)
    state = {name: weights.read(name).to(used) for name in names}
    if name_of(used) != notes.get("dtype"):
        written |= _dtype_field(written, name_of(used))
    if _HEAD in notes.get("tensors", ()) and _HEAD not in state:
        state[_HEAD] = state[_EMBEDDING].clone()
    with new_folder(output, overwrite) as folder:
        save_torch_state_dict(state, folder, max_shard_size=max_shard_size or "50GB", metadata={"format": "pt"})
        write_json(folder / CONFIG, written)
        if notes.get("generation_config"):
            write_json(folder / GENERATION_CONFIG, notes["generation_config"])
        has_tokenizer = copy_tokenizer(source.folder, folder)
        if source.adapter is not None:
            write_plain_adapter(source, folder / PLAIN_ADAPTER, _original_name(notes) or str(output.resolve()))
    count = sum(value.numel() for value in state.values())
    said = ["The embedding of the noise is left out."] if config.diffusion_type == "masked" else []
    if source.adapter is not None:
        said.append(
            f"{output / PLAIN_ADAPTER} is the adapter, as SGLang reads it: --speculative-algorithm UNO "
            f"--uno-lora-path {output / PLAIN_ADAPTER}. This was not tried with SGLang."
        )
    return Converted(config, count, used, has_tokenizer, tuple(said))


def _recorded_config(config: BlockGenConfig, notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of the original; None if there is none, or the model has become another since."""
    if notes.get("family") != CAUSAL_LM or notes["source_config"].get("model_type") not in MODEL_TYPES:
        return None
    recorded = blockgen_config(source_config(notes["source_config"]), Choices())
    if _HEAD in notes["tensors"] and not config.tie_word_embeddings:
        recorded.tie_word_embeddings = False  # whatever it said: see `_has_own_head`
    is_same = all(getattr(recorded, name) == getattr(config, name) for name in _LAYERS)
    return dict(notes["source_config"]) if is_same else None


def _dtype_field(config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """What a config.json says of the type of its weights, by the name that it has for it."""
    return {"torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype": dtype}


def _original_name(notes: Mapping[str, Any]) -> str | None:
    """The repository on the Hub that a folder was converted from."""
    return str(notes["source"]).removeprefix(HUB_PREFIX) if notes.get("revision") else None


__all__ = ["Converted", "from_causal_lm", "to_causal_lm"]
