"""
The models of the papers as presets: noise, block sizes and their weights, objective, attention among clean tokens.
Apart from what reads recipes, since the command line names them without torch.

Sections, tables and equations are those of BlockGen (Deschenaux & Gulcehre) unless another paper is named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


_ROW = "row"  # in place of a block size: the whole row

# What every preset sets, so that nothing is left of the recipe's own mixture: BlockGen (Sec. 5, "Setup").
_MODEL: dict[str, Any] = {
    "diffusion_type": "masked",
    "block_sizes": [1, 2, 4, 8, 16],
    "block_size_weights": None,
    "clean_attention": "causal",  # Fig. 5b
    "training_objective": "cross_entropy",  # Sec. 5.1, masked models
    "noise_schedule": "linear",
    "time_conditioning": False,  # Suppl. A.2
    "next_token_prediction": False,
}
_TRAINING: dict[str, Any] = {
    "noise_level_sampling": "sequence",
    "noise_level_interval": None,
    "noise_interval_steps": 0,  # Sec. 5.1: cross entropy is as good, at no cost
}
# Arriola et al. (2025a): a noise level a block, clipped to the interval with the least variance of the loss, which is
# chosen every 5,000 steps (BlockGen, Sec. 5.1).
_BLOCK_DIFFUSION = {"noise_level_sampling": "block", "noise_interval_steps": 5000}
_UNIFORM = {"diffusion_type": "uniform", "training_objective": "elbo"}  # Sec. 5.1, uniform models
# One block of the whole row. It sees no clean token, so that the attention among these changes nothing.
_FULL_SEQUENCE = {"block_sizes": [_ROW], "clean_attention": "block_causal", "training_objective": "elbo"}


@dataclass(frozen=True)
class Preset:
    """
    What a preset sets in the sections `model` and `training` of a recipe.

    Args:
        summary (`str`): what it is, in a few words.
        model (`dict`): fields of [`BlockGenConfig`] in which it differs from a masked BlockGen.
        training (`dict`): arguments of [`BlockGenTrainingArguments`] in which it differs from it.
    """

    summary: str
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def config_fields(self, sequence_length: int) -> dict[str, Any]:
        """Fields of [`BlockGenConfig`] for rows of this length, which is the block size of full-sequence models."""
        fields = {**_MODEL, **self.model}
        sizes = [sequence_length if size == _ROW else size for size in fields["block_sizes"]]
        return {**fields, "block_sizes": sizes}

    def training_settings(self) -> dict[str, Any]:
        """Arguments of [`BlockGenTrainingArguments`]."""
        return {**_TRAINING, **self.training}


PRESETS = {
    # Table 1, "Transformer"; Suppl. C.1, Eq. 14.
    "ar": Preset(
        "dense causal transformer",
        {
            "diffusion_type": "uniform",
            "block_sizes": [1],
            "next_token_prediction": True,
        },  # it has no noise, nor a mask
    ),
    # Sec. 5.1, "Training with L' = 1"; Table 5, column L = 1.
    "ar-block-1": Preset("block size 1 only, fully noised", {"block_sizes": [1]}),
    # Sahoo et al. (2024); Table 1; Suppl. C.1, Eq. 15: one noise level a sequence.
    "mdlm": Preset("masked diffusion of the whole row", _FULL_SEQUENCE),
    # Schiff et al. (2025), and Duo (Sahoo et al., 2025a) without its curriculum; Table 1; Suppl. C.1, Eq. 16, 17. They
    # know the time (Suppl. A.2).
    "udlm": Preset("uniform diffusion of the whole row", {**_FULL_SEQUENCE, **_UNIFORM, "time_conditioning": True}),
    # Block Diffusion (Arriola et al., 2025a); Table 1, "BDM"; Fig. 5a.
    "bd3lm": Preset(
        "masked block diffusion, blocks of 16",
        {"block_sizes": [16], "clean_attention": "block_causal", "training_objective": "elbo"},
        _BLOCK_DIFFUSION,
    ),
    # Table 1 and Table 7, "Uniform Weights"; Sec. 5.2.
    "blockgen-masked": Preset("masked, equal weights"),
    "blockgen-uniform": Preset("uniform-state, equal weights", _UNIFORM),
    # Table 7, "Mostly AR Weights": 0.7 and 0.15, and what is left for the others; Sec. 5.2; Fig. 2.
    "blockgen-mostly-ar": Preset(
        "uniform-state, weights 0.7, 0.05, 0.05, 0.05, 0.15",
        {**_UNIFORM, "block_size_weights": [0.7, 0.05, 0.05, 0.05, 0.15]},
    ),
    # The authors' release: checkpoints with the weights 0.05 and 0.95.
    "blockgen-5-percent-ar": Preset(
        "masked, block sizes 1 (0.05) and 16 (0.95)", {"block_sizes": [1, 16], "block_size_weights": [0.05, 0.95]}
    ),
    # Diffusion in Diffusion, "Mix-Scale Training": a bimodal distribution with lambda = 0.1, blocks of 4 and of the
    # whole row, trained as in Block Diffusion. Two block sizes need causal attention, so that they share a cache.
    "mix-scale": Preset(
        "masked, blocks of 4 (0.9) and the whole row (0.1)",
        {"block_sizes": [4, _ROW], "block_size_weights": [0.9, 0.1], "training_objective": "elbo"},
        _BLOCK_DIFFUSION,
    ),
}


def find_preset(name: str) -> Preset:
    """
    Raises:
        ValueError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, but is {name!r}.")
    return PRESETS[name]


def apply_preset(
    name: str, sequence_length: int, model: Mapping[str, Any] | None = None, training: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Puts a preset on top of the settings of a model and of its training. What it does not set stays: size, data,
    optimizer.

    Args:
        name (`str`): one of `PRESETS`.
        sequence_length (`int`): tokens per row, the block size of full-sequence models.
        model (`Mapping`, *optional*): fields of [`BlockGenConfig`].
        training (`Mapping`, *optional*): arguments of [`BlockGenTrainingArguments`].

    Returns:
        fields of the configuration, and arguments of the training.

    Raises:
        ValueError: there is no preset of this name.

    ```python
    >>> from blockgen_hf import BlockGenConfig
    >>> from blockgen_hf.training import apply_preset

    >>> model, training = apply_preset("mix-scale", 128, model={"hidden_size": 64, "num_attention_heads": 4})
    >>> BlockGenConfig(**model).block_sizes
    [4, 128]
    ```"""
    preset = find_preset(name)
    fields = {**(model or {}), **preset.config_fields(sequence_length)}
    return fields, {**(training or {}), **preset.training_settings()}


__all__ = ["PRESETS", "Preset", "apply_preset", "find_preset"]
