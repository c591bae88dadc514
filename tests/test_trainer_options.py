"""Rows, batches and options that `BlockGenTrainer` follows, or refuses when it is made."""

from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer, words
from training import make_trainer
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding

from blockgen_hf.evaluation import evaluate_likelihood


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


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


def test_a_batch_without_labels_is_refused_by_name(tmp_path: Path) -> None:
    collator = DataCollatorWithPadding(tiny_tokenizer())
    rows = [{"input_ids": row.tolist()} for row in words(4, 8)]
    trainer = make_trainer(tmp_path, rows=rows, trainer_kwargs={"data_collator": collator})
    with pytest.raises(ValueError, match="`data_collator` must return `input_ids` and `labels`"):
        trainer.train()
