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

from typing import Protocol

import torch

from .diffusion_blockgen import DiffusionProcess


# In training t is uniform on [SMALLEST_TIME, 1].
SMALLEST_TIME = 1e-3


class _MixtureSettings(Protocol):
    block_sizes: list[int]
    block_size_weights: list[float] | None
    training_objective: str


def draw_training_noise(
    diffusion: DiffusionProcess,
    config: _MixtureSettings,
    input_ids: torch.Tensor,
    scored: torch.Tensor,
    block_size: int | None,
    noise_level: torch.Tensor | float | None,
    noisy_input_ids: torch.Tensor | None,
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """
    Draws what of block size, noise level and noisy tokens is None.

    Block size 1 is fully noised, t = 1. Else there is one t a sequence, on a grid of the batch's size with a random
    offset, which lowers the variance of the loss. Tokens that are not scored stay clean.

    Returns:
        block size, noise level `[B, 1]` or `[B, L]`, noisy ids `[B, L]`.
    """
    device = input_ids.device
    if block_size is None:
        weights = config.block_size_weights or [1.0] * len(config.block_sizes)
        block_size = config.block_sizes[int(torch.multinomial(torch.tensor(weights), 1))]
    if noisy_input_ids is not None and noise_level is None and block_size > 1:
        raise ValueError(
            "`noise_level` must be given with `noisy_input_ids` and `labels`: the time at which they were drawn."
        )
    if block_size == 1 or noise_level is None:
        batch_size = input_ids.shape[0]
        grid = torch.arange(batch_size, dtype=torch.float64, device=device) / batch_size
        offset = torch.rand((), dtype=torch.float64, device=device)
        noise_level = SMALLEST_TIME + (1 - SMALLEST_TIME) * ((grid + offset) % 1)
    noise_level = torch.as_tensor(noise_level, dtype=torch.float64, device=device)
    if noise_level.ndim < 2:
        noise_level = noise_level.reshape(-1, 1)
    alpha_t = diffusion.schedule.alpha(noise_level)
    if block_size == 1:
        noise_level, alpha_t = torch.ones_like(noise_level), torch.zeros_like(noise_level)
    if noisy_input_ids is None:
        noisy_input_ids = diffusion.corrupt(input_ids, alpha_t, keep=~scored)
    return block_size, noise_level, noisy_input_ids


def mixture_loss(
    diffusion: DiffusionProcess,
    config: _MixtureSettings,
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    noisy_input_ids: torch.Tensor,
    scored: torch.Tensor,
    block_size: int,
    noise_level: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Sum of the losses of the scored tokens, divided by their number or by `num_items_in_batch`. A scalar."""
    loss = diffusion.loss(
        logits,
        input_ids,
        noisy_input_ids,
        diffusion.schedule.alpha(noise_level),
        diffusion.schedule.alpha_derivative(noise_level),
        "cross_entropy" if block_size == 1 else config.training_objective,
    )
    total = torch.where(scored, loss, torch.zeros_like(loss)).sum()
    return total / (scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


__all__ = ["draw_training_noise", "mixture_loss"]
