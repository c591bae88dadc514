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
Head and loss together, in chunks of tokens, so that the logits `[B, L, V]` never stand in memory.

With a vocabulary of 50,000 the logits of a training step, and what the loss derives from them, are larger than the
activations of many layers. Here the gradients of hidden states and head are computed together with the loss, chunk by
chunk, so that nothing is kept and nothing computed twice; the backward pass only scales them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


# Tokens a chunk. From 128 to 256 the products are as fast as with all tokens at once; more only costs memory.
CHUNK_SIZE = 256
# What the loss derives from the logits, several tensors of their size, is made for fewer tokens at a time on CPUs,
# where that is also faster: it stays in the cache. GPUs would only start more kernels.
CPU_ROWS = 16

# (logits `[n, V]`, the chunk's place among the tokens) -> losses `[n]`
TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]


@torch.compiler.disable  # a compiled graph would keep what the chunks are there to forget
def chunked_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_loss: TokenLoss,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sum over tokens of `token_loss(hidden_states @ weight.T + bias)`, without the logits in memory.

    Args:
        hidden_states (`torch.Tensor` of shape `[N, hidden_size]`): of the tokens that are scored.
        weight, bias (`torch.Tensor` of shape `[V, hidden_size]` and `[V]`): the head.
        token_loss: from the logits of some tokens to their losses; differentiable in the logits.
        chunk_size (`int`): tokens whose logits stand in memory together.

    Returns:
        the sum, a scalar that can be differentiated once, and the losses `[N]`, which cannot.
    """
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


__all__ = ["chunked_loss"]
