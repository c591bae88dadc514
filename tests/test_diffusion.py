"""Schedules, forward process and posteriors of `modeling.diffusion_blockgen` against Eq. 1, 2, 3 and Bayes' rule."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import (
    Array,
    Process,
    bayes_posterior,
    chi_square_p_value,
    marginal,
    masked_posterior,
    prior,
    uniform_posterior,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgen_hf.modeling.diffusion_blockgen import (
    MaskedDiffusion,
    NoiseSchedule,
    UniformDiffusion,
    diffusion_from_config,
)


PROCESSES: tuple[Process, ...] = ("masked", "uniform")
EPS = 1e-3
by_hypothesis = settings(max_examples=40)


def make_diffusion(process: Process, vocab_size: int) -> Any:
    """A process whose mask token, if it has one, is the last id."""
    schedule = NoiseSchedule("linear", EPS)
    if process == "masked":
        return MaskedDiffusion(vocab_size, vocab_size - 1, schedule)
    return UniformDiffusion(vocab_size, schedule)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def clean_ids(process: Process, vocab_size: int) -> range:
    """The ids that text can hold: every row, but for the mask token."""
    return range(vocab_size - 1 if process == "masked" else vocab_size)


def random_x_hat(diffusion: Any, z_t: torch.Tensor, vocab_size: int, seed: int) -> torch.Tensor:
    """Probabilities of a denoiser with random logits, after the process's parameterisation, `[B, L, V]` in float64."""
    logits = 2 * torch.randn(*z_t.shape, vocab_size, generator=generator(seed), dtype=torch.float64)
    return diffusion.log_probs(logits, z_t).exp()


@st.composite
def alpha_pairs(draw: Any) -> tuple[float, float]:
    """(alpha_s, alpha_t), alpha_s >= alpha_t: any step back in time, from the very start or to the very end."""
    low = draw(st.floats(0.0, 0.999))
    high = draw(st.one_of(st.just(1.0), st.floats(max(low, 1e-3), 1.0)))
    return high, low


# ---- schedules
@given(st.floats(0.0, 1.0), st.sampled_from([0.0, 1e-5, 1e-3, 0.1]))
@by_hypothesis
def test_schedules_have_their_printed_values(t: float, eps: float) -> None:
    """linear: eps + (1 - eps)(1 - t); cosine: eps + (1 - eps)(1 - cos(pi (1 - t) / 2)); float64 stays float64."""
    linear = NoiseSchedule("linear", eps).alpha(scalar(t))
    cosine = NoiseSchedule("cosine", eps).alpha(scalar(t))
    assert linear.dtype == cosine.dtype == torch.float64
    assert linear.item() == pytest.approx(eps + (1 - eps) * (1 - t), abs=1e-15)
    assert cosine.item() == pytest.approx(eps + (1 - eps) * (1 - np.cos(np.pi * (1 - t) / 2)), abs=1e-15)


@given(st.floats(1e-4, 1 - 1e-4), st.sampled_from(["linear", "cosine"]), st.sampled_from([0.0, 1e-3, 0.1]))
@by_hypothesis
def test_schedule_derivative_is_that_of_alpha(t: float, name: str, eps: float) -> None:
    """alpha'_t of Eq. 15 and 17 equals autograd's and a central difference of alpha, and is negative."""
    schedule = NoiseSchedule(name, eps)
    derivative = schedule.alpha_derivative(scalar(t))
    assert derivative.dtype == torch.float64
    time = scalar(t).requires_grad_()
    (by_autograd,) = torch.autograd.grad(schedule.alpha(time), time)
    by_difference = (schedule.alpha(scalar(t + 1e-5)) - schedule.alpha(scalar(t - 1e-5))) / 2e-5
    assert derivative.item() == pytest.approx(by_autograd.item(), abs=1e-12)
    assert derivative.item() == pytest.approx(by_difference.item(), abs=1e-8)
    assert derivative.item() < 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_keep_shapes_and_fall_from_one_to_eps(name: str) -> None:
    """Eq. 1: alpha decreases from alpha_0 = 1 to alpha_1 = eps, elementwise on tensors of any shape."""
    schedule = NoiseSchedule(name, EPS)
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha[0].item() == pytest.approx(1, abs=1e-15)
    assert alpha[-1].item() == pytest.approx(EPS, abs=1e-15)
    assert (alpha.diff() < 0).all()
    assert schedule.alpha(t.view(3, 4)).shape == schedule.alpha_derivative(t.view(3, 4)).shape == (3, 4)


def test_unknown_schedule_is_refused() -> None:
    """Section 3 of the design: a bad value raises a ValueError that names what was given and what is accepted."""
    with pytest.raises(ValueError, match="quadratic") as error:
        NoiseSchedule("quadratic", EPS)
    assert "linear" in str(error.value) and "cosine" in str(error.value)


@pytest.mark.parametrize("diffusion_type, kind", [("masked", MaskedDiffusion), ("uniform", UniformDiffusion)])
def test_config_builds_the_process_that_it_names(diffusion_type: str, kind: Any) -> None:
    """Section 5 of the design: `diffusion_from_config` reads type, rows, mask token and schedule."""
    config = SimpleNamespace(
        diffusion_type=diffusion_type,
        vocab_size=7,
        mask_token_id=2 if diffusion_type == "masked" else None,
        noise_schedule="cosine",
        noise_schedule_eps=0.1,
    )
    diffusion: Any = diffusion_from_config(config)
    assert type(diffusion) is kind
    assert diffusion.schedule.alpha(scalar(0.5)).item() == pytest.approx(0.1 + 0.9 * (1 - np.sqrt(0.5)), abs=1e-15)
    noise = diffusion.prior((1, 500), torch.device("cpu"), generator(0))
    assert set(noise.flatten().tolist()) == ({2} if diffusion_type == "masked" else set(range(7)))


# ---- forward process
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.95])
def test_corrupt_has_the_marginal_law(process: Process, alpha: float) -> None:
    """Eq. 1: z_t ~ Cat(alpha x + (1 - alpha) pi), independently at each of two positions."""
    vocab_size, x = 5, (1, 3)
    ids = torch.tensor(x).repeat(40_000, 1)
    z = make_diffusion(process, vocab_size).corrupt(ids, scalar(alpha), generator(0))
    assert z.shape == ids.shape and z.dtype == torch.int64
    factors = marginal(process, np.eye(vocab_size)[list(x)], alpha)
    assert chi_square_p_value(z.numpy(), np.outer(*factors)) > 1e-4
    wrong = marginal(process, np.eye(vocab_size)[list(x)], alpha + 0.03)
    assert chi_square_p_value(z.numpy(), np.outer(*wrong)) < 1e-8


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1, 3), ()])
def test_corrupt_takes_a_noise_level_a_batch_a_row_or_a_token(process: Process, shape: tuple[int, ...]) -> None:
    """Section 5 of the design: alpha is anything that broadcasts to `[B, L]`."""
    diffusion, ids = make_diffusion(process, 50), torch.full((2, 3), 4)
    levels = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)[: int(np.prod(shape))].view(shape)
    rng, num_draws = generator(1), 3000
    kept = sum((diffusion.corrupt(ids, levels, rng) == ids).double() for _ in range(num_draws)) / num_draws
    expected = levels.expand(2, 3) + (1 - levels.expand(2, 3)) * (0 if process == "masked" else 1 / 50)
    assert (kept - expected).abs().max() < 5 * 0.5 / num_draws**0.5


@pytest.mark.parametrize("process", PROCESSES)
def test_corrupt_keeps_what_it_is_told_to_keep(process: Process) -> None:
    """Section 5 of the design: where `keep` is True the clean token stays; the rest has its law unchanged."""
    vocab_size, ids = 5, torch.tensor([[0, 1, 2]]).repeat(30_000, 1)
    before = ids.clone()
    keep = torch.tensor([[True, False, True]]).repeat(30_000, 1)
    z = make_diffusion(process, vocab_size).corrupt(ids, scalar(0.3), generator(2), keep=keep)
    assert (z[:, [0, 2]] == ids[:, [0, 2]]).all()
    assert chi_square_p_value(z[:, 1].numpy(), marginal(process, np.eye(vocab_size)[1], 0.3)) > 1e-4
    assert (ids == before).all(), "the clean ids were written to"


@pytest.mark.parametrize("process", PROCESSES)
def test_corrupt_at_the_ends_is_clean_and_is_the_prior(process: Process) -> None:
    """Eq. 1 at alpha = 1 and at alpha = 0."""
    diffusion, ids = make_diffusion(process, 6), torch.full((1, 30_000), 2)
    assert (diffusion.corrupt(ids, scalar(1.0), generator(3)) == ids).all()
    noise = diffusion.corrupt(ids, scalar(0.0), generator(3))
    assert chi_square_p_value(noise[0].numpy(), prior(process, 6)) > 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_prior_covers_every_row_alike_or_is_the_mask(process: Process) -> None:
    """pi of Eq. 1: 1 / V on each row, special tokens included; or the mask token alone."""
    noise = make_diffusion(process, 300).prior((3, 20_000), torch.device("cpu"), generator(4))
    assert noise.shape == (3, 20_000) and noise.dtype == torch.int64
    assert chi_square_p_value(noise.flatten().numpy(), prior(process, 300)) > 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_draws_repeat_with_the_seed(process: Process) -> None:
    """Section 6 of the design: the same generator state gives the same noise and the same step, another does not."""
    diffusion, ids = make_diffusion(process, 9), torch.arange(64).view(2, 32) % 8
    x_hat = random_x_hat(diffusion, torch.full_like(ids, 8), 9, seed=0)

    def draws(seed: int) -> torch.Tensor:
        rng = generator(seed)
        z = diffusion.corrupt(ids, scalar(0.5), rng)
        noise = diffusion.prior((2, 32), torch.device("cpu"), rng)
        step = diffusion.sample_posterior(x_hat, torch.full_like(ids, 8), scalar(0.7), scalar(0.2), rng)
        return torch.stack([z, noise, step])

    state = torch.random.get_rng_state()
    assert (draws(5) == draws(5)).all()
    assert (torch.random.get_rng_state() == state).all(), "the global generator was used beside the one given"
    first, second = draws(5), draws(6)
    assert (first[0] != second[0]).any() and (first[2] != second[2]).any()
    assert process == "masked" or (first[1] != second[1]).any()


# ---- the parameterisation of the denoiser
@given(st.integers(2, 12), st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 30.0, 1e4]))
@by_hypothesis
def test_log_probs_are_normalised(vocab_size: int, seed: int, scale: float) -> None:
    """Section 2.1: x_hat lies in the simplex at every position, for mild and for extreme logits."""
    for process in PROCESSES:
        diffusion = make_diffusion(process, vocab_size)
        logits = scale * torch.randn(2, 3, vocab_size, generator=generator(seed), dtype=torch.float64)
        z = torch.randint(vocab_size, (2, 3), generator=generator(seed))
        log_probs = diffusion.log_probs(logits, z)
        assert log_probs.shape == logits.shape and log_probs.dtype == torch.float64
        assert not log_probs.isnan().any() and (log_probs <= 0).all()
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64), atol=1e-12, rtol=0)


@given(st.integers(2, 12), st.integers(0, 10_000), st.data())
@by_hypothesis
def test_masked_log_probs_never_mask_and_carry_over(vocab_size: int, seed: int, data: Any) -> None:
    """SUBS: no mask probability, visible tokens one-hot, masked positions a softmax over real tokens; any mask id."""
    mask = data.draw(st.integers(0, vocab_size - 1))
    diffusion = MaskedDiffusion(vocab_size, mask, NoiseSchedule("linear", EPS))
    logits = torch.randn(2, 4, vocab_size, generator=generator(seed), dtype=torch.float64)
    untouched = logits.clone()
    z = torch.randint(vocab_size, (2, 4), generator=generator(seed + 1))
    z[0, 0] = mask
    log_probs = diffusion.log_probs(logits, z)
    assert torch.equal(logits, untouched), "the logits were written to"
    assert (log_probs[..., mask] == -torch.inf)[z == mask].all()
    one_hot = torch.nn.functional.one_hot(z, vocab_size).double().log()
    assert torch.equal(log_probs[z != mask], one_hot[z != mask])
    real = [token for token in range(vocab_size) if token != mask]
    torch.testing.assert_close(log_probs[..., real][z == mask], logits[..., real].log_softmax(-1)[z == mask])


def test_uniform_log_probs_are_a_log_softmax() -> None:
    """Section 5 of the design: nothing is carried over and no row is impossible."""
    logits = torch.randn(2, 3, 6, generator=generator(0), dtype=torch.float64)
    z = torch.randint(6, (2, 3), generator=generator(1))
    torch.testing.assert_close(make_diffusion("uniform", 6).log_probs(logits, z), logits.log_softmax(-1))


# ---- posteriors
def posterior_of_one(diffusion: Any, x: Array, z_t: int, alpha_s: float, alpha_t: float) -> Array:
    probs = diffusion.posterior(
        torch.from_numpy(np.array(x))[None, None], torch.tensor([[z_t]]), scalar(alpha_s), scalar(alpha_t)
    )
    assert probs.dtype == torch.float64
    return probs[0, 0].numpy()


@given(alpha_pairs(), st.integers(2, 6))
@by_hypothesis
def test_posterior_is_bayes_rule_for_clean_tokens(alphas: tuple[float, float], vocab_size: int) -> None:
    """Eq. 2 and 3 = q(z_t given z_s) q(z_s given x) / q(z_t given x), for each pair of x and z_t that can happen."""
    for process in PROCESSES:
        diffusion = make_diffusion(process, vocab_size)
        for x in np.eye(vocab_size)[list(clean_ids(process, vocab_size))]:
            for z_t in range(vocab_size):
                if marginal(process, x, alphas[1])[z_t] < 1e-12:
                    continue
                expected = bayes_posterior(process, x, z_t, *alphas)
                np.testing.assert_allclose(posterior_of_one(diffusion, x, z_t, *alphas), expected, atol=1e-11)


@given(alpha_pairs(), st.integers(2, 8), st.integers(0, 10_000))
@by_hypothesis
def test_posterior_of_a_denoiser_is_a_law_and_bayes_rule(
    alphas: tuple[float, float], vocab_size: int, seed: int
) -> None:
    """p(z_s given z_t) = q(. given z_t, x_hat), section 2.1: not negative, sums to 1, Bayes' rule with x_hat for x."""
    for process in PROCESSES:
        diffusion = make_diffusion(process, vocab_size)
        z = torch.arange(vocab_size)[None]
        x_hat = random_x_hat(diffusion, z, vocab_size, seed)
        probs = diffusion.posterior(x_hat, z, scalar(alphas[0]), scalar(alphas[1]))
        assert probs.shape == x_hat.shape
        assert (probs >= 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(z.shape, dtype=torch.float64), atol=1e-12, rtol=0)
        for z_t in range(vocab_size):
            x = x_hat[0, z_t].numpy()
            if marginal(process, x, alphas[1])[z_t] > 1e-12:
                expected = bayes_posterior(process, x, z_t, *alphas)
                np.testing.assert_allclose(probs[0, z_t].numpy(), expected, atol=1e-11)


@given(st.floats(0.0, 0.999), st.integers(2, 8), st.integers(0, 10_000))
@by_hypothesis
def test_last_step_removes_all_noise(alpha_t: float, vocab_size: int, seed: int) -> None:
    """alpha_s = 1: masked gives x_hat; uniform keeps z in proportion to alpha_t V x_hat(z), else draws x_hat."""
    z = torch.arange(vocab_size)[None]
    masked, uniform = (make_diffusion(process, vocab_size) for process in PROCESSES)
    x_hat = random_x_hat(masked, z, vocab_size, seed)
    torch.testing.assert_close(masked.posterior(x_hat, z, scalar(1.0), scalar(alpha_t)), x_hat, atol=1e-12, rtol=0)
    x_hat = random_x_hat(uniform, z, vocab_size, seed)
    weights = (1 - alpha_t) * x_hat + alpha_t * vocab_size * x_hat * torch.eye(vocab_size, dtype=torch.float64)
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(uniform.posterior(x_hat, z, scalar(1.0), scalar(alpha_t)), expected, atol=1e-12, rtol=0)


@given(st.floats(1e-3, 0.999), st.integers(2, 8))
@by_hypothesis
def test_nothing_changes_when_no_time_passes(alpha: float, vocab_size: int) -> None:
    """Eq. 2 and 3 at alpha_s = alpha_t: z_s = z_t."""
    for process in PROCESSES:
        diffusion, z = make_diffusion(process, vocab_size), torch.arange(vocab_size)[None]
        stays = diffusion.posterior(random_x_hat(diffusion, z, vocab_size, 0), z, scalar(alpha), scalar(alpha))
        torch.testing.assert_close(stays[0], torch.eye(vocab_size, dtype=torch.float64), atol=1e-12, rtol=0)


@given(st.lists(st.floats(1e-3, 0.999), min_size=3, max_size=3, unique=True), st.integers(2, 5))
@by_hypothesis
def test_posteriors_compose_and_marginalise(levels: list[float], vocab_size: int) -> None:
    """Over z_s: q(z_u given z_s, x) q(z_s given z_t, x) = q(z_u given z_t, x); over z_t ~ Eq. 1: q(z_s given x)."""
    alpha_t, alpha_s, alpha_u = sorted(levels)
    for process in PROCESSES:
        diffusion = make_diffusion(process, vocab_size)
        for token in clean_ids(process, vocab_size):
            x = np.eye(vocab_size)[token]
            reachable = np.flatnonzero(marginal(process, x, 0.5)).tolist()
            s_to_u, t_to_s, t_to_u = (
                np.stack([posterior_of_one(diffusion, x, z, later, earlier) for z in reachable])
                for later, earlier in ((alpha_u, alpha_s), (alpha_s, alpha_t), (alpha_u, alpha_t))
            )
            np.testing.assert_allclose(t_to_s[:, reachable] @ s_to_u, t_to_u, atol=1e-11)
            over_z_t = marginal(process, x, alpha_t)[reachable] @ t_to_s
            np.testing.assert_allclose(over_z_t, marginal(process, x, alpha_s), atol=1e-11)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), ()])
def test_posterior_takes_a_noise_level_a_batch_a_row_or_a_token(process: Process, shape: tuple[int, ...]) -> None:
    """Section 5 of the design: alphas broadcast to `[B, L]`; each token has the posterior of its own level."""
    diffusion, z = make_diffusion(process, 5), torch.tensor([[4, 0, 1], [2, 4, 4]])
    alpha_t = torch.linspace(0.1, 0.5, 6, dtype=torch.float64)[: int(np.prod(shape))].view(shape)
    alpha_s = alpha_t + 0.3
    x_hat = random_x_hat(diffusion, z, 5, seed=0)
    probs = diffusion.posterior(x_hat, z, alpha_s, alpha_t)
    for row, column in np.ndindex(2, 3):
        levels = alpha_s.expand(2, 3)[row, column].item(), alpha_t.expand(2, 3)[row, column].item()
        expected = bayes_posterior(process, x_hat[row, column].numpy(), int(z[row, column]), *levels)
        np.testing.assert_allclose(probs[row, column].numpy(), expected, atol=1e-12)
    assert diffusion.sample_posterior(x_hat, z, alpha_s, alpha_t, generator(0)).shape == z.shape


# ---- draws from the posterior
SHORT = np.array([0.45, 0.3, 0.2, 0.05, 0.0])
LONG_TAILED: Array = np.append(1 / np.arange(1, 800) ** 1.3, 0.0)
LONG_TAILED /= LONG_TAILED.sum()
STEPS = {"from noise": (0.3, 0.001), "middle": (0.75, 0.4), "last": (1.0, 0.6), "from prior to clean": (1.0, 0.0)}


def posterior_draws(
    diffusion: Any, x_hat: Array, z_t: int, alphas: tuple[float, float], num_draws: int, dtype: torch.dtype
) -> Array:
    """Draws of z_s for one z_t, in chunks small enough for a large vocabulary."""
    rng, chunk = generator(11), min(num_draws, 4_000_000 // len(x_hat))
    probs = torch.from_numpy(x_hat).to(dtype).repeat(1, chunk, 1)
    z = torch.full((1, chunk), z_t)
    alpha_s, alpha_t = (torch.tensor(alpha, dtype=dtype) for alpha in alphas)
    draws = [diffusion.sample_posterior(probs, z, alpha_s, alpha_t, rng) for _ in range(-(-num_draws // chunk))]
    assert draws[0].dtype == torch.int64
    return torch.cat(draws, dim=1)[0].numpy()


@pytest.mark.parametrize("alphas", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize(
    ("x_hat", "dtype"), [(SHORT, torch.float64), (LONG_TAILED, torch.float32)], ids=["short", "long-tailed"]
)
@pytest.mark.parametrize("process", PROCESSES)
def test_sampled_posterior_has_the_law_of_the_posterior(
    process: Process, x_hat: Array, alphas: tuple[float, float], dtype: torch.dtype
) -> None:
    """A draw of Eq. 2 / Eq. 3 without building it, at a frequent, a rare and (uniform) an impossible z_t."""
    vocab_size, num_draws = len(x_hat), 12_000
    diffusion = make_diffusion(process, vocab_size)
    for z_t in [vocab_size - 1] if process == "masked" else [0, vocab_size // 2, vocab_size - 1]:
        draws = posterior_draws(diffusion, x_hat, z_t, alphas, num_draws, dtype)
        law = bayes_posterior(process, x_hat, z_t, *alphas)
        np.testing.assert_allclose(posterior_of_one(diffusion, x_hat, z_t, *alphas), law, atol=1e-12)
        assert chi_square_p_value(draws, law) > 1e-4


@pytest.mark.parametrize("x_hat", [SHORT, LONG_TAILED], ids=["short", "long-tailed"])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_wrong_posterior_fails_the_same_test(process: Process, x_hat: Array) -> None:
    """The check has teeth: alphas swapped, noise or z_t forgotten, and a step a little too long are all found."""
    alpha_s, alpha_t = 0.75, 0.4
    z_t = len(x_hat) - 1
    draws = posterior_draws(make_diffusion(process, len(x_hat)), x_hat, z_t, (alpha_s, alpha_t), 40_000, torch.float64)
    printed = {"masked": masked_posterior, "uniform": uniform_posterior}[process]
    swapped = printed(x_hat, np.array(z_t), alpha_t, alpha_s).clip(0)
    wrong_laws = {
        "alphas swapped": swapped / swapped.sum(),
        "noise forgotten": x_hat,
        "z_t forgotten": marginal(process, x_hat, alpha_s),
        "step too long": bayes_posterior(process, x_hat, z_t, alpha_s + 0.05, alpha_t),
    }
    assert chi_square_p_value(draws, bayes_posterior(process, x_hat, z_t, alpha_s, alpha_t)) > 1e-4
    for name, law in wrong_laws.items():
        assert chi_square_p_value(draws, law) < 1e-8, name


@pytest.mark.parametrize("x_hat", [SHORT, LONG_TAILED], ids=["short", "long-tailed"])
def test_masked_draws_carry_visible_tokens_over(x_hat: Array) -> None:
    """Eq. 2, second case: a visible token never changes; draws that forget it fail the chi-square test."""
    vocab_size, mask = len(x_hat), len(x_hat) - 1
    diffusion = make_diffusion("masked", vocab_size)
    z = torch.arange(vocab_size).repeat(1, 2000 // vocab_size)
    probs = diffusion.log_probs(torch.from_numpy(x_hat).log().repeat(1, z.shape[1], 1), z).exp()
    for alphas in STEPS.values():
        drawn = diffusion.sample_posterior(probs, z, scalar(alphas[0]), scalar(alphas[1]), generator(0))
        assert (drawn[z != mask] == z[z != mask]).all()
        carried = masked_posterior(np.eye(vocab_size)[0], np.array(0), *alphas)
        forgetful = posterior_draws(diffusion, x_hat, mask, alphas, 1000, torch.float64)
        assert chi_square_p_value(drawn[z == 0].numpy(), carried) > 1e-4
        assert chi_square_p_value(forgetful, carried) < 1e-8


@given(alpha_pairs(), st.integers(2, 8), st.integers(0, 10_000))
@by_hypothesis
def test_masked_steps_change_nothing_but_masks_whatever_the_denoiser_says(
    alphas: tuple[float, float], vocab_size: int, seed: int
) -> None:
    """Masked step: positions that are not masked never change, also where x_probs was not carried over."""
    diffusion, z = make_diffusion("masked", vocab_size), torch.arange(vocab_size - 1).repeat(1, 20)
    x_probs = torch.randn(*z.shape, vocab_size, generator=generator(seed), dtype=torch.float64).softmax(-1)
    levels = scalar(alphas[0]), scalar(alphas[1])
    assert torch.equal(diffusion.sample_posterior(x_probs, z, *levels, generator(seed)), z)
    assert torch.equal(diffusion.posterior(x_probs, z, *levels), torch.nn.functional.one_hot(z, vocab_size).double())


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_impossible_tokens_are_never_drawn(process: Process, dtype: torch.dtype) -> None:
    """alpha_s = 1: a token of probability zero does not appear, be it first, last (the mask) or between others."""
    x_hat = np.array([0.0, 0.0, 0.6, 0.0, 1e-7, 0.4 - 1e-7, 0.0, 0.0])
    z_t = len(x_hat) - 1
    draws = posterior_draws(make_diffusion(process, 8), x_hat, z_t, (1.0, 0.3), 500_000, dtype)
    assert set(np.unique(draws)) <= {2, 4, 5}


@pytest.mark.parametrize("process", PROCESSES)
def test_positions_are_drawn_independently(process: Process) -> None:
    """p(z_s given z_t) = prod_l q(z_s^l given z_t^l, x_hat^l): the joint law of two positions is the product."""
    vocab_size, count = 4, 30_000
    diffusion, z = make_diffusion(process, vocab_size), torch.tensor([[3, 3]])
    x_hat = random_x_hat(diffusion, z, vocab_size, seed=3)
    factors = [bayes_posterior(process, x_hat[0, j].numpy(), 3, 0.8, 0.2) for j in range(2)]
    rows = diffusion.sample_posterior(
        x_hat.repeat(count, 1, 1), z.repeat(count, 1), scalar(0.8), scalar(0.2), generator(8)
    )
    assert chi_square_p_value(rows.numpy(), np.outer(*factors)) > 1e-4
