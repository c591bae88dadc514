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
The training loss of the mixture likelihood bound (BlockGen, Eq. 7), by one draw of block size, noise level and noise.

The draws here serve any training loop that calls `model(input_ids=..., labels=...)`: like dropout they come from
torch's default generator. A trainer that wants them stratified and reproducible makes them itself and passes them to
`forward`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .chunked_loss_blockgen import chunked_loss
from .diffusion_blockgen import DiffusionProcess, MaskedDiffusion, check_objective
from .masking_blockgen import BlockSize


# Training draws t uniformly on [1e-3, 1] (paper, Suppl. A): the weight of the ELBO grows without bound towards t = 0.
SMALLEST_TIME = 1e-3


class _MixtureSettings(Protocol):
    block_sizes: list[int]
    block_size_weights: list[float] | None
    training_objective: str


def check_training_arguments(
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    columns: Mapping[str, torch.Tensor | None],
    **kwargs: Any,
) -> torch.Tensor:
    """
    `input_ids`, which are there.

    Raises:
        ValueError: shapes that differ, a cache, or labels that were shifted.
    """
    if input_ids is None or labels.shape != input_ids.shape:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"`labels` must have the shape of `input_ids` {shape}, but have {tuple(labels.shape)}.")
    if kwargs.get("cache") is not None or kwargs.get("use_cache"):
        raise ValueError("`cache` and `use_cache=True` have no meaning with `labels`: training has no cache.")
    if kwargs.get("shift_labels") is not None:
        raise ValueError(
            "`shift_labels` come from sequence or context parallelism, which cuts the sequences that the loss needs "
            "whole: train without it."
        )
    for name, column in columns.items():
        if column is not None and column.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `input_ids` {tuple(input_ids.shape)} when `labels` are given, but "
                f"the shape is {tuple(column.shape)}."
            )
    return input_ids


@dataclass(frozen=True)
class TrainingDraw:
    """
    What a training step denoises, and how it is scored.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`): clean tokens x.
        noisy_input_ids (`torch.LongTensor` of shape `[B, L]`): z_t.
        scored (`torch.BoolTensor` of shape `[B, L]`): the tokens whose loss counts.
        block_size (`int` or `tuple[int]`): one for all rows, or one a row.
        noise_level (`torch.DoubleTensor` of shape `[B, 1]` or `[B, L]`): t.
        objective (`str`): `"cross_entropy"` or `"elbo"`. Block size 1 is always scored by cross entropy.
        weights (`torch.DoubleTensor` of shape `[B or 1, L or 1]`, *optional*): positive factors of the tokens' losses.
    """

    input_ids: torch.Tensor
    noisy_input_ids: torch.Tensor
    scored: torch.Tensor
    block_size: BlockSize
    noise_level: torch.Tensor
    objective: str
    weights: torch.Tensor | None = None

    def rows_by_objective(self) -> dict[str, torch.Tensor]:
        """Which rows are scored by which objective, `[B, 1]` each; objectives without a row are left out."""
        sizes = (self.block_size,) if isinstance(self.block_size, int) else self.block_size
        objectives = ["cross_entropy" if size == 1 else self.objective for size in sizes]
        device = self.input_ids.device
        return {
            name: torch.tensor([objective == name for objective in objectives], device=device)[:, None]
            for name in sorted(set(objectives))
        }


def draw_training_noise(
    diffusion: DiffusionProcess,
    config: _MixtureSettings,
    input_ids: torch.Tensor,
    scored: torch.Tensor,
    block_size: BlockSize | None = None,
    noise_level: torch.Tensor | float | None = None,
    noisy_input_ids: torch.Tensor | None = None,
    objective: str | None = None,
) -> TrainingDraw:
    """
    Draws what of block size, noise level and noisy tokens is None.

    Block size 1 is fully noised, t = 1. Else there is one t a sequence, on a grid of the batch's size with a random
    offset, which lowers the variance of the loss. Tokens that are not scored stay clean.

    Raises:
        ValueError: noisy tokens without their noise level, or an unknown objective.
    """
    device, objective = input_ids.device, objective or config.training_objective
    check_objective(objective)
    if block_size is None:
        weights = config.block_size_weights or [1.0] * len(config.block_sizes)
        block_size = config.block_sizes[int(torch.multinomial(torch.tensor(weights), 1))]
    if noise_level is None:
        if noisy_input_ids is not None and block_size != 1:
            raise ValueError(
                "`noise_level` must be given with `noisy_input_ids` and `labels`: the time at which they were drawn."
            )
        grid = torch.arange(len(input_ids), dtype=torch.float64, device=device) / len(input_ids)
        offset = torch.rand((), dtype=torch.float64, device=device)
        noise_level = SMALLEST_TIME + (1 - SMALLEST_TIME) * ((grid + offset) % 1)
    noise_level = torch.as_tensor(noise_level, dtype=torch.float64, device=device)
    if noise_level.ndim < 2:
        noise_level = noise_level.reshape(-1, 1)
    noise_level, alpha_t = times_and_alphas(diffusion, noise_level, block_size)
    if noisy_input_ids is None:
        noisy_input_ids = diffusion.corrupt(input_ids, alpha_t, keep=~scored)
    return TrainingDraw(input_ids, noisy_input_ids, scored, block_size, noise_level, objective)


def times_and_alphas(
    diffusion: DiffusionProcess, noise_level: torch.Tensor, block_size: BlockSize
) -> tuple[torch.Tensor, torch.Tensor]:
    """t and alpha_t of every row, `[B or 1, 1 or L]`, from drawn times: block size 1 is fully noised, alpha_1 = 0."""
    sizes = (block_size,) if isinstance(block_size, int) else block_size
    fully_noised = torch.tensor([size == 1 for size in sizes], device=noise_level.device)[:, None]
    alpha_t = torch.where(fully_noised, 0.0, diffusion.schedule.alpha(noise_level))
    return torch.where(fully_noised, 1.0, noise_level), alpha_t


def mixture_loss(
    diffusion: DiffusionProcess, draw: TrainingDraw, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of the scored tokens, and the loss of each `[B, L]`, from the logits `[B, L, V]`."""
    alpha_t = diffusion.schedule.alpha(draw.noise_level)
    slope = diffusion.schedule.alpha_derivative(draw.noise_level)
    losses = torch.zeros((), device=logits.device)
    for objective, rows in draw.rows_by_objective().items():
        loss = diffusion.loss(logits, draw.input_ids, draw.noisy_input_ids, alpha_t, slope, objective)
        losses = torch.where(rows & draw.scored, loss, losses)
    if draw.weights is not None:
        losses = losses * draw.weights.to(losses.dtype)
    return losses.sum(), losses.detach()


def chunked_mixture_loss(
    diffusion: DiffusionProcess,
    draw: TrainingDraw,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As [`mixture_loss`], from hidden states `[B, L, hidden_size]` and the head, without logits in memory. Masked models
    compute the head only at masked positions: elsewhere the token is carried over, and costs nothing.
    """
    counts = draw.scored
    if isinstance(diffusion, MaskedDiffusion):
        counts = counts & (draw.noisy_input_ids == diffusion.mask_token_id)
    tokens, noisy_tokens = draw.input_ids.flatten(), draw.noisy_input_ids.flatten()
    times = draw.noise_level.expand(draw.input_ids.shape).flatten()
    weights = None if draw.weights is None else draw.weights.expand(draw.input_ids.shape).flatten()
    hidden_states = hidden_states.flatten(0, 1)
    totals, losses = [], torch.zeros(tokens.shape, device=tokens.device)
    for objective, rows in draw.rows_by_objective().items():
        index = (rows & counts).flatten().nonzero().squeeze(-1)
        t = times[index]
        alpha_t, slope = diffusion.schedule.alpha(t), diffusion.schedule.alpha_derivative(t)
        x, z_t = tokens[index], noisy_tokens[index]
        factors = None if weights is None else weights[index]

        def token_loss(logits: torch.Tensor, chunk: slice) -> torch.Tensor:
            loss = diffusion.loss(logits, x[chunk], z_t[chunk], alpha_t[chunk], slope[chunk], objective)  # noqa: B023
            return loss if factors is None else loss * factors[chunk].to(loss.dtype)  # noqa: B023

        total, scored_losses = chunked_loss(hidden_states[index], weight, bias, token_loss)
        totals.append(total)
        losses = losses.to(scored_losses.dtype).index_copy(0, index, scored_losses)
    return torch.stack(totals).sum(), losses.view(draw.input_ids.shape)


def refuse_count_without_labels(num_items_in_batch: torch.Tensor | int | None) -> None:
    """
    [`Trainer`] passes the number of scored tokens without the labels exactly where it has taken the labels to compute
    a loss of its own from the logits: with `label_smoothing_factor` or `compute_loss_func`. Without labels these are
    logits of next tokens, which already see the token that such a loss compares them with.

    Raises:
        ValueError: a number is given.
    """
    if num_items_in_batch is not None:
        raise ValueError(
            "`num_items_in_batch` must be given together with `labels`, from which `forward` computes the loss of the "
            "mixture. `Trainer` keeps the labels with `label_smoothing_factor` and `compute_loss_func`, which replace "
            "that loss: train without them."
        )


__all__ = [
    "TrainingDraw",
    "check_training_arguments",
    "chunked_mixture_loss",
    "draw_training_noise",
    "mixture_loss",
    "refuse_count_without_labels",
    "times_and_alphas",
]
