"""`blockgen-hf train --dry-run`: what a run would consist of, and what it would take. Fetches and writes nothing."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..modeling.configuration_blockgen import BlockGenConfig
from ..places import data_place, local_folder
from ..run_folders import LOCK, FolderInUseError, lock_folder
from ..tokenizer_loading import pretrained_tokenizer
from ..training.arguments import CHECKPOINTING, BlockGenTrainingArguments
from ..training.draws import WHOLE_INTERVAL
from ..training.estimates import (
    ParameterCount,
    count_parameters,
    estimate_memory,
    estimate_seconds,
    measure_speed,
    step_operations,
)
from ..training.recipe import Recipe, checkpoint_config
from ..training.recipe_building import vocabulary
from .figures import noise_name
from .loading import one_line_errors, set_num_threads
from .parsing import CommandError
from .training import Prepared


_WIDTH = 15  # of the first column


def dry_run(prepared: Prepared) -> None:
    """Prints what a run would be, in the main process."""
    if prepared.is_main:
        with one_line_errors():
            for line in _describe(prepared):
                print(line)


def _describe(prepared: Prepared) -> Iterator[str]:
    """Lines of text."""
    recipe = prepared.recipe
    config, vocabulary_source = _config(recipe)
    yield _line("recipe", recipe.source)
    parameters = count_parameters(config, recipe.adapter)
    yield _line("model", _model(recipe, config, parameters))
    yield _line("trained", _trained(recipe, parameters))
    yield _line("vocabulary", f"{config.vocab_size:,} rows ({vocabulary_source})")
    yield _line("tokenizer", _tokenizer(recipe))
    yield from _data(recipe)
    yield _line("block sizes", _block_sizes(config, prepared))
    if max(config.block_sizes) > 1:
        yield _line("noise levels", _noise_levels(prepared.args))
    yield from _costs(prepared, config, parameters)
    yield _line("output", _output(prepared))


def _line(name: str, text: str) -> str:
    return f"{name:<{_WIDTH}}{text}"


def _config(recipe: Recipe) -> tuple[BlockGenConfig, str]:
    """The configuration, as far as it is known here, and where the size of its vocabulary is from."""
    fields = {name: value for name, value in recipe.config_fields().items() if name != "mask_token_id"}
    if recipe.checkpoint is not None:
        with suppress(ValueError):
            return checkpoint_config(recipe, local_files_only=True), f"of {recipe.checkpoint}"
    if "vocab_size" in fields:
        return BlockGenConfig(**fields), "says the recipe"
    if recipe.tokenizer.train:
        return BlockGenConfig(**fields, vocab_size=recipe.tokenizer.train["vocab_size"]), "of the tokenizer"
    tokenizer = _cached_tokenizer(str(recipe.tokenizer_name), recipe.tokenizer.revision)
    if tokenizer is not None:
        kind = fields.get("diffusion_type", "masked")
        special = vocabulary(tokenizer, kind)
        is_short = special["mask_token_id"] is None if kind == "masked" else special["pad_token_id"] is None
        return BlockGenConfig(**fields, vocab_size=special["vocab_size"] + is_short), "of the tokenizer"
    return BlockGenConfig(**fields), "a guess: neither the tokenizer nor the checkpoint is on this machine"


def _cached_tokenizer(name: str, revision: str | None) -> Any:
    """From a folder or from the cache of the Hub; None if it would have to be downloaded."""
    try:
        name = str(local_folder(name) or name)
        return pretrained_tokenizer(name, revision=revision or "main", local_files_only=True)
    except Exception:  # transformers raises all kinds of errors for what is not there
        return None


def _model(recipe: Recipe, config: BlockGenConfig, parameters: ParameterCount) -> str:
    origin = f"goes on from {_place(recipe.checkpoint)}" if recipe.checkpoint else "new"
    return (
        f"{noise_name(config)}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{parameters.total:,} parameters, {origin}"
    )


def _trained(recipe: Recipe, parameters: ParameterCount) -> str:
    if not parameters.is_adapter:
        return "all parameters"
    kind = "DoRA" if recipe.adapter.get("use_dora") else "LoRA"
    share = parameters.trained / parameters.total
    return f"an adapter ({kind}), {parameters.trained:,} parameters, {share:.2%} of all"


def _tokenizer(recipe: Recipe) -> str:
    if recipe.tokenizer.train:
        return f"byte-level BPE of {recipe.tokenizer.train['vocab_size']:,} tokens, trained on the data"
    return _place(str(recipe.tokenizer_name))


def _place(name: str) -> str:
    return f"{name} (of the Hub)" if local_folder(name) is None else f"{name} (a folder)"


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    yield _line("data", _source(data.dataset, data.dataset_split))
    packing = "rows" if data.packing == "packed" else "a document a row, at most"
    yield _line("", f"{packing} of {data.sequence_length:,} tokens{', streamed' if data.streaming else ''}")
    validation = "none"
    if data.validation_documents:
        validation = f"the last {data.validation_documents:,} documents"
    elif data.validation_dataset or data.validation_split:
        validation = _source(data.validation_dataset or data.dataset, data.validation_split or "validation")
    yield _line("validation", validation)


def _source(names: str | list[str], split: str) -> str:
    words = names if isinstance(names, str) else ", ".join(names)
    return f"{words} (of the Hub, split {split})" if data_place(names) == "hub" else words


def _block_sizes(config: BlockGenConfig, prepared: Prepared) -> str:
    count = len(config.block_sizes)
    weights = config.block_size_weights or [1 / count] * count
    sizes = ", ".join(f"{size} ({weight:.3g})" for size, weight in zip(config.block_sizes, weights, strict=True))
    args = prepared.args
    slots = args.world_size * args.gradient_accumulation_steps
    if args.block_size_unit == "sequence":
        slots *= args.train_batch_size
    return f"{sizes}; {args.block_size_sampling}, {slots} a step"


def _noise_levels(args: BlockGenTrainingArguments) -> str:
    """From which interval they are drawn."""
    low, high = args.noise_level_interval or WHOLE_INTERVAL
    first = f"from {low:g} to {high:g}, one a {args.noise_level_sampling}"
    every = args.noise_interval_steps
    if every == 0:
        return first
    if 0 < args.max_steps <= every:
        return f"{first}; never chosen anew: `noise_interval_steps` is {every:,}"
    return f"{first}; chosen anew every {every:,} steps"


def _costs(prepared: Prepared, config: BlockGenConfig, parameters: ParameterCount) -> Iterator[str]:
    args, length = prepared.args, prepared.recipe.data.sequence_length
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    processes = "process" if args.world_size == 1 else "processes"
    yield _line(
        "batch",
        f"{rows:,} rows = {args.train_batch_size} a process x {args.gradient_accumulation_steps} accumulation steps x "
        f"{args.world_size} {processes}",
    )
    upper = "" if prepared.recipe.data.packing == "packed" else "at most "
    yield _line("a step", f"{upper}{rows * length:,} tokens")
    if args.max_steps > 0:
        yield _line("in all", f"{args.max_steps:,} steps, {upper}{args.max_steps * rows * length:,} tokens")
    else:
        yield _line("in all", f"{args.num_train_epochs:g} times the data, whose size is known once they are read")

    is_mixed, checkpointing = args.bf16 or args.fp16, bool(getattr(args, CHECKPOINTING))
    memory = estimate_memory(
        config,
        parameters,
        args.train_batch_size,
        length,
        bytes_per_value=2 if is_mixed else 4,
        ema=args.ema_decay > 0,
        checkpointing=checkpointing,
        shards=args.world_size if args.fsdp else 1,
    )
    yield _line("memory", f"about {_gigabytes(memory.total)} a process (estimate): " + _parts(memory))
    device = args.device.type
    set_num_threads(device, parameters.total)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    speed = measure_speed(config, device, dtype)
    operations = step_operations(config, parameters, rows, length, checkpointing=checkpointing)
    seconds = estimate_seconds(operations, speed, args.world_size, device)
    in_all = f", {_duration(seconds * args.max_steps)} in all" if args.max_steps > 0 else ""
    yield _line(
        "time",
        f"about {_duration(seconds)} a step{in_all}, without evaluation (estimate, may be wrong by a factor of 3: "
        f"{device} multiplies {str(dtype).removeprefix('torch.')} matrices at {speed / 1e9:,.0f} GFLOP/s here)",
    )


def _parts(memory: Any) -> str:
    names = ("weights", "gradients", "optimizer", "average", "activations", "head")
    return ", ".join(f"{name} {_gigabytes(getattr(memory, name))}" for name in names)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"


def _output(prepared: Prepared) -> str:
    folder = prepared.folder
    try:
        if (folder.path / LOCK).exists():  # which is not made here
            with lock_folder(folder.path):
                pass
        checkpoint = prepared.checkpoint()
    except (CommandError, FolderInUseError) as error:
        return f"refused: {error}"
    if checkpoint is not None:
        return f"{folder.path}, resumed from {Path(checkpoint).name}"
    if not folder.contents:
        return f"{folder.path}, nothing is overwritten"
    return f"{folder.path}; replaced: {folder.contents}"
