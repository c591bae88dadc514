"""What a card says of a training: from the recipe and the state in the model's folder, or from a Trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..places import is_hub_id, name_without_folder
from .card_facts import Rows
from .files import RECIPE, STATE, read_json


# Keys of a recipe, or attributes of the training arguments, and what the card calls them.
_DATA = {
    "dataset": "Data set",
    "dataset_config": "Configuration",
    "dataset_revision": "Revision",
    "dataset_split": "Split",
    "max_documents": "Documents, at most",
    "sequence_length": "Tokens a row",
    "packing": "Rows",
    "isolate_documents": "Documents see one another",
    "train_on_padding": "Scored ends of text behind the first",
}
_ADAPTER = {
    "r": "Rank of the adapter",
    "lora_alpha": "Its scale (alpha)",
    "use_dora": "With magnitudes of its own (DoRA)",
    "target_modules": "Adapted",
}
_SETTINGS = {
    "max_steps": "Optimizer steps",
    "num_train_epochs": "Epochs",
    "global_batch_size": "Rows a step",
    "per_device_train_batch_size": "Rows a device",
    "gradient_accumulation_steps": "Gradient accumulation",
    "world_size": "Processes",
    "optim": "Optimizer",
    "learning_rate": "Peak learning rate",
    "lr_scheduler_type": "Schedule",
    "warmup_steps": "Warm-up steps",
    "weight_decay": "Weight decay",
    "max_grad_norm": "Gradients clipped to norm",
    "ema_decay": "Decay of the average of the weights, which is what is stored",
    "block_size_sampling": "Block sizes",
    "noise_level_sampling": "A noise level a",
    "bf16": "bf16",
    "fp16": "fp16",
    "seed": "Seed",
}
_OUTCOMES = {"global_step": "Steps done", "epoch": "Epochs done", "num_input_tokens_seen": "Tokens seen"}


@dataclass(frozen=True)
class TrainingFacts:
    """
    Args:
        data, settings, outcome (`Rows`): tables; empty where nothing is known.
        datasets (`list[str]`): names on the Hub.
        base_model (`str`, *optional*): the model on the Hub from which the training began.
        validation (`dict`, *optional*): the likelihoods that the Trainer logged of the stored weights.
        validation_step (`int`, *optional*): when.
    """

    data: Rows = field(default_factory=list)
    settings: Rows = field(default_factory=list)
    outcome: Rows = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    base_model: str | None = None
    validation: dict[str, float] | None = None
    validation_step: int | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.data or self.settings or self.outcome)


def read_training(
    folder: Path, arguments: Mapping[str, Any] | None = None, state: Mapping[str, Any] | None = None
) -> TrainingFacts:
    """
    Args:
        folder: may hold `recipe.yaml` and `trainer_state.json`, as `blockgen-hf train` leaves them.
        arguments: the training arguments of a running Trainer, instead of the recipe's.
        state: its state, instead of the file's.

    Raises:
        ValueError: a file that is damaged.
    """
    recipe = _read_recipe(folder / RECIPE)
    if state is None and (folder / STATE).is_file():
        state = read_json(folder / STATE)
    settings = dict(recipe["training"] if arguments is None else arguments)
    if (settings.get("max_steps") or -1) > 0:
        settings.pop("num_train_epochs", None)  # which is not heeded then
    else:
        settings.pop("max_steps", None)
    data = recipe["data"]
    start = recipe["model"].get("name_or_path")
    validation, step = _validation(state or {})
    dataset = data.get("dataset")
    names = dataset if isinstance(dataset, list) else [dataset]
    return TrainingFacts(
        data=_data_rows(data, recipe["tokenizer"]),
        settings=_rows(recipe["adapter"], _ADAPTER) + _rows(settings, _SETTINGS),
        outcome=_outcome(state or {}),
        datasets=[str(name) for name in names if is_hub_id(name)],
        base_model=start if is_hub_id(start) else None,
        validation=validation,
        validation_step=step,
    )


def _read_recipe(file: Path) -> dict[str, dict[str, Any]]:
    sections = ("model", "adapter", "tokenizer", "data", "training")
    if not file.is_file():
        return {name: {} for name in sections}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return {name: dict(values.get(name) or {}) for name in sections}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no recipe: {error}") from error


def _data_rows(data: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Rows:
    rows = _rows({**data, "isolate_documents": None}, _DATA)
    if data.get("isolate_documents"):
        rows.append((_DATA["isolate_documents"], "no"))
    if tokenizer.get("name_or_path"):
        rows.append(("Tokenizer", _value(tokenizer["name_or_path"])))
    elif tokenizer.get("train"):
        rows.append(("Tokenizer", "byte-level BPE, trained on the data"))
    return rows


def _rows(values: Mapping[str, Any], names: Mapping[str, str]) -> Rows:
    shown = {name: values.get(key) for key, name in names.items()}
    return [
        (name, _value(value)) for name, value in shown.items() if value not in (None, "", []) and value is not False
    ]


def _value(value: Any) -> str:
    """Files are named without the folders in which they lay."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = str(getattr(value, "value", value))
    return name_without_folder(text) if "/" in text else text


def _outcome(state: Mapping[str, Any]) -> Rows:
    found = {**state, "num_input_tokens_seen": state.get("num_input_tokens_seen") or None}
    rows = _rows(found, _OUTCOMES)
    losses = [entry for entry in state.get("log_history", []) if "loss" in entry]
    if losses:
        rows.append(
            ("Last training loss logged, nats a token", f"{losses[-1]['loss']:.4g} (step {losses[-1]['step']})")
        )
    return rows


def _validation(state: Mapping[str, Any]) -> tuple[dict[str, float] | None, int | None]:
    """Of the last step only: other weights have other figures."""
    found = [entry for entry in state.get("log_history", []) if "eval_loss" in entry][-1:]
    if not found or found[0]["step"] != state.get("global_step") or state.get("best_model_checkpoint"):
        return None, None
    metrics = {name.removeprefix("eval_"): value for name, value in found[0].items() if name.startswith("eval_")}
    return metrics, found[0]["step"]


__all__ = ["TrainingFacts", "read_training"]
