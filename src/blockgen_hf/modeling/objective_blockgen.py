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
`forward`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .diffusion_blockgen import DiffusionProcess, MaskedDiffusion, check_objective
from .masking_blockgen import BlockSize


# Training draws t uniformly on [1e-3, 1] (paper, Suppl. A): the weight of the ELBO grows without bound towards t = 0.
SMALLEST_TIME = 1e-3


class _MixtureSettings(Protocol):
    block_sizes: list[int]
    block_size_weights: list[float] | None
    training_objective: str

    @property
    def is_anchored(self) -> bool: ...


def check_training_arguments(
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    columns: Mapping[str, torch.Tensor | None],
    **kwargs: Any,
) -> None:
    """
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


def check_clean_cache(cache: Cache | None, length: int, columns: Mapping[str, torch.Tensor | None]) -> None:
    """
    Raises:
        ValueError: a cache that cannot hold the clean half of rows of this length for several draws of noise.
    """
    if cache is None:
        return
    for name in ("document_ids", "position_ids"):
        if columns[name] is not None:
            raise ValueError(f"`cache` cannot keep the clean tokens of an evaluation with `{name}`: leave it out.")
    if type(cache) is not DynamicCache or cache.get_seq_length() not in (0, length):
        raise ValueError(
            f"`cache` must be a DynamicCache that is empty, or that an earlier call with the same {length} tokens has "
            f"filled, when `labels` are given, but is a {type(cache).__name__} of {cache.get_seq_length()} tokens."
        )


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
        device = self.input_ids.device
        if isinstance(self.block_size, int):  # made on the device: copying a list there would wait for it
            objective = "cross_entropy" if self.block_size == 1 else self.objective
            return {objective: torch.ones(1, 1, dtype=torch.bool, device=device)}
        objectives = ["cross_entropy" if size == 1 else self.objective for size in self.block_size]
        return {
            name: torch.tensor([objective == name for objective in objectives], device=device)[:, None]
            for name in sorted(set(objectives))
        }


def draw_training_noise(
    diffusion: DiffusionProcess,
    config: _MixtureSettings,
    input_ids: torch.Tensor,
    scored: torch.Tensor,
    *,
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
        sizes, weights = drawn_block_sizes(config)
        block_size = sizes[int(torch.multinomial(torch.tensor(weights), 1))]
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


def weighted_block_sizes(config: _MixtureSettings) -> list[tuple[int, float]]:
    """The block sizes of the mixture, each with its weight gamma (Eq. 6)."""
    weights = config.block_size_weights or [1.0 / len(config.block_sizes)] * len(config.block_sizes)
    return list(zip(config.block_sizes, weights, strict=True))


def drawn_block_sizes(config: _MixtureSettings) -> tuple[list[int], list[float]]:
    """
    The block sizes that a training step is drawn from, and their weights. Where clean tokens predict, every pass
    scores block size 1 too, so that it is not drawn unless there is no other.
    """
    pairs = weighted_block_sizes(config)
    if config.is_anchored:
        pairs = [pair for pair in pairs if pair[0] > 1 and pair[1] > 0] or pairs
    return [size for size, _ in pairs], [weight for _, weight in pairs]


def weight_of_block_size_1(config: _MixtureSettings) -> float:
    """gamma_1, the weight of block size 1 in the mixture."""
    return sum(weight for size, weight in weighted_block_sizes(config) if size == 1)


def autoregressive_draw(diffusion: DiffusionProcess, draw: TrainingDraw) -> TrainingDraw:
    """What the clean half of a pass is scored by: cross entropy of every token that the draw scores."""
    noisy = draw.input_ids
    if isinstance(diffusion, MaskedDiffusion):  # which scores masked tokens
        noisy = torch.full_like(noisy, diffusion.mask_token_id)
    return replace(draw, noisy_input_ids=noisy, block_size=1, objective="cross_entropy", weights=None)


def times_and_alphas(
    diffusion: DiffusionProcess, noise_level: torch.Tensor, block_size: BlockSize
) -> tuple[torch.Tensor, torch.Tensor]:
    """t and alpha_t of every row, `[B or 1, 1 or L]`, from drawn times: block size 1 is fully noised, alpha_1 = 0."""
    alpha_t = diffusion.schedule.alpha(noise_level)
    if isinstance(block_size, int):
        return (noise_level, alpha_t) if block_size > 1 else (torch.ones_like(noise_level), torch.zeros_like(alpha_t))
    fully_noised = torch.tensor([size == 1 for size in block_size], device=noise_level.device)[:, None]
    alpha_t = torch.where(fully_noised, 0.0, alpha_t)
    return torch.where(fully_noised, 1.0, noise_level), alpha_t


def next_token_draw(input_ids: torch.Tensor, scored: torch.Tensor, position_ids: torch.Tensor) -> TrainingDraw:
    """
    What a model with `next_token_prediction` is scored by: cross entropy of all but the first token of a text, which
    follows nothing.
    """
    scored = scored & (position_ids > 0)
    time = torch.ones(len(input_ids), 1, dtype=torch.float64, device=input_ids.device)
    return TrainingDraw(input_ids, input_ids, scored, 1, time, "cross_entropy")


def shift_right(states: torch.Tensor) -> torch.Tensor:
    """`[B, L, n]`: what was at l - 1 at l; zeros at 0."""
    return nn.functional.pad(states[:, :-1], (0, 0, 1, 0))


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


# Tokens a chunk. On CPUs, from 128 to 256 the products are as fast as with all tokens at once; more only costs memory.
# GPUs start some 50 to 200 kernels a chunk: fewer chunks keep the card busy, at 0.4 GB of float32 logits for 50,000
# words. That is reckoned, not measured.
CHUNK_SIZE, GPU_CHUNK_SIZE = 256, 2048
# What the loss derives from the logits, several tensors of their size, is made for fewer tokens at a time on CPUs,
# where that is also faster: it stays in the cache. GPUs would only start more kernels.
CPU_ROWS = 16


def chunk_size_on(device_type: str) -> int:
    """Tokens a chunk of the loss on such a device."""
    return CHUNK_SIZE if device_type == "cpu" else GPU_CHUNK_SIZE


# (logits `[n, V]`, the chunk's place among the tokens) -> losses `[n]`
TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]


@torch.compiler.disable  # a compiled graph would keep what the chunks are there to forget
def chunked_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_loss: TokenLoss,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sum over tokens of `token_loss(hidden_states @ weight.T + bias)`, without the logits `[N, V]` in memory.

    With a vocabulary of 50,000 the logits of a training step, and what the loss derives from them, are larger than the
    activations of many layers. Here the gradients of hidden states and head are computed together with the loss, chunk
    by chunk, so that nothing is kept and nothing computed twice; the backward pass only scales them.

    Args:
        hidden_states (`torch.Tensor` of shape `[N, hidden_size]`): of the tokens that are scored.
        weight, bias (`torch.Tensor` of shape `[V, hidden_size]` and `[V]`): the head.
        token_loss: from the logits of some tokens to their losses; differentiable in the logits.
        chunk_size (`int`, *optional*): tokens whose logits stand in memory together. Default: by the device.

    Returns:
        the sum, a scalar that can be differentiated once, and the losses `[N]`, which cannot.
    """
    if chunk_size is None:
        chunk_size = chunk_size_on(hidden_states.device.type)
    needs_grad = torch.is_grad_enabled()  # inside of `forward` it is always off
    return _ChunkedLoss.apply(hidden_states, weight, bias, token_loss, chunk_size, needs_grad)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        token_loss: TokenLoss,
        chunk_size: int,
        needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (hidden_states, weight, bias)
        # Sums over many chunks, in float32 at least.
        gradients = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if tensor is not None and needs_grad and needed
            else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        losses = [hidden_states.new_empty(0, dtype=torch.promote_types(dtype, torch.float32))]
        with torch.autocast(device, enabled=False):
            head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(hidden_states), chunk_size):
                chunk = slice(start, start + chunk_size)
                hidden = hidden_states[chunk].to(dtype)
                logits = nn.functional.linear(hidden, head, offset)
                losses.append(_differentiate(logits, head, hidden, token_loss, chunk, gradients))
        ctx.gradients = [
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        token_losses = torch.cat(losses)
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum(), token_losses

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None or torch.is_grad_enabled():  # in a backward pass: with `create_graph=True`
            raise RuntimeError(
                "The chunked loss can be differentiated once, and only once: its gradients are computed with it and "
                "used up. Pass `skip_logits=False` to `forward` for a loss that keeps its graph."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: they belong to nobody else, and that of the head is large.
        scaled = [None if gradient is None else gradient.mul_(grad_total.to(gradient.dtype)) for gradient in gradients]
        return *scaled, None, None, None


def _differentiate(
    logits: torch.Tensor,
    head: torch.Tensor,
    hidden: torch.Tensor,
    token_loss: TokenLoss,
    chunk: slice,
    gradients: list[torch.Tensor | None],
) -> torch.Tensor:
    """The losses of a chunk; adds the gradients of their sum to those of hidden states, head and bias."""
    for_hidden, for_head, for_bias = gradients
    needs_grad = any(gradient is not None for gradient in gradients)
    rows = CPU_ROWS if logits.device.type == "cpu" else max(len(logits), 1)
    losses = []
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows].detach().requires_grad_(needs_grad)
        with torch.set_grad_enabled(needs_grad):
            loss = token_loss(part, slice(chunk.start + start, chunk.start + start + len(part)))
            total = loss.sum()
        losses.append(loss.detach())
        if needs_grad:
            (gradient,) = torch.autograd.grad(total, part)
            logits[start : start + rows] = gradient  # the logits are not needed any more
    gradient = logits
    if for_hidden is not None:
        for_hidden[chunk] = (gradient @ head).to(for_hidden.dtype)
    if for_head is not None and for_head.dtype == gradient.dtype:
        for_head.addmm_(gradient.T, hidden)
    elif for_head is not None:
        for_head.add_(gradient.T @ hidden)
    if for_bias is not None:
        for_bias.add_(gradient.sum(0, dtype=for_bias.dtype))
    return torch.cat(losses)


__all__ = [
    "TrainingDraw",
    "autoregressive_draw",
    "check_training_arguments",
    "chunked_loss",
    "chunked_mixture_loss",
    "draw_training_noise",
    "drawn_block_sizes",
    "mixture_loss",
    "next_token_draw",
    "refuse_count_without_labels",
    "shift_right",
    "times_and_alphas",
    "weight_of_block_size_1",
    "weighted_block_sizes",
]
