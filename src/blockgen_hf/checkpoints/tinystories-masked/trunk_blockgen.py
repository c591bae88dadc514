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
"""The trunk of BlockGen: from clean and noisy tokens to the hidden states of the noisy ones."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import diffusion_from_config
from .inputs_blockgen import last_columns
from .layers_blockgen import (
    BlockGenAttention,
    BlockGenDecoderLayer,
    BlockGenLayerNorm,
    BlockGenModulation,
    BlockGenRMSNorm,
    BlockGenRotaryEmbedding,
    BlockGenTimeEmbedding,
    LayerModulations,
    Modulation,
    make_norm,
)
from .masking_blockgen import (
    AttentionLayout,
    BlockSize,
    build_layout,
    concat,
    make_attention_mask,
    make_training_mask,
    unreachable,
)
from .releases_blockgen import named_cache


class BlockGenPreTrainedModel(PreTrainedModel):
    config: BlockGenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BlockGenDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BlockGenDecoderLayer, "attentions": BlockGenAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation, as in the paper's backbone; adaLN starts at zero."""
        if isinstance(module, BlockGenModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if getattr(module, "bias", None) is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (BlockGenLayerNorm, BlockGenRMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, BlockGenRotaryEmbedding):
            super()._init_weights(module)


class BlockGenModel(BlockGenPreTrainedModel):
    """
    The trunk: from clean and noisy ids to the hidden states of the noisy tokens. It has no use without the head, so
    that training and sampling go through [`BlockGenForDiffusionLM`].
    """

    def __init__(self, config: BlockGenConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The mask token of a model whose vocabulary has none.
        is_extra = config.is_anchored and config.diffusion_type == "masked"
        self.noise_embedding = nn.Embedding(1, config.hidden_size) if is_extra else None
        self.time_embedding = BlockGenTimeEmbedding(config.cond_dim) if config.adaptive_layer_norm else None
        self.layers = nn.ModuleList([BlockGenDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.norm_modulation = (
            BlockGenModulation(config.cond_dim, 2 * config.hidden_size) if config.adaptive_layer_norm else None
        )
        self.rotary_emb = BlockGenRotaryEmbedding(config)
        self.schedule = diffusion_from_config(config).schedule
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor,
        noisy_input_ids: torch.Tensor | None = None,
        *,
        block_size: BlockSize = 1,
        position_ids: torch.Tensor | None = None,
        noisy_position_ids: torch.Tensor | None = None,
        noisy_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        num_committed: int | None = None,
        noise_level: torch.Tensor | None = None,
        noisy_block_ids: torch.Tensor | None = None,
        isolate_first: bool | torch.Tensor = False,
        document_ids: torch.Tensor | None = None,
        cache_window: int | None = None,
        cache_start: torch.Tensor | None = None,
        is_causal: bool = False,
        is_full: bool = False,
        is_aligned: bool = False,
        num_kept: int | None = None,
        anchor_rows: torch.Tensor | None = None,
        modulations: Sequence[LayerModulations] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `[B, C]`): clean tokens of the call; C may be 0.
            noisy_input_ids (`torch.LongTensor` of shape `[B, N]`): noisy tokens; N may be 0, to fill the cache.
            block_size, position_ids, attention_mask, cache, use_cache, num_committed, noise_level, noisy_block_ids,
                cache_window, cache_start: as in [`BlockGenForDiffusionLM.forward`]; the positions are not optional
                here.
            isolate_first (`bool` or `torch.BoolTensor` of shape `[B, 1]`): as there, or for each row.
            noisy_mask (`torch.Tensor` of shape `[B, N]`, *optional*): zero where a noisy token is padding.
            is_causal (`bool`): the caller knows that the mask is causal over cache, clean and noisy tokens in this
            order.
            is_full (`bool`): the caller knows that every query sees every key.
            is_aligned (`bool`): the caller knows that clean and noisy tokens are as many, at the same positions, which
                follow the order of the tokens (in every document, if there are `document_ids`). Nothing is cached,
                or there are no clean tokens because all of them are.
            num_kept (`int`, *optional*): how many hidden states to return, of the last of the clean and noisy tokens.
                Default: those of the noisy tokens.
            anchor_rows (`torch.LongTensor` of shape `[B or 1, N]`, *optional*): where noisy tokens are the places of
                anchors, as in [`TrunkInputs`].
            modulations (`Sequence[LayerModulations]`, *optional*): what [`~BlockGenModel.constant_modulations`]
                returned.

        Returns:
            [`BaseModelOutputWithPast`], `last_hidden_state` `[B, num_kept, hidden_size]`.
        """
        if noisy_input_ids is None or position_ids is None or noisy_position_ids is None:
            raise ValueError(
                "`BlockGenModel` needs `noisy_input_ids` and both positions: its hidden states are those of noisy "
                "tokens. Call `BlockGenForDiffusionLM`, which makes them (trainers that call the base model train it "
                "wrongly; with TRL take `BlockGenSFTTrainer` and `BlockGenGRPOTrainer` of blockgen-hf)."
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        self._check_checkpointing(cache)
        num_clean = input_ids.shape[1]
        if num_committed is None or not use_cache:
            num_committed = num_clean if use_cache else 0
        read_cache = cache if self._reads(cache, num_committed) else None
        if is_aligned:
            is_causal = False
            mask = self._training_mask(
                noisy_position_ids,
                block_size,
                attention_mask,
                document_ids,
                cache_window,
                has_anchors=anchor_rows is not None,
                clean_is_cached=num_clean == 0,
            )
        else:
            layout = build_layout(
                position_ids,
                noisy_position_ids,
                block_size,
                self._clean_block_size,
                self._cached_positions(read_cache, num_committed, position_ids, attention_mask, cache_start),
                num_committed=num_committed,
                clean_valid=None if attention_mask is None else last_columns(attention_mask, num_clean).bool(),
                noisy_valid=None if noisy_mask is None else noisy_mask.bool(),
                noisy_block_ids=noisy_block_ids,
                isolate_first=isolate_first,
                document_ids=document_ids,
                window=cache_window,
                has_anchors=anchor_rows is not None,
                is_noise_causal=self.config.noisy_attention == "causal",
            )
            # Padding, documents, tokens outside of a window and free slots of static caches have to be masked.
            static = read_cache is not None and read_cache.is_compileable
            num_clean_keys = layout.key_position.shape[-1] - noisy_input_ids.shape[1]
            has_all = attention_mask is None and document_ids is None and not static
            has_all = has_all and (cache_window is None or num_clean_keys <= cache_window)
            mask, is_causal = self._render(layout, is_causal and has_all, is_full and has_all)

        hidden_states = self._embed(torch.cat([input_ids, noisy_input_ids], dim=1))
        position_embeddings = self.rotary_emb(hidden_states, concat(position_ids, noisy_position_ids))
        condition = None
        if modulations is None:
            condition = self._condition(noise_level, num_clean, hidden_states)
        num_kept = noisy_input_ids.shape[1] if num_kept is None else num_kept
        num_queries = None
        for index, layer in enumerate(self.layers):
            if index == len(self.layers) - 1 and not self._records(**kwargs):
                mask, is_causal, num_queries = of_last_tokens(mask, is_causal, hidden_states.shape[1], num_kept)
            hidden_states = layer(
                hidden_states,
                condition,  # by position: reentrant checkpointing tracks no gradients of keywords
                None if modulations is None else modulations[index],
                position_embeddings=position_embeddings,
                attention_mask=mask,
                is_causal=is_causal,
                num_queries=num_queries,
                cache=read_cache,
                num_committed=num_committed,
                num_unadapted=num_clean if self.config.adapter_rows == "noisy" else None,
                **kwargs,
            )
        hidden_states = hidden_states[:, hidden_states.shape[1] - num_kept :]
        # That of the clean tokens was computed too: quantised layers do not take a tensor without tokens.
        last = self._last_modulation(condition) if modulations is None else modulations[-1][0]
        hidden_states = self.norm(hidden_states, *last.of_last(num_kept).norm)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **named_cache(cache))

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.noise_embedding is None:
            return self.embed_tokens(input_ids)
        is_mask = torch.eq(input_ids, self.config.vocab_size)
        embeddings = self.embed_tokens(input_ids.masked_fill(is_mask, 0))
        noise = self.noise_embedding(torch.zeros_like(input_ids[:1, :1]))
        return torch.where(is_mask[..., None], noise.to(embeddings.dtype), embeddings)

    def _records(self, **kwargs: Any) -> bool:
        """Whether the caller wants to see what the layers return, of all tokens."""
        names = ("output_hidden_states", "output_attentions")
        return any(kwargs.get(name, getattr(self.config, name, False)) for name in names)

    def _last_modulation(self, condition: torch.Tensor | None) -> Modulation:
        """Of the norm behind the layers."""
        return (
            Modulation() if self.norm_modulation is None else Modulation(*self.norm_modulation(condition).chunk(2, -1))
        )

    def constant_modulations(self, device: torch.device) -> list[LayerModulations] | None:
        """
        What the adaptive layer norms make of the condition, for many forward passes: of each layer, and of the norm
        behind them. None if there are none, if they depend on the noise level, or if the weights are sharded (FSDP):
        these are whole in the forward pass of their layer only.
        """
        if self.time_embedding is None or self.norm_modulation is None or self.config.time_conditioning:
            return None
        modulations = [*(layer.get_submodule("modulation") for layer in self.layers), self.norm_modulation]
        parts = [self.embed_tokens, self.time_embedding, *modulations]
        if any(hasattr(parameter, "device_mesh") for part in parts for parameter in part.parameters()):
            return None
        # Of the type that a forward pass has, whatever that of the norms (they may be kept in float32).
        hidden_states = self.embed_tokens(torch.zeros(1, 1, dtype=torch.long, device=device))
        condition = self._condition(None, 0, hidden_states)
        layers = [cast(BlockGenDecoderLayer, layer).constant_modulations(condition) for layer in self.layers]
        return [*layers, (self._last_modulation(condition).folded(self.norm),)]

    def _condition(
        self, noise_level: torch.Tensor | None, num_clean: int, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """silu(time embedding): `[1, 1, cond_dim]`, or `[B, C + N, cond_dim]` with zero for the clean half."""
        if self.time_embedding is None:
            return None
        # As the hidden states are, not the weights: these may be on a disk or quantised to integers.
        sigma = torch.zeros(1, 1, device=hidden_states.device)
        if self.config.time_conditioning:
            if noise_level is None:
                raise ValueError(
                    "`noise_level` must be given to a model with `time_conditioning=True`: the time t of the noisy "
                    "tokens, a number, or a tensor of shape [B] or [B, N]."
                )
            noise_level = torch.as_tensor(noise_level, dtype=torch.float64, device=sigma.device)
            noise_level = noise_level[:, None] if noise_level.ndim == 1 else noise_level
            num_rows, length, _ = hidden_states.shape
            alpha = self.schedule.alpha(noise_level).clamp(min=1e-12).expand(num_rows, length - num_clean)
            sigma = torch.cat([sigma.expand(num_rows, num_clean), -alpha.log().float()], dim=1)
        return nn.functional.silu(self.time_embedding(sigma, hidden_states.dtype))

    def _check_checkpointing(self, cache: Cache | None) -> None:
        if cache is not None and self.gradient_checkpointing and self.training:
            raise ValueError(
                "`cache` cannot be read under gradient checkpointing in training mode: the layers would "
                "silently run without it. Call `model.eval()`, or pass `use_cache=False`."
            )

    @staticmethod
    def _reads(cache: Cache | None, num_committed: int) -> bool:
        """Whether the layers touch the cache. Quantised caches cannot be read before something is in them."""
        if cache is None:
            return False
        return num_committed > 0 or cache.is_compileable or cache.get_seq_length() > 0

    @staticmethod
    def _cached_positions(
        cache: Cache | None,
        num_committed: int,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache_start: torch.Tensor | None,
    ) -> torch.Tensor:
        """Positions of the tokens in the slots that the cache will return, `[B or 1, slots]`."""
        if cache is None:
            return position_ids.new_empty(1, 0)
        past = cache.get_seq_length()  # a tensor for static caches, whose value is not needed
        length = past + num_committed
        slots = cache.get_max_length() if cache.is_compileable else length
        index = torch.arange(slots, device=position_ids.device)[None]
        positions = index
        if attention_mask is not None:
            valid = nn.functional.pad(attention_mask, (0, slots - attention_mask.shape[1])).bool()
            positions = torch.where(valid, valid.long().cumsum(-1) - 1, unreachable(valid.long()))
        if cache_start is not None:
            positions = positions + cache_start
        if num_committed:  # they may have been given
            inside = (index - past).clamp(0, num_committed - 1)
            given = position_ids.gather(-1, inside.expand(position_ids.shape[0], -1))
            positions = torch.where((index >= past) & (positions < length), given, positions)
        return torch.where(index < length, positions, unreachable(index))

    @property
    def _clean_block_size(self) -> int:
        return 1 if self.config.clean_attention == "causal" else self.config.block_sizes[0]

    def _training_mask(
        self,
        position_ids: torch.Tensor,
        block_size: BlockSize,
        attention_mask: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        cache_window: int | None,
        has_anchors: bool,
        clean_is_cached: bool,
    ) -> Any:
        self._check_attention(needs_mask=True)
        return make_training_mask(
            position_ids,
            block_size,
            self._clean_block_size,
            self.config._attn_implementation,
            self.dtype,
            valid=None if attention_mask is None else attention_mask.bool(),
            document_ids=document_ids,
            window=cache_window,
            has_anchors=has_anchors,
            is_noise_causal=self.config.noisy_attention == "causal",
            clean_is_cached=clean_is_cached,
        )

    def _check_attention(self, needs_mask: bool) -> None:
        """Refuses what the attention implementation cannot compute, or not on this device."""
        implementation = self.config._attn_implementation
        if implementation == "flex_attention" and self.device.type == "cpu":
            raise ValueError(
                "`attn_implementation='flex_attention'` needs kernels that CPUs do not have: use 'sdpa' or 'eager'."
            )
        if needs_mask and is_flash_attention_requested(self.config):
            raise ValueError(
                f"`attn_implementation={implementation!r}` serves forward passes that need no mask: autoregressive "
                "decoding and block-diffusion denoising of unpadded prompts with a dynamic cache. Training, "
                "verification (ARPC), padding, sliding windows and static caches need one: use "
                "`attn_implementation='sdpa'` or 'flex_attention'."
            )

    def _render(self, layout: AttentionLayout, is_causal: bool, is_full: bool) -> tuple[Any, bool]:
        """The mask for the attention implementation, or None with `is_causal` where the kernel needs none."""
        implementation = self.config._attn_implementation
        self._check_attention(needs_mask=not (is_causal or is_full))
        if is_full:
            return None, False
        # SDPA aligns its causal mask with the first key, so that it fits only where nothing is cached.
        starts_at_zero = layout.key_position.shape[-1] == layout.clean_limit.shape[-1]
        if is_causal and (is_flash_attention_requested(self.config) or (implementation == "sdpa" and starts_at_zero)):
            return None, True
        return make_attention_mask(layout, implementation, self.dtype), False


def of_last_tokens(mask: Any, is_causal: bool, length: int, num_kept: int) -> tuple[Any, bool, int | None]:
    """
    The attention of a layer of whose tokens only the last `num_kept` are wanted.

    Args:
        mask: that of all `length` queries, as the attention implementation takes it, or None.
        is_causal (`bool`): whether the kernel makes the mask itself.

    Returns:
        mask, whether the kernel makes it, and the number of queries. None: all, where a mask cannot be cut.
    """
    kept = max(num_kept, 1)  # kernels take no empty tensors
    first = length - kept
    if first <= 0:
        return mask, is_causal, None
    if isinstance(mask, torch.Tensor):
        return mask[..., first:, :], is_causal, kept
    if isinstance(mask, tuple):
        chunks = [chunk for chunk in mask if chunk.queries.stop > first]
        if chunks[0].queries.start == first:
            return tuple(chunk.moved(-first) for chunk in chunks), is_causal, kept
    if mask is None and (kept == 1 or not is_causal):  # the last token sees all
        return None, False, kept
    return mask, is_causal, None


__all__ = ["BlockGenModel", "BlockGenPreTrainedModel"]
