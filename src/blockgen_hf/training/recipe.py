"""
Recipes: what a training run consists of, as a YAML file.

    file and overrides -> load_recipe -> Recipe (checked, nothing downloaded) -> build_trainer (recipe_building.py)

Not `HfArgumentParser.parse_yaml_file` nor TRL's `TrlParser`: they read one flat level of keys into dataclasses, take
values of any type as they come, and know neither sections nor the fields of a model's configuration.

A recipe has four sections: `model` (fields of [`BlockGenConfig`], or `name_or_path` of a checkpoint to go on from),
`tokenizer` ([`TokenizerArguments`]), `data` ([`DataArguments`]) and `training` ([`BlockGenTrainingArguments`], and
`global_batch_size`). With a fifth one, `adapter` (arguments of PEFT's `LoraConfig`), an adapter of the checkpoint is
trained, and not its weights.
"""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints import find_checkpoint
from ..hub.files import CONFIG, read_json
from ..hub.model_checks import check_model_folder
from ..modeling.configuration_blockgen import BlockGenConfig
from ..places import data_place, local_folder
from ..presets import apply_preset
from ..recipe_files import bundled_recipes, find_recipe
from .arguments import BlockGenTrainingArguments
from .data_arguments import DataArguments
from .documents import find_files
from .recipe_adapter import adapter_settings
from .recipe_values import check_keys, convert, override, parse_override, read_yaml


SECTIONS = ("model", "adapter", "tokenizer", "data", "training")
# What a checkpoint is found by, and how it attends; all else in the section `model` are fields of the configuration.
_MODEL_OPTIONS: dict[str, Any] = {
    "name_or_path": str | None,
    "revision": str | None,
    "attn_implementation": str | None,
}
_NO_FIELDS = ("model_type", "keys_to_ignore_at_inference", "base_model_tp_plan")
# What the command line does by other names, or Trainer fills itself.
_NO_TRAINING_KEYS = (
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    "local_rank",
    "parallelism_config",
)
_TRAINED_KEYS = {"vocab_size": int, "max_documents": int}


@dataclass
class TokenizerArguments:
    """
    Where the tokenizer comes from, and the special tokens that it does not name itself.

    Raises:
        ValueError: both a name and `train`, or a bad value.
    """

    name_or_path: str | None = field(default=None, metadata={"help": "A folder or a tokenizer on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    train: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Train byte-level BPE on the training data: `vocab_size`, `max_documents` (100000)."},
    )
    bos_token: str | None = field(default=None, metadata={"help": "Token that begins a text, such as BERT's [CLS]."})
    eos_token: str | None = field(default=None, metadata={"help": "Token that ends a text, such as BERT's [SEP]."})
    pad_token: str | None = field(default=None, metadata={"help": "Token that fills short rows."})
    mask_token: str | None = field(default=None, metadata={"help": "A token of the vocabulary that masks others."})

    def __post_init__(self) -> None:
        if self.train is None:
            return
        if self.name_or_path is not None or self.revision is not None:
            raise ValueError("`name_or_path` and `train` contradict one another: set one of them to null.")
        check_keys(self.train, _TRAINED_KEYS, "`train`")
        if "vocab_size" not in self.train:
            raise ValueError("`train` needs `vocab_size`.")
        for key, value in self.train.items():
            if convert(value, int, f"`train.{key}`") < 1:
                raise ValueError(f"`train.{key}` must be positive, but is {value!r}.")


@dataclass
class Recipe:
    """
    A checked recipe.

    Args:
        source: the file, for messages.
        model: fields of the configuration that it sets, and `name_or_path`, `revision`, `attn_implementation`.
        adapter: arguments of `peft.LoraConfig`; empty where all weights are trained.
        tokenizer, data: their sections.
        training: arguments of [`BlockGenTrainingArguments`].
        global_batch_size: rows of an optimizer step over all processes and accumulation steps, or None.
        values: the sections as they were written, overrides included.
    """

    source: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    tokenizer: TokenizerArguments
    data: DataArguments
    training: dict[str, Any]
    global_batch_size: int | None
    values: dict[str, Any]

    @property
    def checkpoint(self) -> str | None:
        """The model to go on from."""
        name: str | None = self.model.get("name_or_path")
        return name and find_checkpoint(name)

    @property
    def tokenizer_name(self) -> str | None:
        """Folder or name of the tokenizer, None for one that is trained."""
        name = self.tokenizer.name_or_path
        return find_checkpoint(name) if name else None if self.tokenizer.train else self.checkpoint

    def config_fields(self) -> dict[str, Any]:
        """The fields of the configuration that the recipe sets; a row of the data fits into a new model."""
        fields = {name: value for name, value in self.model.items() if name not in _MODEL_OPTIONS}
        if self.checkpoint is None:
            fields.setdefault("max_position_embeddings", self.data.sequence_length)
        if fields.get("next_token_prediction"):  # its vocabulary has no mask either
            fields.setdefault("diffusion_type", "uniform")
        return fields

    def training_arguments(self) -> BlockGenTrainingArguments:
        """
        With the accumulation that the global batch takes on as many processes as there are.

        Raises:
            ValueError: a value that is not accepted; names file and section.
            ImportError: accelerate is not installed.
        """
        values = dict(self.training)
        if not torch.accelerator.is_available():
            values.setdefault("use_cpu", True)  # unless it is told so, transformers refuses bf16 there
            values.setdefault("dataloader_pin_memory", False)  # and torch warns of what it cannot pin
        try:
            args = BlockGenTrainingArguments(**values)
        except (ValueError, NotImplementedError, FileNotFoundError) as error:
            raise ValueError(f"{self.source}, `training`: {error}") from error
        if self.global_batch_size is not None:
            args.gradient_accumulation_steps = self.accumulation_steps(args.train_batch_size, args.world_size)
        return args

    def training_setting(self, name: str) -> Any:
        """A value of the section `training`, or the default of [`BlockGenTrainingArguments`]."""
        if name in self.training:
            return self.training[name]
        entry = BlockGenTrainingArguments.__dataclass_fields__[name]
        return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()

    def accumulation_steps(self, batch_size: int, world_size: int) -> int:
        """
        Micro-batches a step, so that they are the global batch together.

        Raises:
            ValueError: the global batch is no multiple of what the processes take at once.
        """
        if self.global_batch_size is None:
            steps: int = self.training.get("gradient_accumulation_steps", 1)
            return steps
        at_once = batch_size * world_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"{self.source}: `training.global_batch_size` {self.global_batch_size} is no multiple of the "
                f"{at_once} rows that {world_size} processes take at once, {batch_size} each: change "
                "`training.per_device_train_batch_size`, or the number of processes."
            )
        return self.global_batch_size // at_once


def load_recipe(
    name: str, overrides: Sequence[str] = (), source: str | None = None, preset: str | None = None
) -> Recipe:
    """
    Reads a recipe and checks all that can be checked on this machine. Nothing is downloaded.

    Args:
        name: a bundled recipe, or a YAML file.
        overrides: `section.key=value`, the value written as in YAML.
        source: what messages begin with; default: the name of the file.
        preset: one of `PRESETS`, which replaces the recipe's own mixture. Overrides change it.

    Raises:
        FileNotFoundError: no such recipe, or files that it names are not there.
        ValueError: a key or a value that is not accepted; names file and key.
    """
    recipe = read_recipe(find_recipe(name), overrides, source, preset)
    _check(recipe)
    return recipe


def read_recipe(
    path: Path, overrides: Sequence[str] = (), source: str | None = None, preset: str | None = None
) -> Recipe:
    """
    Reads a recipe as it is written: keys and types are checked, and not whether what it names is there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key or a value that is not accepted; names file and key.
    """
    source, values = source or path.name, read_yaml(path)
    check_keys(values, SECTIONS, source, "section")
    for section in SECTIONS:
        values[section] = {} if values.get(section) is None else values[section]
        if not isinstance(values[section], dict):
            raise ValueError(f"{source}, `{section}` must be a mapping, but is {values[section]!r}.")
    _override(values, overrides)
    if preset is not None:
        data = _arguments(DataArguments, values["data"], source, "data")
        values["model"], values["training"] = apply_preset(
            preset, data.sequence_length, values["model"], values["training"]
        )
        _override(values, overrides)
        source = f"{source} (preset {preset})"
    return _make_recipe(source, values)


def _override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    for text in overrides:
        keys, value = parse_override(text)
        check_keys(keys[:1], SECTIONS, f"The override {text!r}", "section")
        override(values, keys, value)


def _make_recipe(source: str, values: dict[str, Any]) -> Recipe:
    model = _typed(values["model"], {**_model_hints(), **_MODEL_OPTIONS}, source, "model")
    training = _typed(
        values["training"],
        {**_hints(BlockGenTrainingArguments, _NO_TRAINING_KEYS), "global_batch_size": int | None},
        source,
        "training",
    )
    global_batch_size = training.pop("global_batch_size", None)
    if global_batch_size is not None and "gradient_accumulation_steps" in training:
        raise ValueError(
            f"{source}: `training.gradient_accumulation_steps` follows from `training.global_batch_size`: set one of "
            "them."
        )
    model = {key: value for key, value in model.items() if value is not None}
    return Recipe(
        source,
        model,
        _adapter(values["adapter"], model, source),
        _arguments(TokenizerArguments, values["tokenizer"], source, "tokenizer"),
        _arguments(DataArguments, values["data"], source, "data"),
        training,
        global_batch_size,
        values,
    )


def _model_hints() -> dict[str, Any]:
    return {name: hint | None for name, hint in BlockGenConfig.__annotations__.items() if name not in _NO_FIELDS}


def _hints(kind: type, without: Sequence[str] = ()) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind) if entry.name not in without}


def _typed(values: dict[str, Any], hints: dict[str, Any], source: str, section: str) -> dict[str, Any]:
    check_keys(values, hints, f"{source}, section `{section}`")
    return {key: convert(value, hints[key], f"{source}: `{section}.{key}`") for key, value in values.items()}


def _arguments(kind: Any, values: dict[str, Any], source: str, section: str) -> Any:
    hints = _hints(kind)
    typed = _typed(values, hints, source, section)
    required = [entry.name for entry in dataclasses.fields(kind) if _is_required(entry)]
    for name in required:
        if name not in typed:
            raise ValueError(f"{source}: `{section}.{name}` is missing.")
    try:
        return kind(**typed)
    except ValueError as error:
        raise ValueError(f"{source}, `{section}`: {error}") from error


def _adapter(values: dict[str, Any], model: dict[str, Any], source: str) -> dict[str, Any]:
    if not values:
        return {}
    if "name_or_path" not in model:
        raise ValueError(
            f"{source}: `adapter` needs a checkpoint, `model.name_or_path`: what it is trained on top of."
        )
    fields = {key: value for key, value in model.items() if key not in _MODEL_OPTIONS}
    return adapter_settings(values, fields, source)


def _is_required(entry: Any) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _check(recipe: Recipe) -> None:
    """What contradicts, and what is not there, before anything is fetched or written."""
    source, data, training = recipe.source, recipe.data, recipe.training
    if recipe.checkpoint is None and "revision" in recipe.model:
        raise ValueError(f"{source}: `model.revision` is that of `model.name_or_path`, which is missing.")
    if recipe.tokenizer_name is None and recipe.tokenizer.train is None:
        raise ValueError(f"{source}: `tokenizer` needs `name_or_path`, or `train` with a `vocab_size`.")
    if not training.get("output_dir"):
        raise ValueError(f"{source}: `training.output_dir` is missing: where the model is written.")
    if recipe.global_batch_size is not None and recipe.global_batch_size < 1:
        raise ValueError(
            f"{source}: `training.global_batch_size` must be positive, but is {recipe.global_batch_size}."
        )
    if data.streaming and training.get("max_steps", -1) < 1:
        raise ValueError(f"{source}: with `data.streaming` nobody knows where the data end: set `training.max_steps`.")
    validates = data.validation_dataset or data.validation_split or data.validation_documents
    if training.get("eval_strategy", "no") != "no" and not validates:
        raise ValueError(
            f"{source}: `training.eval_strategy` needs validation data: `data.validation_documents`, "
            "`data.validation_split` or `data.validation_dataset`; or set it to no."
        )
    if (training.get("noise_interval_steps") or 0) > 0 and not validates:
        raise ValueError(
            f"{source}: `training.noise_interval_steps` needs validation data, on which noise levels are chosen: "
            "`data.validation_documents`, `data.validation_split` or `data.validation_dataset`; or set it to 0."
        )
    _check_model(recipe)
    for argument in ("dataset", "validation_dataset"):
        try:
            _check_files(getattr(data, argument), f"data.{argument}")
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{source}: {error}") from error
    for section, name in (("model", recipe.checkpoint), ("tokenizer", recipe.tokenizer.name_or_path)):
        try:
            if name is not None:
                local_folder(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source}: `{section}.name_or_path`: {error}") from error


def _check_model(recipe: Recipe) -> None:
    """The configuration, apart from the vocabulary, which is the tokenizer's, and from checkpoints of the Hub."""
    if recipe.checkpoint is not None:
        folder = local_folder(recipe.checkpoint)
        if folder is not None:
            checkpoint_config(recipe)
            check_model_folder(folder)
        return
    fields = recipe.config_fields()
    fields.pop("mask_token_id", None)
    try:
        config = BlockGenConfig(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{recipe.source}, `model`: {error}") from error
    _check_length(recipe, config)


def checkpoint_config(recipe: Recipe, local_files_only: bool = False) -> BlockGenConfig:
    """
    The configuration of the checkpoint to go on from, with the fields that the recipe sets.

    Raises:
        ValueError: it cannot be read, is of another model, or does not go with the recipe.
    """
    name = str(recipe.checkpoint)
    folder = local_folder(name)
    options: dict[str, Any] = {"revision": recipe.model.get("revision") or "main"}
    if folder is not None:
        name, local_files_only = str(folder), True
    try:
        if folder is not None and (folder / CONFIG).is_file():
            found = read_json(folder / CONFIG)
        else:
            found, _ = PreTrainedConfig.get_config_dict(name, local_files_only=local_files_only, **options)
    except Exception as error:  # transformers raises all kinds for files that hold something else
        raise ValueError(f"The configuration of {name} cannot be read: {error}") from error
    if found.get("model_type") != BlockGenConfig.model_type:
        kind = found.get("model_type")
        raise ValueError(
            f"{recipe.source}: {name} is a model of type {kind!r}, not {BlockGenConfig.model_type!r}."
            if found
            else f"{recipe.source}: the folder {name} holds no model: it has no config.json."
        )
    fields = recipe.config_fields()
    if fields.get("diffusion_type", found.get("diffusion_type")) != found.get("diffusion_type"):
        if fields["diffusion_type"] == "masked" and "mask_token_id" not in fields:
            raise ValueError(
                f"{recipe.source}: {name} has no mask token, since its noise is uniform: choose a token of its "
                "vocabulary that no text holds with `model.mask_token_id`."
            )
        # What follows from the noise, unless the recipe says otherwise. The weights have the same shapes.
        fields = {"training_objective": None, "mask_token_id": None, **fields}
    if fields.get("block_sizes", found.get("block_sizes")) != found.get("block_sizes"):
        fields = {"block_size_weights": None, **fields}
    try:
        config: BlockGenConfig = BlockGenConfig.from_dict({**found, **fields})
    except Exception as error:  # fields of any type raise all kinds
        raise ValueError(f"{recipe.source}, `model` on top of {name}: {error}") from error
    _check_length(recipe, config)
    if recipe.adapter:
        _check_mixture(recipe, config)
    return config


def _check_mixture(recipe: Recipe, config: BlockGenConfig) -> None:
    """An adapter may act on noisy tokens only, of which blocks of one token have none."""
    sizes = config.block_sizes
    weights = config.block_size_weights or [1.0] * len(sizes)
    is_trained = any(size > 1 and weight > 0 for size, weight in zip(sizes, weights, strict=True))
    if config.adapter_rows == "noisy" and not is_trained:
        name, value = ("block_sizes", sizes) if max(sizes) == 1 else ("block_size_weights", weights)
        raise ValueError(
            f"{recipe.source}: `model.{name}` {value} would train nothing: the adapter acts on noisy tokens only, and "
            "no block size above 1 has a weight. Give one of them a weight, or train all weights."
        )


def _check_length(recipe: Recipe, config: BlockGenConfig) -> None:
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{recipe.source}: `data.sequence_length` {length} is more than the {config.max_position_embeddings} "
            "positions of the model (`model.max_position_embeddings`)."
        )


def _check_files(names: str | list[str] | None, argument: str) -> None:
    if names and data_place(names) == "files":
        find_files([names] if isinstance(names, str) else names, argument)


__all__ = [
    "Recipe",
    "TokenizerArguments",
    "bundled_recipes",
    "checkpoint_config",
    "find_recipe",
    "load_recipe",
    "read_recipe",
]
