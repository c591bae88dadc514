"""Train a checkpoint further on prompts and answers: all weights, or an adapter (LoRA, DoRA)."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..places import data_place, local_folder
from .parsing import (
    MODEL_HELP,
    CommandError,
    add_run_arguments,
    integer,
    list_of,
    model_name,
    positive,
    unescaped,
)
from .train import run_recipe


# The columns of data sets that everybody uses. Prompts end as they do in generation.
_GSM8K = {
    "dataset_config": "main",
    "prompt_column": "question",
    "completion_column": "answer",
    "prompt_separator": "\n",
}
_KNOWN_DATASETS: dict[str, dict[str, str]] = {"openai/gsm8k": _GSM8K, "gsm8k": _GSM8K}
EXAMPLE = (
    "blockgen-hf finetune tinystories-masked --dataset my.jsonl --output-dir runs/mine\n"
    "blockgen-hf finetune org/name --dataset openai/gsm8k --lora-rank 16"
)
USAGE = "model --dataset NAME [section.key=value ...]"
_RECIPE = Path(__file__).parents[1] / "training" / "finetune.yaml"
_LONGEST_ROW = 512  # unless the user wants longer ones
_LARGEST_MICRO_BATCH = 16
_LORA_LEARNING_RATE = 5e-4

# Options that are a setting of the recipe by another name.
SETTINGS = {
    "revision": "model.revision",
    "diffusion_type": "model.diffusion_type",
    "block_sizes": "model.block_sizes",
    "block_size_weights": "model.block_size_weights",
    "dataset": "data.dataset",
    "dataset_config": "data.dataset_config",
    "dataset_split": "data.dataset_split",
    "prompt_column": "data.prompt_column",
    "completion_column": "data.completion_column",
    "messages_column": "data.messages_column",
    "prompt_separator": "data.prompt_separator",
    "max_documents": "data.max_documents",
    "validation_dataset": "data.validation_dataset",
    "validation_split": "data.validation_split",
    "validation_documents": "data.validation_documents",
    "max_steps": "training.max_steps",
    "epochs": "training.num_train_epochs",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
    "output_dir": "training.output_dir",
}


def known_settings(dataset: str) -> dict[str, str]:
    """Fields of `DataArguments` that go with a data set on the Hub."""
    return _KNOWN_DATASETS.get(dataset, {}) if data_place(dataset) == "hub" else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_name, help=MODEL_HELP)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="other settings of the recipe: training.weight_decay=0.1, adapter.lora_dropout=0.05 ...",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    add_data_arguments(parser.add_argument_group("data"))
    _add_training_arguments(parser.add_argument_group("training"))
    _add_adapter_arguments(parser.add_argument_group("adapter"))
    add_output_arguments(parser.add_argument_group("output"))


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="a data set on the Hub (openai/gsm8k), or a file, glob or folder: .jsonl, .json, .parquet",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a data set on the Hub")
    group.add_argument("--dataset-split", metavar="NAME", help="split to train on (default: train)")
    group.add_argument(
        "--prompt-column", metavar="NAME", help="column of prompts (default: prompt, or that of a known data set)"
    )
    group.add_argument(
        "--completion-column",
        metavar="NAME",
        help="column of answers (default: completion, or that of a known data set)",
    )
    group.add_argument(
        "--messages-column", metavar="NAME", help="column of conversations, for the tokenizer's chat template"
    )
    group.add_argument(
        "--prompt-separator",
        type=unescaped,
        metavar="TEXT",
        help="text between prompt and answer, \\n for a line break (default: nothing)",
    )
    group.add_argument("--max-documents", type=integer(1), metavar="N", help="train on the first N documents only")
    group.add_argument("--validation-dataset", metavar="NAME", help="validation data, named as --dataset")
    group.add_argument("--validation-split", metavar="NAME", help="split to validate on")
    group.add_argument(
        "--validation-documents",
        type=integer(0),
        metavar="N",
        help="hold out the last N documents (default: 100, or 0 with other validation data)",
    )
    group.add_argument(
        "--sequence-length",
        type=integer(1),
        metavar="N",
        help=f"truncate longer rows (default: {_LONGEST_ROW}, or what the model takes)",
    )
    group.add_argument(
        "--train-on-padding",
        type=_padding,
        default=0,
        metavar="yes|no|N",
        help="also score end-of-text tokens after the first: N of them, or up to the sequence length (default: no)",
    )


def _add_training_arguments(group: argparse._ArgumentGroup) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=integer(1), metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the data (default: 3)")
    group.add_argument(
        "--learning-rate", type=positive, metavar="X", help=f"default: 1e-4, for adapters {_LORA_LEARNING_RATE:g}"
    )
    group.add_argument("--batch-size", type=integer(1), metavar="N", help="rows per optimizer step (default: 32)")
    group.add_argument("--seed", type=integer(0), metavar="N", help="for data, noise and adapters (default: 0)")
    group.add_argument(
        "--block-sizes", type=list_of(int), metavar="N,N...", help="block sizes of the mixture (default: the model's)"
    )
    group.add_argument(
        "--block-size-weights",
        type=list_of(float),
        metavar="X,X...",
        help="their weights, which add up to 1 (default: the model's; equal for new block sizes)",
    )
    group.add_argument(
        "--diffusion-type", choices=("masked", "uniform"), help="noise to train with (default: the model's)"
    )


def _add_adapter_arguments(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="train all weights (default)")
    which.add_argument("--lora-rank", type=integer(1), metavar="N", help="train an adapter (LoRA) of rank N instead")
    group.add_argument(
        "--lora-alpha", type=integer(1), metavar="N", help="scale of the adapter (default: twice the rank)"
    )
    group.add_argument(
        "--lora-target",
        metavar="NAME,NAME...",
        help="matrices to adapt (default: attention and MLP); all-linear: adaptive layer norms too",
    )
    group.add_argument("--dora", action="store_true", help="train an adapter with magnitudes (DoRA)")


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output-dir", metavar="DIR", help="folder for the model (default: runs/finetune)")
    add_run_arguments(group)


def _padding(text: str) -> int | str:
    """A number, 0 for `no`, or `yes`, whose number is known later."""
    return text if text == "yes" else 0 if text == "no" else integer(0)(text)


def run(args: argparse.Namespace) -> int:
    settings = {"model.name_or_path": args.model, **data_settings(args), **_adapter_settings(args)}
    settings.update({key: getattr(args, name) for name, key in SETTINGS.items() if getattr(args, name) is not None})
    if args.batch_size is not None:
        settings["training.global_batch_size"] = args.batch_size
        settings["training.per_device_train_batch_size"] = micro_batch(args.batch_size)
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    overrides += args.overrides
    try:
        return run_recipe(str(_RECIPE), overrides, args.resume, args.overwrite, args.dry_run, source="finetune")
    except CommandError as error:
        raise CommandError(with_options(str(error), args)) from error


def with_options(message: str, args: argparse.Namespace) -> str:
    """A message that calls the settings of the recipe as the user did."""
    message = message.replace("`model.name_or_path`", "`model`")
    for name, key in {**SETTINGS, "sequence_length": "data.sequence_length"}.items():
        if getattr(args, name) is not None:
            message = message.replace(f"`{key}`", f"`--{name.replace('_', '-')}`")
    return message


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those that follow from other options."""
    settings: dict[str, Any] = {f"data.{key}": value for key, value in known_settings(args.dataset).items()}
    length = args.sequence_length or min(_LONGEST_ROW, _positions(args.model, args.revision, args.dry_run))
    settings["data.sequence_length"] = length
    settings["data.train_on_padding"] = length if args.train_on_padding == "yes" else args.train_on_padding
    has_data = args.validation_dataset is not None or args.validation_split is not None
    if has_data:
        settings["data.validation_documents"] = 0
    elif args.validation_documents == 0:
        settings["training.eval_strategy"] = "no"
    return settings


def _positions(model: str, revision: str | None, is_dry: bool) -> int:
    """The longest row that the model takes; for one of the Hub that is not here yet, a dry run cannot know."""
    from transformers import PreTrainedConfig

    folder = local_folder(model)
    options: dict[str, Any] = {"local_files_only": is_dry or folder is not None, "revision": revision or "main"}
    try:
        found, _ = PreTrainedConfig.get_config_dict(str(folder or model), **options)
    except Exception:  # what is wrong with the model is said when it is loaded
        return _LONGEST_ROW
    positions = found.get("max_position_embeddings") if isinstance(found, dict) else None
    return positions if isinstance(positions, int) else _LONGEST_ROW


def _adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    if args.lora_rank is None:
        given = [name for name in ("lora_alpha", "lora_target", "dora") if getattr(args, name)]
        if given:
            raise CommandError(f"--{given[0].replace('_', '-')} is for an adapter: give its --lora-rank.")
        return {}
    settings = {
        "adapter.r": args.lora_rank,
        "adapter.lora_alpha": args.lora_alpha or 2 * args.lora_rank,
        "adapter.use_dora": args.dora,
        "training.learning_rate": _LORA_LEARNING_RATE,
    }
    if args.lora_target is not None:
        names = args.lora_target.split(",")
        settings["adapter.target_modules"] = names if names != ["all-linear"] else "all-linear"
    return settings


def micro_batch(rows: int) -> int:
    """Rows that a process takes at once: the most that divide its share of a step."""
    share = rows // int(os.environ.get("WORLD_SIZE", "1")) or rows
    return max(count for count in range(1, min(share, _LARGEST_MICRO_BATCH) + 1) if share % count == 0)
