"""`BlockGenTrainer`: arguments, the same losses however the batch is cut, the logs, and all that Trainer offers."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MASK, record_forwards, tiny_config, tiny_model
from training import (
    Recorder,
    StreamedRows,
    TokenRows,
    are_equal,
    logs,
    losses,
    make_trainer,
    saved_model,
    saved_weights,
    weights,
)
from transformers import HfArgumentParser, TrainingArguments

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.training import (
    BlockGenDataCollator,
    BlockGenTrainer,
    BlockGenTrainingArguments,
    DataArguments,
)
from blockgen_hf.training.draws import StepDraws


pytest.importorskip("accelerate", reason="Trainer needs accelerate")


# Arguments


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    args = BlockGenTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.warmup_steps, args.lr_scheduler_type) == (3e-4, 2500, "constant_with_warmup")
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.0, 1.0)
    assert args.optim.startswith("adamw_torch")
    assert (args.ema_decay, args.noise_level_sampling, args.block_size_sampling) == (0.9999, "sequence", "stratified")
    assert (args.block_size_unit, args.eval_monte_carlo_samples) == ("micro_batch", 8)


@pytest.mark.parametrize(
    "name, value",
    [
        ("block_size_sampling", "random"),
        ("block_size_unit", "token"),
        ("noise_level_sampling", "token"),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("ema_decay", math.nan),
        ("eval_monte_carlo_samples", 0),
        ("label_smoothing_factor", 0.1),
        ("label_names", ["targets"]),
        ("prediction_loss_only", True),
    ],
)
def test_values_that_are_not_accepted_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        BlockGenTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_another_loss_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        make_trainer(tmp_path, trainer_kwargs={"compute_loss_func": lambda outputs, labels, **kwargs: 0})


@pytest.mark.parametrize(("name", "value"), [("batch_eval_metrics", True), ("eval_do_concat_batches", False)])
def test_options_of_evaluation_that_the_bounds_do_not_know_are_refused(name: str, value: bool, tmp_path: Path) -> None:
    """When the trainer is made, not hours later; metrics of the user's may know them."""
    with pytest.raises(ValueError, match=f"`{name}` must be {not value}"):
        make_trainer(tmp_path, **{name: value})
    own = {"compute_metrics": lambda prediction, compute_result=True: {"score": 1.0}}
    trainer = make_trainer(tmp_path, eval_rows=TokenRows(3, seed=1), trainer_kwargs=own, **{name: value})
    assert trainer.evaluate()["eval_score"] == 1.0


def test_logits_that_there_are_not_cannot_be_preprocessed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`preprocess_logits_for_metrics` must be None"):
        make_trainer(tmp_path, trainer_kwargs={"preprocess_logits_for_metrics": lambda logits, labels: logits})


def test_the_loss_of_a_batch_may_be_computed_by_hand(tmp_path: Path) -> None:
    """Of a batch without draws, in training mode: the model draws, and nothing is logged."""
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([TokenRows()[row] for row in range(2)]))
    assert loss.isfinite() and loss.requires_grad


@pytest.mark.parametrize("own_collator", [False, True])
def test_a_mask_token_among_the_scored_tokens_is_refused(own_collator: bool, tmp_path: Path) -> None:
    """By name, before a step; a uniform model has none, and tokens that are not scored may be it."""
    rows = TokenRows(4)
    rows.tokens[1, 3] = MASK
    collator = BlockGenDataCollator(default_pad_token_id=0)
    kwargs = {"data_collator": lambda batch: dict(collator(batch))} if own_collator else {}
    trainer = make_trainer(tmp_path, rows=rows, eval_rows=rows, per_device_train_batch_size=4, trainer_kwargs=kwargs)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=rf"documents \[1\] of the data have the mask token {MASK} among"):
            run()
    make_trainer(tmp_path, tiny_model("uniform"), rows=rows, max_steps=1, trainer_kwargs=kwargs).train()
    hidden = [{"input_ids": [1, MASK, 3], "labels": [1, -100, 3]}] * 4
    make_trainer(tmp_path, rows=hidden, max_steps=1, trainer_kwargs=kwargs).train()


def test_plain_training_arguments_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`args` must be a `BlockGenTrainingArguments`.*is a `TrainingArguments`"):
        BlockGenTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=TokenRows())


def test_labels_may_be_named_as_they_are(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, label_names=["labels"], max_steps=1)
    trainer.train()
    assert len(losses(trainer)) == 1


def test_arguments_are_flags_of_a_script() -> None:
    """`HfArgumentParser` reads them together with those of the data, the paper's defaults included."""
    parser = HfArgumentParser((BlockGenTrainingArguments, DataArguments))
    flags = ["--output_dir", "runs", "--dataset", "a.txt", "--isolate_documents", "--ema_decay", "0.5", "--use_cpu"]
    training, data = parser.parse_args_into_dataclasses(flags)
    assert (training.ema_decay, training.warmup_steps, training.include_num_input_tokens_seen) == (
        0.5,
        2500,
        "non_padding",
    )
    assert data.isolate_documents and data.dataset == ["a.txt"]


# The same losses however the batch is cut


@pytest.mark.parametrize(
    "variant, sampling",
    [("masked", "sequence"), pytest.param("uniform", "block", marks=pytest.mark.slow)],
)
def test_with_a_size_a_sequence_batch_and_accumulation_are_one(variant: str, sampling: str, tmp_path: Path) -> None:
    """Batch 8 x 1 = 4 x 2 = 1 x 8, over an epoch's end, with rows of unequal length: the padding differs."""
    names = ("grad_norm", "num_input_tokens_seen")
    runs = []
    for batch_size, accumulation in [(8, 1), (4, 2), (1, 8)]:
        trainer = make_trainer(
            tmp_path,
            tiny_model(variant),
            TokenRows(shortest=9),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            block_size_unit="sequence",
            noise_level_sampling=sampling,
            max_steps=10,
        )
        trainer.train()
        runs.append((logs(trainer, *names), weights(trainer.model)))
    assert len(runs[0][0]) == 10
    for entries, parameters in runs[1:]:
        for entry, expected in zip(entries, runs[0][0], strict=True):
            assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for name, expected in runs[0][1].items():
            torch.testing.assert_close(parameters[name], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "sampling",
    ["stratified", *(pytest.param(name, marks=pytest.mark.slow) for name in ("independent", "shared"))],
)
def test_a_run_is_a_function_of_its_seed(sampling: str, tmp_path: Path) -> None:
    """Block sizes are those of [`StepDraws`]; a second run is the same bit for bit, whatever was drawn before."""
    runs = []
    for _ in range(2):
        model = tiny_model(block_size_weights=[0.4, 0.3, 0.2, 0.1])
        trainer = make_trainer(
            tmp_path,
            model,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            max_steps=3,
            block_size_sampling=sampling,
        )
        with record_forwards(model) as calls:
            trainer.train()
        runs.append((losses(trainer), weights(model), [call["block_size"] for call in calls]))
        torch.rand(3)
    assert runs[0][0] == runs[1][0] and runs[0][2] == runs[1][2]
    assert are_equal(runs[0][1], runs[1][1])
    expected = [
        StepDraws(1, step, 8).block_sizes([1, 2, 4, 8], [0.4, 0.3, 0.2, 0.1], 8, sampling) for step in range(3)
    ]
    assert runs[0][2] == [size for sizes in expected for size in sizes]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2):
        trainer = make_trainer(tmp_path, seed=seed, data_seed=0)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] != runs[1]


# What is logged


def test_losses_are_logged_for_each_block_size(tmp_path: Path) -> None:
    """Means over the scored tokens since the last log, from what the model returned."""
    model = tiny_model()
    seen: list[tuple[int, float, int]] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append(
            (kwargs["block_size"], output.token_losses.double().sum().item(), (kwargs["labels"] != -100).sum())
        )

    handle = model.register_forward_hook(hook, with_kwargs=True)
    trainer = make_trainer(
        tmp_path, model, TokenRows(shortest=5), gradient_accumulation_steps=4, max_steps=6, logging_steps=2
    )
    trainer.train()
    handle.remove()
    entries = logs(trainer)
    assert len(entries) == 3 and len(seen) == 24
    for number, entry in enumerate(entries):
        of_size: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        steps = []
        for step in (2 * number, 2 * number + 1):
            calls = seen[4 * step : 4 * step + 4]
            steps.append(sum(total for _, total, _ in calls) / sum(int(count) for *_, count in calls))
            for size, total, count in calls:
                of_size[size].append((total, int(count)))
        expected = {
            f"loss_block_size_{size}": sum(total for total, _ in pairs) / sum(count for _, count in pairs)
            for size, pairs in of_size.items()
        }
        expected["loss"] = sum(steps) / 2
        assert entry == pytest.approx(expected, rel=1e-5)


def test_with_a_size_a_sequence_every_row_counts_for_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for size, row, labels in zip(kwargs["block_size"], output.token_losses, kwargs["labels"], strict=True):
            sums[size][0] += row.double().sum().item()
            sums[size][1] += (labels != -100).sum().item()

    model.register_forward_hook(hook, with_kwargs=True)
    trainer = make_trainer(
        tmp_path,
        model,
        TokenRows(shortest=5),
        per_device_train_batch_size=8,
        block_size_unit="sequence",
        max_steps=2,
        logging_steps=2,
    )
    trainer.train()
    (entry,) = logs(trainer)
    del entry["loss"]
    assert entry == pytest.approx({f"loss_block_size_{s}": a / b for s, (a, b) in sums.items()}, rel=1e-5)


@pytest.mark.parametrize("kind", ["non_padding", "all"])
def test_tokens_seen_leave_padding_out(kind: str, tmp_path: Path) -> None:
    rows = TokenRows(16, shortest=5)
    trainer = make_trainer(
        tmp_path,
        rows=rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        include_num_input_tokens_seen=kind,
    )
    trainer.train()
    (_, last) = logs(trainer, "num_input_tokens_seen")
    if kind == "non_padding":
        assert last["num_input_tokens_seen"] == sum(rows.lengths)
    else:
        assert sum(rows.lengths) < last["num_input_tokens_seen"] <= 16 * 16


def test_the_norm_of_the_gradient_is_logged_as_it_was_before_clipping(tmp_path: Path) -> None:
    norms: list[float] = []

    def measure(model: torch.nn.Module, state: Any) -> None:
        norms.append(math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters())))

    settings: dict[str, Any] = dict(max_steps=1, gradient_accumulation_steps=2)
    trainer = make_trainer(
        tmp_path,
        callbacks=[Recorder(on_pre_optimizer_step=measure)],
        max_grad_norm=0.0,
        **settings,
    )
    trainer.train()
    clipped = make_trainer(tmp_path, max_grad_norm=0.1, **settings)
    clipped.train()
    assert norms[0] > 0.1
    for run in (trainer, clipped):
        (entry,) = logs(run, "grad_norm")
        assert entry["grad_norm"] == pytest.approx(norms[0], rel=1e-5)


# What else Trainer offers


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, tiny_model(hidden_dropout=0.1), gradient_checkpointing=checkpointing, max_steps=3
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    runs = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16, max_steps=3, save_strategy="steps", save_steps=3)
        trainer.train()
        runs.append(losses(trainer))
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        assert all(value.dtype == torch.float32 for value in saved_model(tmp_path / "checkpoint-3").values())
    assert runs[1] == pytest.approx(runs[0], rel=0.05)
    assert runs[1] != runs[0]


@pytest.mark.slow
def test_bfloat16_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    """The checkpoint keeps the average to the full precision, so that a resumed run has the same."""
    settings: dict[str, Any] = dict(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    whole = make_trainer(tmp_path / "whole", tiny_model().to(torch.bfloat16), **settings)
    averages: list[dict[str, torch.Tensor]] = []
    whole.add_callback(Recorder(on_step_end=lambda model, state: averages.append(dict(whole.ema.averages))))
    whole.train()
    assert all(value.dtype == torch.float32 for value in averages[0].values())
    resumed = make_trainer(tmp_path / "resumed", tiny_model(seed=5).to(torch.bfloat16), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    one, other = (saved_weights(tmp_path / run / "checkpoint-4") for run in ("whole", "resumed"))
    assert any(name.startswith("average.") for name in one)
    assert are_equal(one, other)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(tmp_path: Path) -> None:
    runs = []
    for compiled in (False, True):
        trainer = make_trainer(
            tmp_path,
            tiny_model(block_sizes=[1, 4]),
            torch_compile=compiled,
            max_steps=3,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train()
        runs.append((losses(trainer), saved_model(tmp_path / "checkpoint-3")))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[0][1].keys() == runs[1][1].keys()
    for name, expected in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], expected, atol=1e-3, rtol=1e-2)


def test_losses_of_block_sizes_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, max_steps=2, report_to="tensorboard")
    trainer.train()
    (file,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/loss_block_size_{size}" for size in (1, 2, 4, 8)} <= tags
    assert {"train/loss", "train/grad_norm", "train/num_input_tokens_seen"} <= tags
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(trainer), rel=1e-5)


def test_losses_of_block_sizes_reach_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as its `log` function: what is behind it starts a server."""
    trackio = pytest.importorskip("trackio")
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(trackio, "init", lambda **kwargs: None)
    monkeypatch.setattr(trackio, "finish", lambda: None)
    monkeypatch.setattr(trackio, "log", lambda values, *args, **kwargs: logged.append(values))
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, max_steps=2, report_to="trackio")
    trainer.train()
    names = set().union(*logged)
    assert {f"train/loss_block_size_{size}" for size in (1, 2, 4, 8)} <= names


def lora_model(seed: int = 0) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return peft.get_peft_model(tiny_model(), config)


def test_an_adapter_is_trained_saved_and_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    model = lora_model()
    frozen = {name: value for name, value in weights(model).items() if "lora" not in name}
    whole = make_trainer(tmp_path / "whole", model, **settings)
    whole.train()
    after = weights(whole.model)
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_config.json").exists() and (checkpoint / "adapter_model.safetensors").exists()
    assert all("lora" in name for name in saved_weights(checkpoint))
    resumed = make_trainer(tmp_path / "resumed", lora_model(seed=3), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert are_equal(weights(resumed.model), after)


def test_a_stream_of_rows_is_trained_on(tmp_path: Path) -> None:
    rows = TokenRows(shortest=9)
    trainer = make_trainer(tmp_path, rows=StreamedRows(rows), gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    assert logs(trainer, "num_input_tokens_seen")[-1]["num_input_tokens_seen"] == sum(rows.lengths[:12])


def test_a_stream_that_ends_early_ends_the_run(tmp_path: Path) -> None:
    """5 rows are 2.5 micro-batches: a whole step, then one with a single row, in the first pass over the stream."""
    trainer = make_trainer(tmp_path, rows=StreamedRows(TokenRows(5)), gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_model_and_arguments_may_be_left_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = BlockGenTrainer(BlockGenForDiffusionLM(tiny_config()), train_dataset=TokenRows())
    assert isinstance(trainer.args, BlockGenTrainingArguments)
