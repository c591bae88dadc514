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
Samplers that take as many tokens at a step as the model is sure of, and end a block early.

They follow no posterior: the law of the text is theirs, not that of the diffusion.
"""

import torch

from .denoising_blockgen import Block, Purpose
from .diffusion_blockgen import MaskedDiffusion
from .logits_blockgen import Prediction
from .sampling_blockgen import argsort_at_random


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
        if step == grid.num_steps - 1:
            tokens = z_t.masked_scatter(wanted, prediction.best()) if block.greedy_end else tokens
            accepted = wanted
        else:
            accepted = _accepted(prediction, wanted, sampler, bound, generator.fold_in(Purpose.SCORE).uniform())
        noise = process.prior(z_t.shape, z_t.device, generator.fold_in(Purpose.RENOISE))
        z_t = torch.where(wanted & ~accepted, noise, tokens)
        open_tokens = wanted & ~accepted
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


__all__ = ["denoise_adaptively"]
