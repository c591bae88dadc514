"""A training run of the command line: checks, then data and model, then training, evaluation and saving."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..training.arguments import BlockGenTrainingArguments
from ..training.recipe import Recipe, load_recipe
from ..training.recipe_building import build_trainer
from ..training.trainer import BlockGenTrainer
from .figures import likelihood_table
from .loading import one_line_errors, set_num_threads, show_bars_of_datasets
from .output_folder import OutputFolder
from .parsing import CommandError
from .training_log import TrainingBar, TrainingLog


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: nothing is downloaded, and nothing is written."""

    recipe: Recipe
    args: BlockGenTrainingArguments
    folder: OutputFolder
    checkpoint: str | None
    overwrite: bool
    refusal: CommandError | None = None

    @property
    def is_main(self) -> bool:
        return bool(self.args.process_index == 0)


def prepare(name: str, overrides: Sequence[str], resume: bool, overwrite: bool, is_dry: bool) -> Prepared:
    """
    Raises:
        CommandError: whatever can be found wrong on this machine. A dry run reports an output folder in use instead.
    """
    with one_line_errors():
        recipe = load_recipe(name, overrides)
        recipe.training.setdefault("disable_tqdm", not sys.stderr.isatty())
        args = recipe.training_arguments()
    folder = OutputFolder(Path(str(args.output_dir)))
    checkpoint = refusal = None
    try:
        checkpoint = folder.check(recipe.values, resume, overwrite)
    except CommandError as error:
        if not is_dry:
            raise
        refusal = error
    return Prepared(recipe, args, folder, checkpoint, overwrite, refusal)


def train(prepared: Prepared) -> None:
    """
    Raises:
        CommandError: data, tokenizer or model that cannot be had, or a run that failed.
    """
    recipe, args, folder = prepared.recipe, prepared.args, prepared.folder
    PartialState().wait_for_everyone()  # all have looked into the folder before anyone writes to it
    show_bars_of_datasets(not args.disable_tqdm and prepared.is_main)
    with one_line_errors():
        trainer = build_trainer(recipe, args, keep_tokenizer=prepared.checkpoint is not None)
        _replace_callbacks(trainer)
        num_parameters = trainer.model.num_parameters()
        set_num_threads(args.device.type, num_parameters)
        if prepared.is_main:
            if prepared.overwrite:
                folder.clear()
            folder.save_recipe(recipe.values)
            begins = f"from {prepared.checkpoint}" if prepared.checkpoint else "begins"
            parameters = f"{num_parameters / 1e6:,.1f}M parameters"
            if recipe.adapter:
                num_trained = trainer.model.num_parameters(only_trainable=True)
                parameters += f", of which {num_trained:,} ({num_trained / num_parameters:.2%}) are trained"
            print(f"{recipe.source}: {parameters}, {_rows(trainer)}, {begins}", flush=True)
        PartialState().wait_for_everyone()
        result = trainer.train(resume_from_checkpoint=prepared.checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", result.metrics)
        metrics = _final_metrics(trainer)
        if metrics:
            trainer.save_metrics("eval", metrics)
    if prepared.is_main:
        _print_end(prepared, result.metrics, metrics)
    if args.world_size > 1:
        trainer.accelerator.end_training()


def dry_run(prepared: Prepared) -> None:
    from .dry_run import describe

    if prepared.is_main:
        with one_line_errors():
            for line in describe(prepared):
                print(line)


def _replace_callbacks(trainer: BlockGenTrainer) -> None:
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    callbacks: list[TrainerCallback] = [TrainingLog()]
    if not trainer.args.disable_tqdm:
        callbacks.append(TrainingBar())
    for callback in callbacks:
        trainer.add_callback(callback)


def _rows(trainer: BlockGenTrainer) -> str:
    train, validation = trainer.train_dataset, trainer.eval_dataset
    words = f"{len(train):,} rows" if hasattr(train, "__len__") else "a stream of rows"
    if validation is not None:
        words += f", {len(validation):,} for validation" if hasattr(validation, "__len__") else ", others to validate"
    return words


def _final_metrics(trainer: BlockGenTrainer) -> dict[str, Any]:
    """Of the model that was saved; those of the last step, if it was evaluated then."""
    if trainer.eval_dataset is None:
        return {}
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1:]
    if last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last[0].items() if name != "step"}
    metrics: dict[str, Any] = trainer.evaluate()
    return metrics


def _print_end(prepared: Prepared, training: dict[str, Any], metrics: dict[str, Any]) -> None:
    what = "Adapter" if prepared.recipe.adapter else "Model"
    print(f"Trained in {training['train_runtime']:.0f} s. {what}: {prepared.folder.path}")
    if metrics:
        draws = prepared.args.eval_monte_carlo_samples
        print(f"\nValidation, {draws} Monte-Carlo draws a row:")
        figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        print("\n".join(likelihood_table(figures)))
