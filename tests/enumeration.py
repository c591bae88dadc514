"""Exact laws of BlockGen's decodings on a tiny vocabulary, by brute force: the judge of samplers and bounds.

Everything here is numpy in float64, written from the equations of the paper (Eq. 1, 2, 3, Algorithm 1) and from
nothing of `blockgen_hf`. A *state* is a tuple of token ids; a law over blocks of n tokens is an array of shape
`(V,) * n`, so that `law[x]` is the probability of the tuple `x`. A masked process has its mask token as the last id.

    oracle = Oracle(denoise, "masked", vocab_size=4)
    law = oracle.arpc_law(length=4, block_size=2, steps=3)
    assert chi_square_p_value(samples, law) > 1e-4  # samples [N, 4]

`denoise(prefix, z, block_size)` gives the raw logits `[len(z), V]` of a noisy block `z` after the clean `prefix`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy import stats


Array = np.ndarray
Tokens = tuple[int, ...]
Process = Literal["masked", "uniform"]
Denoiser = Callable[[Tokens, Tokens, int], Array]
Posterior = Callable[[Array, Array, float, float], Array]


# ---- one token (Eq. 1, 2, 3)
def prior(process: Process, vocab_size: int) -> Array:
    """pi of Eq. 1, `[V]`: all on the mask token (the last id), or the same for every row."""
    if process == "masked":
        return np.eye(vocab_size)[vocab_size - 1]
    return np.full(vocab_size, 1 / vocab_size)


def marginal(process: Process, x: Array, alpha: float) -> Array:
    """q(z_t given x) of Eq. 1 for probabilities x, `[..., V] -> [..., V]`."""
    return alpha * x + (1 - alpha) * prior(process, x.shape[-1])


def forward_kernel(process: Process, vocab_size: int, alpha_s: float, alpha_t: float) -> Array:
    """q(z_t given z_s), `[V (z_s), V (z_t)]`: the Markov transition whose products give Eq. 1."""
    return marginal(process, np.eye(vocab_size), alpha_t / alpha_s)


def bayes_posterior(process: Process, x: Array, z_t: int, alpha_s: float, alpha_t: float) -> Array:
    """q(z_s given z_t, x), `[V]`, by Bayes' rule from Eq. 1 alone: q(z_t given z_s) q(z_s given x), normalised."""
    joint = forward_kernel(process, x.shape[-1], alpha_s, alpha_t)[:, z_t] * marginal(process, x, alpha_s)
    return joint / joint.sum()


def masked_posterior(x: Array, z_t: Array, alpha_s: float, alpha_t: float) -> Array:
    """Eq. 2 for x `[..., V]` and ids z_t `[...]`; the mask token is the last id."""
    mask = x.shape[-1] - 1
    stays = (1 - alpha_s) / (1 - alpha_t) * np.eye(mask + 1)[z_t]
    moves = (alpha_s - alpha_t) / (1 - alpha_t) * x
    return np.where((z_t == mask)[..., None], moves + stays, x)


def uniform_posterior(x: Array, z_t: Array, alpha_s: float, alpha_t: float) -> Array:
    """Eq. 3 as printed, for x `[..., V]` and ids z_t `[...]`."""
    size = x.shape[-1]
    z = np.eye(size)[z_t]
    alpha_ts = alpha_t / alpha_s
    numerator = (
        size * alpha_t * z * x
        + (alpha_ts - alpha_t) * z
        + (alpha_s - alpha_t) * x
        + (1 - alpha_ts) * (1 - alpha_s) / size
    )
    return numerator / (size * alpha_t * (z * x).sum(-1, keepdims=True) + 1 - alpha_t)


# ---- blocks of tokens
@functools.cache
def states(num_values: int, length: int) -> Array:
    """All tuples of ids below `num_values`, `[num_values ** length, length]`, in the order of a flattened law."""
    tuples = list(itertools.product(range(num_values), repeat=length))
    return np.array(tuples, dtype=np.int64).reshape(num_values**length, length)


def factorized(factors: Array) -> Array:
    """Independent positions, `[S, n, V]`, to laws over whole blocks, `[S, V ** n]`."""
    law = np.ones((factors.shape[0], 1))
    for position in range(factors.shape[1]):
        law = (law[:, :, None] * factors[:, None, position]).reshape(len(law), -1)
    return law


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def time_grid(steps: int) -> Array:
    """The times of generation, `[steps + 1]`, from all noise to (nearly) none."""
    return np.linspace(1.0, 1e-5, steps + 1)


def random_denoiser(vocab_size: int, seed: int = 0, scale: float = 1.5) -> Denoiser:
    """A denoiser without structure: independent normal logits for each (block size, prefix, noisy block)."""

    def denoise(prefix: Tokens, z: Tokens, block_size: int) -> Array:
        key = [seed, block_size, len(prefix), *prefix, *z]
        return scale * np.random.default_rng(key).standard_normal((len(z), vocab_size))

    return denoise


class Oracle:
    """The exact law of each decoding of one denoiser.

    `eps` is that of the linear schedule alpha_t = eps + (1 - eps)(1 - t). `posterior` replaces Eq. 2 / Eq. 3, to show
    that a wrong one is noticed.
    """

    def __init__(
        self,
        denoise: Denoiser,
        process: Process,
        vocab_size: int,
        *,
        eps: float = 1e-3,
        posterior: Posterior | None = None,
    ) -> None:
        self.denoise = functools.cache(denoise)
        self.process: Process = process
        self.vocab_size = vocab_size
        self.eps = eps
        self.prior = prior(process, vocab_size)
        self.posterior = posterior or {"masked": masked_posterior, "uniform": uniform_posterior}[process]
        self.queries: list[int] = [vocab_size - 1] if process == "masked" else list(range(vocab_size))

    # ---- predictions
    def x_hat(self, prefix: Tokens, z: Tokens, block_size: int) -> Array:
        """x_hat `[n, V]` of one noisy block: softmax; masked: no mask token, and visible tokens carried over."""
        logits = np.array(self.denoise(prefix, z, block_size), dtype=np.float64)
        if self.process == "uniform":
            return np.exp(log_softmax(logits))
        mask = self.vocab_size - 1
        logits[:, mask] = -np.inf
        visible = (np.array(z) != mask)[:, None]
        return np.where(visible, np.eye(self.vocab_size)[list(z)], np.exp(log_softmax(logits)))

    def x_hat_of_all_states(self, prefix: Tokens, length: int, block_size: int) -> Array:
        """x_hat of every noisy block of `length` tokens, `[V ** n, n, V]`."""
        noisy = states(self.vocab_size, length).tolist()
        return np.stack([self.x_hat(prefix, tuple(z), block_size) for z in noisy])

    def ar_probs(self, prefix: Tokens, query: int) -> Array:
        """p(next token given prefix), `[V]`, read off one noised query token."""
        return self.x_hat(prefix, (query,), 1)[0]

    def alphas(self, steps: int) -> list[tuple[float, float]]:
        """(alpha_t, alpha_s) of each generation step; the last goes to alpha_s = 1 exactly."""
        levels = self.eps + (1 - self.eps) * (1 - time_grid(steps))
        return [*zip(levels[:-1].tolist(), [*levels[1:-1].tolist(), 1.0], strict=True)]

    # ---- laws
    def ar_law(self, length: int, *, prompt: Tokens = ()) -> Array:
        """prod_l p(x_l given x_<l); uniform noise: each factor is the mean over the random query token."""
        return self._left_to_right(length, 1, self._ar_block, prompt, ar_seed_tokens=0)

    def block_diffusion_law(
        self,
        length: int,
        block_size: int,
        steps: int,
        *,
        prompt: Tokens = (),
        ar_seed_tokens: int = 0,
        noise_removal: str = "ancestral",
    ) -> Array:
        """Blocks from left to right, each by `steps` draws of the posterior; a last block may be shorter."""
        return self.arpc_law(
            length,
            block_size,
            steps,
            start=steps,
            prompt=prompt,
            ar_seed_tokens=ar_seed_tokens,
            noise_removal=noise_removal,
        )

    def arpc_law(
        self,
        length: int,
        block_size: int,
        steps: int,
        *,
        start: int = 0,
        period: int = 1,
        prompt: Tokens = (),
        ar_seed_tokens: int = 0,
        noise_removal: str = "ancestral",
    ) -> Array:
        """Algorithm 1 with g = AR surprisal: step i is informed when i >= start and i - start divides by the period.

        The last step never is. A shorter last block of n tokens counts k from n.
        """

        def block_law(prefix: Tokens, n: int) -> Array:
            informed = [i >= start and (i - start) % period == 0 and i < steps - 1 for i in range(steps)]
            return self._block(prefix, n, block_size, informed, noise_removal)

        return self._left_to_right(length, block_size, block_law, prompt, ar_seed_tokens)

    # ---- parts
    def _left_to_right(
        self,
        length: int,
        block_size: int,
        block_law: Callable[[Tokens, int], Array],
        prompt: Tokens,
        ar_seed_tokens: int,
    ) -> Array:
        law: Array = np.ones(())
        while law.ndim < length:
            seeding = law.ndim < ar_seed_tokens
            n = 1 if seeding else min(block_size, length - law.ndim)
            longer = np.zeros((self.vocab_size,) * (law.ndim + n))
            for prefix in np.ndindex(law.shape):
                if law[prefix] > 0:
                    one_block = self._ar_block if seeding else block_law
                    longer[prefix] = law[prefix] * one_block(prompt + prefix, n)
            law = longer
        return law

    def _ar_block(self, prefix: Tokens, n: int) -> Array:
        assert n == 1
        return np.mean([self.ar_probs(prefix, query) for query in self.queries], axis=0)

    def _block(self, prefix: Tokens, n: int, block_size: int, informed: list[bool], noise_removal: str) -> Array:
        """The law of one block: the prior pushed through the transition matrix of each step."""
        z = states(self.vocab_size, n)
        x_hat = self.x_hat_of_all_states(prefix, n, block_size)
        law = factorized(np.broadcast_to(self.prior, (1, n, self.vocab_size)))[0]
        steps = len(informed)
        for i, (alpha_t, alpha_s) in enumerate(self.alphas(steps)):
            if informed[i]:
                proposal = law @ factorized(self.posterior(x_hat, z, 1.0, alpha_t))
                law = proposal @ self.renoising_kernel(prefix, n, max(1, round((1 - alpha_s) * n)))
            elif i == steps - 1 and noise_removal == "greedy":
                law = law @ factorized(np.eye(self.vocab_size)[x_hat.argmax(-1)])
            else:
                law = law @ factorized(self.posterior(x_hat, z, alpha_s, alpha_t))
        return law.reshape((self.vocab_size,) * n)

    def surprisals(self, prefix: Tokens, n: int) -> Array:
        """-log p_AR(x~_l given prefix, x~_<l), `[V ** n, n, queries]`; 0 for proposals that hold a mask token."""
        proposals = states(self.vocab_size, n)
        g = np.zeros((*proposals.shape, len(self.queries)))
        for row, proposal in enumerate(proposals.tolist()):
            if self.process == "masked" and self.vocab_size - 1 in proposal:
                continue
            for position, query_index in np.ndindex(n, len(self.queries)):
                probs = self.ar_probs(prefix + tuple(proposal[:position]), self.queries[query_index])
                g[row, position, query_index] = -np.log(probs[proposal[position]])
        return g

    def renoising_kernel(self, prefix: Tokens, n: int, k: int) -> Array:
        """p(z given x~), `[V ** n, V ** n]`: the k positions of largest surprisal return to the prior.

        The query token of each position is drawn on its own, so the mean runs over all tuples of query tokens. Equal
        surprisals: the lower position goes first.
        """
        proposals = states(self.vocab_size, n)
        query_tuples = states(len(self.queries), n)
        g = self.surprisals(prefix, n)[:, np.arange(n), query_tuples]  # [V ** n, tuples, n]
        worst = np.argsort(-g, axis=-1, kind="stable")[..., :k]
        chosen = (2**worst).sum(-1)  # a set of positions as the bits of a number
        clean = np.eye(self.vocab_size)[proposals]
        kernel = np.zeros((len(proposals), len(proposals)))
        for subset in np.unique(chosen):
            renoised = (subset >> np.arange(n) & 1).astype(bool)
            z = factorized(np.where(renoised[None, :, None], self.prior, clean))
            kernel += (chosen == subset).mean(-1, keepdims=True) * z
        return kernel

    # ---- bounds
    def discrete_nelbo(self, x: Tokens, block_size: int, steps: int, *, prompt: Tokens = ()) -> float:
        """The negative ELBO of `steps` steps a block, summed exactly: at least `nll(x, block_diffusion_law(...))`.

        KL of the forward process from the prior at t = 1, and of the true posterior from the model's in each step. A
        masked forward process with alpha_1 = eps would leave tokens visible that the sampler never sees; Eq. 2 depends
        on ratios of 1 - alpha only, so rescaling alpha to 0 at t = 1 gives the same sampler and a proper bound.
        """
        total = 0.0
        for begin in range(0, len(x), block_size):
            block, prefix = x[begin : begin + block_size], prompt + x[:begin]
            n = len(block)
            z = states(self.vocab_size, n)
            x_hat = self.x_hat_of_all_states(prefix, n, block_size)
            clean = np.eye(self.vocab_size)[list(block)]
            alphas = self.alphas(steps)
            if self.process == "masked":
                first = alphas[0][0]
                alphas = [((t - first) / (1 - first), (s - first) / (1 - first)) for t, s in alphas]
            total += kl(marginal(self.process, clean, alphas[0][0]), self.prior).sum()
            for alpha_t, alpha_s in alphas:
                weight = factorized(marginal(self.process, clean, alpha_t)[None])[0]
                seen = weight > 0
                true = self.posterior(np.broadcast_to(clean, x_hat[seen].shape), z[seen], alpha_s, alpha_t)
                model = self.posterior(x_hat[seen], z[seen], alpha_s, alpha_t)
                total += (weight[seen] * kl(true, model).sum(-1)).sum()
        return float(total)


# ---- comparison
def kl(p: Array, q: Array) -> Array:
    """KL(p from q) along the last axis, with 0 log 0 = 0."""
    q = np.broadcast_to(q, p.shape)
    safe = p > 0
    with np.errstate(divide="ignore"):
        ratio = np.log(np.where(safe, p, 1.0)) - np.log(np.where(safe, q, 1.0))
    return (p * ratio).sum(-1)


def nll(x: Tokens, law: Array) -> float:
    """-log law(x), in nats."""
    return float(-np.log(law[x]))


def chi_square_p_value(samples: Array, law: Array, *, min_expected: float = 10.0) -> float:
    """Pearson's test of samples `[N, L]` (or `[N]` for L = 1) against a law of shape `(V,) * L`.

    Cells are merged, rarest first, until each expects `min_expected` samples. A sample where the law is zero gives 0.
    """
    samples = np.asarray(samples).reshape(len(samples), -1)
    assert samples.shape[1] == law.ndim, f"samples of length {samples.shape[1]} against a law over {law.ndim} tokens"
    assert abs(law.sum() - 1) < 1e-6, f"the law sums to {law.sum()}"
    counts = np.bincount(np.ravel_multi_index(tuple(samples.T), law.shape), minlength=law.size)
    expected: Array = law.ravel() * len(samples)
    if counts[expected == 0].sum() > 0:
        return 0.0
    observed, wanted = [0], [0.0]
    for index in np.argsort(expected, kind="stable"):
        observed[-1] += int(counts[index])
        wanted[-1] += float(expected[index])
        if wanted[-1] >= min_expected:
            observed.append(0)
            wanted.append(0.0)
    last_observed, last_wanted = observed.pop(), wanted.pop()  # what is left over joins the largest cell
    if not wanted:
        return 1.0
    observed[-1] += last_observed
    wanted[-1] += last_wanted
    if len(wanted) == 1:
        return 1.0
    return float(stats.chisquare(observed, np.array(wanted) * len(samples) / sum(wanted)).pvalue)


def draw(law: Array, num_samples: int, seed: int) -> Array:
    """Samples `[N, L]` of a law of shape `(V,) * L`."""
    flat = np.random.default_rng(seed).choice(law.size, size=num_samples, p=law.ravel() / law.sum())
    return np.stack(np.unravel_index(flat, law.shape), axis=-1)
