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
"""The layers of the diffusion transformer (Peebles & Xie, 2023; BlockGen, Suppl. A.2)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_blockgen import commit_and_read
from .configuration_blockgen import BlockGenConfig
from .masking_blockgen import attend_in_chunks


class BlockGenLayerNorm(nn.Module):
    """Layer norm without bias, computed in float32; then shifted and scaled by the condition, if there is one."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, L, d]` -> `[B, L, d]`; shift and scale `[1 or B, 1 or L, d]`."""
        weight, bias, shape = self.weight.float(), None, self.weight.shape
        # One condition for all tokens is a part of the weights: fewer passes over the hidden states.
        if shift is not None and scale is not None and shift.numel() == shape.numel():
            weight, bias = weight * (1 + scale.float().view(shape)), shift.float().view(shape)
            shift = scale = None
        normed = nn.functional.layer_norm(hidden_states.float(), shape, weight=weight, bias=bias, eps=self.eps)
        normed = normed.to(hidden_states.dtype)
        return normed if shift is None or scale is None else normed * (1 + scale) + shift


class BlockGenModulation(nn.Linear):
    """Shifts, scales and gates of the adaptive layer norms, from the condition. Starts at zero."""


class BlockGenTimeEmbedding(nn.Module):
    """Embedding of the noise level sigma = -log alpha_t: sinusoids of 128 frequencies, then a two-layer MLP."""

    num_frequencies = 128

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * self.num_frequencies, cond_dim)
        self.linear_2 = nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[...]` -> `[..., cond_dim]`."""
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=sigma.device)
        angles = sigma.float()[..., None] * torch.exp(-math.log(10000) / self.num_frequencies * steps)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(embedding)))


class BlockGenRotaryEmbedding(nn.Module):
    def __init__(self, config: BlockGenConfig) -> None:
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: BlockGenConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_half(states: torch.Tensor) -> torch.Tensor:
    left, right = states.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `[B, heads, length, head_dim]` by the angles of its positions, `[B or 1, length, head_dim]`."""
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BlockGenAttention(nn.Module):
    """Multi-head attention over the cached tokens and the clean and noisy tokens of the call."""

    def __init__(self, config: BlockGenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        cache: Cache | None = None,
        num_committed: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = apply_rotary_pos_emb(
            self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2), *position_embeddings
        )
        key_states = apply_rotary_pos_emb(
            self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2), *position_embeddings
        )
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        if cache is not None:
            key_states, value_states = commit_and_read(cache, self.layer_idx, key_states, value_states, num_committed)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attend = partial(attention_interface, self, scaling=self.scaling, dropout=0.0)
        if isinstance(attention_mask, tuple):
            attn_output, attn_weights = attend_in_chunks(
                attend, query_states, key_states, value_states, attention_mask
            )
        else:
            attn_output, attn_weights = attend(query_states, key_states, value_states, attention_mask, **kwargs)
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class BlockGenMLP(nn.Module):
    def __init__(self, config: BlockGenConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class BlockGenDecoderLayer(GradientCheckpointingLayer):
    """A layer of the diffusion transformer: attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, config: BlockGenConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = BlockGenLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = BlockGenAttention(config, layer_idx)
        self.post_attention_layernorm = BlockGenLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = BlockGenMLP(config)
        self.modulation = (
            BlockGenModulation(config.cond_dim, 6 * config.hidden_size) if config.adaptive_layer_norm else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`modulation`: that of the condition, `[.., .., 6 d]`, where it is known already."""
        if modulation is None and self.modulation is not None:
            modulation = self.modulation(condition)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            (None,) * 6 if modulation is None else modulation.chunk(6, dim=-1)
        )
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states, shift, scale)
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = add_gated(residual, self.dropout(hidden_states), gate)

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states, mlp_shift, mlp_scale)
        return add_gated(residual, self.dropout(self.mlp(hidden_states)), mlp_gate)


def add_gated(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return residual + branch if gate is None else torch.addcmul(residual, branch, gate)


__all__ = ["BlockGenAttention", "BlockGenDecoderLayer"]
