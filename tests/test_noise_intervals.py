"""Noise levels clipped to an interval: weights, the choice of the one with the least variance, and resumed runs."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MASK, tiny_model, words
from training import TokenRows, are_equal, make_trainer, saved_model

from blockgen_hf.evaluation.likelihood import sequence_nll
from blockgen_hf.training.draws import WHOLE_INTERVAL, StepDraws, corrupt_batch
from blockgen_hf.training.noise_intervals import INTERVAL_GRID, least_variance, noise_variance


MASKED_ELBO: dict[str, Any] = {
    "clean_attention": "block_causal", "block_sizes": [4], "training_objective": "elbo"
}  # fmt: skip


def test_the_levels_of_an_interval_are_a_grid_over_the_global_batch() -> None:
    levels = StepDraws(0, 5, 64).noise_levels(torch.arange(64), interval=(0.3, 0.8)).flatten().sort().values
    assert levels[0] >= 0.3 and levels[-1] < 0.8
    torch.testing.assert_close(levels.diff(), torch.full((63,), 0.5 / 64, dtype=torch.float64))


@pytest.mark.parametrize("sampling", ["sequence", "block"])
def test_every_block_size_has_an_interval_of_its_own(sampling: str) -> None:
    batch = {"input_ids": words(64, 8), "labels": words(64, 8)}
    sizes = (1, 2, 4, 8) * 16
    drawn = corrupt_batch(
        batch,
        tiny_model().diffusion,
        StepDraws(0, 0, 64),
        torch.arange(64),
        sizes,
        sampling,
        {2: (0.45, 0.95), 4: (0.3, 0.4)},
    )
    levels = drawn["noise_level"].expand(64, 8)
    assert (levels[::4] == 1).all() and (drawn["noisy_input_ids"][::4] == MASK).all()
    for first, (low, high) in enumerate([(0.45, 0.95), (0.3, 0.4), WHOLE_INTERVAL], 1):
        found = levels[first::4]
        assert low <= found.min() < low + 0.15 and high - 0.15 < found.max() <= high


def drawn_losses(model: Any, row: torch.Tensor, interval: tuple[float, float], count: int = 2048) -> torch.Tensor:
    """The training loss of a row of one block, for many draws of a step."""
    batch = {"input_ids": row.expand(count, -1), "labels": row.expand(count, -1)}
    draws = StepDraws(3, 0, count)
    noise = corrupt_batch(batch, model.diffusion, draws, torch.arange(count), 4, "block", {4: interval})
    with torch.no_grad():
        return model(**batch, **noise, block_size=4).token_losses.double().sum(-1)


def mean_over_interval(model: Any, row: torch.Tensor, interval: tuple[float, float], points: int = 1000) -> float:
    """By quadrature over t: the sum over all masks of their probability, times the cross entropies, times 1 / t."""
    masks = torch.tensor(list(product([False, True], repeat=4)))
    noisy = torch.where(masks, MASK, row)
    rows = row.expand(len(masks), -1)
    with torch.no_grad():
        losses = model(
            rows, noisy, labels=rows, noise_level=torch.ones(len(masks), 1), block_size=4, objective="cross_entropy"
        ).token_losses.double()
    low, high = interval
    t = low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    noised = 1 - model.diffusion.schedule.alpha(t)[:, None]
    weight = -model.diffusion.schedule.alpha_derivative(t)[:, None] / noised
    probability = noised ** masks.sum(-1) * (1 - noised) ** (~masks).sum(-1)
    return (probability * weight * losses.sum(-1)).sum(-1).mean().item()


def test_the_loss_of_an_interval_is_the_mean_of_the_weighted_losses_there_and_the_bound_on_the_whole() -> None:
    model, row = tiny_model(**MASKED_ELBO), words(1, 4)
    for interval in (WHOLE_INTERVAL, (0.3, 0.8), (0.5, 1.0)):
        losses = drawn_losses(model, row, interval)
        error = losses.std().item() / len(losses) ** 0.5
        assert losses.mean().item() == pytest.approx(mean_over_interval(model, row, interval), abs=3 * error), interval
    bound = sequence_nll(model, {"input_ids": row}, [4], 128).mean().item()
    assert mean_over_interval(model, row, WHOLE_INTERVAL) == pytest.approx(bound, rel=0.01)


def test_variances_are_those_of_rows_and_of_gradients() -> None:
    """Against the losses and gradients themselves."""
    model, rows = tiny_model(**MASKED_ELBO), words(6, 8)
    found = noise_variance(model, rows, 4, (0.3, 0.8), draws=3, batch_size=2, gradient=True)
    losses, gradients = [], []
    for draw in range(3):
        for first in (0, 2, 4):
            batch = {"input_ids": rows[first : first + 2], "labels": rows[first : first + 2]}
            places = torch.arange(first, first + 2)
            noise = corrupt_batch(batch, model.diffusion, StepDraws(0, draw, 6), places, 4, "block", {4: (0.3, 0.8)})
            model.zero_grad()
            output = model(**batch, **noise, block_size=4)
            output.loss.backward()
            losses.append(output.token_losses.detach().mean(-1))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found.loss == pytest.approx(torch.cat(losses).var().item(), rel=1e-4)
    assert found.mean == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert found.gradient == pytest.approx(torch.stack(gradients).var(0).sum().item(), rel=1e-4)


def test_measuring_leaves_model_and_random_numbers_alone() -> None:
    model = tiny_model(hidden_dropout=0.5).train()
    state = torch.get_rng_state()
    one, other = (noise_variance(model, words(4, 8), 4, batch_size=2, gradient=gradient) for gradient in (False, True))
    assert one.loss == other.loss  # no dropout, and the same draws
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((words(4, 8), 1), "`block_size` must be an integer above 1"), ((words(1, 8), 4), "needs two losses at least")],
)
def test_what_has_no_variance_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_variance(tiny_model(), *arguments)


# In training


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.training.noise_intervals.INTERVAL_GRID", INTERVAL_GRID[::7])


def clipped(folder: Path, **settings: Any) -> Any:
    return make_trainer(
        folder,
        tiny_model(block_sizes=[1, 4, 8], training_objective="elbo"),
        eval_rows=TokenRows(8, shortest=9, seed=1),
        **{
            "noise_interval_steps": 2,
            "noise_interval_rows": 6,
            "noise_level_sampling": "block",
            "gradient_accumulation_steps": 3,
            "learning_rate": 1e-2,
            **settings,
        },
    )


def chosen(trainer: Any) -> list[dict[str, float]]:
    names = ("step", "noise_level_low_block_size_4", "noise_level_high_block_size_8", "loss_variance_block_size_4")
    return [{n: entry[n] for n in names} for entry in trainer.state.log_history if names[1] in entry]


@pytest.mark.usefixtures("small_grid")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """From step 3, with the intervals of step 2, and from step 4, where new ones are due."""
    whole = clipped(tmp_path / "whole", max_steps=5, save_strategy="steps", save_steps=1)
    whole.train()
    whole.save_model()
    assert [entry["step"] for entry in chosen(whole)] == [2, 4]
    assert whole.noise_intervals.keys() == {4, 8} and set(whole.noise_intervals.values()) <= set(INTERVAL_GRID)
    for step in (3, 4):
        resumed = clipped(tmp_path / f"from_{step}", max_steps=5)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        resumed.save_model()
        assert chosen(resumed) == chosen(whole)
        assert are_equal(saved_model(tmp_path / f"from_{step}"), saved_model(tmp_path / "whole"))


@pytest.mark.usefixtures("small_grid")
def test_levels_are_drawn_on_the_chosen_intervals_until_the_next_run(tmp_path: Path) -> None:
    trainer = clipped(tmp_path, noise_level_interval=[0.2, 0.9])
    seen: list[tuple[int, float]] = []

    def record(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if module.training and inputs["block_size"] > 1:
            ends = trainer.noise_intervals[inputs["block_size"]]
            assert ends[0] <= inputs["noise_level"].min() and inputs["noise_level"].max() <= ends[1]
            seen.append(ends)

    trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    assert seen[0] == (0.2, 0.9) and seen[-1] in INTERVAL_GRID
    assert trainer.noise_intervals[4] != (0.2, 0.9)
    seen.clear()
    trainer.train()
    assert seen[0] == (0.2, 0.9)


def test_off_by_default(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_rows=TokenRows(4))
    trainer.train()
    assert set(trainer.noise_intervals.values()) == {WHOLE_INTERVAL} and chosen(trainer) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_level_interval": [0.5]}, "`noise_level_interval` must be two numbers"),
        ({"noise_level_interval": [0.0, 0.5]}, "`noise_level_interval` must be two numbers"),
        ({"noise_level_interval": [0.8, 0.5]}, "`noise_level_interval` must be two numbers"),
        ({"noise_interval_steps": -1}, "`noise_interval_steps` must be an integer of at least 0"),
        ({"noise_level_interval": 0.3}, "`noise_level_interval` must be two numbers"),
        ({"noise_level_interval": [0.3, "a"]}, "`noise_level_interval` must be two numbers"),
        ({"noise_interval_steps": 2.5}, "`noise_interval_steps` must be an integer"),
        ({"noise_interval_rows": 1}, "`noise_interval_rows` must be an integer of at least 2"),
        ({"noise_interval_steps": 5}, "`noise_interval_steps` needs an `eval_dataset`"),
        ({"noise_level_interval": [0.1, 0.5], "model": {"block_sizes": [1]}}, "needs a block size above 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model(**settings.pop("model", {}))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, **settings)


def test_a_run_that_ends_before_the_first_choice_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        make_trainer(tmp_path, eval_rows=TokenRows(4), noise_interval_steps=5000, max_steps=500)
    assert "No noise levels will be chosen: the run has 500 steps" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": (0.8, 0.3)}, "`interval` must be two numbers"),
        ({"interval": (-1, 2)}, "`interval` must be two numbers"),
        ({"noise_level_sampling": "foo"}, "`noise_level_sampling` must be one of sequence, block, but is 'foo'"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer, but is 0"),
        ({"draws": 0}, "`draws` must be a positive integer, but is 0"),
        ({"block_size": 2.5}, "`block_size` must be an integer above 1, but is 2.5"),
    ],
)
def test_a_variance_of_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_variance(tiny_model(), [words(1, 8)[0]] * 3, **{"block_size": 4, **settings})


@pytest.mark.slow
def test_the_chosen_interval_lowers_the_variance_on_a_trained_model(tmp_path: Path) -> None:
    """Chosen on some rows and draws, measured on others."""
    rows = TokenRows(256, 16)
    rows.tokens = (rows.tokens[:, :1] + torch.arange(16) * (1 + rows.tokens[:, 1:2] % 2)) % 20  # counting
    trainer = make_trainer(
        tmp_path,
        tiny_model(scale=0.5, **MASKED_ELBO),
        rows,
        max_steps=200,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        noise_level_sampling="block",
        logging_steps=100,
    )
    trainer.train()
    model = trainer.model
    best, variance = least_variance(model, rows.tokens[:128], 4, seed=0)
    whole = noise_variance(model, rows.tokens[:128], 4, seed=0)
    assert variance < whole.loss
    others = rows.tokens[128:]
    options: dict[str, Any] = {"draws": 2, "seed": 7, "gradient": True}
    before, after = (noise_variance(model, others, 4, interval, **options) for interval in (WHOLE_INTERVAL, best))
    assert after.loss < 0.8 * before.loss
    assert after.gradient is not None and before.gradient is not None and after.gradient < before.gradient
