"""Which family a published checkpoint belongs to, and which configuration it has here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..modeling.configuration_blockgen import BlockGenConfig
from .layouts import CAUSAL_LM, FAMILIES, is_adaptive, is_prefixed, setting_names


# Settings that change nothing about what the model computes, or that are read elsewhere.
_KNOWN = ("name", "type", "attn_backend", "x0_causal", "scale_by_sigma", "tie_word_embeddings")
_NOISES = {"absorb": "masked", "uniform": "uniform"}
_BASELINES = {"ar": ("ar", None), "mdlm": ("dense-dit", "masked"), "duo": ("dense-dit", "uniform")}
_BD3LM_DEFAULTS = {"dropout": 0.1, "time_conditioning": False}  # of its own configuration class
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Choices:
    """What a published checkpoint does not say, and its user may: None where nothing is said."""

    family: str | None = None
    diffusion_type: str | None = None
    block_sizes: list[int] | None = None
    block_size_weights: list[float] | None = None
    time_conditioning: bool | None = None


def choices_of_place(parts: Sequence[str]) -> Choices | None:
    """
    What a folder's place in the release of BlockGen tells: `baselines/DATA/{ar,mdlm,duo}`,
    `blockgen/single_block_size/SIZE/DATA/NOISE` or `blockgen/multi_block_size/SIZE/DATA/WEIGHTS/NOISE`.
    """
    match list(parts):
        case [*_, "baselines", _, name] if name in _BASELINES:
            family, noise = _BASELINES[name]
            return Choices(family, noise)
        case [*_, "single_block_size", size, _, noise] if size.isdecimal() and noise in _NOISES:
            return Choices("block-dit", _NOISES[noise], [int(size)])
        case [*_, "multi_block_size", size, _, weights, noise] if size.isdecimal() and noise in _NOISES:
            return Choices("block-dit", _NOISES[noise], *_mixture(int(size), weights))
        case [*_, "multi_block_size", size, _, noise] if size.isdecimal() and noise in _NOISES:
            return Choices("block-dit", _NOISES[noise])
    return None


def _mixture(size: int, weights: str) -> tuple[list[int] | None, list[float] | None]:
    """`uniform`: all powers of two up to the size; `0.05_0.95`: block size 1 and the size."""
    if weights == "uniform":
        return [2**power for power in range(size.bit_length())], None
    try:
        first, last = (float(word) for word in weights.split("_"))
    except ValueError:
        return None, None
    return [1, size], [first, last]


def recognise_family(
    names: Collection[str], config: Mapping[str, Any], place: Choices | None, named: str | None
) -> str:
    """
    The family of a checkpoint, from the names of its tensors, its place in the release, its config.json, in this
    order; or the one that the user names, unless one of the first two contradicts it.

    Raises:
        ValueError: an unknown family, or one that something contradicts.
    """
    if named is not None and named not in FAMILIES:
        raise ValueError(f"`family` must be one of {[*FAMILIES, CAUSAL_LM]}, but is {named!r}.")
    prefixed = is_prefixed(names)
    if named is not None and (named == "bd3lm") != prefixed:
        verb = "begin" if prefixed else "do not begin"
        raise ValueError(
            f"`family` {named!r} contradicts the tensors, whose names {verb} with `backbone.`, as those of 'bd3lm':"
            " leave it out."
        )
    if prefixed:
        return "bd3lm"
    adaptive = is_adaptive(names)
    family = _agreed("family", named, None if place is None else place.family)
    told = _family_of_config(config, adaptive)
    if family is None:
        family = told or ("block-dit" if "x0_causal" in config else "dense-dit" if adaptive else "ar")
    elif named is None and told is not None and (told == "block-dit") != (family == "block-dit"):
        raise ValueError(
            f"The checkpoint's config.json is that of {told!r}, and its place in the release that of {family!r}: name "
            "the right one with `family` (--family), from a folder elsewhere."
        )
    if family == "ar" and adaptive:
        raise ValueError(
            "`family` 'ar' contradicts the tensors, which have adaptive layer norms (sigma_map, adaLN_modulation): a "
            "full-sequence diffusion model is 'dense-dit', a BlockGen 'block-dit'."
        )
    return family


def _family_of_config(config: Mapping[str, Any], adaptive: bool) -> str | None:
    words = [str(config.get(key, "")).lower().replace("-", "_") for key in ("type", "name")]
    if any("block" in word for word in words):
        return "block-dit"
    if words[0] in ("dit", "ddit"):
        return "dense-dit" if adaptive else "ar"
    return None


def make_config(
    family: str,
    names: Collection[str],
    rows: int,
    published: Mapping[str, Any],
    place: Choices | None,
    chosen: Choices,
) -> BlockGenConfig:
    """
    The configuration of a published checkpoint.

    Args:
        family: from [`recognise_family`].
        names: of its tensors.
        rows: of its embedding.
        published: its config.json.
        place, chosen: what its place in the release and the user say.

    Raises:
        ValueError: settings that are missing, that contradict one another, or that no model here has.
    """
    adaptive = is_adaptive(names)
    if family == "bd3lm":
        published = {**_BD3LM_DEFAULTS, **published}
    fields = {**_sizes(family, published, adaptive), "vocab_size": rows, "adaptive_layer_norm": adaptive}
    place = place or Choices()
    if family == "bd3lm":
        fields |= _bd3lm_fields(published, adaptive, rows)
        place = Choices("bd3lm", "masked", fields["block_sizes"], None, published["time_conditioning"])
    elif family == "ar":
        fields |= {"next_token_prediction": True}
        place = Choices("ar", None, [1], None, False)
        if chosen.diffusion_type is not None:
            raise ValueError("`diffusion_type` has no meaning for an autoregressive model ('ar'): leave it out.")
    elif family == "dense-dit":
        fields |= {"clean_attention": "block_causal", "training_objective": "elbo"}
        place = Choices("dense-dit", place.diffusion_type, [fields["max_position_embeddings"]])
    else:
        fields |= {"clean_attention": "causal" if _flag(published, "x0_causal") else "block_causal"}
        place = Choices("block-dit", place.diffusion_type, place.block_sizes, place.block_size_weights, False)
    fields |= _mixture_fields(family, place, chosen, fields, adaptive)
    return BlockGenConfig(**fields)


def _mixture_fields(
    family: str, place: Choices, chosen: Choices, fields: dict[str, Any], adaptive: bool
) -> dict[str, Any]:
    diffusion_type = _agreed("diffusion_type", chosen.diffusion_type, place.diffusion_type)
    if diffusion_type is None and family != "ar":
        raise ValueError(
            "`diffusion_type` (--diffusion-type) must be 'masked' or 'uniform': the published files do not say it."
        )
    sizes = _agreed("block_sizes", chosen.block_sizes, place.block_sizes)
    if sizes is None:
        raise ValueError(
            "`block_sizes` (--block-sizes) must be given: the published files do not say which block sizes a BlockGen "
            "was trained on."
        )
    if fields.get("clean_attention") == "block_causal" and len(sizes) > 1:
        raise ValueError(
            f"`block_sizes` {sizes} (--block-sizes) must be a single one: `x0_causal` of the checkpoint is false, so "
            "that its clean tokens see their whole block, and it was trained on one block size."
        )
    length = fields["max_position_embeddings"]
    if isinstance(length, int) and max(sizes) > length:
        raise ValueError(
            f"`block_sizes` {sizes} (--block-sizes) must fit into the model, which is {length} tokens long."
        )
    timed = _agreed("time_conditioning", chosen.time_conditioning, place.time_conditioning)
    if timed is None:  # full-sequence models: Duo knows the time, MDLM does not
        timed = diffusion_type == "uniform" and adaptive
    mixture = {
        "block_sizes": sizes,
        "block_size_weights": _agreed("block_size_weights", chosen.block_size_weights, place.block_size_weights),
        "time_conditioning": timed,
    }
    return mixture if family == "ar" else {**mixture, "diffusion_type": diffusion_type}


def _sizes(family: str, published: Mapping[str, Any], adaptive: bool) -> dict[str, Any]:
    settings = setting_names(family)
    if not adaptive and "cond_dim" not in published:
        del settings["cond_dim"]
    extra = {"block-dit": ("x0_causal",), "bd3lm": ("block_size", "vocab_size", "time_conditioning")}
    missing = [name for name in (*settings, *extra.get(family, ())) if published.get(name) is None]
    if missing:
        raise ValueError(
            f"The checkpoint's config.json lacks {', '.join(f'`{name}`' for name in missing)}, without which a "
            f"{family!r} cannot be built: take the one that was published with the weights."
        )
    if published.get("tie_word_embeddings"):
        raise ValueError("`tie_word_embeddings` of the checkpoint's config.json is true: no such model was published.")
    return {here: published[name] for name, here in settings.items()}


def _flag(published: Mapping[str, Any], name: str) -> bool:
    value = published[name]
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` of the checkpoint's config.json must be true or false, but is {value!r}.")
    return value


def _bd3lm_fields(published: Mapping[str, Any], adaptive: bool, rows: int) -> dict[str, Any]:
    size, length = published["block_size"], published["model_length"]
    for name, found in (("adaln", adaptive), ("vocab_size", rows)):
        if published.get(name, found) != found:
            raise ValueError(
                f"`{name}` of the checkpoint's config.json is {published[name]!r}, but its tensors say {found!r}. "
                "Take the config.json that was published with the weights."
            )
    if published.get("causal"):
        raise ValueError("`causal` of the checkpoint's config.json is true: that is no block-diffusion model.")
    if not published.get("cross_attn", True) and size != length:
        raise ValueError(
            f"`cross_attn` of the checkpoint's config.json is false, so that it is a full-sequence model, but "
            f"`block_size` is {size!r} and `model_length` {length!r}."
        )
    _flag(published, "time_conditioning")
    return {"clean_attention": "block_causal", "block_sizes": [size], "training_objective": "elbo"}


def _agreed(name: str, given: _Value | None, told: _Value | None) -> _Value | None:
    """What the user says, or else the checkpoint."""
    if given is not None and told is not None and given != told:
        raise ValueError(
            f"`{name}` is {given!r}, but the checkpoint, by its files or its place in the release, has {told!r}. "
            "Leave it out, or see whether this is the checkpoint that you mean."
        )
    return told if given is None else given


def unused_settings(family: str, published: Mapping[str, Any]) -> list[str]:
    """Settings of a config.json that this package knows nothing of. BD3-LM's is full of transformers' own."""
    return [] if family == "bd3lm" else [name for name in published if name not in {*setting_names(family), *_KNOWN}]


def rope_theta(inv_freq: torch.Tensor, head_dim: int) -> float:
    """
    The base of a rotary embedding from its frequencies, `[head_dim / 2]`.

    Raises:
        ValueError: they are not those of one base on the whole head.
    """
    found = inv_freq.double()
    exponents = torch.arange(len(found), dtype=torch.float64) / len(found)
    default = 10000.0
    tolerance = 1e-5 if inv_freq.dtype in (torch.float32, torch.float64) else 1e-2
    candidates = [default]
    if len(found) > 1 and found[1] > 0:
        candidates.append(float(f"{found[1].item() ** -len(found):.4g}"))
    for base in candidates:
        if len(found) == head_dim // 2 and torch.allclose(found, base**-exponents, rtol=tolerance, atol=0.0):
            return base
    raise ValueError(
        "`rotary_emb.inv_freq` of the checkpoint is not that of a rotary embedding on the whole head: this is another "
        "architecture, which cannot be converted."
    )


__all__ = ["Choices", "choices_of_place", "make_config", "recognise_family", "rope_theta", "unused_settings"]
