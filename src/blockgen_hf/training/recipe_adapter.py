"""The section `adapter` of a recipe: what PEFT trains in place of the weights of a checkpoint."""

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..places import local_folder
from ..quantization import some_numbers
from .recipe_values import check_keys, convert


if TYPE_CHECKING:
    from peft import PeftModel

# The matrices of a layer, which PEFT has no table of for this model type; a gated MLP has another one. "all-linear"
# are these, and the modulations of the adaptive layer norms with the embedding of the time.
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
# Parameters that act on noisy tokens alone, if `adapter_rows` says so.
_OF_NOISY_TOKENS = re.compile(
    r"\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.lora_|\.noise_embedding\."
)
# What is filled here, or by PEFT.
_NO_ADAPTER_KEYS = (
    "task_type",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
)
# An adapter's folder has no configuration: the model that it is loaded on has its own. These matter to training alone.
_TRAINING_FIELDS = ("block_sizes", "block_size_weights", "training_objective", "hidden_dropout")


def adapter_settings(values: dict[str, Any], model: dict[str, Any], source: str) -> dict[str, Any]:
    """
    The arguments of `peft.LoraConfig`, checked. `target_modules` are [`LINEAR_LAYERS`] unless they are given.

    Args:
        values: the section as it was written, not empty.
        model: fields of the configuration that the recipe sets on top of the checkpoint.
        source: of the recipe, for messages.

    Raises:
        ValueError: a key or a value that PEFT does not accept, or a model that would be another without the recipe.
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("Adapters need the package peft: pip install 'blockgen-hf[train]'.") from error
    hints = typing.get_type_hints(LoraConfig)
    names = [entry.name for entry in dataclasses.fields(LoraConfig) if entry.name not in _NO_ADAPTER_KEYS]
    check_keys(values, names, f"{source}, section `adapter`")
    for name, value in model.items():
        if name not in _TRAINING_FIELDS:
            raise ValueError(
                f"{source}: `model.{name}={value}` is for the weights of a model, which an adapter leaves as they "
                "are: leave out the section `adapter`, or this field."
            )
    settings = {key: convert(value, hints[key], f"{source}: `adapter.{key}`") for key, value in values.items()}
    settings = {"task_type": "CAUSAL_LM", "target_modules": LINEAR_LAYERS, **settings}
    rank = settings.get("r", LoraConfig().r)
    if rank < 1:
        raise ValueError(f"{source}: `adapter.r` must be positive, but is {rank}.")
    try:
        LoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}, `adapter`: {error}") from error
    return settings


def add_adapter(
    model: PreTrainedModel, settings: dict[str, Any], checkpoint: str, revision: str | None = None
) -> "PeftModel":
    """
    The model with a new adapter, which alone is trained.

    Args:
        settings: from [`adapter_settings`].
        checkpoint, revision: where the model is from. The adapter names a folder by its whole path.

    Raises:
        ValueError: modules that the model does not have, or an adapter that would change what it must leave as it is.
    """
    from peft import LoraConfig, get_peft_model

    if settings["target_modules"] == LINEAR_LAYERS and model.config.gated_mlp:
        settings = {**settings, "target_modules": [*LINEAR_LAYERS, "gate_proj"]}
    is_for_noisy = model.config.adapter_rows == "noisy"  # and leaves the weights as they are for all other tokens
    before = [(weight, some_numbers(weight)) for weight in model.parameters()] if is_for_noisy else []
    adapted = get_peft_model(model, LoraConfig(**settings, revision=revision))
    folder = local_folder(checkpoint)
    base = checkpoint if folder is None else str(folder.resolve())
    adapted.peft_config["default"].base_model_name_or_path = base
    if is_for_noisy:
        _check_noisy_only(adapted)
    if not all(torch.equal(some_numbers(weight), numbers) for weight, numbers in before):
        raise ValueError(
            f"`adapter.init_lora_weights` is {settings.get('init_lora_weights')!r}, which changes the weights of the "
            "model, so that text by block size 1 would not stay the original's (`adapter_rows` of the model is "
            "'noisy'): leave it out."
        )
    return adapted


def _check_noisy_only(model: "PeftModel") -> None:
    """
    Raises:
        ValueError: something would be trained that acts on clean tokens too.
    """
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _OF_NOISY_TOKENS.search(name)
    ]
    if others:
        raise ValueError(
            f"`adapter` would train {others[0]}, which acts on clean tokens too, so that text by block size 1 would "
            "not stay the original's (`adapter_rows` of the model is 'noisy'): `target_modules` may name only "
            f"{[*LINEAR_LAYERS, 'gate_proj']}, `modules_to_save` only 'noise_embedding', and `bias` must be 'none'."
        )


__all__ = ["LINEAR_LAYERS", "adapter_settings", "add_adapter"]
