"""
Published checkpoints and causal language models become BlockGen folders that transformers loads, and folders of ours
become these again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from .. import __version__
from ..default_decoding import default_decoding
from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM
from ..whole_files import write_json
from .adapters import join_adapter
from .causal_conversion import from_causal_lm, to_causal_lm
from .conversion_back import write_published
from .conversion_output import check_output, new_folder
from .conversion_tokenizer import load_fitting_tokenizer
from .families import Choices, choices_of_place, make_config, recognise_family, rope_theta, unused_settings
from .files import CONVERSION
from .layouts import CAUSAL_LM, PublishedTensor, buffer_names, embedding_name, inv_freq_name, published_tensors
from .portable import make_tokenizer_portable, without_paths
from .sources import Source, open_source
from .weights import DTYPES, Weights, check_shapes, count_values, name_of, read_tensors


TARGETS = ("transformers", "published", "causal-lm")


@dataclass(frozen=True)
class ConversionReport:
    """
    What [`convert_checkpoint`] did.

    Attributes:
        output: the folder that was written.
        family: `"block-dit"`, `"dense-dit"`, `"ar"`, `"bd3lm"` or `"causal-lm"`.
        config: the configuration for transformers.
        num_parameters: number of parameters of the model.
        dtype: type of the written weights.
        wrote_tokenizer: whether the folder has a tokenizer.
        notes: what a user of the folder should know, one sentence each.
    """

    output: Path
    family: str
    config: BlockGenConfig
    num_parameters: int
    dtype: torch.dtype
    wrote_tokenizer: bool
    notes: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    diffusion_type: str | None = None,
    block_sizes: Sequence[int] | None = None,
    block_size_weights: Sequence[float] | None = None,
    time_conditioning: bool | None = None,
    noisy_attention: str | None = None,
    tokenizer: str | Path | None = None,
    family: str | None = None,
    to: str = "transformers",
    dtype: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    max_shard_size: str | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Converts a published checkpoint to a folder for `from_pretrained`, or the other way round. Pass what neither the
    published files nor the path of `source` in the release of BlockGen say.

    A Llama, Mistral, Qwen2, Qwen3 or SmolLM checkpoint, or a GGUF file of one, becomes a BlockGen model that is the
    original at block size 1 and has blocks that are still to be trained (`blockgen-hf adapt`). Of the adapter that was
    trained, and of its base model, one folder is made, or with `to="causal-lm"` a plain checkpoint with the adapter in
    the folder `adapter`.

    Args:
        source: a folder, or `hf:org/repo` or `hf:org/repo/folder`: a published checkpoint or a causal language model,
            or one of this package with `to="published"` or `"causal-lm"`. Of causal language models also a GGUF file,
            or the folder of an adapter that was trained on one, which names its base model.
        output: the folder to write, which must be empty or absent unless `overwrite`.
        diffusion_type: `"masked"` or `"uniform"`. Default for causal language models: `"masked"`.
        block_sizes, block_size_weights: the mixture that a BlockGen model was trained on, or that a causal language
            model will be; its default is [1, 2, 4, 8], with a weight of 0.77 for block size 1.
        time_conditioning: whether a full-sequence model knows the noise level. Default: uniform ones (Duo) do, masked
            ones (MDLM) do not.
        noisy_attention: of a causal language model: `"block"` (default), or `"causal"`: noisy tokens see those before
            them only.
        tokenizer: a folder or a name on the Hub, to save in `output`. Default: that of a causal language model; of
            others no tokenizer is saved.
        family: `"block-dit"`, `"dense-dit"`, `"ar"`, `"bd3lm"` or `"causal-lm"`, if it cannot be found from the files.
        to: `"transformers"`, `"published"` or `"causal-lm"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`. Default: as in the source, bit by bit.
        revision, cache_dir: of a source on the Hub.
        max_shard_size: weights larger than this are split into several files. Default: 50 GB.
        overwrite: replace the model in `output`; other files there stay.

    Raises:
        ValueError: an argument has a value that is not accepted, or contradicts the source; the source is
            incomplete, of another architecture, or pickled; the published layout cannot hold the model.
        OSError: `output` cannot be written.
    """
    for name, value, accepted in (("to", to, TARGETS), ("dtype", dtype, (None, *DTYPES))):
        if value not in accepted:
            raise ValueError(f"`{name}` must be one of {list(accepted)}, but is {value!r}.")
    for name, path in (("source", source), ("output", output)):
        if not str(path):
            raise ValueError(f"`{name}` must be the name of a folder, but is empty.")
    sizes, weights = _listed("block_sizes", block_sizes), _listed("block_size_weights", block_size_weights)
    chosen = Choices(family, diffusion_type, sizes, weights, time_conditioning)
    target = Path(output).expanduser()
    check_output(target, overwrite)
    opened = open_source(source, revision, cache_dir)
    if target.resolve() in (opened.folder.resolve(), opened.adapter and opened.adapter.resolve()):
        raise ValueError(f"`output` {target} is the source: name another folder.")
    if to == "causal-lm":
        given = {**vars(chosen), "noisy_attention": noisy_attention, "tokenizer": tokenizer}
        return _to_causal_lm(opened, target, given, dtype, max_shard_size, overwrite)
    if opened.adapter is not None:
        given = {**vars(chosen), "noisy_attention": noisy_attention, "tokenizer": tokenizer, "dtype": dtype}
        return _join(opened, target, {**given, "max_shard_size": max_shard_size}, to, overwrite)
    is_causal = family == CAUSAL_LM or (family is None and _is_of_transformers(opened))
    if to == "transformers" and (is_causal or opened.gguf):
        if family not in (None, CAUSAL_LM):
            raise ValueError(f"`family` must be {CAUSAL_LM!r} for a GGUF file, but is {family!r}.")
        made = from_causal_lm(
            opened,
            target,
            chosen,
            noisy_attention=noisy_attention,
            tokenizer=tokenizer,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        return ConversionReport(target, CAUSAL_LM, **vars(made))
    if noisy_attention is not None:
        raise ValueError(f"`noisy_attention` is for causal language models ({CAUSAL_LM!r}): leave it out.")
    if to == "published":
        unused = {"tokenizer": tokenizer, "max_shard_size": max_shard_size}
        return _to_published(opened, target, chosen, unused, dtype, overwrite)
    return _to_transformers(opened, target, chosen, tokenizer, dtype, max_shard_size, overwrite)


def _listed(name: str, values: Sequence[Any] | None) -> list[Any] | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"`{name}` must be a list of numbers, one or more, but is {values!r}.")
    return list(values)


def _is_of_transformers(source: Source) -> bool:
    """A causal language model, or another model of transformers, which is then refused by its name."""
    return source.config.get("model_type") in set(CONFIG_MAPPING) - {BlockGenConfig.model_type}


def _join(source: Source, output: Path, given: dict[str, Any], to: str, overwrite: bool) -> ConversionReport:
    """An adapter with its base, in one folder."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` has no meaning for the folder of an adapter, which is copied: leave it out.")
    if to != "transformers" or source.config.get("model_type") != BlockGenConfig.model_type:
        raise ValueError(
            f"{source.adapter} is an adapter, which becomes one folder with its base model, {source.name}, if that is "
            "of this package, or a plain checkpoint beside the adapter with `to='causal-lm'` (--to)."
        )
    if source.adapter == source.folder:
        raise ValueError(f"{source.name} holds a model with its adapter already.")
    config, has_tokenizer = join_adapter(source, output, overwrite)
    tensors = read_tensors(output)
    weights = Weights(output)
    notes = ("from_pretrained loads the adapter with the model, where the package peft is installed.",)
    return ConversionReport(
        output, CAUSAL_LM, config, count_values(tensors), weights.dtype(tensors, None), has_tokenizer, notes
    )


def _to_causal_lm(
    source: Source,
    output: Path,
    given: dict[str, Any],
    dtype: str | None,
    max_shard_size: str | None,
    overwrite: bool,
) -> ConversionReport:
    for name, value in given.items():
        if value is not None and (name, value) != ("family", CAUSAL_LM):
            raise ValueError(f"`{name}` has no meaning with `to='causal-lm'`: leave it out.")
    if source.config.get("model_type") != BlockGenConfig.model_type:
        raise ValueError(
            f"{source.name} is no checkpoint of this package, which `to='causal-lm'` starts from: leave `to` (--to) "
            "out to convert one of transformers."
        )
    made = to_causal_lm(source, output, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    return ConversionReport(output, CAUSAL_LM, **vars(made))


def _to_transformers(
    source: Source,
    output: Path,
    chosen: Choices,
    tokenizer_name: str | Path | None,
    dtype_name: str | None,
    max_shard_size: str | None,
    overwrite: bool,
) -> ConversionReport:
    if source.config.get("model_type") == BlockGenConfig.model_type:
        raise ValueError(
            f"{source.name} is a checkpoint of this package already; for the way back give `to='published'` (--to)."
        )
    weights = Weights(source.folder)
    place = choices_of_place(source.parts)
    family = recognise_family(weights.shapes, source.config, place, chosen.family)
    vocabulary = embedding_name(family)
    if not weights.shapes.get(vocabulary):
        raise ValueError(f"The weights of {source.name} have no {vocabulary}: they are those of another architecture.")
    rows = weights.shapes[vocabulary][0]
    config = make_config(family, weights.shapes, rows, source.config, place, chosen)
    tensors = published_tensors(family, config)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    check_shapes(shapes, weights.shapes, buffer_names(family), source.name)
    dtype = weights.dtype(shapes, dtype_name)
    buffers = {name: weights.read(name) for name in buffer_names(family) if name in weights.shapes}
    if inv_freq_name(family) in buffers:
        config.rope_parameters["rope_theta"] = rope_theta(
            buffers[inv_freq_name(family)], config.hidden_size // config.num_attention_heads
        )
    tokenizer = None
    if tokenizer_name is not None:
        noise = None if family == "ar" else config.diffusion_type
        tokenizer = load_fitting_tokenizer(tokenizer_name, rows, noise, config.max_position_embeddings)
        _set_special_tokens(config, tokenizer)
    provenance = {  # which is published: what folders a local source lies in is nobody's business
        "source": source.name if source.commit else source.folder.resolve().name,
        "revision": source.commit,
        "family": family,
        "source_config": without_paths(source.config),
        "buffers": {
            name: {"dtype": name_of(value.dtype), "values": value.tolist()} for name, value in buffers.items()
        },
        "blockgen_hf_version": __version__,
    }
    with new_folder(output, overwrite) as folder:
        model = _build_model(config, tensors, weights, dtype)
        num_parameters = model.num_parameters()
        _set_generation(model, tokenizer)
        model.save_pretrained(str(folder), max_shard_size=max_shard_size or "50GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            make_tokenizer_portable(folder, config.max_position_embeddings)
        files = sorted([*(path.name for path in folder.iterdir()), CONVERSION])
        write_json(folder / CONVERSION, {**provenance, "files": files})
    notes = _notes(family, source, config, tokenizer)
    return ConversionReport(output, family, config, num_parameters, dtype, tokenizer is not None, notes)


def _build_model(
    config: BlockGenConfig, tensors: list[PublishedTensor], weights: Weights, dtype: torch.dtype
) -> BlockGenForDiffusionLM:
    """The model around the tensors of the file, of which none is copied but the queries, keys and values."""
    state: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        if len(tensor.names_here) == 1:
            state[tensor.names_here[0]] = weights.read(tensor.name).to(dtype)
            continue
        height = tensor.shape[0] // len(tensor.names_here)
        for index, name in enumerate(tensor.names_here):
            state[name] = weights.read(tensor.name, index * height, (index + 1) * height).to(dtype)
    with torch.device("meta"):
        model = BlockGenForDiffusionLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _set_special_tokens(config: BlockGenConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.diffusion_type == "masked":
        config.mask_token_id = tokenizer.mask_token_id
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def _set_generation(model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerBase | None) -> None:
    config = model.config
    model.generation_config.update(decoding=default_decoding(config), do_sample=True, top_k=0, temperature=1.0)
    if config.next_token_prediction and tokenizer is not None and len(tokenizer) < config.vocab_size:
        model.generation_config.update(suppress_tokens=list(range(len(tokenizer), config.vocab_size)))


def _notes(
    family: str, source: Source, config: BlockGenConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, ...]:
    notes = []
    if tokenizer is None:
        notes.append("No tokenizer was written: name the one of the training with `tokenizer` (--tokenizer).")
        if config.diffusion_type == "masked":
            notes.append(f"The mask token is taken to be the last one, {config.mask_token_id}.")
    elif len(tokenizer) < config.vocab_size:
        notes.append(
            f"The last row, {config.vocab_size - 1}, is that of no token (published AR models have it for a mask "
            "token that they never use): generation suppresses it."
        )
    unused = unused_settings(family, source.config)
    if unused:
        notes.append(f"Settings of the source that nothing here uses: {', '.join(unused)}.")
    return tuple(notes)


def _to_published(
    source: Source,
    output: Path,
    chosen: Choices,
    unused: dict[str, str | Path | None],
    dtype_name: str | None,
    overwrite: bool,
) -> ConversionReport:
    given = {
        "diffusion_type": chosen.diffusion_type,
        "block_sizes": chosen.block_sizes,
        "block_size_weights": chosen.block_size_weights,
        "time_conditioning": chosen.time_conditioning,
        **unused,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` has no place in a published checkpoint: leave it out with `to='published'`.")
    if source.config.get("model_type") != BlockGenConfig.model_type:
        raise ValueError(
            f"{source.name} is no checkpoint of this package, which `to='published'` starts from: leave `to` (--to) "
            "out to convert a published one."
        )
    config = BlockGenConfig.from_dict(dict(source.config))
    weights = Weights(source.folder)
    with new_folder(output, overwrite) as folder:
        written = write_published(source, config, weights, chosen.family, dtype_name, folder)
    return ConversionReport(
        output, written.family, config, written.num_parameters, written.dtype, False, written.notes
    )


__all__ = ["TARGETS", "ConversionReport", "convert_checkpoint"]
