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
The noise of a likelihood evaluation: draws keyed by what a row says, with little variance (BlockGen, Eq. 18, 19).

The paper draws one noise level t ~ U[smallest_time, 1] a sequence, and averages K such draws. The bound is a sum over
blocks, and the term of a block depends on the noise of this block alone, as the tokens before it are clean. So every
block may have a noise level of its own, and how the levels of a row's blocks and draws hang together is free: the
expectation stays that of Eq. 18 as long as each block of each draw has the right law. That allows for draws of much
less variance:

- Levels stand on a grid: those of a row's blocks, in random order, and those of a block over the draws.
- The loss of a masked model that does not know the time depends on which of the m scored tokens of a block are
  masked, and on t by a factor only. So the number n of masked tokens is drawn, uniform on 1 .. m, then which ones, and
  the integral over t that is left is known, [`_count_weights`]. That spares the factor 1 / t of Eq. 15 its variance.
- For other models small times are drawn more often, t = smallest_time + (1 - smallest_time) v^2 with v uniform on
  (0, 1], and count less, by dt / dv: near t = 0 few tokens are noised, at a high price each.
- A token is noised if a uniform number exceeds alpha_t; over the draws it goes on by steps of the golden ratio.

The K draws fall into two halves, independent of each other, with a grid each: by how much the means of the halves
differ tells the error of the mean of all, which the spread of draws on a grid does not."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import DiffusionProcess, MaskedDiffusion, NoiseSchedule
from .inputs_blockgen import ForwardInputs, document_positions
from .objective_blockgen import SMALLEST_TIME, TrainingDraw, draw_training_noise, weighted_block_sizes
from .sampling_blockgen import CounterGenerator


# Steps of this size, modulo 1, fill the unit interval evenly however many there are, and are unlike those of a grid.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

# Draws of noise for each block size; block size 1 of a masked model is exact, and needs one.
NUM_DRAWS = 2

# What random numbers are for.
_LEVEL, _BLOCK_ORDER, _TOKEN, _PRIOR = range(4)


@dataclass(frozen=True)
class EvaluationRows:
    """
    The rows of a batch, and where their random numbers come from.

    Args:
        tokens (`torch.LongTensor` of shape `[B, L]`): clean tokens x.
        scored (`torch.BoolTensor` of shape `[B, L]`): the tokens whose likelihood counts.
        valid (`torch.BoolTensor` of shape `[B, L]`): False for padding.
        positions (`torch.LongTensor` of shape `[B, L]`): where the tokens stand in their row or document; with
            anchored blocks, where the tokens stand that predict them: -1 for the first, which nothing predicts.
        places (`torch.LongTensor` of shape `[B, L]`): how many tokens of the row are before each, padding not counted.
        generator ([`CounterGenerator`]): a key a row, `[B, 1]`, from the seed and from what the row says.
        is_anchored (`bool`): whether the positions are those of anchored blocks.
    """

    tokens: torch.Tensor
    scored: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    generator: CounterGenerator
    is_anchored: bool = False

    @property
    def token_positions(self) -> torch.Tensor:
        """Where the tokens stand in their row or document, `[B, L]`, whatever predicts them."""
        return self.positions + 1 if self.is_anchored else self.positions


def evaluation_rows(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    seed: int,
    is_anchored: bool = False,
) -> EvaluationRows:
    """
    Rows from the tensors of a batch, `[B, L]` each; padding is never scored. Keys come from the tokens, their places,
    which of them are scored and where documents start: not from padding, or from other rows.
    """
    input_ids = input_ids.long().contiguous()  # a number is the same in every form
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scored = valid if labels is None else valid & (labels != -100)
    tokens = input_ids if labels is None else torch.where(scored, labels, input_ids)
    places = (valid.long().cumsum(-1) - 1).clamp(min=0)
    positions = places if document_ids is None else document_positions(document_ids, attention_mask)
    if is_anchored:
        scored, positions = scored & (positions > 0), positions - 1
    said = CounterGenerator.from_seed(0, tokens.device).fold_in(tokens, places, scored.long(), positions).keys
    row_keys = (said * valid).sum(-1, keepdim=True)
    generator = CounterGenerator.from_seed(seed, tokens.device).fold_in(row_keys)
    return EvaluationRows(tokens, scored, valid, positions, places, generator, is_anchored)


@dataclass(frozen=True)
class EvaluationDraw:
    """
    What one forward pass denoises, and what its losses count.

    Args:
        noisy_input_ids (`torch.LongTensor` of shape `[B, L]`): z_t.
        noise_level (`torch.DoubleTensor` of shape `[B or 1, L or 1]`): t.
        objective (`str`): `"elbo"` or `"cross_entropy"`.
        weights (`torch.DoubleTensor` of shape `[B or 1, L or 1]`): factors of the tokens' losses.
    """

    noisy_input_ids: torch.Tensor
    noise_level: torch.Tensor
    objective: str
    weights: torch.Tensor


def is_exact(config: BlockGenConfig, block_size: int) -> bool:
    """
    Whether all draws are the same: with a block size of 1 a masked model sees mask tokens only, and one whose clean
    tokens predict sees no noise.
    """
    return block_size == 1 and (config.predicts_from_clean or config.diffusion_type == "masked")


def half_of_draw(draw: int, num_draws: int) -> tuple[int, int, int]:
    """Which half of the draws this one belongs to, its place there, and how many there are."""
    first = num_draws // 2
    return (0, draw, first) if draw < first else (1, draw - first, num_draws - first)


def make_draw(
    diffusion: DiffusionProcess,
    rows: EvaluationRows,
    block_size: int,
    draw: int,
    num_draws: int,
    smallest_time: float,
    time_conditioning: bool,
) -> EvaluationDraw:
    """Draw k of K for all rows and one block size."""
    one = torch.ones(1, 1, dtype=torch.float64, device=rows.tokens.device)
    half, place, count = half_of_draw(draw, num_draws)
    generator = rows.generator.fold_in(block_size, half)
    if block_size == 1:
        prior = diffusion.prior(rows.tokens.shape, rows.tokens.device, generator.fold_in(_PRIOR, place, rows.places))
        return EvaluationDraw(torch.where(rows.scored, prior, rows.tokens), one, "cross_entropy", one)
    blocks = _blocks_of(rows, block_size)
    level = _levels(blocks, generator, place, count)
    if isinstance(diffusion, MaskedDiffusion) and not time_conditioning:
        masked, weights = _mask_some(rows, blocks, generator, level, place, diffusion.schedule, smallest_time)
        noisy = torch.where(masked, diffusion.mask_token_id, rows.tokens)
        return EvaluationDraw(noisy, one, "cross_entropy", weights)
    v = 1 - level  # not zero
    t, weights = smallest_time + (1 - smallest_time) * v**2, 2 * v
    number = (generator.fold_in(_TOKEN, rows.places).uniform() + place * _GOLDEN_RATIO) % 1
    noised = rows.scored & (number >= diffusion.schedule.alpha(t))
    prior = diffusion.prior(rows.tokens.shape, rows.tokens.device, generator.fold_in(_PRIOR, place, rows.places))
    return EvaluationDraw(torch.where(noised, prior, rows.tokens), t, "elbo", weights)


@dataclass(frozen=True)
class _Blocks:
    """
    The blocks of every row that hold scored tokens.

    Args:
        index (`torch.LongTensor` of shape `[B, L]`): the block of every scored token, counted from 0; else any.
        num_scored (`torch.LongTensor` of shape `[B, L]`): scored tokens of each block, zero behind the last.
    """

    index: torch.Tensor
    num_scored: torch.Tensor


def _blocks_of(rows: EvaluationRows, block_size: int) -> _Blocks:
    """Blocks as the attention mask cuts them: from position 0 of a row or document."""
    number = rows.positions.div(block_size, rounding_mode="floor")
    changes = nn.functional.pad(number.diff(dim=-1) != 0, (1, 0))  # also where positions leave out the block's first
    starts = rows.valid & (changes | (rows.positions % block_size == 0) | (rows.places == 0))
    block = (starts.long().cumsum(-1) - 1).clamp(min=0)
    num_scored = torch.zeros_like(block).scatter_add(-1, block, rows.scored.long())
    # Blocks without a scored token are left out, so that the grid of levels is that of blocks which count.
    index = ((num_scored > 0).long().cumsum(-1) - 1).clamp(min=0).gather(-1, block)
    return _Blocks(index, torch.zeros_like(block).scatter_add(-1, index, rows.scored.long()))


def _levels(blocks: _Blocks, generator: CounterGenerator, place: int, count: int) -> torch.Tensor:
    """A number in [0, 1) a block, given to its tokens: `[B, L]`, uniform, on a grid over blocks and over draws."""
    exists = blocks.num_scored > 0
    num_blocks = exists.sum(-1, keepdim=True).clamp(min=1)
    index = torch.arange(exists.shape[1], device=exists.device)
    number = generator.fold_in(_BLOCK_ORDER, index).uniform()
    order = torch.where(exists, number, 2.0).argsort(-1).argsort(-1)
    offset = (generator.fold_in(_LEVEL).uniform() + place / count) % 1
    level = ((order + offset) / num_blocks + place / count) % 1
    return level.gather(-1, blocks.index)


def _mask_some(
    rows: EvaluationRows,
    blocks: _Blocks,
    generator: CounterGenerator,
    level: torch.Tensor,
    place: int,
    schedule: NoiseSchedule,
    smallest_time: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks n of the m scored tokens of a block, n uniform on 1 .. m by `level`, all subsets alike.

    The tokens of a block stand in a random order, on a circle; a draw masks n neighbours, and the next draw begins
    elsewhere.

    Returns:
        which tokens are masked, `[B, L]`, and the weights of their losses, m times [`_count_weights`], `[B, L]`.
    """
    total = blocks.num_scored.gather(-1, blocks.index).clamp(min=1)
    number = generator.fold_in(_TOKEN, rows.places).uniform()
    rank = torch.where(rows.scored, blocks.index + number, math.inf).argsort(-1).argsort(-1)
    before = blocks.num_scored.cumsum(-1) - blocks.num_scored
    rank = rank - before.gather(-1, blocks.index)
    masked_count = 1 + (level * total).long().clamp(max=total - 1)
    start = ((place * _GOLDEN_RATIO) % 1 * total).long()
    masked = rows.scored & ((rank - start) % total < masked_count)
    sizes, which = total.unique(return_inverse=True)
    table = torch.zeros(len(sizes), int(sizes.max()) + 1, dtype=torch.float64)
    for row, size in zip(table, sizes.tolist(), strict=True):
        row[: size + 1] = size * _count_weights(size, schedule, smallest_time)
    return masked, table.to(total.device)[which, masked_count]


def _count_weights(num_scored: int, schedule: NoiseSchedule, smallest_time: float) -> torch.Tensor:
    r"""
    What the cross entropy of a block counts when n of its m scored tokens are masked, `[m + 1]`, float64, for n = 0
    to m: the part of Eq. 15 that needs no network. With a = 1 - alpha_t the probability that a token is masked,

        w_n = 1 / (1 - t_min) int (-alpha'_t / (1 - alpha_t)) Bin(n; m, a) dt
            = (F_n(a_max) - F_n(a_min)) / (n (1 - t_min))

    where F_n(a) is the probability that at least n of m tokens are masked, and a_min, a_max belong to `smallest_time`
    and to t = 1. Without the cuts at both ends it is 1 / n.
    """
    times = torch.tensor([1.0, smallest_time], dtype=torch.float64)
    probability = (1 - schedule.alpha(times))[:, None]
    n = torch.arange(num_scored + 1, dtype=torch.float64)
    others = num_scored - n
    ways = math.lgamma(num_scored + 1) - torch.lgamma(n + 1) - torch.lgamma(others + 1)
    log_mass = ways + torch.xlogy(n, probability) + torch.special.xlog1py(others, -probability)
    at_least = log_mass.exp().flip(-1).cumsum(-1).flip(-1)
    weights = (at_least[0] - at_least[1]) / (n.clamp(min=1) * (1 - smallest_time))
    return torch.where(n > 0, weights, 0.0)


def evaluation_draws(
    diffusion: DiffusionProcess,
    config: BlockGenConfig,
    inputs: ForwardInputs,
    scored: torch.Tensor,
    block_size: int | None,
) -> Iterator[TrainingDraw]:
    """
    The loss in evaluation mode: the mixture bound itself (BlockGen, Eq. 7), by a few fixed draws of every block size.

    One random draw, as training takes it, would make a figure that no two evaluations agree on. Here all block sizes
    of the mixture are visited, and the noise is keyed by what a row says: the loss depends on the weights and the
    batch only. The sum of the draws' losses is the bound of `evaluate_likelihood`, with as many draws and seed 0:
    `jensen`, or that of `block_size` if one is given.

    Args:
        inputs ([`ForwardInputs`]): the clean tokens x `[B, L]`, and what of them is padding or another document.
        scored (`torch.BoolTensor` of shape `[B, L]`): the tokens whose loss counts; padding never does.

    Yields:
        what to denoise, a draw a forward pass.
    """
    tokens, position_ids = inputs.input_ids, inputs.position_ids
    labels = torch.where(scored, tokens, -100)
    anchored = config.is_anchored
    rows = evaluation_rows(tokens, labels, inputs.attention_mask, inputs.document_ids, 0, anchored)
    if position_ids is not None and inputs.document_ids is None:  # blocks are counted from the first, as in the mask
        positions = (position_ids - position_ids.amin(-1, keepdim=True)).expand_as(tokens)
        if anchored:
            rows = dataclasses.replace(rows, scored=rows.scored & (positions > 0), positions=positions - 1)
        else:
            rows = dataclasses.replace(rows, positions=positions)
    if block_size is None:
        mixture = [pair for pair in weighted_block_sizes(config) if pair[1] > 0]
    else:
        mixture = [(block_size, 1.0)]
    total = sum(weight for _, weight in mixture)
    for size, weight in mixture:
        count = 1 if is_exact(config, size) else NUM_DRAWS
        for k in range(count):
            noise = make_draw(diffusion, rows, size, k, NUM_DRAWS, SMALLEST_TIME, config.time_conditioning)
            draw = draw_training_noise(
                diffusion,
                config,
                rows.tokens,
                rows.scored,
                block_size=size,
                noise_level=noise.noise_level,
                noisy_input_ids=noise.noisy_input_ids,
                objective=noise.objective,
            )
            yield dataclasses.replace(draw, weights=noise.weights * (weight / total / count))


__all__ = [
    "NUM_DRAWS",
    "EvaluationDraw",
    "EvaluationRows",
    "evaluation_draws",
    "evaluation_rows",
    "half_of_draw",
    "is_exact",
    "make_draw",
]
