"""`BlockGenTrainer` saves and evaluates the average of the weights, and resumed runs go on with both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from training import (
    Recorder,
    TokenRows,
    are_equal,
    logs,
    losses,
    make_trainer,
    saved_model,
    saved_weights,
    weights,
)

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.training import BlockGenTrainer


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


# The average of the weights


def averages_by_hand(history: list[dict[str, torch.Tensor]], decay: float) -> list[dict[str, torch.Tensor]]:
    """The recursion in float64; the first weights are those before step 1."""
    averages = [{name: value.double() for name, value in history[0].items()}]
    for n, values in enumerate(history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        averages.append({name: d * average + (1 - d) * values[name] for name, average in averages[-1].items()})
    return averages


@pytest.mark.parametrize("decay", [0.4, pytest.param(0.9999, marks=pytest.mark.slow)])
def test_the_average_follows_its_recursion_with_warm_up(decay: float, tmp_path: Path) -> None:
    """0.4 is reached in step 5, 0.9999 never. Checkpoints hold the average, and the weights beside it."""
    history: list[dict[str, torch.Tensor]] = []
    recorder = Recorder(
        on_train_begin=lambda model, state: history.append(weights(model)),
        on_step_end=lambda model, state: history.append(weights(model)),
    )
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        ema_decay=decay,
        learning_rate=1e-2,
        max_steps=12,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert len(history) == 13 and not are_equal(history[0], history[1])
    expected = averages_by_hand(history, decay)
    for step in (4, 8, 12):
        saved = saved_model(tmp_path / f"checkpoint-{step}")
        for name, value in expected[step].items():
            torch.testing.assert_close(saved[name], value.float(), atol=1e-6, rtol=1e-5)
        assert are_equal(saved_weights(tmp_path / f"checkpoint-{step}"), history[step])
    assert are_equal(weights(trainer.model), saved_model(tmp_path / "checkpoint-12"))
    trainer.save_model(str(tmp_path / "model"))
    assert are_equal(saved_model(tmp_path / "model"), weights(trainer.model))
    loaded = BlockGenForDiffusionLM.from_pretrained(tmp_path / "checkpoint-8")
    assert are_equal(weights(loaded), saved_model(tmp_path / "checkpoint-8"))


def test_without_an_average_the_weights_are_saved(tmp_path: Path) -> None:
    last: dict[str, torch.Tensor] = {}
    recorder = Recorder(on_step_end=lambda model, state: last.update(weights(model)))
    trainer = make_trainer(
        tmp_path, callbacks=[recorder], ema_decay=0.0, learning_rate=1e-2, save_strategy="steps", save_steps=4
    )
    trainer.train()
    assert are_equal(saved_model(tmp_path / "checkpoint-4"), last)
    assert are_equal(weights(trainer.model), last)
    assert not (tmp_path / "checkpoint-4" / "training_weights.safetensors").exists()


def test_a_second_training_begins_with_an_average_of_its_own(tmp_path: Path) -> None:
    """As when the first one was interrupted, also by an error."""

    def interrupt(model: torch.nn.Module, state: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    recorder = Recorder(on_step_end=interrupt)
    trainer = make_trainer(tmp_path, callbacks=[recorder], learning_rate=1e-2, ema_decay=0.99, max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(recorder)
    history: list[dict[str, torch.Tensor]] = []
    trainer.add_callback(
        Recorder(
            on_train_begin=lambda model, state: history.append(weights(model)),
            on_step_end=lambda model, state: history.append(weights(model)),
        )
    )
    trainer.train()
    expected = averages_by_hand(history, 0.99)[-1]
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, expected[name].float(), atol=1e-6, rtol=1e-5)


def test_a_new_model_has_an_average_of_its_own(tmp_path: Path) -> None:
    """`model_init`, as a search over hyper-parameters uses it: an abandoned trial leaves nothing behind."""

    def interrupt(model: torch.nn.Module, state: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    recorder = Recorder(on_step_end=interrupt)
    args = make_trainer(tmp_path, learning_rate=1e-2).args
    trainer = BlockGenTrainer(
        model_init=lambda: tiny_model(), args=args, train_dataset=TokenRows(), callbacks=[recorder]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(recorder)
    trainer.train()
    fresh = make_trainer(tmp_path, learning_rate=1e-2)
    fresh.train()
    assert are_equal(weights(trainer.model), weights(fresh.model))


# Resuming


@pytest.mark.parametrize(
    "step, decay",  # within the first epoch, and at its end
    [(3, 0.9), (4, 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 0.9), (3, 0.0)])],
)
def test_a_resumed_run_goes_on_as_if_uninterrupted(step: int, decay: float, tmp_path: Path) -> None:
    """Losses, averages and weights are equal bit for bit, dropout included; the model given on resuming is another."""
    settings: dict[str, Any] = dict(
        rows=TokenRows(16, shortest=9),
        max_steps=7,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        ema_decay=decay,
    )
    whole = make_trainer(tmp_path / "whole", tiny_model(hidden_dropout=0.1), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", tiny_model(seed=5, hidden_dropout=0.1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    names = ("grad_norm", "learning_rate", "num_input_tokens_seen", "epoch", "step")
    assert logs(resumed, *names) == logs(whole, *names)
    assert are_equal(weights(resumed.model), weights(whole.model))
    for later in range(step + 1, 8):
        one, other = (tmp_path / run / f"checkpoint-{later}" for run in ("whole", "resumed"))
        assert are_equal(saved_model(one), saved_model(other))
        if decay:
            assert are_equal(saved_weights(one), saved_weights(other))


@pytest.mark.slow
def test_an_average_may_begin_or_end_when_a_run_is_resumed(tmp_path: Path) -> None:
    """Without one the weights go on, not the average that was saved; with one it begins with the weights."""
    settings: dict[str, Any] = dict(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    whole = make_trainer(tmp_path / "whole", ema_decay=0.0, **settings)
    whole.train()
    make_trainer(tmp_path / "averaged", ema_decay=0.9, **settings).train()
    ended = make_trainer(tmp_path / "ended", tiny_model(seed=5), ema_decay=0.0, **settings)
    ended.train(resume_from_checkpoint=str(tmp_path / "averaged" / "checkpoint-2"))
    assert losses(ended) == losses(whole)
    assert are_equal(weights(ended.model), weights(whole.model))
    begun = make_trainer(tmp_path / "begun", tiny_model(seed=5), ema_decay=0.9, **settings)
    begun.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(begun) == losses(whole)
    assert are_equal(saved_weights(tmp_path / "begun" / "checkpoint-4"), weights(whole.model))


@pytest.mark.slow
def test_a_checkpoint_of_the_model_alone_can_be_resumed(tmp_path: Path) -> None:
    """`save_only_model`: the run goes on from the average."""
    settings: dict[str, Any] = dict(max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
    make_trainer(tmp_path, **settings).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4 and len(losses(resumed)) == 4
