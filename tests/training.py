"""What the tests of the trainer share: rows, a small run, and what is looked at afterwards."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_model, words
from transformers import TrainerCallback

from blockgen_hf.training import BlockGenTrainer, BlockGenTrainingArguments


# What a checkpoint consists of, from which a run of one process goes on.
CHECKPOINT_FILES = {
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "training_weights.safetensors",
}


class TokenRows(torch.utils.data.Dataset):
    """Random rows with the number of their document; of unequal length if `shortest` is given."""

    def __init__(self, number: int = 64, length: int = 16, shortest: int | None = None, seed: int = 0) -> None:
        self.tokens = words(number, length, seed=seed)
        span = length - (length if shortest is None else shortest)
        self.lengths = [length - (7 * row) % (span + 1) for row in range(number)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index, : self.lengths[index]].tolist(), "source": index}


class LabelledRows(TokenRows):
    """The rows that `unscored` names have nothing to learn."""

    def __init__(self, *args: Any, unscored: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unscored = set(unscored)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        ids = row["input_ids"]
        return {**row, "labels": [-100] * len(ids) if index in self.unscored else list(ids)}


class StreamedRows(torch.utils.data.IterableDataset):
    """The same rows, one after the other."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.rows[index] for index in range(len(self.rows)))


class Recorder(TrainerCallback):
    """Calls functions of the model and the state where Trainer calls back."""

    def __init__(self, **functions: Callable[[torch.nn.Module, Any], None]) -> None:
        for event, function in functions.items():
            setattr(self, event, self._handler(function))

    @staticmethod
    def _handler(function: Callable[[torch.nn.Module, Any], None]) -> Callable[..., None]:
        def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            function(kwargs["model"], state)

        return handle


def make_trainer(
    folder: Path,
    model: torch.nn.Module | None = None,
    rows: torch.utils.data.Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    eval_rows: torch.utils.data.Dataset | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> BlockGenTrainer:
    """A trainer on the CPU whose every step is logged, without warm-up."""
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        warmup_steps=0,
        max_steps=4,
        per_device_train_batch_size=2,
        ema_decay=0.9,
        seed=1,
    )
    trainer = BlockGenTrainer(
        tiny_model() if model is None else model,
        BlockGenTrainingArguments(**{**defaults, **settings}),
        train_dataset=TokenRows() if rows is None else rows,
        eval_dataset=eval_rows,
        callbacks=list(callbacks),
        **(trainer_kwargs or {}),
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def logs(trainer: BlockGenTrainer, *names: str) -> list[dict[str, float]]:
    """What was logged of every step: the losses, those of block sizes among them, and what `names` say."""
    return [
        {name: value for name, value in entry.items() if name.startswith("loss") or name in names}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def losses(trainer: BlockGenTrainer) -> list[float]:
    return [entry["loss"] for entry in logs(trainer)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved_model(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a model that was saved in one file."""
    return load_file(Path(folder) / "model.safetensors")


def saved_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights that the optimizer of a checkpoint goes on with."""
    return load_file(Path(folder) / "training_weights.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, oldest first."""
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


def run_in_processes(*specifications: dict[str, Any], timeout: float = 100) -> list[int]:
    """
    Runs `trainer_script` with each specification, all at once, and returns how the processes ended. They are forked
    from one that has imported all, which takes seconds, and has computed nothing.
    """
    import trainer_script

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_script"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)  # it imports what we import
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    processes = [context.Process(target=trainer_script.run, args=(one,)) for one in specifications]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    is_hanging = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert not any(is_hanging)
    return [process.exitcode for process in processes if process.exitcode is not None]


def run_in_process(folder: Path, **specification: Any) -> int:
    """One run of `trainer_script` with output in `folder`; how its process ended."""
    (code,) = run_in_processes({"folder": str(folder), **specification})
    return code


def history(result: Path) -> list[dict[str, float]]:
    """All that was logged, but what depends on the clock."""
    entries: list[dict[str, float]] = json.loads(result.read_text())["history"]
    return entries
