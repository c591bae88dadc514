"""`blockgen-hf train` in an output folder that is in use, resumed, interrupted, or on a full disk."""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import TINY, sentences, stand_ins, write_text
from safetensors.torch import load_file
from transformers import TrainerCallback

from blockgen_hf.cli import main, training
from blockgen_hf.run_folders import lock_folder


Command = Callable[..., str]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return ["train", "laptop", *TINY, *stand_ins("laptop", tmp_path / "data"), "--output-dir", str(tmp_path / "run")]


@pytest.fixture
def train(words: list[str], capsys: pytest.CaptureFixture[str]) -> Command:
    def run_command(*arguments: str) -> str:
        status = main([*words, *arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run_command


@pytest.fixture
def fail(words: list[str], failing_line: Command) -> Command:
    return lambda *arguments: failing_line(*words, *arguments)


def test_a_second_run_in_the_folder_is_refused(train: Command, fail: Command, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run"):
        for flag in ("--overwrite", "--resume"):
            assert f"Another process is writing to the folder {tmp_path / 'run'}" in fail(flag)
    assert "begins" in train("--max-steps", "1", "data.validation_documents=0")


def test_a_run_that_has_ended_is_not_trained_further(train: Command, tmp_path: Path) -> None:
    """Also one that was killed at its very end: it ends as it would have, at the same step."""
    folder = tmp_path / "run"
    train("--max-steps", "3")
    whole, figures = load_file(folder / "model.safetensors"), (folder / "train_results.json").read_text()
    (folder / "model.safetensors").unlink()
    out = train("--max-steps", "3", "--resume")
    assert "The run had its 3 steps already: nothing was trained." in out
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert (folder / "train_results.json").read_text() == figures
    again = load_file(folder / "model.safetensors")
    assert all(again[name].equal(weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rate=0.5", "another `training.learning_rate`: it was 0.002, and is 0.5 now"),
        ("training.optim=adafactor", "another `training.optim`"),
        ("training.seed=7", "another `training.seed`"),
        ("training.lr_scheduler_type=linear", "another `training.lr_scheduler_type`"),
        ("training.ema_decay=0.5", "another `training.ema_decay`"),
        ("training.global_batch_size=8", "another batch: the rows of a step were 4, and are 8 now"),
        ("training.per_device_train_batch_size=4", "the rows that a process takes at once were 2, and are 4 now"),
    ],
)
def test_what_cannot_change_when_a_run_is_resumed(
    train: Command, fail: Command, tmp_path: Path, change: str, message: str
) -> None:
    train("--max-steps", "1", "training.learning_rate=2e-3")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    fixed = () if "learning_rate" in change else ("training.learning_rate=0.002",)  # as it is written does not matter
    assert message in fail("--max-steps", "2", "--resume", *fixed, change)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe


def test_what_may_change_is_told(train: Command) -> None:
    train("--max-steps", "1", "training.lr_scheduler_type=cosine")
    out = train("--max-steps", "2", "training.lr_scheduler_type=cosine", "--resume", "training.save_steps=7")
    assert "Changed: training.max_steps: 1 -> 2" in out and "Changed: training.save_steps:" in out
    assert "the learning rate follows `cosine` over the new number of steps" in out


def test_a_longer_schedule_holds_from_the_first_step_on(train: Command) -> None:
    """The rate of the step after the resume is that of a run that was as long from the beginning."""
    settings = ("training.lr_scheduler_type=linear", "training.warmup_steps=0", "training.learning_rate=1e-3")
    train(*settings, "--max-steps", "2")
    rates = re.findall(r"lr ([\d.e+-]+)", train(*settings, "--max-steps", "4", "--resume"))
    assert [float(rate) for rate in rates] == pytest.approx([5e-4, 2.5e-4])


def test_data_that_have_changed_are_refused(train: Command, fail: Command, tmp_path: Path) -> None:
    train("--max-steps", "1")
    file = tmp_path / "data" / "stories.txt"
    os.utime(file, (0, 0))  # another time, the same rows
    train("--max-steps", "2", "--resume")
    write_text(file, [*sentences()[:-8], *reversed(sentences()[-8:])])
    assert "The training data have changed since" in fail("--max-steps", "3", "--resume")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "training_weights.safetensors", "trainer_state.json"]
)
def test_checkpoints_that_lack_something(train: Command, fail: Command, tmp_path: Path, name: str) -> None:
    train("--max-steps", "1")
    (tmp_path / "run" / "checkpoint-1" / name).unlink()
    message = fail("--max-steps", "2", "--resume")
    assert f"checkpoint-1 has no {name}, without which the run would not go on as it was. Delete" in message


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "training_weights.safetensors", "model.safetensors", "trainer_state.json"]
)
def test_checkpoints_that_are_damaged(train: Command, fail: Command, tmp_path: Path, name: str) -> None:
    train("--max-steps", "1")
    file = tmp_path / "run" / "checkpoint-1" / name
    os.truncate(file, file.stat().st_size // 2)
    message = fail("--max-steps", "2", "--resume")
    assert "checkpoint-1 cannot be read: " in message and "delete its folder to resume from an earlier one" in message


@pytest.mark.parametrize("text", ["", "[]", "model", "model: {"])
def test_a_damaged_recipe_of_the_run(train: Command, fail: Command, tmp_path: Path, text: str) -> None:
    train("--max-steps", "1")
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    message = fail("--max-steps", "2", "--resume")
    assert "recipe.yaml is damaged, or was written by another version: " in message
    (tmp_path / "run" / "recipe.yaml").unlink()
    train("--max-steps", "2", "--resume")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["max_steps"] == 2


class InterruptAt(TrainerCallback):
    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def interrupt(monkeypatch: pytest.MonkeyPatch, *arguments: int) -> None:
    build = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *a, **k: build(*a, **k, callbacks=[InterruptAt(*arguments)]))


def test_an_interrupted_run_saves_and_goes_on(
    train: Command,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    train()
    whole = load_file(folder / "model.safetensors")
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        (folder / "model.safetensors").unlink(), (folder / "config.json").unlink()
        assert main([*words, "--overwrite"]) == 130
    assert signal.getsignal(signal.SIGINT) == before
    message = f"Interrupted. {folder} holds checkpoint-3. To continue from there, run the same command with --resume"
    assert message in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists()
    train("--resume")
    resumed = load_file(folder / "model.safetensors")
    assert all(resumed[name].equal(weight) for name, weight in whole.items())


def test_a_second_interruption_ends_at_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 2, 2)
    assert main(words) == 130
    assert f"Interrupted. {tmp_path / 'run'} holds no checkpoint." in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 22400 vs 22288"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(train: Command, fail: Command, tmp_path: Path, error: Exception) -> None:
    train("--max-steps", "1")

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.save", no_space)
        message = fail("--max-steps", "2", "--resume")
    assert "The disk is full (" in message and "holds checkpoint-1 and a model. To continue" in message
    assert not (tmp_path / "run" / "_unfinished").exists()
    train("--max-steps", "2", "--resume")
