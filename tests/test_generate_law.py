"""The law of `generate`: samples of a tiny model against its exact enumeration by brute force (`enumeration.py`)."""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import Denoiser, Oracle, Process, Tokens, chi_square_p_value, factorized, marginal, nll, states
from tiny import generate, tiny_model

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.generation.denoising_blockgen import TimeGrid


VOCAB_SIZE, LENGTH = 4, 4
NUM_SAMPLES = 20_000
SIGNIFICANCE = 1e-4


# Models whose laws are spread out and differ between decodings (`test_the_laws_can_be_told_apart`).
SEEDS = {"masked": 6, "uniform": 5}


def law_model(process: Process, seed: int | None = None, **overrides: Any) -> BlockGenForDiffusionLM:
    """Four tokens, the last of them the mask of a masked model; predictions that depend on all that they see."""
    return tiny_model(
        process,
        seed=SEEDS[process] if seed is None else seed,
        vocab_size=VOCAB_SIZE,
        block_sizes=[1, 2, 3, 4],
        max_position_embeddings=8,
        pad_token_id=None,
        scale=3.0,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=1,
        **overrides,
    )


def denoiser(model: BlockGenForDiffusionLM) -> Denoiser:
    """The model's raw logits, as the oracle asks for them: clean prefix, noisy block, block size; without a cache."""

    @functools.cache
    def table(start: int, length: int, block_size: int) -> np.ndarray:
        """Logits of every prefix and noisy block of these lengths, `[V ** start, V ** length, length, V]`."""
        both = torch.from_numpy(states(VOCAB_SIZE, start + length))
        with torch.no_grad():
            logits = model(
                both[:, :start],
                both[:, start:],
                block_size=block_size,
                noisy_position_ids=torch.arange(start, start + length)[None],
            ).logits
        return logits.double().numpy().reshape(VOCAB_SIZE**start, VOCAB_SIZE**length, length, VOCAB_SIZE)

    def index(tokens: Tokens) -> int:
        return functools.reduce(lambda number, token: VOCAB_SIZE * number + token, tokens, 0)

    def denoise(prefix: Tokens, z: Tokens, block_size: int) -> np.ndarray:
        return table(len(prefix), len(z), block_size)[index(prefix), index(z)]

    return denoise


def oracle_of(model: BlockGenForDiffusionLM) -> Oracle:
    config = model.config
    return Oracle(denoiser(model), config.diffusion_type, VOCAB_SIZE, eps=config.noise_schedule_eps)


def p_value(model: BlockGenForDiffusionLM, law: np.ndarray, prompt: Tokens = (), **settings: Any) -> float:
    """Chi-square of many samples without a prompt, or behind copies of one."""
    prompts = torch.tensor([prompt] * NUM_SAMPLES, dtype=torch.long).reshape(NUM_SAMPLES, len(prompt))
    samples = generate(model, prompts, seed=11, max_new_tokens=LENGTH - len(prompt), **settings)
    return chi_square_p_value(samples[:, len(prompt) :].numpy(), law)


def case(*values: Any, slow: bool = False) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


BLOCK_CASES = [
    # process, block size, steps
    case("masked", 1, 2, slow=True),
    case("masked", 2, 2, slow=True),
    case("masked", 4, 2),
    case("masked", 4, 8),
    case("masked", 3, 2),  # the last block is shorter
    case("masked", 2, 8, slow=True),
    case("uniform", 1, 2, slow=True),
    case("uniform", 2, 2, slow=True),
    case("uniform", 4, 2),
    case("uniform", 4, 8),
    case("uniform", 3, 1, slow=True),
    case("uniform", 2, 8, slow=True),
]
ARPC_CASES = [
    # process, block size, steps, start, period
    case("masked", 4, 2, 0, 1),
    case("masked", 3, 3, 0, 1),
    case("masked", 4, 5, 1, 2, slow=True),
    case("masked", 2, 4, 0, 1, slow=True),
    case("uniform", 4, 2, 0, 1),
    case("uniform", 2, 3, 0, 1),
    case("uniform", 4, 4, 1, 1, slow=True),
]


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_the_laws_can_be_told_apart(process: Process) -> None:
    """Else the tests below would show nothing: entropy of two nats and more, 5% of the mass elsewhere."""
    oracle = oracle_of(law_model(process))
    laws = [
        oracle.ar_law(LENGTH),
        oracle.block_diffusion_law(LENGTH, 4, 2),
        oracle.block_diffusion_law(LENGTH, 4, 8),
        oracle.block_diffusion_law(LENGTH, 2, 2),
        oracle.arpc_law(LENGTH, 4, 2),
    ]
    for one, other in itertools.combinations(laws, 2):
        assert np.abs(one - other).sum() / 2 > 0.05
    for law in laws:
        assert law.sum() == pytest.approx(1.0, abs=1e-9)
        assert -(law[law > 0] * np.log(law[law > 0])).sum() > 2


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_autoregressive_samples_have_the_law_of_the_chain_rule(process: Process) -> None:
    """prod_l p(x_l given x_<l); for uniform noise the mean over the random query tokens."""
    model = law_model(process)
    assert p_value(model, oracle_of(model).ar_law(LENGTH), decoding="ar") > SIGNIFICANCE


@pytest.mark.parametrize("process, block_size, steps", BLOCK_CASES)
def test_block_diffusion_samples_have_their_exact_law(process: Process, block_size: int, steps: int) -> None:
    """Eq. 2, Eq. 3: the prior pushed through the transition of every step, block by block."""
    model = law_model(process)
    law = oracle_of(model).block_diffusion_law(LENGTH, block_size, steps)
    settings = dict(decoding="block_diffusion", block_size=block_size, denoising_steps=steps)
    assert p_value(model, law, **settings) > SIGNIFICANCE


@pytest.mark.parametrize("process, block_size, steps, start, period", ARPC_CASES)
def test_arpc_samples_have_their_exact_law(
    process: Process, block_size: int, steps: int, start: int, period: int
) -> None:
    """Algorithm 1 with the AR surprisal: proposal, verification, the k worst back to the prior."""
    model = law_model(process)
    law = oracle_of(model).arpc_law(LENGTH, block_size, steps, start=start, period=period)
    settings = dict(
        decoding="arpc", block_size=block_size, denoising_steps=steps, corrector_start=start, corrector_period=period
    )
    assert p_value(model, law, **settings) > SIGNIFICANCE


@pytest.mark.parametrize("process", ["masked", case("uniform", slow=True)])
@pytest.mark.parametrize(
    "settings", [dict(noise_removal="greedy"), dict(ar_seed_tokens=1), dict(prompt=(2, 0))], ids=str
)
def test_variations_have_their_exact_law(settings: dict[str, Any], process: Process) -> None:
    """Greedy noise removal, AR seeding off the grid of blocks, and a prompt."""
    model = law_model(process)
    prompt = settings.get("prompt", ())
    law = oracle_of(model).block_diffusion_law(LENGTH - len(prompt), 2, 2, **settings)
    assert p_value(model, law, decoding="block_diffusion", block_size=2, denoising_steps=2, **settings) > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("process", ["masked", "uniform"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_more_laws(process: Process, block_size: int, steps: int) -> None:
    """Block diffusion and ARPC over more block sizes and step counts, with another model."""
    model = law_model(process, seed=2)
    oracle = oracle_of(model)
    settings = dict(block_size=block_size, denoising_steps=steps)
    law = oracle.block_diffusion_law(LENGTH, block_size, steps)
    assert p_value(model, law, decoding="block_diffusion", **settings) > SIGNIFICANCE
    law = oracle.arpc_law(LENGTH, block_size, steps, period=3)
    assert p_value(model, law, decoding="arpc", corrector_period=3, **settings) > SIGNIFICANCE


def test_first_hitting_is_ancestral_sampling_with_many_steps() -> None:
    """Zheng et al. (2025): the limit of T to infinity; 400 steps are as good with so many samples."""
    model = law_model("masked", noise_schedule_eps=0.0)
    law = oracle_of(model).block_diffusion_law(LENGTH, 4, 400)
    assert p_value(model, law, decoding="block_diffusion", block_size=4, sampler="first_hitting") > SIGNIFICANCE


# ---- the test notices what is wrong
def test_a_wrong_masked_posterior_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reveals as if two of four steps were left out: too much at a time, so that fewer tokens see others."""
    model = law_model("masked")
    law = oracle_of(model).block_diffusion_law(LENGTH, 4, 4)
    settings = dict(decoding="block_diffusion", block_size=4, denoising_steps=4)
    assert p_value(model, law, **settings) > SIGNIFICANCE
    right = TimeGrid.of

    def wrong(*args: Any) -> TimeGrid:
        grid = right(*args)
        return TimeGrid(grid.times, grid.alphas[[0, 3, 3, 3, 4]])

    monkeypatch.setattr(TimeGrid, "of", wrong)
    assert p_value(model, law, **settings) < SIGNIFICANCE


def test_a_wrong_uniform_posterior_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the noise that a token has at time s: every token is kept or denoised."""
    model = law_model("uniform")
    law = oracle_of(model).block_diffusion_law(LENGTH, 2, 2)
    right = model.diffusion._posterior_weights
    settings = dict(decoding="block_diffusion", block_size=2, denoising_steps=2)

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keep, denoise, noise = right(*args)
        return keep + noise, denoise, torch.zeros_like(noise)

    monkeypatch.setattr(type(model.diffusion), "_posterior_weights", staticmethod(wrong))
    assert p_value(model, law, **settings) < SIGNIFICANCE


def test_a_corrector_that_takes_the_best_tokens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Surprisal with the wrong sign."""
    from blockgen_hf.generation import block_decoding_blockgen as loop

    model = law_model("masked")
    law = oracle_of(model).arpc_law(LENGTH, 4, 3)
    right = loop.penalties
    monkeypatch.setattr(loop, "penalties", lambda *args: -right(*args))
    assert p_value(model, law, decoding="arpc", block_size=4, denoising_steps=3) < SIGNIFICANCE


def test_a_query_that_is_no_noise_is_noticed() -> None:
    """A uniform model whose AR queries are one fixed token has another law."""
    model = law_model("uniform")
    oracle = oracle_of(model)
    oracle.queries = [1]
    assert p_value(model, oracle.ar_law(LENGTH), decoding="ar") < SIGNIFICANCE


# ---- bounds
@pytest.mark.parametrize("process", ["masked", case("uniform", slow=True)])
def test_losses_of_block_size_1_are_a_distribution_over_texts(process: Process) -> None:
    """Sec. 3.1: exp(-loss) of the AR mode adds up to 1 over all texts, fully noised queries given."""
    model = law_model(process)
    values = range(VOCAB_SIZE - (process == "masked"))
    texts = torch.tensor([*itertools.product(values, repeat=LENGTH)])
    queries = torch.full((1, LENGTH), VOCAB_SIZE - 1)
    with torch.no_grad():
        losses = [
            model(text[None], queries, labels=text[None], block_size=1, noise_level=1.0).loss.double()
            for text in texts
        ]
    total = (-LENGTH * torch.stack(losses)).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)
    if process == "masked":
        law = oracle_of(model).ar_law(LENGTH)
        for text, loss in zip(texts.tolist(), losses, strict=True):
            assert LENGTH * loss.item() == pytest.approx(nll(tuple(text), law), abs=1e-4)


def exact_bound(model: BlockGenForDiffusionLM, text: Tokens, block_size: int, first_time: float = 0.0) -> float:
    """The ELBO of `forward` and `diffusion.loss`, in nats: over every z_t, and by Gauss-Legendre quadrature over t.

    t = first + (1 - first) u^3 puts nodes where the integrand of a wrong model is steep. The mean is over t >= first.
    """
    diffusion, process = model.diffusion, model.config.diffusion_type
    z = states(VOCAB_SIZE, LENGTH)
    clean = torch.tensor([text]).expand(len(z), -1)
    with torch.no_grad():
        logits = model(clean, torch.from_numpy(z), block_size=block_size).logits.double()
    nodes, weights = np.polynomial.legendre.leggauss(150)
    u = (nodes + 1) / 2
    times, total = torch.from_numpy(first_time + (1 - first_time) * u**3), 0.0
    for t, weight in zip(times, 3 * u**2 * weights / 2, strict=True):
        alpha, slope = diffusion.schedule.alpha(t), diffusion.schedule.alpha_derivative(t)
        loss = diffusion.loss(logits, clean, torch.from_numpy(z), alpha, slope, "elbo").sum(-1).numpy()
        q = factorized(marginal(process, np.eye(VOCAB_SIZE)[list(text)], alpha.item())[None])[0]
        total += weight * (q[q > 0] * loss[q > 0]).sum()
    return total


@pytest.mark.parametrize("block_size", [2, case(4, slow=True)])
@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_the_elbo_bounds_the_exact_likelihood(process: Process, block_size: int) -> None:
    """Sec. 2.1: expected over t and z_t it is at least -log p of block diffusion with many steps (eps = 0)."""
    model = law_model(process, noise_schedule_eps=0.0)
    law = oracle_of(model).block_diffusion_law(LENGTH, block_size, 200 if block_size == 2 else 40)
    gaps = []
    for text in [(0, 1, 2, 0), (2, 2, 2, 2), (1, 0, 0, 1), (0, 0, 0, 0), (1, 2, 1, 2)]:
        gaps.append(exact_bound(model, text, block_size) - nll(text, law))
    assert min(gaps) > -2e-3
    assert max(gaps) > 0.01


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_the_drawn_training_loss_estimates_the_bound(process: Process) -> None:
    """`forward(labels)` with its own t in [1e-3, 1] and z_t: the mean over many rows is the expected ELBO a token."""
    model = law_model(process, training_objective="elbo", noise_schedule_eps=0.0).train()
    text = (0, 2, 1, 1)
    rows = torch.tensor([text]).expand(20_000, -1)
    torch.manual_seed(2)
    with torch.no_grad():
        loss = model(rows, labels=rows, block_size=2).loss.item()
    assert loss * LENGTH == pytest.approx(exact_bound(model, text, 2, first_time=1e-3), rel=0.05)
