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
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_blockgen import commit_and_read
from .configuration_blockgen import BlockGenConfig
from .inputs_blockgen import last_columns
from .masking_blockgen import attend_in_chunks


# What a condition makes of a norm: shift, scale, and the weight that stands for its own and the scale.
NormCondition = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class BlockGenNorm(nn.Module):
    """A norm with a weight and no bias, computed in float32; then shifted and scaled by the condition, if any."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def folded(self, shift: torch.Tensor | None, scale: torch.Tensor | None) -> NormCondition:
        """One condition for all tokens may be made a part of the weights."""
        return shift, scale, None


class BlockGenLayerNorm(BlockGenNorm):
    def folded(self, shift: torch.Tensor | None, scale: torch.Tensor | None) -> NormCondition:
        """Fewer passes over the hidden states. Not where the weights lie elsewhere, on a disk for instance."""
        shape = self.weight.shape
        if shift is None or scale is None or shift.numel() != shape.numel() or shift.device != self.weight.device:
            return shift, scale, None
        return shift.float().view(shape), None, self.weight.float() * (1 + scale.float().view(shape))

    def forward(
        self,
        hidden_states: torch.Tensor,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `[B, L, d]` -> `[B, L, d]`; shift and scale `[1 or B, 1 or L, d]`, or what [`~BlockGenNorm.folded`] makes of
        them.
        """
        if weight is None:
            shift, scale, weight = self.folded(shift, scale)
        bias = shift if scale is None else None
        weight = self.weight.float() if weight is None else weight
        normed = nn.functional.layer_norm(hidden_states.float(), self.weight.shape, weight, bias, self.eps)
        normed = normed.to(hidden_states.dtype)
        return normed if scale is None or shift is None else normed * (1 + scale) + shift


class BlockGenRMSNorm(BlockGenNorm):
    """As in Llama."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        weight: None = None,
    ) -> torch.Tensor:
        """`[..., d]` -> `[..., d]`; shift and scale `[1 or B, 1 or L, d]`."""
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        normed = self.weight * states.to(hidden_states.dtype)
        return normed if shift is None or scale is None else normed * (1 + scale) + shift


def make_norm(config: BlockGenConfig, size: int | None = None) -> BlockGenNorm:
    """The norm that the configuration names, of the hidden size or of another."""
    kind: type[BlockGenNorm] = BlockGenRMSNorm if config.norm_type == "rms_norm" else BlockGenLayerNorm
    return kind(size or config.hidden_size, config.layer_norm_eps)


class BlockGenModulation(nn.Linear):
    """Shifts, scales and gates of the adaptive layer norms, from the condition. Starts at zero."""


class Modulation(NamedTuple):
    """
    What a condition makes of a branch: the norm before it is shifted and scaled, the gate stands behind it.

    Args:
        shift, scale, gate (`torch.Tensor` of shape `[1 or B, 1 or L, d]`, *optional*): None without a condition.
        weight (`torch.Tensor` of shape `[d]`, *optional*): that of the norm where the scale is in it; the shift has
            its shape then.
    """

    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    @property
    def norm(self) -> NormCondition:
        return self.shift, self.scale, self.weight

    def folded(self, norm: BlockGenNorm) -> "Modulation":
        shift, scale, weight = norm.folded(self.shift, self.scale)
        return Modulation(shift, scale, self.gate, weight)

    def of_last(self, length: int) -> "Modulation":
        """Of the last tokens."""
        return Modulation(
            *(
                part if part is None or part.ndim == 1 or part.shape[1] == 1 else last_columns(part, length)
                for part in self
            )
        )


# Of attention and MLP; of the norm behind the layers alone.
LayerModulations = tuple[Modulation, ...]


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
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotates `[B, heads, length, head_dim]` by the angles of its positions, `[B or 1, length, head_dim]`. The first half
    of the sines has the other sign: that is the sign of what the halves exchange.
    """
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)  # under autocast, that of the products
    return torch.addcmul(states * cos[:, None], states.roll(states.shape[-1] // 2, dims=-1), sin[:, None])


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # In float32 at least. The mask's least float64 would be minus infinity there, and NaN where padding sees nothing.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def project(linear: nn.Module, hidden_states: torch.Tensor, num_unadapted: int | None) -> torch.Tensor:
    """
    A linear layer, with an adapter that acts on some tokens only.

    Adapters of PEFT keep the original layer as `base_layer`. The first tokens go through that alone, the others
    through the adapter too: what comes first is the same with and without an adapter.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, L, in]`): clean tokens, then noisy ones.
        num_unadapted (`int`, *optional*): how many tokens, from the first on, no adapter acts on. None: an adapter
            acts on all.

    Raises:
        ValueError: the adapter was merged into the weights, which act on all tokens.
    """
    base = getattr(linear, "base_layer", None)
    if base is None or num_unadapted is None:
        return linear(hidden_states)
    if getattr(linear, "merged", False):
        raise ValueError(
            "An adapter that acts on noisy tokens alone cannot be merged into the weights, which act on clean tokens "
            "too: call `unmerge_adapter()`, and load the adapter beside the model."
        )
    if num_unadapted == hidden_states.shape[1]:
        return base(hidden_states)
    clean, noisy = hidden_states[:, :num_unadapted], hidden_states[:, num_unadapted:]
    return torch.cat([base(clean), linear(noisy)], dim=1) if num_unadapted else linear(noisy)


def last_tokens(
    hidden_states: torch.Tensor, length: int, num_unadapted: int | None
) -> tuple[torch.Tensor, int | None]:
    """The last tokens of `[B, L, d]`, and how many of them no adapter acts on."""
    dropped = hidden_states.shape[1] - length
    return hidden_states[:, dropped:], None if num_unadapted is None else max(num_unadapted - dropped, 0)


class BlockGenAttention(nn.Module):
    """Multi-head attention over the cached tokens and the clean and noisy tokens of the call."""

    def __init__(self, config: BlockGenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width, key_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.widths = (width, key_width, key_width)  # of queries, keys and values
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.qkv_proj: nn.Module | None = None  # one product instead of the three, where weights are packed
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = BlockGenRMSNorm(self.head_dim, config.layer_norm_eps) if config.qk_norm else None
        self.k_norm = BlockGenRMSNorm(self.head_dim, config.layer_norm_eps) if config.qk_norm else None
        self.has_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        cache: Cache | None = None,
        num_committed: int = 0,
        num_unadapted: int | None = None,
        num_queries: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        queries, query_embeddings, num_unadapted_queries = hidden_states, position_embeddings, num_unadapted
        if num_queries is not None:
            queries, num_unadapted_queries = last_tokens(hidden_states, num_queries, num_unadapted)
            cos, sin = position_embeddings
            query_embeddings = last_columns(cos, num_queries), last_columns(sin, num_queries)
        input_shape = queries.shape[:-1]
        if self.qkv_proj is None:
            query_states = project(self.q_proj, queries, num_unadapted_queries)
            key_states = project(self.k_proj, hidden_states, num_unadapted)
            value_states = project(self.v_proj, hidden_states, num_unadapted)
        else:
            query_states, key_states, value_states = self.qkv_proj(hidden_states).split(self.widths, dim=-1)
            query_states = last_columns(query_states, queries.shape[1])
        query_states, key_states, value_states = (
            states.unflatten(-1, (-1, self.head_dim)) for states in (query_states, key_states, value_states)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        value_states = value_states.transpose(1, 2)
        if self.has_rope:
            query_states = apply_rotary_pos_emb(query_states, *query_embeddings)
            key_states = apply_rotary_pos_emb(key_states, *position_embeddings)

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
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return project(self.o_proj, attn_output, num_unadapted_queries), attn_weights


class BlockGenMLP(nn.Module):
    def __init__(self, config: BlockGenConfig) -> None:
        super().__init__()
        inner, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, num_unadapted: int | None = None) -> torch.Tensor:
        inner = project(self.up_proj, hidden_states, num_unadapted)
        if self.gate_proj is None:
            inner = self.act_fn(inner)
        else:
            inner = self.act_fn(project(self.gate_proj, hidden_states, num_unadapted)) * inner
        return project(self.down_proj, inner, num_unadapted)


class BlockGenDecoderLayer(GradientCheckpointingLayer):
    """A layer of the diffusion transformer: attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, config: BlockGenConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = BlockGenAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = BlockGenMLP(config)
        self.modulation = (
            BlockGenModulation(config.cond_dim, 6 * config.hidden_size) if config.adaptive_layer_norm else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout)

    def modulations(self, condition: torch.Tensor | None) -> LayerModulations:
        """What the condition makes of attention and MLP."""
        if self.modulation is None:
            return (Modulation(), Modulation())
        parts = self.modulation(condition).chunk(6, dim=-1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def constant_modulations(self, condition: torch.Tensor | None) -> LayerModulations:
        """As [`~BlockGenDecoderLayer.modulations`], computed as far as it can be for a condition of all tokens."""
        attention, mlp = self.modulations(condition)
        return attention.folded(self.input_layernorm), mlp.folded(self.post_attention_layernorm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None = None,
        modulations: LayerModulations | None = None,
        num_unadapted: int | None = None,
        num_queries: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        `[B, L, d]` -> `[B, L or num_queries, d]`.

        `modulations`: those of the condition, where they are known already. `num_unadapted`: see [`project`].
        `num_queries`: only so many of the last tokens are wanted; the others are keys and values.
        """
        attention, mlp = self.modulations(condition) if modulations is None else modulations
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states, *attention.norm)
        hidden_states, _ = self.self_attn(
            hidden_states, num_unadapted=num_unadapted, num_queries=num_queries, **kwargs
        )
        if num_queries is not None:
            residual, num_unadapted = last_tokens(residual, num_queries, num_unadapted)
            attention, mlp = attention.of_last(num_queries), mlp.of_last(num_queries)
        hidden_states = add_gated(residual, self.dropout(hidden_states), attention.gate)

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states, *mlp.norm)
        return add_gated(residual, self.dropout(self.mlp(hidden_states, num_unadapted)), mlp.gate)


def add_gated(residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return residual + branch if gate is None else torch.addcmul(residual, branch, gate)


__all__ = ["BlockGenAttention", "BlockGenDecoderLayer", "LayerModulations", "Modulation"]
