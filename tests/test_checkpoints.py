"""Killed at any moment, a run leaves complete checkpoints, goes on from them, and keeps those that it should."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from training import (
    CHECKPOINT_FILES,
    Recorder,
    TokenRows,
    are_equal,
    checkpoints,
    history,
    make_trainer,
    run_in_process,
    saved_model,
    saved_weights,
    weights,
)
from transformers.trainer_utils import get_last_checkpoint

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.hub.files import move_model
from blockgen_hf.training import ema
from blockgen_hf.training.checkpointing import keep_checkpoint, replace_folder, rotate_checkpoints


pytest.importorskip("accelerate", reason="Trainer needs accelerate")

Run = Callable[..., int]


def is_complete(checkpoint: Path) -> bool:
    """All files there, and whole: read as they are on resuming."""
    if not {path.name for path in checkpoint.iterdir()} >= CHECKPOINT_FILES:
        return False
    BlockGenForDiffusionLM.from_pretrained(checkpoint)
    saved_weights(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(checkpoint / name, weights_only=name != "rng_state.pth")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["global_step"] == int(checkpoint.name.split("-")[1])


# Without a kill


@pytest.mark.parametrize("limit, expected", [(None, [1, 2, 3, 4, 5]), (2, [4, 5])])
def test_the_latest_checkpoints_are_kept_and_nothing_else(
    limit: int | None, expected: list[int], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=limit)
    trainer.train()
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(checkpoints(tmp_path))
    for name in checkpoints(tmp_path):
        assert {path.name for path in (tmp_path / name).iterdir()} >= CHECKPOINT_FILES
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    "limit, load, expected",
    [(2, False, [2, 5]), (1, True, [2]), pytest.param(3, True, [2, 4, 5], marks=pytest.mark.slow)],
)
def test_the_best_checkpoint_is_protected(limit: int, load: bool, expected: list[int], tmp_path: Path) -> None:
    """And its path is where it is, in the state of every checkpoint saved since."""
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2])
    trainer = make_trainer(
        tmp_path,
        eval_rows=TokenRows(2, seed=1),
        trainer_kwargs={"compute_metrics": lambda prediction: {"score": next(scores)}},
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit,
        load_best_model_at_end=load,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_monte_carlo_samples=1,
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in expected]
    best = str(tmp_path / "checkpoint-2")
    assert trainer.state.best_model_checkpoint == best
    for step in expected:
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best and state["best_global_step"] == 2
        assert state["best_metric"] == 0.5


def test_only_the_best_are_saved(tmp_path: Path) -> None:
    scores = iter([0.1, 0.05, 0.4, 0.3])
    trainer = make_trainer(
        tmp_path,
        eval_rows=TokenRows(2, seed=1),
        trainer_kwargs={"compute_metrics": lambda prediction: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="score",
        greater_is_better=True,
        eval_monte_carlo_samples=1,
    )
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")


def test_what_an_earlier_kill_has_left_does_not_disturb(tmp_path: Path) -> None:
    left = tmp_path / "_unfinished" / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "rubbish").write_text("")
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "rubbish").exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """A second run in the same folder."""
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-2" / "rubbish").write_text("")
    first = saved_model(tmp_path / "checkpoint-2")
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, seed=9).train()
    assert not (tmp_path / "checkpoint-2" / "rubbish").exists()
    assert not are_equal(first, saved_model(tmp_path / "checkpoint-2"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_model_is_saved_beside_other_things(tmp_path: Path) -> None:
    """Over an older model too; checkpoints and what else is in the folder stay."""
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "notes.txt").write_text("mine")
    tiny_model(seed=7).save_pretrained(tmp_path)
    trainer.save_model()
    assert (tmp_path / "notes.txt").read_text() == "mine" and checkpoints(tmp_path) == ["checkpoint-2"]
    assert not (tmp_path / "_unfinished").exists()
    assert are_equal(saved_model(tmp_path), saved_model(tmp_path / "checkpoint-2"))
    BlockGenForDiffusionLM.from_pretrained(tmp_path)


def make_folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text(path.name)
    return path


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "checkpoint-1", "a", "b")
    new = make_folder(tmp_path / "_unfinished" / "checkpoint-1", "b", "c")
    replace_folder(new, old)
    assert sorted(path.name for path in old.iterdir()) == ["b", "c"] and not new.exists()


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_weights_are_moved_last(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the folder is no model, neither the old one nor the new one, whatever kind they are of."""
    shard = "model-00001-of-00002.safetensors"
    target = make_folder(tmp_path / "model", "config.json", "adapter_config.json", *WEIGHTS, shard, "notes.txt")
    source = make_folder(target / "_unfinished" / "model", "config.json", "a.json", weights, "z.json")
    (source / "folder").mkdir()
    moved: list[str] = []
    replace = os.replace

    def observe(one: Path, other: Path) -> None:
        assert not any((target / name).exists() for name in (*WEIGHTS, shard, "adapter_config.json"))
        moved.append(Path(other).name)
        replace(one, other)

    monkeypatch.setattr(os, "replace", observe)
    move_model(source, target)
    assert moved[-1] == weights and len(moved) == 5
    assert (target / "notes.txt").exists() and not source.exists()
    assert [name for name in WEIGHTS if (target / name).exists()] == [weights]


def test_a_model_that_is_saved_deletes_no_folder_and_no_file_of_another_name(tmp_path: Path) -> None:
    target = make_folder(tmp_path / "model", "model-mine.safetensors", "model.safetensors")
    make_folder(target / "config.json", "precious.txt")
    source = make_folder(target / "_unfinished" / "model", "config.json", "model.safetensors")
    with pytest.raises(OSError, match=r"config\.json"):
        move_model(source, target)
    assert (target / "config.json" / "precious.txt").exists() and (target / "model-mine.safetensors").exists()


def test_rotation_deletes_the_oldest_that_are_neither_last_nor_best(tmp_path: Path) -> None:
    def names() -> list[int]:
        return [int(name.split("-")[1]) for name in checkpoints(tmp_path)]

    for number, step in enumerate([1, 2, 3, 4, 5]):
        os.utime(make_folder(tmp_path / f"checkpoint-{step}", "a"), (number, number))
    rotate_checkpoints(tmp_path, None, None)
    rotate_checkpoints(tmp_path, 0, None)
    assert names() == [1, 2, 3, 4, 5]
    rotate_checkpoints(tmp_path, 3, str(tmp_path / "checkpoint-1"))
    assert names() == [1, 4, 5]
    rotate_checkpoints(tmp_path, 1, str(tmp_path / "checkpoint-1"))
    assert names() == [1, 5]
    keep_checkpoint(tmp_path, str(tmp_path / "checkpoint-9"))
    assert names() == [1, 5]  # the one to keep is not there
    keep_checkpoint(tmp_path, str(tmp_path / "checkpoint-1"))
    assert names() == [1]
    rotate_checkpoints(tmp_path / "empty", 1, None)


# Killed


@pytest.fixture(scope="module")
def run() -> Run:
    """Runs a specification of `trainer_script` in a process of its own, forked from one that has imported all."""
    return run_in_process


SETTINGS: dict[str, Any] = {"model": {"hidden_dropout": 0.1}}


@pytest.fixture(scope="module")
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints and the log of the whole run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder, result=str(folder / "result.json"), save=True, **SETTINGS) == 0
    return folder


TRAINER = "blockgen_hf.training.trainer.BlockGenTrainer"
KILLS: dict[str, tuple[dict[str, Any], list[int]]] = {
    # where: the kill, and the checkpoints that it leaves
    "in_the_first_step": ({"function": f"{TRAINER}.compute_loss", "call": 2}, []),
    "between_the_micro_batches_of_step_6": ({"function": f"{TRAINER}.compute_loss", "call": 12}, [2, 4]),
    "before_the_optimizer_of_step_5": ({"function": "torch.optim.AdamW.step", "call": 5}, [2, 4]),
    "before_anything_is_written": ({"function": f"{TRAINER}._save_checkpoint", "call": 2}, [2]),
    "in_the_model_of_the_first": (
        {"function": "transformers.modeling_utils.safe_save_file", "call": 1, "when": "half"},
        [],
    ),
    "in_the_model": ({"function": "transformers.modeling_utils.safe_save_file", "call": 3, "when": "half"}, [2, 4]),
    "in_the_optimizer": ({"function": "torch.save", "match": "optimizer.pt", "call": 3, "when": "half"}, [2, 4]),
    "in_the_weights": ({"function": "blockgen_hf.training.ema.save_file", "call": 3, "when": "half"}, [2, 4]),
    "before_the_random_numbers": ({"function": f"{TRAINER}._save_rng_state", "call": 3}, [2, 4]),
    "before_the_state": ({"function": "transformers.TrainerState.save_to_json", "call": 3}, [2]),
    "in_the_state": ({"function": "transformers.TrainerState.save_to_json", "call": 6, "when": "half"}, [2, 4]),
    "before_it_is_moved": (
        {"function": "os.replace", "match": "_unfinished/checkpoint", "call": 3},
        [2, 4],
    ),
    "after_it_is_moved": (
        {"function": "os.replace", "match": "_unfinished/checkpoint", "call": 3, "when": "after"},
        [2, 4, 6],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_goes_on_from_the_last_complete_checkpoint(
    where: str, run: Run, uninterrupted: Path, tmp_path: Path
) -> None:
    """Every folder that is there is complete; the losses after resuming are those of the run that was not killed."""
    kill, left = KILLS[where]
    folder, result = tmp_path / "run", tmp_path / "result.json"
    assert run(folder, kill=kill, **SETTINGS) == -signal.SIGKILL
    assert checkpoints(folder) == [f"checkpoint-{step}" for step in left]
    assert all(is_complete(folder / name) for name in checkpoints(folder))
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    assert last == (str(folder / f"checkpoint-{left[-1]}") if left else None)
    assert run(folder, resume=bool(left), result=str(result), save=True, **SETTINGS) == 0
    assert history(result) == history(uninterrupted / "result.json")
    assert are_equal(saved_model(folder), saved_model(uninterrupted))
    assert checkpoints(folder) == checkpoints(uninterrupted)
    assert not (folder / "_unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill, left",
    [
        ({"function": "shutil.rmtree", "match": "deleted-checkpoint-4", "call": 2, "when": "half"}, [6]),
        ({"function": "os.replace", "match": "deleted-checkpoint-4", "when": "before"}, [4, 6]),
        ({"function": "os.replace", "match": "deleted-checkpoint-4", "when": "after"}, [6]),
    ],
    ids=["in_the_deletion", "before_it", "after_the_move"],
)
def test_a_checkpoint_that_is_being_deleted_is_none(
    kill: dict[str, Any], left: list[int], run: Run, uninterrupted: Path, tmp_path: Path
) -> None:
    """`save_total_limit=1`."""
    folder, result = tmp_path / "run", tmp_path / "result.json"
    limited = {**SETTINGS, "settings": {"save_total_limit": 1}}
    assert run(folder, kill=kill, **limited) == -signal.SIGKILL
    assert checkpoints(folder) == [f"checkpoint-{step}" for step in left]
    assert all(is_complete(folder / name) for name in checkpoints(folder))
    assert run(folder, resume=True, result=str(result), **limited) == 0
    assert history(result) == history(uninterrupted / "result.json")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-8"]


@pytest.mark.slow
def test_the_last_checkpoint_is_deleted_in_one_step_when_the_best_is_loaded(run: Run, tmp_path: Path) -> None:
    """With `save_total_limit=1` Trainer deletes, at the end, the last checkpoint if an earlier one is the best."""
    settings = {
        "learning_rate": 1e-3,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # it falls: the first checkpoint is the best
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    kill = {"function": "shutil.rmtree", "match": "checkpoint-8", "call": 2, "when": "half"}
    assert run(tmp_path / "run", kill=kill, settings=settings) == -signal.SIGKILL
    (best,) = checkpoints(tmp_path / "run")
    assert best != "checkpoint-8" and is_complete(tmp_path / "run" / best)


@pytest.fixture(scope="module")
def new_model(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The model that the next test saves."""
    folder = tmp_path_factory.mktemp("new_model")
    assert run(folder, save=True, settings={"max_steps": 2, "save_strategy": "no"}) == 0
    return saved_model(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        {"function": "transformers.modeling_utils.safe_save_file", "match": "_unfinished/model", "when": "half"},
        *({"function": "os.replace", "match": "_unfinished/model", "call": call} for call in (1, 2, 4)),
        {"function": "shutil.rmtree", "match": "_unfinished/model", "when": "before"},
    ],
    ids=lambda kill: f"{kill['function'].split('.')[-1]}_{kill.get('call', 1)}",
)
@pytest.mark.parametrize("is_there", [False, True], ids=["empty", "old_model"])
def test_killed_while_the_model_is_saved_the_folder_is_a_model_or_none(
    kill: dict[str, Any], is_there: bool, run: Run, new_model: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The old one or the new one, never a mixture, whichever of the files were moved."""
    folder = tmp_path / "run"
    old = tiny_model(seed=7)
    if is_there:
        old.save_pretrained(folder)
    settings = {"max_steps": 2, "save_strategy": "no"}
    assert run(folder, kill=kill, save=True, settings=settings) == -signal.SIGKILL
    try:
        loaded = BlockGenForDiffusionLM.from_pretrained(folder)
    except OSError:
        assert not (folder / "model.safetensors").exists()
    else:
        is_old = are_equal(dict(loaded.state_dict()), dict(old.state_dict()))
        assert is_old or are_equal(saved_model(folder), new_model)
        assert is_old <= is_there
        assert is_old or (folder / "config.json").exists()
    assert run(folder, save=True, settings=settings) == 0
    assert not (folder / "_unfinished").exists()
    assert are_equal(saved_model(folder), new_model) and (folder / "config.json").exists()


def test_a_checkpoint_with_the_model_only_says_what_a_run_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average, which is what was saved: not the weights of that step."""
    warnings: list[str] = []
    monkeypatch.setattr(ema.logger, "warning", lambda message, *args: warnings.append(message % args))
    settings: dict[str, Any] = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    make_trainer(tmp_path / "whole", save_only_model=True, **settings).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    begun: list[dict[str, torch.Tensor]] = []
    recorder = Recorder(on_train_begin=lambda model, state: begun.append(weights(model)))
    make_trainer(tmp_path / "resumed", callbacks=[recorder], **settings).train(resume_from_checkpoint=str(checkpoint))
    assert are_equal(begun[0], saved_model(checkpoint))
    (warning,) = warnings
    assert "no training_weights.safetensors" in warning and "`save_only_model=True` saves the average alone" in warning
