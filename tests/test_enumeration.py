"""The brute-force oracle of `enumeration.py` against hand calculations, simulation and Bayes' rule."""

import bisect
import functools
import itertools

import numpy as np
import pytest
from enumeration import (
    Array,
    Oracle,
    Posterior,
    Process,
    Tokens,
    bayes_posterior,
    chi_square_p_value,
    draw,
    factorized,
    forward_kernel,
    marginal,
    masked_posterior,
    nll,
    prior,
    random_denoiser,
    states,
    uniform_posterior,
)


VOCAB_SIZE = 4
MASK = VOCAB_SIZE - 1
PROCESSES: tuple[Process, ...] = ("masked", "uniform")


@functools.cache
def make_oracle(process: Process, posterior: Posterior | None = None) -> Oracle:
    return Oracle(random_denoiser(VOCAB_SIZE), process, VOCAB_SIZE, posterior=posterior)


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def total_variation(p: Array, q: Array) -> float:
    return float(np.abs(p - q).sum() / 2)


# ---- the building blocks
@pytest.mark.parametrize("process", PROCESSES)
def test_forward_kernels_compose_to_the_marginal(process: Process) -> None:
    """Eq. 1: transitions t1 then t2 give Cat(alpha x + (1 - alpha) pi)."""
    x = np.eye(VOCAB_SIZE)[:MASK]
    two_steps = marginal(process, x, 0.7) @ forward_kernel(process, VOCAB_SIZE, 0.7, 0.2)
    np.testing.assert_allclose(two_steps, marginal(process, x, 0.2), atol=1e-15)


@pytest.mark.parametrize("alpha_s, alpha_t", [(0.6, 0.25), (1.0, 0.001), (0.3, 0.0)])
@pytest.mark.parametrize("process", PROCESSES)
def test_printed_posteriors_follow_bayes_rule(process: Process, alpha_s: float, alpha_t: float) -> None:
    """Eq. 2 and Eq. 3 equal q(z_t given z_s) q(z_s given x) / q(z_t given x), for a denoiser's x_hat too."""
    x_hat = np.array([0.5, 0.3, 0.2, 0.0] if process == "masked" else [0.4, 0.3, 0.2, 0.1])
    printed = {"masked": masked_posterior, "uniform": uniform_posterior}[process]
    for z_t in range(VOCAB_SIZE):
        x = np.eye(VOCAB_SIZE)[z_t] if process == "masked" and z_t != MASK else x_hat  # carried over
        if marginal(process, x, alpha_t)[z_t] > 0:
            expected = bayes_posterior(process, x, z_t, alpha_s, alpha_t)
            np.testing.assert_allclose(printed(x, np.array(z_t), alpha_s, alpha_t), expected, atol=1e-15)


def test_factorized_is_the_outer_product_in_the_order_of_states() -> None:
    """A block's law is the product over its positions."""
    factors = np.random.default_rng(0).dirichlet(np.ones(3), size=(1, 2))
    for state, probability in zip(states(3, 2), factorized(factors)[0], strict=True):
        assert probability == pytest.approx(factors[0, 0, state[0]] * factors[0, 1, state[1]], abs=1e-15)


def test_steps_follow_the_grid_and_end_without_noise() -> None:
    """linspace(1, 1e-5, T + 1) through alpha_t = eps + (1 - eps)(1 - t); the last step has alpha_s = 1 exactly."""
    steps = make_oracle("masked").alphas(2)
    middle = 1e-3 + 0.999 * (1 - 0.500005)
    np.testing.assert_allclose(steps, [(1e-3, middle), (middle, 1.0)], atol=1e-15)
    assert steps[-1][1] == 1.0


# ---- the laws
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("block_size", "steps"), [(1, 4), (2, 4), (3, 1), (4, 1)])
def test_laws_are_probabilities(process: Process, block_size: int, steps: int) -> None:
    """Every decoding's law is non-negative and sums to 1; a masked model leaves no mask token behind."""
    oracle = make_oracle(process)
    laws = {
        "ar": oracle.ar_law(4),
        "block_diffusion": oracle.block_diffusion_law(4, block_size, steps),
        "arpc": oracle.arpc_law(4, block_size, steps),
        "greedy": oracle.arpc_law(4, block_size, steps, start=1, period=2, noise_removal="greedy"),
        "seeded": oracle.arpc_law(4, block_size, steps, ar_seed_tokens=1, prompt=(2,)),
    }
    for name, law in laws.items():
        assert law.shape == (VOCAB_SIZE,) * 4, name
        assert law.min() >= 0, name
        assert law.sum() == pytest.approx(1, abs=1e-12), name
        if process == "masked":
            assert all(law.take(MASK, axis=axis).sum() == 0 for axis in range(4)), name


def test_autoregressive_law_of_a_masked_model_is_the_chain_rule() -> None:
    """p(x) = prod_l p(x_l given x_<l), each factor read off one mask token."""
    denoise = random_denoiser(VOCAB_SIZE)
    law = make_oracle("masked").ar_law(3)
    for x in itertools.product(range(MASK), repeat=3):
        factors = [softmax(denoise(x[:i], (MASK,), 1)[0, :MASK])[x[i]] for i in range(3)]
        assert law[x] == pytest.approx(np.prod(factors), abs=1e-15)


def test_autoregressive_law_of_a_uniform_model_averages_over_query_tokens() -> None:
    """Uniform noise: the query at the predicted position is a random token, drawn anew for each position."""
    denoise = random_denoiser(VOCAB_SIZE)
    law = make_oracle("uniform").ar_law(2)
    for x in itertools.product(range(VOCAB_SIZE), repeat=2):
        factors = [
            np.mean([softmax(denoise(x[:i], (query,), 1)[0])[x[i]] for query in range(VOCAB_SIZE)]) for i in range(2)
        ]
        assert law[x] == pytest.approx(np.prod(factors), abs=1e-15)


def test_one_masked_step_gives_the_product_of_marginals() -> None:
    """T = 1: every position is drawn from x_hat of the all-mask block at once, on its own (Eq. 2, alpha_s = 1)."""
    logits = random_denoiser(VOCAB_SIZE)((), (MASK,) * 3, 3)
    marginals: list[Array] = [np.append(softmax(row[:MASK]), 0.0) for row in logits]
    by_hand = np.einsum("i,j,k->ijk", *marginals)
    np.testing.assert_allclose(make_oracle("masked").block_diffusion_law(3, 3, 1), by_hand, atol=1e-15)


def test_one_uniform_step_mixes_products_over_the_random_start() -> None:
    """T = 1, uniform: z from the prior, kept in proportion to alpha_t V x_hat(z), else x_hat (Eq. 3, alpha_s = 1)."""
    denoise = random_denoiser(VOCAB_SIZE)
    by_hand = np.zeros((VOCAB_SIZE,) * 2)
    for z in itertools.product(range(VOCAB_SIZE), repeat=2):
        kept = []
        for row, token in zip(denoise((), z, 2), z, strict=True):
            weights = (1 - 1e-3) * softmax(row)
            weights[token] += 1e-3 * VOCAB_SIZE * softmax(row)[token]
            kept.append(weights / weights.sum())
        by_hand += np.outer(*kept) / VOCAB_SIZE**2
    np.testing.assert_allclose(make_oracle("uniform").block_diffusion_law(2, 2, 1), by_hand, atol=1e-15)


@pytest.mark.parametrize("process", PROCESSES)
def test_two_steps_on_one_token_sum_over_all_paths(process: Process) -> None:
    """sum over z_1, z_1/2 of prior(z_1) p(z_1/2 given z_1) p(x given z_1/2), by loops and Bayes' rule."""
    oracle = make_oracle(process)
    middle = 1e-3 + 0.999 * (1 - 0.500005)
    by_hand = np.zeros(VOCAB_SIZE)
    for z_1 in range(VOCAB_SIZE):
        if prior(process, VOCAB_SIZE)[z_1] == 0:
            continue
        step = bayes_posterior(process, oracle.x_hat((), (z_1,), 1)[0], z_1, middle, 1e-3)
        for z_half in range(VOCAB_SIZE):
            last = bayes_posterior(process, oracle.x_hat((), (z_half,), 1)[0], z_half, 1.0, middle)
            by_hand += prior(process, VOCAB_SIZE)[z_1] * step[z_half] * last
    np.testing.assert_allclose(oracle.block_diffusion_law(1, 1, 2), by_hand, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_block_size_one_of_a_masked_model_is_autoregressive(steps: int) -> None:
    """Section 3.1: with L' = 1 masked block diffusion reduces to AR, whatever the number of steps; so does ARPC."""
    oracle = make_oracle("masked")
    np.testing.assert_allclose(oracle.block_diffusion_law(4, 1, steps), oracle.ar_law(4), atol=1e-13)
    np.testing.assert_allclose(oracle.arpc_law(4, 1, steps), oracle.ar_law(4), atol=1e-13)


def test_many_masked_steps_unmask_in_a_random_order() -> None:
    """T to infinity: the mean over all orders of drawing one position at a time (two step counts extrapolated)."""
    oracle = make_oracle("masked")
    by_order = np.zeros((VOCAB_SIZE,) * 3)
    for x in itertools.product(range(MASK), repeat=3):
        for order in itertools.permutations(range(3)):
            z, probability = [MASK] * 3, 1 / 6
            for position in order:
                probability *= oracle.x_hat((), tuple(z), 3)[position, x[position]]
                z[position] = x[position]
            by_order[x] += probability
    coarse, fine = (oracle.block_diffusion_law(3, 3, steps) for steps in (150, 300))
    assert total_variation(coarse, by_order) > 1e-4  # the extrapolation below has something to do
    assert total_variation(2 * fine - coarse, by_order) < 2e-5


def test_blocks_follow_one_another_and_the_last_may_be_shorter() -> None:
    """Eq. 5: p(x) = prod_b p(x^b given x^<b), also where the length is no multiple of the block size."""
    oracle = make_oracle("uniform")
    law = oracle.block_diffusion_law(3, 2, 2, prompt=(1,))
    first = oracle.block_diffusion_law(2, 2, 2, prompt=(1,))
    for prefix in np.ndindex(first.shape):
        # one token, but asked of the denoiser with the block size of the whole text
        rest = oracle._block((1, *prefix), 1, 2, [False, False], "ancestral")
        np.testing.assert_allclose(law[prefix], first[prefix] * rest, atol=1e-15)


def test_seeded_tokens_are_autoregressive() -> None:
    """Section 4, AR seeding: the first k tokens have the AR law; k = length is AR decoding."""
    oracle = make_oracle("uniform")
    seeded = oracle.block_diffusion_law(4, 2, 2, ar_seed_tokens=1)
    np.testing.assert_allclose(seeded.sum((1, 2, 3)), oracle.ar_law(1), atol=1e-14)
    np.testing.assert_allclose(oracle.block_diffusion_law(4, 2, 2, ar_seed_tokens=4), oracle.ar_law(4), atol=1e-14)


# ---- ARPC
@pytest.mark.parametrize("process", PROCESSES)
def test_without_an_informed_step_arpc_is_block_diffusion(process: Process) -> None:
    """Algorithm 1: nothing is GUIDED when the start lies behind the end, nor in one step, since the last never is."""
    oracle = make_oracle(process)
    plain = oracle.block_diffusion_law(4, 4, 3)
    np.testing.assert_array_equal(oracle.arpc_law(4, 4, 3, start=2), plain)
    assert total_variation(oracle.arpc_law(4, 4, 3, start=1), plain) > 1e-3
    np.testing.assert_array_equal(oracle.arpc_law(4, 4, 1), oracle.block_diffusion_law(4, 4, 1))


def test_period_skips_steps() -> None:
    """Start 0 and period 2 of four steps inform steps 0 and 2; period 3 only step 0, as step 3 is the last."""
    oracle = make_oracle("masked")
    every_third = oracle._block((), 2, 2, [True, False, False, False], "ancestral")
    np.testing.assert_allclose(oracle.arpc_law(2, 2, 4, period=3), every_third, atol=1e-15)
    every_second = oracle._block((), 2, 2, [True, False, True, False], "ancestral")
    np.testing.assert_allclose(oracle.arpc_law(2, 2, 4, period=2), every_second, atol=1e-15)


def test_renoising_hits_the_largest_surprisal_and_breaks_ties_to_the_left() -> None:
    """Algorithm 1, lines 8 to 10: the k positions that AR finds least likely become the mask token."""
    flat = Oracle(lambda prefix, z, block_size: np.zeros((len(z), VOCAB_SIZE)), "masked", VOCAB_SIZE)
    proposal = int(np.ravel_multi_index((0, 1, 2), (VOCAB_SIZE,) * 3))
    for k, left in ((1, (MASK, 1, 2)), (2, (MASK, MASK, 2)), (3, (MASK, MASK, MASK))):
        assert flat.renoising_kernel((), 3, k)[proposal].reshape((VOCAB_SIZE,) * 3)[left] == 1
    favours_0 = Oracle(lambda prefix, z, block_size: np.tile([3.0, 1.0, 0.0, 0.0], (len(z), 1)), "masked", VOCAB_SIZE)
    assert favours_0.renoising_kernel((), 3, 1)[proposal].reshape((VOCAB_SIZE,) * 3)[0, 1, MASK] == 1


def simulate_arpc(process: Process, steps: int, num_samples: int, *, worst_first: bool = True) -> Array:
    """Algorithm 1 line by line: two blocks of two tokens, one sample at a time, every step but the last informed."""
    predictor = make_oracle(process)  # for its x_hat only
    rng = np.random.default_rng(7)
    times = np.linspace(1, 1e-5, steps + 1)

    def noise() -> int:
        return MASK if process == "masked" else int(rng.random() * VOCAB_SIZE)

    @functools.cache
    def proposal_thresholds(prefix: Tokens, z: Tokens, i: int) -> list[list[float]]:
        alpha_t = 1e-3 + 0.999 * (1 - times[i])
        x_hat = predictor.x_hat(prefix, z, 2)
        return [np.cumsum(bayes_posterior(process, x_hat[j], z[j], 1.0, alpha_t)).tolist() for j in range(2)]

    @functools.cache
    def likelihood(prefix: Tokens, query: int, token: int) -> float:
        return float(predictor.ar_probs(prefix, query)[token])

    def one_block(prefix: Tokens) -> Tokens:
        z = [noise(), noise()]
        for i in range(steps):
            thresholds = proposal_thresholds(prefix, tuple(z), i)
            z = [bisect.bisect(row, rng.random() * row[-1]) for row in thresholds]
            if i < steps - 1:  # re-noise the proposal for the next time
                likely = [likelihood(prefix + tuple(z[:j]), noise(), z[j]) for j in range(2)]
                k = max(1, round(0.999 * times[i + 1] * 2))
                order = sorted(range(2), key=likely.__getitem__, reverse=not worst_first)
                for j in order[:k]:
                    z[j] = noise()
        return tuple(z)

    blocks = (one_block(()) for _ in range(num_samples))
    return np.array([first + one_block(first) for first in blocks])


@pytest.mark.parametrize("process", PROCESSES)
def test_arpc_law_is_that_of_a_simulation_of_algorithm_1(process: Process) -> None:
    """Algorithm 1 drawn 6,000 times agrees; re-noising the best positions instead of the worst does not."""
    law = make_oracle(process).arpc_law(4, 2, 4)
    assert chi_square_p_value(simulate_arpc(process, 4, 6000), law) > 1e-4
    assert chi_square_p_value(simulate_arpc(process, 4, 6000, worst_first=False), law) < 1e-8


# ---- bounds and the test itself
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("block_size, steps", [(1, 3), (2, 1), (2, 5), (3, 4)])
def test_discrete_elbo_bounds_the_exact_likelihood(process: Process, block_size: int, steps: int) -> None:
    """Section 2.1: the NELBO of T steps is at least -log p_T(x), for every x."""
    oracle = make_oracle(process)
    law = oracle.block_diffusion_law(3, block_size, steps)
    for x in itertools.product(range(MASK), repeat=3):
        assert oracle.discrete_nelbo(x, block_size, steps) >= nll(x, law) - 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_the_geometric_mean_of_block_sizes_is_bounded_by_the_mean_of_their_bounds(process: Process) -> None:
    """
    Suppl. D.2: the products add up to Z < 1, so that the normalised ones are likelier by -log Z, for every text. It is
    not the mixture of Eq. 6, which is likelier than the products by Jensen's inequality alone.
    """
    oracle, sizes, gamma, steps = make_oracle(process), (1, 2, 3), (0.5, 0.3, 0.2), 4
    laws = [oracle.block_diffusion_law(3, size, steps) for size in sizes]
    support = np.stack(laws).min(0) > 0
    products = np.exp(sum(weight * np.log(law.clip(1e-300)) for weight, law in zip(gamma, laws, strict=True)))
    products = np.where(support, products, 0)
    z = products.sum()
    assert 0.5 < z < 1 - 1e-6
    geometric, mixture = products / z, sum(weight * law for weight, law in zip(gamma, laws, strict=True))
    assert (mixture >= products - 1e-12).all()
    for x in itertools.product(range(MASK), repeat=3):
        nlls = [nll(x, law) for law in laws]
        mean = float(np.dot(gamma, nlls))
        bound = float(np.dot(gamma, [oracle.discrete_nelbo(x, size, steps) for size in sizes]))
        assert nll(x, geometric) == pytest.approx(mean + np.log(z), abs=1e-9)
        assert nll(x, geometric) < mean <= bound + 1e-12


def test_discrete_elbo_is_tight_where_it_must_be() -> None:
    """Masked: one step of any block, and any steps of block size 1, have no gap."""
    oracle = make_oracle("masked")
    x = (2, 0, 1)
    for block_size, steps in ((3, 1), (1, 4)):
        exact = nll(x, oracle.block_diffusion_law(3, block_size, steps))
        assert oracle.discrete_nelbo(x, block_size, steps) == pytest.approx(exact, abs=1e-12)


def swapped_alphas(x: Array, z_t: Array, alpha_s: float, alpha_t: float) -> Array:
    """A wrong Eq. 2: as if the chance to unmask were that to stay masked, except for the last step."""
    return masked_posterior(x, z_t, 1.0 if alpha_s == 1 else 1 - alpha_s + alpha_t, alpha_t)


def forgets_z_t(x: Array, z_t: Array, alpha_s: float, alpha_t: float) -> Array:
    """A wrong Eq. 3: a draw of x_hat, re-noised to alpha_s, that forgets z_t."""
    return marginal("uniform", x, alpha_s)


@pytest.mark.parametrize(
    "process, wrong", [("masked", swapped_alphas), ("uniform", forgets_z_t)], ids=["masked", "uniform"]
)
def test_a_wrong_posterior_fails_the_chi_square_test(process: Process, wrong: Posterior) -> None:
    """Samples of a sampler with a wrong posterior are told from the law of the right one, and right ones pass."""
    right = make_oracle(process).block_diffusion_law(4, 4, 3)
    other = make_oracle(process, wrong).block_diffusion_law(4, 4, 3)
    assert chi_square_p_value(draw(right, 20_000, seed=1), right) > 1e-4
    assert chi_square_p_value(draw(other, 20_000, seed=1), right) < 1e-8


def test_chi_square_merges_rare_cells_and_refuses_impossible_ones() -> None:
    """Cells that expect less than ten samples share one; a sample of probability zero settles the matter."""
    law = np.array([0.5, 0.4999, 0.00005, 0.00005, 0.0])
    assert chi_square_p_value(draw(law, 1000, seed=0), law) > 1e-4
    assert chi_square_p_value(np.array([0] * 500 + [1] * 499 + [2]), law) > 1e-4
    assert chi_square_p_value(np.array([0] * 500 + [1] * 499 + [4]), law) == 0
    assert chi_square_p_value(np.array([0] * 600 + [1] * 400), law) < 1e-8


def test_chi_square_p_values_are_uniform_under_the_law() -> None:
    """Of 200 sets of right samples about a tenth lie below 0.1, so the test neither sleeps nor cries wolf."""
    law = make_oracle("uniform").ar_law(2)
    p_values = np.array([chi_square_p_value(draw(law, 2000, seed), law) for seed in range(200)])
    assert 0.04 < (p_values < 0.1).mean() < 0.17
    assert 0.4 < p_values.mean() < 0.6
