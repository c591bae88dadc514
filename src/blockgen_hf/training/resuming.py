"""Whether a run can go on from a checkpoint: what must be as it was, and what may change."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..run_folders import Difference, differences, digest, shown
from .arguments import BlockGenTrainingArguments
from .checkpointing import read_state
from .recipe import Recipe


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .trainer import BlockGenTrainer

# Settings of `model` and `data` that leave the weights and the rows as they are.
_FREE = {"model": ("attn_implementation",), "data": ("num_proc", "cache_dir", "overwrite_cache")}
# Settings of `training` that the state in a checkpoint was made by: of the seed, the draws, optimizer and schedule.
_FIXED = (
    "seed",
    "data_seed",
    "block_size_sampling",
    "block_size_unit",
    "noise_level_sampling",
    "noise_level_interval",
    "noise_interval_steps",
    "noise_interval_rows",
    "ema_decay",
    "optim",
    "optim_args",
    "optim_target_modules",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "average_tokens_across_devices",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "length_column_name",
    "dataloader_drop_last",
)
# The batch is compared as a whole, by `RunFacts`; the others are nobody's business.
_UNTOLD = (
    "global_batch_size",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "output_dir",
    "disable_tqdm",
    "hub_token",
)
# Schedules that are the same however long a run is.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
_HASHED_TOKENS = 2**26


def compare_recipes(before: Recipe, now: Recipe) -> list[str]:
    """
    What is another for the steps to come, in words.

    Raises:
        ValueError: a setting that cannot change on the way.
    """
    for section in ("model", "adapter", "tokenizer", "data"):
        for found in differences(_values(before, section), _values(now, section)):
            if found.name not in _FREE.get(section, ()):
                raise ValueError(_refusal(section, found))
    names = [entry.name for entry in dataclasses.fields(BlockGenTrainingArguments) if entry.name not in _UNTOLD]
    settings = [{name: recipe.training_setting(name) for name in names} for recipe in (before, now)]
    changed = differences(*settings)
    for found in changed:
        if found.name in _FIXED:
            raise ValueError(_refusal("training", found))
    words = [f"training.{found.name}: {shown(found.before)} -> {shown(found.now)}" for found in changed]
    if _length(before) != _length(now) and _depends_on_length(now):
        schedule = str(getattr(now.training_setting("lr_scheduler_type"), "value", now.training["lr_scheduler_type"]))
        words.append(f"from here on, the learning rate follows `{schedule}` over the new number of steps")
    return words


def _values(recipe: Recipe, section: str) -> dict[str, Any]:
    values = getattr(recipe, section)
    return dataclasses.asdict(values) if dataclasses.is_dataclass(values) else values  # type: ignore[arg-type]


def _refusal(section: str, found: Difference) -> str:
    return (
        f"cannot be resumed with another `{section}.{found.name}`: it was {shown(found.before)}, and is "
        f"{shown(found.now)} now. Begin anew in another --output-dir, from the weights so far with "
        "model.name_or_path=CHECKPOINT."
    )


def _length(recipe: Recipe) -> tuple[str, float]:
    steps = recipe.training_setting("max_steps")
    return ("steps", steps) if steps > 0 else ("epochs", recipe.training_setting("num_train_epochs"))


def _depends_on_length(recipe: Recipe) -> bool:
    is_share = 0 < recipe.training_setting("warmup_steps") < 1
    return is_share or recipe.training_setting("lr_scheduler_type") not in _ENDLESS


class RunFacts(TrainerCallback, ExportableState):
    """
    What a recipe does not tell, and a run that is resumed must have in common with itself. Every checkpoint keeps it.

    Args:
        rows: of the training data, from [`hash_rows`].
        step_rows: rows of an optimizer step.
        slot_rows: rows that share a block size, None where none do.
    """

    def __init__(self, rows: str | None, step_rows: int, slot_rows: int | None) -> None:
        self.rows, self.step_rows, self.slot_rows = rows, step_rows, slot_rows

    @classmethod
    def of(cls, trainer: "BlockGenTrainer") -> "RunFacts":
        args = trainer.args
        is_per_row = args.block_size_unit == "sequence"
        return cls(
            hash_rows(trainer.train_dataset),
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            None if is_per_row else args.train_batch_size,
        )

    def state(self) -> dict[str, Any]:
        return {"args": vars(self).copy(), "attributes": {}}

    def check(self, checkpoint: str) -> None:
        """
        Compares with those in a checkpoint, if it has any.

        Raises:
            ValueError: other data, or another batch.
        """
        saved = read_state(checkpoint).get("stateful_callbacks", {}).get(type(self).__name__, {}).get("args")
        if saved is None:
            return
        if None not in (saved["rows"], self.rows) and saved["rows"] != self.rows:
            raise ValueError(
                f"The training data have changed since {checkpoint} was saved: its run cannot go on with other rows. "
                "Bring back the former data, or begin anew in another --output-dir, from the weights so far with "
                f"model.name_or_path={checkpoint}."
            )
        for name, what in (("step_rows", "rows of a step"), ("slot_rows", "rows that a process takes at once")):
            old, new = saved[name], getattr(self, name)
            if old != new:
                raise ValueError(
                    f"The run of {checkpoint} cannot go on with another batch: the {what} were {old}, and are {new} "
                    "now. They are training.per_device_train_batch_size, times training.gradient_accumulation_steps "
                    "and processes (together training.global_batch_size)."
                )


def hash_rows(rows: "Dataset | IterableDataset | Any") -> str | None:
    """
    A hash of the number of rows and of their tokens, of evenly spaced rows if they are very many. None for streams,
    of which nobody knows the rows to come.
    """
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return None
    length = len(rows[0]["input_ids"])
    every = -(-len(rows) * length // _HASHED_TOKENS)
    names = [name for name in ("input_ids", "labels") if name in rows.column_names]
    chosen = rows.select_columns(names).select(range(0, len(rows), every)).with_format("arrow")

    def parts() -> Iterator[Any]:
        yield str(len(rows))
        for table in chosen.iter(batch_size=1000):
            for name in names:
                column = table[name].combine_chunks()
                yield column.value_lengths().to_numpy().tobytes()
                yield column.flatten().to_numpy().tobytes()

    return digest(parts(), is_long=True)


__all__ = ["RunFacts", "compare_recipes", "hash_rows"]
