"""`BlockGenTrainer` with nothing to learn in a batch, with numbers that are not finite, and without labels."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import record_forwards, tiny_model, tiny_tokenizer, words
from training import (
    LabelledRows,
    Recorder,
    StreamedRows,
    TokenRows,
    checkpoints,
    logs,
    losses,
    make_trainer,
    saved_model,
    saved_weights,
    weights,
)
from transformers import DataCollatorWithPadding


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


@pytest.mark.parametrize("first", [0, 8])
def test_rows_without_anything_to_learn_do_no_harm(first: int, tmp_path: Path) -> None:
    """A micro-batch, and all rows of a step, whose labels are -100 throughout."""
    rows = LabelledRows(24, unscored=[*range(first, 8), *range(8, 16)])  # with 8: step 2 has nothing; with 0: 1 and 2
    trainer = make_trainer(
        tmp_path,
        rows=StreamedRows(rows),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
    )
    trainer.train()
    values = losses(trainer)
    assert values[1] == 0 and values[2] > 0 and (values[0] > 0) == (first == 8)
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


def test_a_micro_batch_without_anything_to_learn_does_no_harm(tmp_path: Path) -> None:
    """The loss is that of the other micro-batch, by its own tokens."""
    trainer = make_trainer(
        tmp_path,
        rows=StreamedRows(LabelledRows(8, unscored=range(4, 8))),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trainer.train()
    (entry,) = logs(trainer)
    (of_size,) = [value for name, value in entry.items() if name != "loss"]
    assert entry["loss"] == pytest.approx(of_size, rel=1e-5)


def spoil(step: int) -> Recorder:
    """Sets a weight to NaN before a step, counted from 1."""

    def on_step_begin(model: torch.nn.Module, state: Any) -> None:
        if state.global_step == step - 1:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)

    return Recorder(on_step_begin=on_step_begin)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_next_checkpoint(logging_steps: int, tmp_path: Path) -> None:
    model = tiny_model()
    trainer = make_trainer(
        tmp_path,
        model,
        callbacks=[spoil(step=3)],
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        logging_steps=logging_steps,
        lr_scheduler_type="constant",
    )
    with record_forwards(model) as calls, pytest.raises(ValueError, match="not finite") as caught:
        trainer.train()
    message = str(caught.value)
    assert f"step 3: block size {calls[2]['block_size']}, rows [0, 1]" in message
    assert "documents [" in message and len(calls) <= 4
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in saved_model(tmp_path / "checkpoint-2").values())
    assert all(value.isfinite().all() for value in saved_weights(tmp_path / "checkpoint-2").values())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_the_documents_of_a_bad_batch_are_named(tmp_path: Path) -> None:
    """Rows of the batch and documents of the data, in the order that the stream has them."""

    def poison(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == 7)[..., None], math.nan, output)

    rows = TokenRows(8)
    rows.tokens[rows.tokens == 7] = 8
    rows.tokens[5, 0] = 7  # the clean token at the front, which all later blocks see
    model = tiny_model(block_sizes=[4])
    model.model.embed_tokens.register_forward_hook(poison)
    trainer = make_trainer(tmp_path, model, StreamedRows(rows), max_steps=4, ema_decay=0.0, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"step 3: block size 4, rows \[1\] of a batch, documents \[5\]"):
        trainer.train()


def test_a_loss_that_is_not_finite_is_told_without_checkpoints_and_logs(tmp_path: Path) -> None:
    """At the end at the latest: what follows would save the model."""
    trainer = make_trainer(tmp_path, callbacks=[spoil(step=2)], max_steps=3, logging_strategy="no")
    with pytest.raises(ValueError, match="not finite"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A step whose loss is finite and whose gradient is not spoils the weights that a checkpoint would hold."""

    def spoil_gradient(model: torch.nn.Module, state: Any) -> None:
        if state.global_step == 3:
            next(model.parameters()).grad.fill_(math.nan)

    trainer = make_trainer(
        tmp_path,
        callbacks=[Recorder(on_pre_optimizer_step=spoil_gradient)],
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(ValueError, match="not finite"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_a_batch_without_labels_is_refused_by_name(tmp_path: Path) -> None:
    collator = DataCollatorWithPadding(tiny_tokenizer())
    rows = [{"input_ids": row.tolist()} for row in words(4, 8)]
    trainer = make_trainer(tmp_path, rows=rows, trainer_kwargs={"data_collator": collator})
    with pytest.raises(ValueError, match="`data_collator` must return `input_ids` and `labels`"):
        trainer.train()
