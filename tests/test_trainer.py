"""`transformers.Trainer`, as it is, trains the model: the loss falls, accumulation and token counts are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import generate, tiny_config, tiny_model, words
from transformers import Trainer, TrainerCallback, TrainingArguments

from blockgen_hf import BlockGenForDiffusionLM


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


class Rows(torch.utils.data.Dataset):
    """`{"input_ids", "labels"}` rows of a tensor `[N, L]`; the first tokens may be a prompt that is not scored."""

    def __init__(self, rows: torch.Tensor, prompt: int = 0) -> None:
        self.rows, self.prompt = rows, prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.rows[index].clone()
        labels[: self.prompt] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class UnequalRows(Rows):
    """Row i scores its last 3 + 2 i tokens."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.rows[index].clone()
        labels[: len(labels) - 3 - 2 * index] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class Losses(TrainerCallback):
    """The training losses as they are logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def train(model: BlockGenForDiffusionLM, rows: Rows, folder: Path, **settings: Any) -> list[float]:
    """Runs a Trainer on the CPU and returns the losses of its steps."""
    losses = Losses()
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer = Trainer(
        model=model, args=TrainingArguments(**{**defaults, **settings}), train_dataset=rows, callbacks=[losses]
    )
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    trainer.train()
    return losses.values


def counting_rows(number: int, length: int = 16) -> torch.Tensor:
    """Rows that count upwards modulo 10: each token follows from the one before."""
    return (torch.arange(length)[None] + torch.arange(number)[:, None]) % 10


@pytest.mark.parametrize("variant", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def test_the_loss_falls_and_the_text_is_learnt(variant: str, tmp_path: Path) -> None:
    """A plain Trainer draws nothing itself: `model(input_ids, labels)` is the whole recipe. From zero logits on."""
    config = tiny_config(
        variant, hidden_size=32, intermediate_size=64, block_sizes=[1, 2, 4], max_position_embeddings=32
    )
    torch.manual_seed(1)
    model = BlockGenForDiffusionLM(config)
    losses = train(
        model,
        Rows(counting_rows(64)),
        tmp_path,
        max_steps=100,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        weight_decay=0.0,
        seed=1,
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    model.eval()
    text = generate(model, torch.tensor([[3, 4, 5, 6]]), max_new_tokens=8, decoding="ar", do_sample=False)
    right = (text[0, 4:] == (text[0, 3:-1] + 1) % 10).sum()  # one slip does not make all behind it wrong
    assert right >= 6


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Batch 1 x accumulation 4 = batch 4 x 1, rows with different numbers of scored tokens: `num_items_in_batch`.

    The draws are made deterministic by a model of block size 1 and masked noise, which is always fully noised.
    """
    data = UnequalRows(words(4, 12))
    updates = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        model = tiny_model(block_sizes=[1])
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        losses = train(
            model,
            data,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            data_seed=0,
            seed=0,
        )
        updates.append((losses[0], {name: p.detach() - before[name] for name, p in model.named_parameters()}))
    for loss, update in updates[1:]:
        assert loss == pytest.approx(updates[0][0], rel=1e-4)
        for name, expected in updates[0][1].items():
            torch.testing.assert_close(update[name], expected, atol=1e-5, rtol=1e-4, msg=name)


def test_trainer_counts_every_scored_token(tmp_path: Path) -> None:
    """Position 0 is scored too: it is the text's first token. The stock count for shifted losses drops it."""
    model, rows = tiny_model(block_sizes=[1]), words(4, 12)
    (loss,) = train(
        model,
        Rows(rows),
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.0,
        optim="sgd",
    )
    expected = model.eval()(rows, labels=rows, block_size=1).loss.item()
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_trainer_runs_with_gradient_checkpointing(kwargs: dict[str, bool] | None, tmp_path: Path) -> None:
    """Both kinds of checkpointing, with adaLN's condition shared by all layers."""
    losses = train(
        tiny_model(),
        Rows(words(4, 8)),
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
    )
    assert len(losses) == 2


def test_trainer_evaluates_and_resumes(tmp_path: Path) -> None:
    """`evaluate` gives a loss without a cache in its outputs; a checkpoint brings the weights back."""
    model = tiny_model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=2,
            save_steps=2,
            disable_tqdm=True,
            logging_strategy="no",
            per_device_train_batch_size=2,
        ),
        train_dataset=Rows(words(8, 8)),
        eval_dataset=Rows(words(4, 8, seed=1)),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loaded = BlockGenForDiffusionLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"label_smoothing_factor": 0.1}, {}),
        ({}, {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()}),
    ],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_a_loss_that_trainer_computes_from_logits_is_refused(
    variant: str, settings: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """It would compare logits of next tokens with the tokens that they see: a uniform model would learn to copy."""
    trainer = Trainer(
        model=tiny_model(variant),
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True, **settings
        ),
        train_dataset=Rows(words(4, 8)),
        **arguments,
    )
    with pytest.raises(ValueError, match="`num_items_in_batch` must be given together with `labels`.*label_smoothing"):
        trainer.train()
