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
The loss in evaluation mode: the mixture bound itself (BlockGen, Eq. 7), by a few fixed draws of every block size.

One random draw, as training takes it, would make a figure that no two evaluations agree on. Here all block sizes of
the mixture are visited, and the noise is keyed by what a row says: the loss depends on the weights and the batch only.
"""

import dataclasses
from collections.abc import Iterator

import torch

from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import DiffusionProcess
from .evaluation_draws_blockgen import evaluation_rows, is_exact, make_draw
from .objective_blockgen import SMALLEST_TIME, TrainingDraw, draw_training_noise


# Draws of noise for each block size; block size 1 of a masked model is exact, and needs one.
NUM_DRAWS = 2


def evaluation_draws(
    diffusion: DiffusionProcess,
    config: BlockGenConfig,
    input_ids: torch.Tensor,
    scored: torch.Tensor,
    block_size: int | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> Iterator[TrainingDraw]:
    """
    What to denoise, a draw a forward pass. The sum of their losses is the bound of `evaluate_likelihood`, with as many
    draws and seed 0: `jensen`, or that of `block_size` if one is given.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`): clean tokens x.
        scored (`torch.BoolTensor` of shape `[B, L]`): the tokens whose loss counts; padding never does.
    """
    rows = evaluation_rows(input_ids, torch.where(scored, input_ids, -100), attention_mask, document_ids, seed=0)
    if position_ids is not None and document_ids is None:  # blocks are counted from the first, as in the mask
        positions = (position_ids - position_ids.amin(-1, keepdim=True)).expand_as(input_ids)
        rows = dataclasses.replace(rows, positions=positions)
    if block_size is None:
        gamma = config.block_size_weights or [1.0] * len(config.block_sizes)
        mixture = [pair for pair in zip(config.block_sizes, gamma, strict=True) if pair[1] > 0]
    else:
        mixture = [(block_size, 1.0)]
    total = sum(weight for _, weight in mixture)
    for size, weight in mixture:
        count = 1 if is_exact(config, size) else NUM_DRAWS
        for k in range(count):
            noise = make_draw(diffusion, rows, size, k, NUM_DRAWS, SMALLEST_TIME, config.time_conditioning)
            draw = draw_training_noise(
                diffusion, config, rows.tokens, rows.scored, size, noise.noise_level, noise.noisy_input_ids,
                noise.objective,
            )  # fmt: skip
            yield dataclasses.replace(draw, weights=noise.weights * (weight / total / count))


__all__ = ["NUM_DRAWS", "evaluation_draws"]
