# Copyright 2026 The blockgen-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Interpolating discrete diffusion (BlockGen, Sec. 2.1): noise schedules, and the masked and the uniform process.

Symbols: x clean ids, z_t noisy ids, alpha_t the probability that a token is still its own (Eq. 1), alpha'_t its
derivative in t, x_hat the denoiser's distribution, V the vocabulary. Time runs from t = 1 (all noise) to t = 0. Ids
have the shape `[B, L]`, probabilities and logits `[B, L, V]`; alpha is a number or a tensor that broadcasts to `[B,
L]`.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch

from .sampling_blockgen import RandomSource, draw_token, draw_uniform, sample_categorical


# Keeps 1 - alpha and alpha away from zero, in float64, where a coefficient divides by them.
_TINY = 1e-12


class NoiseSchedule:
    r"""
    The noise schedule alpha_t, decreasing from alpha_0 = 1 to alpha_1 = eps.

    - `"linear"`: alpha_t = eps + (1 - eps)(1 - t)
    - `"cosine"`: alpha_t = eps + (1 - eps)(1 - cos(pi (1 - t) / 2)), as in MaskGIT, MDLM and the research code

    Args:
        name (`str`): `"linear"` or `"cosine"`.
        eps (`float`): alpha at t = 1, in [0, 1).

    Raises:
        ValueError: unknown name, or eps outside [0, 1).
    """

    def __init__(self, name: str = "linear", eps: float = 1e-3) -> None:
        if name not in ("linear", "cosine"):
            raise ValueError(f"`name` of a noise schedule must be 'linear' or 'cosine', but is {name!r}.")
        if not 0 <= eps < 1:
            raise ValueError(f"`eps` of a noise schedule must be in [0, 1), but is {eps!r}.")
        self.name = name
        self.eps = eps

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """alpha_t, of the shape and dtype of `t`."""
        if self.name == "linear":
            kept = 1 - t
        else:  # 1 - cos(x) = 2 sin(x / 2)^2, without the cancellation near t = 1
            kept = 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2
        return self.eps + (1 - self.eps) * kept

    def time(self, alpha: torch.Tensor) -> torch.Tensor:
        """The inverse of [`~NoiseSchedule.alpha`]: t at which alpha_t is so large."""
        kept = ((alpha - self.eps) / (1 - self.eps)).clamp(0, 1)
        return 1 - kept if self.name == "linear" else 1 - 4 / math.pi * torch.asin((kept / 2).sqrt())

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """alpha'_t <= 0, of the shape and dtype of `t`."""
        slope = -torch.ones_like(t) if self.name == "linear" else -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))
        return (1 - self.eps) * slope


class _Process:
    """What the two processes share: both are given by their prior pi and by the posterior that follows from it."""

    def __init__(self, vocab_size: int, schedule: NoiseSchedule) -> None:
        self.vocab_size = vocab_size
        self.schedule = schedule

    def prior(
        self, shape: tuple[int, ...], device: torch.device | str, generator: RandomSource = None
    ) -> torch.Tensor:
        raise NotImplementedError

    def corrupt(
        self,
        input_ids: torch.Tensor,
        alpha_t: torch.Tensor | float,
        generator: RandomSource = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Draws z_t ~ q_t(. | x), Eq. 1: every token stays with probability alpha_t and else comes from the prior.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`): x.
            alpha_t (`torch.Tensor` or `float`): broadcastable to `[B, L]`.
            generator (`torch.Generator` or [`CounterGenerator`], *optional*): source of the random numbers.
            keep (`torch.BoolTensor` of shape `[B, L]`, *optional*): where True the clean token stays.

        Returns:
            `torch.LongTensor` of shape `[B, L]`.
        """
        stays = draw_uniform(input_ids.shape, input_ids.device, generator, index=0) < alpha_t
        if keep is not None:
            stays = stays | keep
        noise = self.prior(input_ids.shape, input_ids.device, generator)
        return torch.where(stays, input_ids, noise)


class MaskedDiffusion(_Process):
    """
    Masked (absorbing) diffusion: the prior is the mask token, and a token that is unmasked stays (MDLM, BlockGen Eq.
    2).

    Args:
        vocab_size (`int`): V, the mask token included.
        mask_token_id (`int`): the mask token m. V itself where the vocabulary has none: a state of the tokens, which
            has no probability.
        schedule ([`NoiseSchedule`]): alpha_t.
    """

    def __init__(self, vocab_size: int, mask_token_id: int | None, schedule: NoiseSchedule) -> None:
        if mask_token_id is None or not 0 <= mask_token_id <= vocab_size:
            raise ValueError(f"`mask_token_id` must be in [0, {vocab_size}], but is {mask_token_id!r}.")
        super().__init__(vocab_size, schedule)
        self.mask_token_id = mask_token_id

    def prior(
        self, shape: tuple[int, ...], device: torch.device | str, generator: RandomSource = None
    ) -> torch.Tensor:
        """A fully noised block: mask tokens. `generator` is not used."""
        return torch.full(shape, self.mask_token_id, dtype=torch.long, device=device)

    def log_probs(self, logits: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        """
        log x_hat of the masked parameterisation (SUBS): the mask token is impossible, and positions that are not
        masked carry their token over. `[B, L, V]`, in the dtype of the logits but at least float32.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = torch.arange(self.vocab_size, device=logits.device)
        logits = logits.masked_fill(ids == self.mask_token_id, -math.inf)
        carried_over = torch.where(ids == z_t[..., None], 0.0, -math.inf).to(logits.dtype)
        return torch.where((z_t == self.mask_token_id)[..., None], logits.log_softmax(-1), carried_over)

    def posterior(
        self,
        x_probs: torch.Tensor,
        z_t: torch.Tensor,
        alpha_s: torch.Tensor | float,
        alpha_t: torch.Tensor | float,
    ) -> torch.Tensor:
        """q(z_s | z_t, x_hat) of Eq. 2 as probabilities `[B, L, V]`, or `[B, L, V + 1]` if the mask is outside."""
        num_states = max(self.vocab_size, self.mask_token_id + 1)
        x_probs = torch.nn.functional.pad(x_probs, (0, num_states - self.vocab_size))
        unmask = self._unmasking_probability(alpha_s, alpha_t, x_probs)[..., None]
        ids = torch.arange(num_states, device=z_t.device)
        stays = (ids == z_t[..., None]).to(x_probs.dtype)
        return torch.where((z_t == self.mask_token_id)[..., None], unmask * x_probs + (1 - unmask) * stays, stays)

    def sample_posterior(
        self,
        x_probs: torch.Tensor,
        z_t: torch.Tensor,
        alpha_s: torch.Tensor | float,
        alpha_t: torch.Tensor | float,
        generator: RandomSource = None,
    ) -> torch.Tensor:
        """
        A draw from [`~MaskedDiffusion.posterior`], `[B, L]`, for one random number a token: a masked position takes a
        draw of x_hat with probability (alpha_s - alpha_t) / (1 - alpha_t), no other position changes.
        """
        uniform = draw_uniform(z_t.shape, z_t.device, generator)
        unmask = self._unmasking_probability(alpha_s, alpha_t, uniform)
        changes = (z_t == self.mask_token_id) & (uniform < unmask)
        # Given that it is below `unmask`, the number divided by it is uniform again: it serves for the token too.
        tokens = sample_categorical(x_probs[changes], (uniform / unmask.clamp(min=_TINY))[changes])
        return z_t.masked_scatter(changes, tokens)

    def loss(
        self,
        logits: torch.Tensor,
        input_ids: torch.Tensor,
        z_t: torch.Tensor,
        alpha_t: torch.Tensor | float,
        alpha_derivative: torch.Tensor | float,
        objective: str,
    ) -> torch.Tensor:
        """
        Loss of each token, `[B, L]`, float32 or better and zero where z_t is not masked (the token is carried over).

        - `"cross_entropy"`: -log x_hat(x)
        - `"elbo"`: the integrand of Eq. 15, alpha'_t / (1 - alpha_t) log x_hat(x) >= 0

        Both are infinite where x is the mask token, which is impossible.

        Raises:
            ValueError: unknown objective.
        """
        check_objective(objective)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = torch.arange(self.vocab_size, device=logits.device)
        normalizer = logits.masked_fill(ids == self.mask_token_id, -math.inf).logsumexp(-1)
        nll = normalizer - logits.gather(-1, input_ids[..., None]).squeeze(-1)
        nll = nll.masked_fill(input_ids == self.mask_token_id, math.inf)
        if objective == "elbo":
            alpha_t = _as_double(alpha_t, nll)
            weight = -_as_double(alpha_derivative, nll) / (1 - alpha_t).clamp(min=_TINY)
            nll = weight.to(nll.dtype) * nll
        return torch.where(z_t == self.mask_token_id, nll, torch.zeros_like(nll))

    @staticmethod
    def _unmasking_probability(
        alpha_s: torch.Tensor | float, alpha_t: torch.Tensor | float, like: torch.Tensor
    ) -> torch.Tensor:
        alpha_s, alpha_t = _as_double(alpha_s, like), _as_double(alpha_t, like)
        return ((alpha_s - alpha_t) / (1 - alpha_t).clamp(min=_TINY)).clamp(0, 1).to(like.dtype)


class UniformDiffusion(_Process):
    """
    Uniform-state diffusion: the prior is uniform over the vocabulary, so that every token may change until the end
    (UDLM, Duo, BlockGen Eq. 3).

    Args:
        vocab_size (`int`): V, all rows of the embedding.
        schedule ([`NoiseSchedule`]): alpha_t.
    """

    def prior(
        self, shape: tuple[int, ...], device: torch.device | str, generator: RandomSource = None
    ) -> torch.Tensor:
        """A fully noised block: independent uniform tokens."""
        return draw_token(draw_uniform(shape, device, generator, index=1), self.vocab_size)

    def log_probs(self, logits: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        """log x_hat: the log-softmax, `[B, L, V]`, in the dtype of the logits but at least float32."""
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def posterior(
        self,
        x_probs: torch.Tensor,
        z_t: torch.Tensor,
        alpha_s: torch.Tensor | float,
        alpha_t: torch.Tensor | float,
    ) -> torch.Tensor:
        """q(z_s | z_t, x_hat) of Eq. 3 as probabilities `[B, L, V]`."""
        z_prob = x_probs.gather(-1, z_t[..., None]).squeeze(-1)
        keep, denoise, noise = (w[..., None] for w in self._posterior_weights(z_prob, alpha_s, alpha_t))
        stays = torch.nn.functional.one_hot(z_t, self.vocab_size)
        probs = keep * stays + denoise * x_probs + noise / self.vocab_size
        return (probs / (keep + denoise + noise)).to(x_probs.dtype)

    def sample_posterior(
        self,
        x_probs: torch.Tensor,
        z_t: torch.Tensor,
        alpha_s: torch.Tensor | float,
        alpha_t: torch.Tensor | float,
        generator: RandomSource = None,
    ) -> torch.Tensor:
        """
        A draw from [`~UniformDiffusion.posterior`], `[B, L]`, for one random number a token. Eq. 3 is a mixture of
        three laws: keep z_t, draw x_hat, draw the prior. The number picks one, and what is left of it picks the
        token.
        """
        z_prob = x_probs.gather(-1, z_t[..., None]).squeeze(-1)

        def draw(where: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
            return sample_categorical(x_probs[where], uniform)

        return self.sample_transition(z_prob, draw, z_t, alpha_s, alpha_t, generator)

    def sample_transition(
        self,
        z_prob: torch.Tensor,
        draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        z_t: torch.Tensor,
        alpha_s: torch.Tensor | float,
        alpha_t: torch.Tensor | float,
        generator: RandomSource = None,
    ) -> torch.Tensor:
        """
        As [`~UniformDiffusion.sample_posterior`], for who does not have the whole x_hat at hand: most tokens are kept.

        Args:
            z_prob (`torch.Tensor` of shape `[B, L]`): x_hat(z_t).
            draw (`Callable`): draws from x_hat at some positions: from a mask `[B, L]` and a uniform number for each
                of the k positions in it to ids, `[k]`.
        """
        keep, denoise, noise = self._posterior_weights(z_prob, alpha_s, alpha_t)
        target = draw_uniform(z_t.shape, z_t.device, generator) * (keep + denoise + noise)
        # A component of zero weight is never picked, whatever the rounding.
        kept = (target < keep) | (denoise + noise <= 0)
        denoised = ~kept & ((target < keep + denoise) | (noise <= 0))
        noised = draw_token(((target - keep - denoise) / noise.clamp(min=_TINY)).clamp(0, 1), self.vocab_size)
        place = ((target - keep) / denoise.clamp(min=_TINY)).clamp(0, 1)
        return torch.where(kept, z_t, noised).masked_scatter(denoised, draw(denoised, place[denoised]))

    def loss(
        self,
        logits: torch.Tensor,
        input_ids: torch.Tensor,
        z_t: torch.Tensor,
        alpha_t: torch.Tensor | float,
        alpha_derivative: torch.Tensor | float,
        objective: str,
    ) -> torch.Tensor:
        r"""
        Loss of each token, `[B, L]`, float32 or better.

        - `"cross_entropy"`: -log x_hat(x), at every position
        - `"elbo"`: f_ELBO of Eq. 17, with the sign that makes it a bound (it is >= 0)

        Eq. 17 is evaluated in terms of kappa = V alpha_t / (1 - alpha_t) and l_r = log(1 + kappa x_hat_r): its bars
        are x_bar_theta = (1 - alpha_t)(1 + kappa x_hat), so that log(1 - alpha_t) cancels by hand instead of in
        float32, where that loses up to 5e-3 near alpha_t = 1. The case z_t = x is in `_elbo_kept`, the other in
        `_elbo_changed`.

        Raises:
            ValueError: unknown objective.
        """
        check_objective(objective)
        log_x = self.log_probs(logits, z_t)
        log_target = log_x.gather(-1, input_ids[..., None]).squeeze(-1)
        if objective == "cross_entropy":
            return -log_target
        alpha = _as_double(alpha_t, log_x).clamp(_TINY, 1 - _TINY)
        noise, kappa = 1 - alpha, self.vocab_size * alpha / (1 - alpha)
        # What has a vocabulary stays in the dtype of the logits; the few numbers a token are combined in float64.
        log_terms = torch.log1p(kappa.expand(input_ids.shape)[..., None].to(log_x.dtype) * log_x.exp())
        others = (log_terms.sum(-1) - log_terms.gather(-1, input_ids[..., None]).squeeze(-1)).double()  # l_r, r != x
        log_target = log_target.double()
        z_prob = log_x.gather(-1, z_t[..., None]).squeeze(-1).double().exp()
        kept = self._elbo_kept(log_target, others, noise, kappa)
        changed = self._elbo_changed(log_target.exp(), z_prob, others, noise, kappa)
        scale = -_as_double(alpha_derivative, log_x) / (self.vocab_size * alpha)
        return (scale * torch.where(z_t == input_ids, kept, changed)).to(log_x.dtype)

    def _elbo_kept(
        self, log_target: torch.Tensor, others: torch.Tensor, noise: torch.Tensor, kappa: torch.Tensor
    ) -> torch.Tensor:
        """Minus the bracket of Eq. 17 where z_t = x."""
        x_term = kappa * log_target.exp()
        missing = -torch.expm1(log_target)  # 1 - x_hat_x, without cancellation
        first = self.vocab_size * kappa * missing / (noise * (1 + kappa) * (1 + x_term))
        ratio = torch.log1p(x_term) - torch.log1p(kappa)
        return first + ((self.vocab_size - 1) * ratio - others) / (1 + kappa)

    def _elbo_changed(
        self,
        x_prob: torch.Tensor,
        z_prob: torch.Tensor,
        others: torch.Tensor,
        noise: torch.Tensor,
        kappa: torch.Tensor,
    ) -> torch.Tensor:
        """Minus the bracket of Eq. 17 where z_t != x."""
        log_x_term, log_z_term = torch.log1p(kappa * x_prob), torch.log1p(kappa * z_prob)
        first = -self.vocab_size * kappa * z_prob / (noise * (1 + kappa * z_prob))
        second = (1 + kappa) * (log_z_term + torch.log1p(kappa) - log_x_term)
        return first + second + (self.vocab_size - 1) * log_z_term - others

    def _posterior_weights(
        self, z_prob: torch.Tensor, alpha_s: torch.Tensor | float, alpha_t: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masses of z_t, x_hat and the prior in Eq. 3, `[B, L]` each, float64; they add up to its denominator."""
        alpha_s, alpha_t = _as_double(alpha_s, z_prob), _as_double(alpha_t, z_prob)
        alpha_ts = alpha_t / alpha_s.clamp(min=_TINY)
        keep = self.vocab_size * alpha_t * z_prob.double() + (alpha_ts - alpha_t)
        denoise = (alpha_s - alpha_t).expand_as(keep)
        noise = ((1 - alpha_ts) * (1 - alpha_s)).expand_as(keep)
        return keep, denoise, noise


DiffusionProcess = MaskedDiffusion | UniformDiffusion


class _DiffusionSettings(Protocol):
    vocab_size: int
    mask_token_id: int | None
    diffusion_type: str
    noise_schedule: str
    noise_schedule_eps: float


def diffusion_from_config(config: _DiffusionSettings) -> DiffusionProcess:
    """The process that a [`BlockGenConfig`] names."""
    schedule = NoiseSchedule(config.noise_schedule, config.noise_schedule_eps)
    if config.diffusion_type == "masked":
        return MaskedDiffusion(config.vocab_size, config.mask_token_id, schedule)
    return UniformDiffusion(config.vocab_size, schedule)


def check_objective(objective: str) -> None:
    if objective not in ("elbo", "cross_entropy"):
        raise ValueError(f"`objective` must be 'elbo' or 'cross_entropy', but is {objective!r}.")


def _as_double(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """Coefficients are computed in float64: there are few, and 1 - alpha loses digits near alpha = 1."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)


__all__ = ["MaskedDiffusion", "NoiseSchedule", "UniformDiffusion", "diffusion_from_config"]
