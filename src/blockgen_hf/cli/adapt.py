"""Teach a converted causal language model to denoise: by an adapter that leaves it as it is, or all weights."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..places import local_folder
from .finetune import SETTINGS, add_data_arguments, data_settings, micro_batch, with_options
from .parsing import MODEL_HELP, CommandError, add_run_arguments, integer, list_of, model_name, positive
from .train import run_recipe


EXAMPLE = (
    "blockgen-hf adapt smollm2 --dataset my.jsonl --output-dir runs/smollm2-adapter\n"
    "blockgen-hf adapt smollm2 --dataset my.jsonl --mode full --output-dir runs/smollm2-full"
)
USAGE = "model --dataset NAME [section.key=value ...]"
_RECIPE = Path(__file__).parents[1] / "training" / "adapt.yaml"
_LEARNING_RATES = {"adapter": 1e-4, "full": 1e-5}
_RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_name, help=f"{MODEL_HELP}, made by convert --family causal-lm")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="other settings of the recipe: training.block_size_curriculum=0, adapter.lora_dropout=0.05 ...",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--mode",
        choices=tuple(_LEARNING_RATES),
        default="adapter",
        help="adapter: LoRA on noisy tokens only, text by block size 1 stays the original's; full: all weights, with "
        "the autoregressive loss (default: adapter)",
    )
    group = parser.add_argument_group("data")
    add_data_arguments(group)
    group.add_argument(
        "--self-data",
        type=integer(1),
        metavar="N",
        help="train on N texts that the model itself samples behind beginnings of the texts of --dataset, or on N "
        "answers of its own to the prompts or conversations there",
    )
    group.add_argument(
        "--prompt-tokens", type=integer(1), default=16, metavar="N", help="tokens of a text's beginning (default: 16)"
    )
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=integer(1), metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the data (default: 1)")
    group.add_argument(
        "--learning-rate", type=positive, metavar="X", help="default: 1e-4 for an adapter, 1e-5 for all weights"
    )
    group.add_argument("--batch-size", type=integer(1), metavar="N", help="rows per optimizer step (default: 32)")
    group.add_argument("--seed", type=integer(0), metavar="N", help="for data, noise and adapters (default: 0)")
    group.add_argument(
        "--block-sizes", type=list_of(int), metavar="N,N...", help="block sizes of the mixture (default: the model's)"
    )
    group.add_argument(
        "--block-size-weights", type=list_of(float), metavar="X,X...", help="their weights, which add up to 1"
    )
    group.add_argument("--lora-rank", type=integer(1), metavar="N", help=f"rank of the adapter (default: {_RANK})")
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", metavar="DIR", help="folder for the adapter or model (default: runs/adapt)")
    add_run_arguments(group)
    parser.set_defaults(diffusion_type=None)


def run(args: argparse.Namespace) -> int:
    found = _configuration(args)
    settings: dict[str, Any] = {
        "model.name_or_path": args.model,
        "training.learning_rate": _LEARNING_RATES[args.mode],
        **data_settings(args),
        **_mode_settings(args, found),
    }
    if args.block_sizes is not None and args.block_size_weights is None:
        from ..hub.causal_lm import default_weights

        settings["model.block_size_weights"] = default_weights(args.block_sizes)
    settings.update({key: getattr(args, name) for name, key in SETTINGS.items() if getattr(args, name) is not None})
    if args.batch_size is not None:
        settings["training.global_batch_size"] = args.batch_size
        settings["training.per_device_train_batch_size"] = micro_batch(args.batch_size)
    if args.prompt_column is not None or args.messages_column is not None:
        settings["data.packing"] = "none"
    overrides = _written(settings) + args.overrides
    try:
        if args.self_data is not None and not args.dry_run:
            overrides += _self_data(args, overrides)
        return run_recipe(str(_RECIPE), overrides, args.resume, args.overwrite, args.dry_run, source="adapt")
    except CommandError as error:
        raise CommandError(with_options(str(error), args)) from error


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the model; empty where it is not known yet."""
    from transformers import PreTrainedConfig

    try:
        folder = local_folder(args.model)
        options: dict[str, Any] = {"local_files_only": args.dry_run or folder is not None}
        found, _ = PreTrainedConfig.get_config_dict(
            str(folder or args.model), revision=args.revision or "main", **options
        )
    except Exception:  # what is wrong with the model is said when it is loaded
        return {}
    ar_prediction = found.get("ar_prediction", "query")  # as in a config.json from before there were two
    if found and ar_prediction != "clean":
        raise CommandError(
            f"{args.model} is not a causal language model that became a BlockGen model (`ar_prediction` is "
            f"{ar_prediction!r}): make one with `blockgen-hf convert SOURCE --family causal-lm`. Other "
            "BlockGen models are trained further with `blockgen-hf finetune`."
        )
    return dict(found)


def _mode_settings(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    if args.mode == "full":
        if args.lora_rank is not None:
            raise CommandError("--lora-rank is for `--mode adapter`: leave it out with `--mode full`.")
        return {}
    rank = args.lora_rank or _RANK
    settings = {"adapter.r": rank, "adapter.lora_alpha": 2 * rank}
    if found.get("diffusion_type", "masked") == "masked":  # uniform noise is made of tokens
        settings["adapter.modules_to_save"] = ["noise_embedding"]
    return settings


def _self_data(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Samples the texts, if they are not there from a run before, and gives the overrides to train on them."""
    from ..training.recipe import load_recipe
    from ..training.self_data import make_self_data, self_data_settings
    from .loading import one_line_errors, quiet_transformers

    with one_line_errors(), quiet_transformers():
        recipe = load_recipe(str(_RECIPE), overrides, "adapt")
        training = recipe.training_arguments()
        path, count = make_self_data(recipe, training, args.self_data, args.prompt_tokens, args.overwrite)
    if training.process_index == 0:
        print(f"{path}: {count} texts of the model's own", flush=True)
    return _written(self_data_settings(recipe.data, path, count))


def _written(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
