"""A training run of the command line: checks, then data and model, then training, evaluation and saving."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..errors import first_line, full_disk_error
from ..hub.model_checks import fetch_model
from ..run_folders import lock_folder
from ..training.arguments import BlockGenTrainingArguments
from ..training.recipe import Recipe, load_recipe
from ..training.recipe_building import build_trainer
from ..training.resuming import RunFacts
from ..training.trainer import BlockGenTrainer
from .figures import likelihood_table
from .interruption import StopOnInterrupt
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
    resume: bool
    overwrite: bool

    @property
    def is_main(self) -> bool:
        return bool(self.args.process_index == 0)

    def checkpoint(self) -> str | None:
        """See [`OutputFolder.check`]."""
        return self.folder.check(self.recipe, self.resume, self.overwrite)


def prepare(
    name: str,
    overrides: Sequence[str],
    resume: bool,
    overwrite: bool,
    source: str | None = None,
    preset: str | None = None,
) -> Prepared:
    """
    Raises:
        CommandError: whatever can be found wrong on this machine, apart from what is in the output folder.
    """
    with one_line_errors():
        recipe = load_recipe(name, overrides, source, preset)
        recipe.training.setdefault("disable_tqdm", not sys.stderr.isatty())
        args = recipe.training_arguments()
    folder = OutputFolder(Path(str(args.output_dir)))
    if folder.path.exists() and not folder.path.is_dir():
        raise CommandError(f"The output folder {folder.path} is a file.")
    return Prepared(recipe, args, folder, resume, overwrite)


def train(prepared: Prepared) -> None:
    """
    Raises:
        CommandError: data, tokenizer or model that cannot be had, an output folder that another process writes to or
            that is not to be overwritten, or a run that failed.
        KeyboardInterrupt: the run was interrupted; says what is saved.
    """
    with one_line_errors(), _held_folder(prepared) as checkpoint:
        try:
            _train(prepared, checkpoint)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Interrupted. {_what_is_saved(prepared.folder)}") from None
        except Exception as error:
            full = full_disk_error(error)
            if full is None:
                raise
            raise CommandError(f"The disk is full ({first_line(full)}). {_what_is_saved(prepared.folder)}") from error


@contextmanager
def _held_folder(prepared: Prepared) -> Iterator[str | None]:
    """
    Within, no other run writes to the output folder. Gives the checkpoint to go on from, which is that of the main
    process for all.
    """
    outcome: list[str | Exception | None] = [None]
    with ExitStack() as stack:
        if prepared.is_main:
            try:
                stack.enter_context(lock_folder(prepared.folder.path))
                outcome = [prepared.checkpoint()]
            except (CommandError, ValueError, OSError) as error:
                outcome = [CommandError(error)]
        (found,) = broadcast_object_list(outcome)
        if isinstance(found, Exception):
            raise found if prepared.is_main else SystemExit(1)  # once is enough
        yield found


def _train(prepared: Prepared, checkpoint: str | None) -> None:
    recipe, args, folder = prepared.recipe, prepared.args, prepared.folder
    show_bars_of_datasets(not args.disable_tqdm and prepared.is_main)
    trainer = build_trainer(recipe, args, keep_tokenizer=checkpoint is not None)
    facts, interruption = RunFacts.of(trainer), StopOnInterrupt()
    _replace_callbacks(trainer, facts, interruption)
    if checkpoint is not None:
        facts.check(checkpoint)
    set_num_threads(args.device.type, trainer.model.num_parameters())
    if prepared.is_main:
        _print_begin(prepared, trainer, checkpoint)
        if prepared.overwrite:
            folder.clear()
        folder.save_recipe(recipe.values)
        if recipe.checkpoint is not None and not recipe.adapter:
            folder.save_conversion(fetch_model(recipe.checkpoint, recipe.model.get("revision")))
    PartialState().wait_for_everyone()
    with interruption.listening() if args.world_size == 1 else nullcontext():
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if interruption.requested:
        raise KeyboardInterrupt
    trainer.save_model()
    trainer.save_state()
    if trainer.num_steps_trained > 0:
        trainer.save_metrics("train", result.metrics)
    metrics = _final_metrics(trainer)
    if metrics:
        trainer.save_metrics("eval", metrics)
    if prepared.is_main:
        _print_end(prepared, trainer, result.metrics, metrics)
    if args.world_size > 1:
        trainer.accelerator.end_training()


def _what_is_saved(folder: OutputFolder) -> str:
    if not folder.checkpoints:
        return f"{folder.path} holds no checkpoint."
    return (
        f"{folder.path} holds {folder.contents}. To continue from there, run the same command with --resume, and "
        "without --overwrite."
    )


def _replace_callbacks(trainer: BlockGenTrainer, *callbacks: TrainerCallback) -> None:
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    bars = [] if trainer.args.disable_tqdm else [TrainingBar()]
    for callback in (TrainingLog(), *bars, *callbacks):
        trainer.add_callback(callback)


def _print_begin(prepared: Prepared, trainer: BlockGenTrainer, checkpoint: str | None) -> None:
    num_parameters = trainer.model.num_parameters()
    parameters = f"{num_parameters / 1e6:,.1f}M parameters"
    if prepared.recipe.adapter:
        num_trained = trainer.model.num_parameters(only_trainable=True)
        parameters += f", of which {num_trained:,} ({num_trained / num_parameters:.2%}) are trained"
    begins = f"from {checkpoint}" if checkpoint else "begins"
    print(f"{prepared.recipe.source}: {parameters}, {_rows(trainer)}, {begins}", flush=True)
    if checkpoint is not None:
        for change in prepared.folder.changes(prepared.recipe):
            print(f"Changed: {change}", flush=True)


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


def _print_end(
    prepared: Prepared, trainer: BlockGenTrainer, training: dict[str, Any], metrics: dict[str, Any]
) -> None:
    what = "Adapter" if prepared.recipe.adapter else "Model"
    trained = f"Trained in {training['train_runtime']:.0f} s."
    if trainer.num_steps_trained == 0:
        trained = f"The run had its {trainer.state.global_step:,} steps already: nothing was trained."
    print(f"{trained} {what}: {prepared.folder.path}")
    if metrics:
        draws = prepared.args.eval_monte_carlo_samples
        print(f"\nValidation, {draws} Monte-Carlo draws a row:")
        figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        print(likelihood_table(figures).text())
