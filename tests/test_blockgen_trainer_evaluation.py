"""`BlockGenTrainer.evaluate`: bounds of the average, however rows are batched and padded; early stopping."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training import (
    Recorder,
    TokenRows,
    are_equal,
    losses,
    make_trainer,
    saved_model,
    saved_weights,
    weights,
)
from transformers import DataCollatorWithFlattening, EarlyStoppingCallback

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


def test_evaluation_is_of_the_average_and_gives_the_weights_back(tmp_path: Path) -> None:
    before: list[dict[str, torch.Tensor]] = []
    after: list[dict[str, torch.Tensor]] = []
    recorder = Recorder(
        on_step_end=lambda model, state: before.append(weights(model)),
        on_evaluate=lambda model, state: after.append(weights(model)),
    )
    settings: dict[str, Any] = dict(
        eval_rows=TokenRows(6, seed=1), per_device_eval_batch_size=4, eval_monte_carlo_samples=2
    )
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder],
        learning_rate=3e-2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    trainer.train()
    assert all(are_equal(a, b) for a, b in zip(before, after, strict=True))
    during = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(during) == 3
    for step, entry in enumerate(during, start=1):
        saved = BlockGenForDiffusionLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        metrics = make_trainer(tmp_path, saved, **settings).evaluate()
        timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
        expected = {name: value for name, value in metrics.items() if name not in timings and name.startswith("eval")}
        assert len(expected) >= 5
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    model = tiny_model()
    model.load_state_dict(saved_weights(tmp_path / "checkpoint-3"), strict=False)
    assert make_trainer(tmp_path, model, **settings).evaluate()["eval_loss"] != pytest.approx(
        during[-1]["eval_loss"], rel=1e-3
    )


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """Nor does the loss, with rows of unequal length; and the run is not disturbed by it."""
    results = []
    for batch_size in (1, 4, 7):
        trainer = make_trainer(
            tmp_path,
            eval_rows=TokenRows(7, shortest=4, seed=1),
            per_device_eval_batch_size=batch_size,
            eval_monte_carlo_samples=2,
        )
        metrics = trainer.evaluate()
        results.append(
            {n: v for n, v in metrics.items() if "runtime" not in n and "per_second" not in n and "time" not in n}
        )
    assert "eval_loss" in results[0]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)


def test_evaluating_does_not_change_the_run(tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path,
            eval_rows=TokenRows(4, seed=1),
            eval_strategy=strategy,
            eval_steps=1,
            eval_monte_carlo_samples=1,
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert are_equal(runs[0][1], runs[1][1])


def test_early_stopping_ends_with_the_average_of_the_best_checkpoint(tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    trainer = make_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_rows=TokenRows(2, seed=1),
        trainer_kwargs={"compute_metrics": lambda prediction: {"score": next(scores)}},
        learning_rate=1e-2,
        max_steps=10,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_monte_carlo_samples=1,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert are_equal(weights(trainer.model), saved_model(tmp_path / "checkpoint-2"))
    assert not are_equal(saved_model(tmp_path / "checkpoint-2"), saved_weights(tmp_path / "checkpoint-2"))
    trainer.save_model()
    assert are_equal(saved_model(tmp_path), saved_model(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_that_a_tokenizer_padded_are_evaluated_as_the_rows_alone(side: str, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.padding_side = side
    texts = ["abc", "defghi", "jklmnopqrst"]
    rows = [dict(tokenizer(text, padding="max_length", max_length=16)) for text in texts]
    alone = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    flat = DataCollatorWithFlattening()
    trainer = make_trainer(tmp_path, model, eval_monte_carlo_samples=2)
    flattened = make_trainer(
        tmp_path,
        model,
        eval_monte_carlo_samples=2,
        trainer_kwargs={"data_collator": flat},
        per_device_eval_batch_size=3,
    )
    expected = evaluate_likelihood(model, alone, monte_carlo_samples=2, seed=1).metrics()
    for found in (trainer.evaluate(rows), trainer.evaluate(alone)):
        assert found["eval_nll_jensen"] == pytest.approx(expected["nll_jensen"], rel=1e-5)
    assert trainer.evaluate(rows)["eval_nll_block_size_1"] == pytest.approx(expected["nll_block_size_1"], rel=1e-5)
    # Flattened documents do not see one another; the collator does not score their first tokens.
    without_first = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in alone]
    found = flattened.evaluate(alone)["eval_nll_block_size_1"]
    assert found == pytest.approx(evaluate_likelihood(model, without_first).block_sizes[1].nll, rel=1e-5)
