"""The losses of `modeling.diffusion_blockgen`: limits of the discrete-time KL, bounds, float32 at the ends of time."""

import itertools
from typing import Any

import mpmath  # type: ignore[import-untyped]  # comes with torch
import numpy as np
import pytest
import torch
from enumeration import (
    Array,
    Oracle,
    Process,
    bayes_posterior,
    factorized,
    kl,
    marginal,
    nll,
    random_denoiser,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgen_hf.modeling.diffusion_blockgen import MaskedDiffusion, NoiseSchedule, UniformDiffusion


PROCESSES: tuple[Process, ...] = ("masked", "uniform")
OBJECTIVES = ("elbo", "cross_entropy")
by_hypothesis = settings(max_examples=40)


def make_diffusion(process: Process, vocab_size: int, name: str = "linear", eps: float = 1e-3) -> Any:
    """A process whose mask token, if it has one, is the last id."""
    schedule = NoiseSchedule(name, eps)
    if process == "masked":
        return MaskedDiffusion(vocab_size, vocab_size - 1, schedule)
    return UniformDiffusion(vocab_size, schedule)


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(process: Process, vocab_size: int, shape: tuple[int, int], seed: int) -> tuple[Any, Any]:
    """Clean ids, and noisy ids of which about half are noise."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(vocab_size - (process == "masked"), shape, generator=rng)
    noise = (
        torch.full(shape, vocab_size - 1) if process == "masked" else torch.randint(vocab_size, shape, generator=rng)
    )
    return x, torch.where(torch.rand(shape, generator=rng) < 0.5, noise, x)


def x_hat_of(diffusion: Any, logits: torch.Tensor, z_t: torch.Tensor) -> Array:
    return diffusion.log_probs(logits, z_t).exp().numpy()


# ---- the limit of the discrete-time KL
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("process", PROCESSES)
def test_elbo_is_the_rate_of_the_posterior_kl(process: Process, t: float, name: str) -> None:
    """Eq. 15, 17 = lim T KL(q(z_s given z_t, x) from q(z_s given z_t, x_hat)), s = t - 1 / T, by Bayes from Eq. 1."""
    vocab_size = 5
    diffusion = make_diffusion(process, vocab_size, name)
    alpha_t, slope = diffusion.schedule.alpha(numbers(t)), diffusion.schedule.alpha_derivative(numbers(t))
    logits = random_logits(1, vocab_size, vocab_size, seed=int(100 * t))
    z = torch.arange(vocab_size)[None]
    x_hat = x_hat_of(diffusion, logits, z)[0]
    dt = 1e-6
    alpha_s = diffusion.schedule.alpha(numbers(t - dt)).item()
    for token in range(vocab_size - (process == "masked")):
        x = np.eye(vocab_size)[token]
        loss = diffusion.loss(logits, torch.full_like(z, token), z, alpha_t, slope, "elbo")[0]
        assert loss.dtype == torch.float64
        for z_t in np.flatnonzero(marginal(process, x, alpha_t.item())).tolist():
            true = bayes_posterior(process, x, z_t, alpha_s, alpha_t.item())
            model = bayes_posterior(process, x_hat[z_t], z_t, alpha_s, alpha_t.item())
            assert loss[z_t].item() == pytest.approx(kl(true, model) / dt, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("process", PROCESSES)
def test_integrated_elbo_is_the_limit_of_the_summed_kl(process: Process, name: str) -> None:
    """Eq. 15, 16: E over t and z_t ~ Eq. 1 equals sum over T steps of E KL, T to infinity, over all of [0, 1]."""
    vocab_size, token, num_steps = 4, 1, 20_000
    diffusion = make_diffusion(process, vocab_size, name)
    logits = random_logits(1, vocab_size, vocab_size, seed=3)
    z, x = torch.arange(vocab_size)[None], np.eye(vocab_size)[token]
    x_hat = x_hat_of(diffusion, logits, z)[0]

    t = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    alpha, slope = diffusion.schedule.alpha(t)[:, None], diffusion.schedule.alpha_derivative(t)[:, None]
    shape = (num_steps, vocab_size)
    clean = torch.full(shape, token)
    loss = diffusion.loss(logits.expand(*shape, -1), clean, z.expand(shape), alpha, slope, "elbo").numpy()
    weights = np.stack([marginal(process, x, level) for level in alpha[:, 0].tolist()])
    integral = np.where(weights > 0, weights * loss, 0).sum() / num_steps

    def summed_kl(steps: int) -> float:
        levels = diffusion.schedule.alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()
        return sum(
            marginal(process, x, alpha_t)[z_t]
            * kl(bayes_posterior(process, x, z_t, *step), bayes_posterior(process, x_hat[z_t], z_t, *step))
            for alpha_s, alpha_t in itertools.pairwise(levels)
            for step in [(alpha_s, alpha_t)]
            for z_t in np.flatnonzero(marginal(process, x, alpha_t)).tolist()
        )

    coarse, fine = summed_kl(300), summed_kl(600)
    assert fine == pytest.approx(integral, rel=5e-3)
    assert 2 * fine - coarse == pytest.approx(integral, rel=1e-4)  # without the term of order 1 / T


# ---- against the exact likelihood of an enumerated model
def exact_elbo(diffusion: Any, oracle: Oracle, x: tuple[int, ...], num_times: int) -> float:
    """E over t and z_t of the loss of one block, summed over every z_t and by Gauss-Legendre quadrature over t."""
    nodes, node_weights = np.polynomial.legendre.leggauss(num_times)
    t = torch.from_numpy((nodes + 1) / 2)
    alpha, slope = diffusion.schedule.alpha(t), diffusion.schedule.alpha_derivative(t)
    z = states(oracle.vocab_size, len(x))
    logits = torch.from_numpy(np.stack([oracle.denoise((), tuple(row), len(x)) for row in z.tolist()]))
    total = 0.0
    for level, derivative, weight in zip(alpha, slope, node_weights / 2, strict=True):
        loss = diffusion.loss(
            logits, torch.tensor(x).expand(z.shape), torch.from_numpy(z), level, derivative, "elbo"
        ).sum(-1)
        q = factorized(marginal(oracle.process, np.eye(oracle.vocab_size)[list(x)], level.item())[None])[0]
        total += weight * (q[q > 0] * loss.numpy()[q > 0]).sum()
    return total


@pytest.mark.parametrize("process", PROCESSES)
def test_elbo_bounds_the_exact_likelihood_of_an_enumerated_model(process: Process) -> None:
    """Section 2.1: NELBO(x) >= -log p(x) for all x of two tokens (V = 4, eps = 0); T-step bounds tend to it."""
    vocab_size, steps = 4, 400
    oracle = Oracle(random_denoiser(vocab_size, seed=5), process, vocab_size, eps=0.0)
    diffusion = make_diffusion(process, vocab_size, eps=0.0)
    law = oracle.block_diffusion_law(2, 2, steps)
    gaps = []
    for x in itertools.product(range(vocab_size - (process == "masked")), repeat=2):
        nelbo = exact_elbo(diffusion, oracle, x, num_times=100)
        if sum(x) <= 1:  # a few of them
            coarse, fine = oracle.discrete_nelbo(x, 2, steps // 2), oracle.discrete_nelbo(x, 2, steps)
            assert nelbo == pytest.approx(2 * fine - coarse, rel=5e-4)
        gaps.append(nelbo - nll(x, law))
    assert min(gaps) > -1e-3  # the law has 400 steps and the bound infinitely many
    assert max(gaps) > 0.02


# ---- values, signs, zeros
@given(st.floats(1e-3, 0.999), st.integers(2, 9), st.integers(0, 10_000), st.sampled_from([0.5, 3.0, 40.0]))
@by_hypothesis
def test_losses_are_not_negative(t: float, vocab_size: int, seed: int, scale: float) -> None:
    """Signs: with alpha' < 0 both losses are positive, as KL divergences and cross entropies are."""
    for process, objective in itertools.product(PROCESSES, OBJECTIVES):
        diffusion = make_diffusion(process, vocab_size)
        x, z = random_pairs(process, vocab_size, (2, 4), seed)
        logits = random_logits(2, 4, vocab_size, seed=seed, scale=scale)
        alpha, slope = diffusion.schedule.alpha(numbers(t)), diffusion.schedule.alpha_derivative(numbers(t))
        loss = diffusion.loss(logits, x, z, alpha, slope, objective)
        assert loss.shape == (2, 4)
        assert (loss >= -1e-12).all() and loss.isfinite().all()


@given(st.floats(1e-3, 0.999), st.integers(2, 9), st.integers(0, 10_000))
@by_hypothesis
def test_a_perfect_prediction_costs_nothing(t: float, vocab_size: int, seed: int) -> None:
    """KL(q from q) = 0: x_hat one-hot on x gives a loss of zero, whatever z_t is."""
    for process, objective in itertools.product(PROCESSES, OBJECTIVES):
        diffusion = make_diffusion(process, vocab_size)
        x, z = random_pairs(process, vocab_size, (2, 4), seed)
        logits = 2000.0 * torch.nn.functional.one_hot(x, vocab_size).double()
        alpha, slope = diffusion.schedule.alpha(numbers(t)), diffusion.schedule.alpha_derivative(numbers(t))
        loss = diffusion.loss(logits, x, z, alpha, slope, objective)
        torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-9, rtol=0)


@given(st.floats(1e-3, 0.999), st.integers(0, 10_000))
@by_hypothesis
def test_masked_losses_are_weighted_cross_entropies_of_masked_positions(t: float, seed: int) -> None:
    """Eq. 15: alpha' / (1 - alpha) log x_hat(x) where z_t is the mask, else zero; cross entropy: without weight."""
    diffusion, vocab_size = make_diffusion("masked", 6), 6
    x, z = random_pairs("masked", vocab_size, (2, 5), seed)
    logits = random_logits(2, 5, vocab_size, seed=seed)
    alpha, slope = diffusion.schedule.alpha(numbers(t)), diffusion.schedule.alpha_derivative(numbers(t))
    surprisal = -logits[..., :-1].log_softmax(-1).gather(-1, x[..., None])[..., 0]
    expected = torch.where(z == vocab_size - 1, surprisal, 0.0)
    torch.testing.assert_close(diffusion.loss(logits, x, z, alpha, slope, "cross_entropy"), expected)
    weight = -slope / (1 - alpha)
    torch.testing.assert_close(diffusion.loss(logits, x, z, alpha, slope, "elbo"), weight * expected)


def test_uniform_cross_entropy_scores_every_position() -> None:
    """Section 5.1: -log x_hat(x), at unchanged positions too, since nothing tells them from the noisy ones."""
    diffusion = make_diffusion("uniform", 6)
    x, z = random_pairs("uniform", 6, (2, 5), seed=0)
    logits = random_logits(2, 5, 6, seed=0)
    loss = diffusion.loss(logits, x, z, numbers(0.5), numbers(-1.0), "cross_entropy")
    torch.testing.assert_close(loss, -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0])


@given(st.floats(1e-3, 0.999), st.integers(2, 9), st.integers(0, 10_000))
@by_hypothesis
def test_uniform_elbo_is_equation_17(t: float, vocab_size: int, seed: int) -> None:
    """Eq. 17 written out in numpy: + alpha' / (V alpha) times the bracket, so that it comes out positive."""
    diffusion = make_diffusion("uniform", vocab_size)
    x, z = random_pairs("uniform", vocab_size, (1, 4), seed)
    logits = random_logits(1, 4, vocab_size, seed=seed)
    alpha, slope = diffusion.schedule.alpha(numbers(t)), diffusion.schedule.alpha_derivative(numbers(t))
    loss = diffusion.loss(logits, x, z, alpha, slope, "elbo")
    size, level = vocab_size, alpha.item()
    for position in range(4):
        i = int(z[0, position])
        x_bar = size * level * np.eye(size)[int(x[0, position])] + 1 - level
        x_bar_theta = size * level * logits[0, position].softmax(-1).numpy() + 1 - level
        ratio = x_bar / x_bar[i]
        bracket = (
            size / x_bar[i] - size / x_bar_theta[i] - (ratio * np.log(x_bar_theta[i] / x_bar_theta * ratio)).sum()
        )
        expected = slope.item() / (size * level) * bracket
        assert loss[0, position].item() == pytest.approx(expected, rel=1e-8, abs=1e-8 / (1 - level))


@pytest.mark.parametrize(
    ("process", "objective"), [("masked", "elbo"), ("uniform", "elbo"), ("uniform", "cross_entropy")]
)
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1,), ()])
def test_losses_take_a_noise_level_a_batch_a_row_or_a_token(
    process: Process, objective: str, shape: tuple[int, ...]
) -> None:
    """Section 5 of the design: levels broadcast to `[B, L]`, and each token's loss depends on its own level only."""
    diffusion = make_diffusion(process, 5)
    x, z = random_pairs(process, 5, (2, 3), seed=1)
    logits = random_logits(2, 3, 5, seed=1)
    alpha = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)[: int(np.prod(shape))].view(shape)
    slope = -1 - alpha
    loss = diffusion.loss(logits, x, z, alpha, slope, objective)
    assert loss.shape == (2, 3)
    for b, l in np.ndindex(2, 3):
        level, derivative = alpha.expand(2, 3)[b, l], slope.expand(2, 3)[b, l]
        one = diffusion.loss(
            logits[b : b + 1, l : l + 1], x[b, l].view(1, 1), z[b, l].view(1, 1), level, derivative, objective
        )
        torch.testing.assert_close(loss[b, l], one[0, 0])


def test_a_visible_token_costs_a_masked_model_nothing_even_without_noise() -> None:
    """Eq. 15: zero loss and gradient where z_t = x, also at alpha = 1, where the weight is infinite."""
    for dtype, objective in itertools.product((torch.float32, torch.float64), OBJECTIVES):
        diffusion = make_diffusion("masked", 5)
        logits = random_logits(1, 4, 5, seed=0).to(dtype).requires_grad_()
        x = torch.tensor([[0, 1, 2, 3]])
        one, minus_one = torch.ones(1, 1, dtype=dtype), -torch.ones(1, 1, dtype=dtype)
        loss = diffusion.loss(logits, x, x, one, minus_one, objective)
        assert (loss == 0).all()
        loss.sum().backward()
        assert logits.grad is not None and (logits.grad == 0).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_unknown_objective_is_refused(process: Process) -> None:
    """Section 3 of the design: a bad value raises a ValueError that names what was given and what is accepted."""
    x = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="hinge") as error:
        make_diffusion(process, 4).loss(random_logits(1, 1, 4, seed=0), x, x, numbers(0.5), numbers(-1.0), "hinge")
    assert "elbo" in str(error.value) and "cross_entropy" in str(error.value)


# ---- float32
def loss_and_gradient(
    diffusion: Any, logits: torch.Tensor, x: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, objective: str
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = diffusion.loss(leaf, x, z, alpha, -torch.ones_like(alpha), objective)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


# t = 1e-3 and t = 1 - 1e-6 of the linear schedule, the float32 number below 1, and an alpha far below the usual eps
LEVELS = {"t=1e-3": 0.999001, "t=1-1e-6": 1e-3 + 0.999e-6, "last below 1": 1 - 2**-24, "nearly 0": 1e-6, "middle": 0.5}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("vocab_size", [4, 50_258])
@pytest.mark.parametrize("process", PROCESSES)
def test_float32_losses_agree_with_float64(process: Process, vocab_size: int, level: float, objective: str) -> None:
    """Eq. 15 and 17 lose nothing in float32 at the ends of time: value and gradient, at changed and unchanged tokens.

    The natural scale of an ELBO term is -alpha' / (1 - alpha), the rate at which a noisy token turns clean.
    """
    diffusion = make_diffusion(process, vocab_size)
    noise = vocab_size - 1
    x = torch.tensor([[0, 0, 1, 1, 2, 2]])
    z = torch.tensor([[noise, 0, noise, 1, noise, 2]])  # noise, clean, noise, clean, ...
    alpha = torch.tensor([[level]], dtype=torch.float32)
    scale = (1 / (1 - alpha.double())).item() if objective == "elbo" else 1.0
    for spread in (0.3, 3.0, 12.0):
        logits = random_logits(1, 6, vocab_size, seed=9, scale=spread).float()
        logits[:, :2] += spread * torch.nn.functional.one_hot(torch.tensor([0, 0]), vocab_size)  # a good prediction
        loss, gradient = loss_and_gradient(diffusion, logits, x, z, alpha, objective)
        exact, exact_gradient = loss_and_gradient(diffusion, logits.double(), x, z, alpha.double(), objective)
        assert loss.isfinite().all() and gradient.isfinite().all()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("process", PROCESSES)
def test_float64_losses_near_the_ends_are_those_of_exact_arithmetic(process: Process, level: float) -> None:
    """Eq. 17 as sum over r of true log(true / model) - true + model, in 60 digits; Eq. 15 likewise."""
    vocab_size = 6
    diffusion = make_diffusion(process, vocab_size)
    x, z = torch.tensor([[0, 0, 1]]), torch.tensor([[5, 0 if process == "uniform" else 5, 5]])
    logits = random_logits(1, 3, vocab_size, seed=2)
    loss = diffusion.loss(logits, x, z, numbers(level), numbers(-1.0), "elbo")
    with mpmath.workdps(60):
        alpha = mpmath.mpf(level)
        for position in range(3):
            weights = [mpmath.exp(mpmath.mpf(value)) for value in logits[0, position].tolist()]
            token, i = int(x[0, position]), int(z[0, position])
            if process == "masked":
                expected = -mpmath.log(weights[token] / sum(weights[:-1])) / (1 - alpha)
            else:
                clean = [vocab_size * alpha * (r == token) + 1 - alpha for r in range(vocab_size)]
                model = [vocab_size * alpha * weight / sum(weights) + 1 - alpha for weight in weights]
                rates = [(clean[r] / clean[i], model[r] / model[i]) for r in range(vocab_size)]
                expected = sum(p * mpmath.log(p / q) - p + q for p, q in rates) / (vocab_size * alpha)
            assert loss[0, position].item() == pytest.approx(float(expected), rel=1e-6, abs=1e-9 / (1 - level))


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
def test_confident_mistakes_stay_finite_in_float32(process: Process, level: float) -> None:
    """Eq. 15, 17 with logits 200 apart: x_hat(x) underflows, its logarithm and the gradients must not."""
    diffusion = make_diffusion(process, 50)
    logits = torch.zeros(1, 2, 50)
    logits[..., 7] = 200.0
    x, z = torch.tensor([[3, 3]]), torch.tensor([[49, 3 if process == "uniform" else 49]])
    for objective in OBJECTIVES:
        loss, gradient = loss_and_gradient(diffusion, logits, x, z, torch.tensor([[level]]), objective)
        assert loss.isfinite().all() and (loss > 0).all()
        assert gradient.isfinite().all()
        if process == "masked" or objective == "cross_entropy":
            weight = 1.0 if objective == "cross_entropy" else 1 / (1 - torch.tensor(level).item())
            torch.testing.assert_close(loss, torch.full_like(loss, 200 * weight), rtol=1e-4, atol=0)
