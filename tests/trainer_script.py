"""
A small training that tests launch in processes of its own: `python trainer_script.py SPECIFICATION`, or [`run`].

The specification is JSON, all of it optional but `folder`:

- `folder`: the output, `settings`: training arguments, `model`: overrides of the configuration, `rows`: how many.
- `resume`: a checkpoint, or true for the last one of the folder. `save`: whether the model is saved at the end.
- `result`: a file that the losses and what else was logged are written to by the main process.
- `kill`: `{"function": dotted name, "match": part of its arguments, "call": which, "when": "before", "half" or
  "after"}`: the process ends itself by SIGKILL there; `"half"` cuts the file that the function has written, or takes a
  file out of the folder that it was to delete.
- `poison`: a row of the data on which the model's losses are not finite.
- `environment`: variables, set before anything else.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import tiny_model
from training import TokenRows, make_trainer


def run(specification: dict[str, Any]) -> None:
    """One training run."""
    os.environ.update(specification.get("environment", {}))
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        allow_fsdp_on_cpu()
    if "kill" in specification:
        kill_in(**specification["kill"])
    settings = dict(
        max_steps=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        eval_monte_carlo_samples=1,
    )
    model, rows = tiny_model(**specification.get("model", {})), TokenRows(specification.get("rows", 64), shortest=9)
    if "poison" in specification:
        poison(model, rows, specification["poison"])
    trainer = make_trainer(
        Path(specification["folder"]),
        model,
        rows,
        eval_rows=TokenRows(5, shortest=6, seed=1),
        **{**settings, **specification.get("settings", {})},
    )
    trainer.train(resume_from_checkpoint=specification.get("resume"))
    if specification.get("save"):
        trainer.save_model()
    if specification.get("result") and trainer.is_world_process_zero():
        history = [{k: v for k, v in entry.items() if is_reproducible(k)} for entry in trainer.state.log_history]
        result = {
            "history": history[:-1],  # the last entry is of the time taken
            "best": trainer.state.best_model_checkpoint,
            "distributed_type": str(trainer.accelerator.distributed_type),
            "num_processes": trainer.accelerator.num_processes,
        }
        Path(specification["result"]).write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def poison(model: torch.nn.Module, rows: TokenRows, row: int) -> None:
    """The word 7 stands in this row alone, first, where all blocks see it, and is embedded as NaN."""
    rows.tokens[rows.tokens == 7] = 8
    rows.tokens[row, 0] = 7
    embedding = model.get_submodule("model.embed_tokens")
    embedding.register_forward_hook(lambda _, args, output: torch.where((args[0] == 7)[..., None], math.nan, output))


def is_reproducible(name: str) -> bool:
    return not any(part in name for part in ("runtime", "per_second", "preparation_time", "flos"))


def allow_fsdp_on_cpu() -> None:
    """accelerate 1.15 takes FSDP for accelerators only, though FSDP2 works on CPUs with gloo: this is for tests."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("_plugin_of_tests")
        if plugin is not None:
            self._plugin_of_tests = plugin
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = init


def kill_in(function: str, call: int = 1, when: str = "before", match: str = "") -> None:
    """Ends the process by SIGKILL in the `call`th call, counted from 1, whose arguments contain `match`."""
    owner_name, name = function.rsplit(".", 1)
    owner = resolve(owner_name)
    original: Callable[..., Any] = getattr(owner, name)
    count = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += match in " ".join(str(value) for value in (*args, *kwargs.values()) if isinstance(value, str | Path))
        if count < call:
            return original(*args, **kwargs)
        if when == "half" and name == "rmtree":
            take_one_file(Path(args[0]))
        elif when != "before":
            original(*args, **kwargs)
        if when == "half" and name != "rmtree":
            for value in (*args, *kwargs.values()):
                if isinstance(value, str | Path) and os.path.isfile(value):
                    os.truncate(value, os.path.getsize(value) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, patched)


def take_one_file(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # training_weights before model
        if path.is_file():
            path.unlink()
            return


def resolve(name: str) -> Any:
    """A module, or something in one, by its dotted name."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    owner, attribute = name.rsplit(".", 1)
    return getattr(resolve(owner), attribute)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
