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
From a noisy block to a clean one, with no forward pass that cannot change anything (BlockGen, Sec. 2.1).

Every row goes its own way through the steps: a pass serves all rows, each at the step at which it next needs one. That
leaves the law alone, since rows have nothing to do with one another, and a row's random numbers are keyed by its own
steps. What a row can do without:

- A masked model may reveal a token at a step, or not, whatever the network says. So when each token is revealed is
  drawn first, for one number a token, and only steps that reveal something need a pass: of T steps on n masked tokens
  T (1 - (1 - 1/T)^n) in the mean.
- A model that does not know the time says the same of a block that did not change. So a uniform model needs a pass
  only after a step that changed something.

The adaptive samplers, at the end, take as many tokens at a step as the model is sure of. They follow no posterior: the
law of the text is theirs, not that of the diffusion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch

from .diffusion_blockgen import DiffusionProcess, MaskedDiffusion, NoiseSchedule, UniformDiffusion
from .sampling_blockgen import CounterGenerator, argsort_at_random
from .logits_blockgen import Prediction


# The grid of generation ends here, not at 0 (the last step goes to alpha = 1 whatever its time).
_LAST_TIME = 1e-5


class Purpose(IntEnum):
    """What a random number is for."""

    PRIOR = 0
    AR_QUERY = 1
    AR_TOKEN = 2
    DENOISE = 3
    PROPOSE = 4
    SCORE = 5
    RENOISE = 6
    REVEAL = 7
    DRAFT = 8
    ACCEPT = 9
    RESIDUAL = 10
    REVISE = 11


class Predict(Protocol):
    """
    One denoiser pass over all rows: x_hat at some positions.

    Args:
        z_t (`torch.LongTensor` of shape `[A, n]`): the blocks.
        where (`torch.BoolTensor` of shape `[A, n]`): positions whose prediction is wanted.
        rows (`torch.BoolTensor` of shape `[A]`): rows that need the pass, for which it counts.
        time (`torch.DoubleTensor` of shape `[A]`): t of each row.
    """

    def __call__(
        self, z_t: torch.Tensor, where: torch.Tensor, rows: torch.Tensor, time: torch.Tensor
    ) -> Prediction: ...


@dataclass(frozen=True)
class TimeGrid:
    """
    The steps of a block: step i goes from t_i to t_(i+1).

    Args:
        times (`torch.DoubleTensor` of shape `[T + 1]`): linspace(1, 1e-5, T + 1).
        alphas (`torch.DoubleTensor` of shape `[T + 1]`): alpha at these times, and 1 at the last.
    """

    times: torch.Tensor
    alphas: torch.Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, num_steps: int, device: torch.device) -> "TimeGrid":
        times = torch.linspace(1, _LAST_TIME, num_steps + 1, dtype=torch.float64)
        alphas = schedule.alpha(times)
        alphas[-1] = 1.0
        return cls(times.to(device), alphas.to(device))

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1


@dataclass(frozen=True)
class Block:
    """
    What stays as it is while the blocks of all active rows are denoised.

    Args:
        process ([`MaskedDiffusion`] or [`UniformDiffusion`]): the model's.
        grid ([`TimeGrid`]): the steps.
        predict ([`Predict`]): a denoiser pass.
        generator ([`CounterGenerator`]): keys of the tokens, `[A, n]`.
        free (`torch.BoolTensor` of shape `[A, n]`): False for tokens of the prompt, which are held fixed.
        greedy_end (`bool`): the last step takes the arg-max.
        time_conditioning (`bool`): whether the model says something else of the same block at another time.
        states (`list[torch.Tensor]`, *optional*): is given the state `[A, n]` after each step.
        numbers (`torch.DoubleTensor` of shape `[A, n]`, *optional*): what the tokens of a masked model are drawn with,
            in place of numbers of the generator's.
        confidence (`torch.DoubleTensor` of shape `[A, n]`, *optional*): is given the log-probability of each token in
            the prediction that it was drawn from last.
        show (`Callable`, *optional*): is called as [`FrameRecorder.canvas`] with each state of the block.
    """

    process: DiffusionProcess
    grid: TimeGrid
    predict: Predict
    generator: CounterGenerator
    free: torch.Tensor
    greedy_end: bool
    time_conditioning: bool
    states: list[torch.Tensor] | None
    numbers: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    show: Callable[..., None] | None = None

    def keep_confidence(self, where: torch.Tensor, prediction: Prediction, tokens: torch.Tensor) -> None:
        """Of the M tokens that were drawn at the positions `where`, `[A, n]`."""
        if self.confidence is not None:
            self.confidence[where] = prediction.log_prob(tokens)

    def show_step(self, z_t: torch.Tensor, step: torch.Tensor | int, rows: torch.Tensor, **facts: Any) -> None:
        """What `step` made of these rows `[A]`."""
        if self.show is not None:
            self.show("denoise", z_t, step=step + 1, rows=rows, free=self.free, **facts)

    def masked(self, z_t: torch.Tensor) -> torch.Tensor:
        """Where a token is masked, `[A, n]`; nowhere in uniform models."""
        if isinstance(self.process, MaskedDiffusion):
            return (z_t == self.process.mask_token_id) & self.free
        return torch.zeros_like(self.free)


def denoise(block: Block, z_t: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Ancestral steps `first` to `last - 1`, `[A, n]`: every step draws from the posterior of Eq. 2 or 3."""
    if isinstance(block.process, MaskedDiffusion):
        return _denoise_masked(block, z_t, first, last)
    return _denoise_uniform(block, block.process, z_t, first, last)


def _denoise_masked(block: Block, z_t: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """
    By Eq. 2 a token that is masked at alpha_first is revealed before alpha_s with probability
    (alpha_s - alpha_first) / (1 - alpha_first).
    """
    grid, generator = block.grid, block.generator.fold_in(first)
    start = grid.alphas[first]
    reached = (grid.alphas[first + 1 : last + 1] - start) / (1 - start)
    step = first + torch.searchsorted(reached, generator.fold_in(Purpose.REVEAL).uniform(), right=True)
    return _reveal(block, z_t, step, first, last, grid.times[step], generator, step == grid.num_steps - 1)


def hit_first(block: Block, z_t: torch.Tensor) -> torch.Tensor:
    """
    First-hitting sampling of a masked model (Zheng et al., 2025), the limit of ancestral sampling for T to infinity,
    `[A, n]`: each token is revealed at a time of its own, by a pass of its own.
    """
    generator, start = block.generator.fold_in(0), block.grid.alphas[0]
    number = generator.fold_in(Purpose.REVEAL).uniform()
    masked = block.masked(z_t)
    order = torch.where(masked, number, 2.0).argsort(-1).argsort(-1)
    time = block.process.schedule.time(start + number * (1 - start))
    is_end = order == masked.sum(-1, keepdim=True) - 1  # tokens of the prompt have no event
    return _reveal(block, z_t, order, 0, z_t.shape[1], time, generator, is_end)


def _reveal(
    block: Block,
    z_t: torch.Tensor,
    event: torch.Tensor,
    first: int,
    last: int,
    time: torch.Tensor,
    generator: CounterGenerator,
    is_end: torch.Tensor,
) -> torch.Tensor:
    """
    Reveals masked tokens in the order of their events, `[A, n]`.

    Args:
        event (`torch.LongTensor` of shape `[A, n]`): when a token is revealed, `first` to `last - 1`; else not here.
        time (`torch.DoubleTensor` of shape `[A, n]`): t of the event.
        is_end (`torch.BoolTensor` of shape `[A, n]`): the tokens of the last event, which may take the arg-max.
    """
    masked = block.masked(z_t)
    event = torch.where(masked, event, last)
    number = generator.fold_in(Purpose.DENOISE).uniform() if block.numbers is None else block.numbers
    upcoming, noisy = event, z_t
    while True:
        following, position = upcoming.min(-1, keepdim=True)
        due = following < last
        if not due.any():
            break
        revealed = due & (upcoming == following)
        prediction = block.predict(z_t, revealed, due.squeeze(-1), time.gather(-1, position).squeeze(-1))
        tokens = prediction.sample(number[revealed])
        if block.greedy_end:
            tokens = torch.where(is_end[revealed], prediction.best(), tokens)
        block.keep_confidence(revealed, prediction, tokens)
        z_t = z_t.masked_scatter(revealed, tokens)
        upcoming = upcoming.masked_fill(revealed, last)
        block.show_step(z_t, following.squeeze(-1), due.squeeze(-1))
    if block.states is not None:
        block.states.extend(torch.where(masked & (event > step), noisy, z_t) for step in range(first, last))
    return z_t


def _denoise_uniform(
    block: Block, process: UniformDiffusion, z_t: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """A row goes through its steps with one prediction, until a step has changed it."""
    grid = block.grid
    everywhere = torch.ones_like(block.free)
    # A row of fixed tokens alone needs no step.
    step = torch.where(block.free.any(-1, keepdim=True), first, last)
    stale = torch.ones_like(step, dtype=torch.bool)
    states: dict[int, torch.Tensor] = {}
    while True:
        running, now = step < last, step.clamp(max=last - 1)
        if not running.any():
            break
        has_pass = not (running & ~stale).any()
        if has_pass:
            prediction = block.predict(z_t, everywhere, running.squeeze(-1), grid.times[now].squeeze(-1))
            z_prob = prediction.prob(z_t.flatten()).view_as(z_t)
            stale = torch.zeros_like(stale)
        ready = running & ~stale
        generator = block.generator.fold_in(now, Purpose.DENOISE)
        z_s = process.sample_transition(
            z_prob, prediction.sample_at, z_t, grid.alphas[now + 1], grid.alphas[now], generator
        )
        is_end = now == grid.num_steps - 1
        if block.greedy_end and is_end.any():
            z_s = torch.where(is_end, prediction.best().view_as(z_t), z_s)
        z_s = torch.where(ready & block.free, z_s, z_t)
        ends = ready & block.free & is_end
        if block.confidence is not None and ends.any():
            block.keep_confidence(ends, prediction[ends.flatten()], z_s[ends])
        has_changed = (z_s != z_t).any(-1, keepdim=True)
        stale = stale | (ready & (has_changed | block.time_conditioning))
        z_t = z_s
        if has_pass or has_changed.any():
            block.show_step(z_t, now.squeeze(-1), (ready & (has_changed | has_pass)).squeeze(-1))
        if block.states is not None:
            for index in step[ready].unique().tolist():
                states[index] = torch.where(ready & (step == index), z_t, states.get(index, z_t))
        step = step + ready
    if block.states is not None:
        block.states.extend(states.get(index, z_t) for index in range(first, last))
    return z_t


def denoise_adaptively(block: Block, z_t: torch.Tensor, sampler: str, bound: float) -> torch.Tensor:
    """
    At every step each token that is not accepted is drawn, and those that the model is sure of are accepted, one at
    least; the last step accepts all. Masked models never change a token again. Uniform models draw the whole block
    anew, and what is not accepted goes back to the prior; a row ends when all its tokens are accepted at once.

    Args:
        sampler (`str`): `"confidence"` accepts tokens whose most likely value has at least the probability `bound`,
            `"entropy_bound"` the most certain ones as long as their entropies but the largest add up to `bound` nats
            at most (Ben-Hamu et al., 2025): a bound of what they tell of one another.

    Returns:
        `torch.LongTensor` of shape `[A, n]`.
    """
    process, grid = block.process, block.grid
    is_masked = isinstance(process, MaskedDiffusion)
    open_tokens = block.free
    for step in range(grid.num_steps):
        rows = open_tokens.any(-1)
        if not rows.any():
            break
        generator = block.generator.fold_in(step)
        wanted = open_tokens if is_masked else block.free & rows[:, None]
        prediction = block.predict(z_t, wanted, rows, grid.times[step].expand(len(z_t)))
        tokens = z_t.masked_scatter(wanted, prediction.sample(generator.fold_in(Purpose.DENOISE).uniform()[wanted]))
        if step == grid.num_steps - 1 and block.greedy_end:
            tokens = z_t.masked_scatter(wanted, prediction.best())
        block.keep_confidence(wanted, prediction, tokens[wanted])
        if step == grid.num_steps - 1:
            accepted = wanted
        else:
            accepted = _accepted(prediction, wanted, sampler, bound, generator.fold_in(Purpose.SCORE).uniform())
        noise = process.prior(z_t.shape, z_t.device, generator.fold_in(Purpose.RENOISE))
        z_t = torch.where(wanted & ~accepted, noise, tokens)
        open_tokens = wanted & ~accepted
        block.show_step(z_t, step, rows, noise=open_tokens)
        if block.states is not None:
            block.states.append(z_t)
    return z_t


def _accepted(
    prediction: Prediction, wanted: torch.Tensor, sampler: str, bound: float, uniform: torch.Tensor
) -> torch.Tensor:
    """
    Which of the wanted tokens are accepted, `[A, n]`: at least one of each row that wants any. `uniform` ranks those
    that the model is equally sure of.
    """
    log_probs = prediction.log_probs()
    doubt = -log_probs.amax(-1) if sampler == "confidence" else torch.special.entr(log_probs.exp()).sum(-1)
    doubt = torch.full(wanted.shape, torch.inf, dtype=doubt.dtype, device=doubt.device).masked_scatter(wanted, doubt)
    order = argsort_at_random(doubt, uniform)
    ordered = doubt.gather(-1, order)
    if sampler == "confidence":
        sure = ordered.neg().exp() >= bound
    else:  # all but the largest entropy, which is the last
        sure = ordered.cumsum(-1) - ordered <= bound
    sure[:, 0] = True
    return torch.zeros_like(wanted).scatter(-1, order, sure) & wanted


__all__ = ["Block", "Predict", "Purpose", "TimeGrid", "denoise", "denoise_adaptively", "hit_first"]
