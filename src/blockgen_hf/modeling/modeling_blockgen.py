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
"""BlockGen model: one denoiser that is an autoregressive, a block-diffusion and a full-sequence diffusion model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging

from .block_size_blockgen import check_leak, checked_block_size
from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import diffusion_from_config
from .generation_blockgen import BlockGenGenerationMixin
from .generation_configuration_blockgen import BlockGenGenerationConfig
from .masking_blockgen import BlockSize
from .next_token_blockgen import (
    next_token_positions,
    next_token_states,
    refuse_noise,
)
from .objective_blockgen import refuse_count_without_labels
from .outputs_blockgen import BlockGenOutput, with_logits
from .positions_blockgen import (
    clean_positions,
    document_positions,
    following_position,
    last_columns,
    restarting_documents,
)
from .releases_blockgen import given_cache
from .sampling_blockgen import CounterGenerator
from .training_forward_blockgen import BlockGenTrainingMixin
from .trunk_blockgen import BlockGenModel, BlockGenPreTrainedModel


logger = logging.get_logger(__name__)


@auto_docstring
class BlockGenForDiffusionLM(BlockGenPreTrainedModel, BlockGenTrainingMixin, BlockGenGenerationMixin):
    """
    The BlockGen language model. What is passed to `forward` decides what it is: with `input_ids` alone a causal
    language model, with `noisy_input_ids` the denoiser, with `labels` the training loss.
    """

    generation_config_class = BlockGenGenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # The loss divides by the number of scored tokens that the Trainer counts over all micro-batches.
    accepts_loss_kwargs = True

    def __init__(self, config: BlockGenConfig) -> None:
        super().__init__(config)
        self.model = BlockGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.diffusion = diffusion_from_config(config)
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """
        As [`PreTrainedModel.resize_token_embeddings`]; the diffusion works on the new vocabulary.

        Raises:
            ValueError: the mask token would be cut off.
        """
        mask_token_id = self.config.mask_token_id
        if new_num_tokens is not None and mask_token_id is not None and new_num_tokens <= mask_token_id:
            raise ValueError(
                f"`new_num_tokens` must be at least {mask_token_id + 1}, as the mask token is {mask_token_id}, "
                f"but is {new_num_tokens}."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.diffusion = diffusion_from_config(self.config)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The output layer starts at zero, as in the paper's backbone."""
        if module is self.lm_head and not self.config.tie_word_embeddings:
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        noisy_input_ids: torch.Tensor | None = None,
        *,
        block_size: int | Sequence[int] | None = None,
        noisy_position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        noise_level: torch.Tensor | float | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        query_input_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        objective: str | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BlockGenOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `[B, C]`, *optional*):
                Clean tokens that are not in the cache yet. May be empty or None when noisy tokens are given.
            noisy_input_ids (`torch.LongTensor` of shape `[B, N]`, *optional*):
                Noisy tokens z_t: the denoiser's input. Each sees the clean tokens before its block, and its block.
            block_size (`int` or `list[int]`, *optional*):
                Block size L' of the noisy tokens, or one for each row; blocks are counted from the first noisy token.
                Default: the largest that the model was trained for. With `labels` it is drawn from the mixture, or in
                evaluation mode all of the mixture are used.
            noisy_position_ids (`torch.LongTensor` of shape `[B or 1, N]`, *optional*):
                Default: the positions of `input_ids` if there are as many (training, verification), the positions
                behind the cache if there are no `input_ids` (generation).
            attention_mask (`torch.Tensor` of shape `[B, past + C]`, *optional*):
                Zero for padding among cached and clean tokens. It gives the default positions.
            position_ids (`torch.LongTensor` of shape `[B or 1, C]`, *optional*):
                Positions of `input_ids`. Where they start again, without a cache, another document begins, which sees
                nothing of those before it.
            cache (`Cache`, *optional*):
                Keys and values of earlier clean tokens, any class of transformers. Always read.
            past_key_values (`Cache`, *optional*):
                The name of `cache` before transformers 5.24. Pass one of the two.
            use_cache (`bool`, *optional*):
                Whether to commit the clean tokens of this call to the cache. Noisy tokens never are. Default: the
                configuration's for the causal language model, False for the denoiser and for training.
            labels (`torch.LongTensor` of shape `[B, C]`, *optional*):
                The clean tokens to learn (not shifted). Where they are -100 the noisy half is clean and costs nothing.
                In training mode the loss is one draw of the mixture bound. In evaluation mode it is the bound, by two
                fixed draws of each block size, unless noise or objective are given: reproducible, at the cost of
                1 + 2 (S - 1) passes of a masked model with S block sizes.
            noise_level (`torch.Tensor` of shape `[]`, `[B]` or `[B, N]`, *optional*):
                Time t of the noisy tokens, in [0, 1]. Needed by a time-conditional denoiser; drawn with `labels`.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                As in every causal language model: how many of the last logits to compute (0: all), or which. For the
                denoiser also a mask of shape `[B, N]`: the logits of these M tokens alone, `[M, V]`, row by row.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                With `labels`: number of scored tokens in all micro-batches of an optimizer step. The loss is then the
                sum divided by it.
            query_input_ids (`torch.LongTensor` of shape `[B, Q]`, *optional*):
                Causal language model only: the fully noised tokens that stand at the last Q predicted positions.
                Default: mask tokens, or for uniform noise tokens that are a fixed function of their position, so that
                logits are reproducible.
            document_ids (`torch.LongTensor` of shape `[B, C]`, *optional*):
                Documents packed into a row: tokens see those of their own document only, and positions restart with
                it. For training, and for the denoiser with as many noisy tokens; without a cache.
            objective (`str`, *optional*):
                With `labels`: `"cross_entropy"` or `"elbo"` instead of the configuration's `training_objective`, for
                blocks larger than 1.
            skip_logits (`bool`, *optional*):
                With `labels`: compute the loss in chunks, and return no logits, so that they never stand in memory.
                Default: True in training mode, where the output layer is a plain linear layer.

        Returns:
            [`BlockGenOutput`]. With `input_ids` alone `logits[:, i]` predict the token at i + 1. With
            `noisy_input_ids` or `labels` `logits[:, l]` score the clean token at noisy position l, before the masked
            parameterisation. A model with `next_token_prediction` has one use: always `logits[:, i]` predict the
            token at i + 1, and no label scores the first token of a text.

        Raises:
            ValueError: arguments that contradict one another, or attention that the implementation cannot compute.
        """
        cache = given_cache(cache, past_key_values)
        # CODEPATH: the paper's AR baseline has neither noise nor blocks.
        if self.config.next_token_prediction:
            refuse_noise(noisy_input_ids=noisy_input_ids, query_input_ids=query_input_ids, objective=objective)
            refuse_noise(block_size=None if block_size == 1 else block_size, noise_level=noise_level)
        if labels is not None:
            return self._training_forward(
                input_ids, labels, noisy_input_ids, block_size, noise_level, attention_mask, position_ids,
                cache, use_cache, document_ids, num_items_in_batch, objective, skip_logits, **kwargs,
            )  # fmt: skip
        refuse_count_without_labels(num_items_in_batch)
        if noisy_input_ids is None:
            if input_ids is None:
                raise ValueError("`forward` needs `input_ids`, `noisy_input_ids`, or both.")
            if document_ids is not None and not self.config.next_token_prediction:
                raise ValueError("`document_ids` serve training and the denoiser, not the causal language model.")
            use_cache = self._causal_use_cache(use_cache)
            # CODEPATH: the paper's AR baseline predicts the next token from the clean ones themselves.
            if self.config.next_token_prediction:
                return self._next_token_forward(
                    input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep, document_ids,
                    **kwargs,
                )  # fmt: skip
            return self._causal_forward(
                input_ids, query_input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep,
                **kwargs,
            )  # fmt: skip
        if input_ids is None:
            input_ids = noisy_input_ids[:, :0]
        block_size = checked_block_size(self.config, block_size, noisy_input_ids.shape[0])
        outputs = self._denoise(
            input_ids, noisy_input_ids, block_size, noisy_position_ids, attention_mask, position_ids, cache,
            bool(use_cache), noise_level, document_ids, **kwargs,
        )  # fmt: skip
        is_mask = isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool
        hidden_states = outputs.last_hidden_state
        hidden_states = hidden_states[logits_to_keep if is_mask else (slice(None), _kept(logits_to_keep))]
        return with_logits(outputs, self.lm_head(hidden_states))

    def _causal_forward(
        self,
        input_ids: torch.Tensor,
        query_input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> BlockGenOutput:
        """A fully noised query at the position behind every kept token: block size 1."""
        check_leak(self.config, 1)
        documents = restarting_documents(position_ids, attention_mask, input_ids.shape[0], cache is not None)
        position_ids = clean_positions(input_ids, attention_mask, position_ids, cache)
        kept = _kept(logits_to_keep) if query_input_ids is None else slice(-query_input_ids.shape[1], None)
        if query_input_ids is None and input_ids.shape[1] == 0:  # nothing precedes the one logit of an empty text
            query_positions = following_position(input_ids, attention_mask, position_ids, cache)
            query_mask = None
            query_input_ids = self.fixed_queries(query_positions).expand(input_ids.shape[0], -1)
        elif query_input_ids is None:
            query_positions = (position_ids + 1)[:, kept]
            query_mask = None
            if attention_mask is not None:
                query_mask = last_columns(attention_mask, input_ids.shape[1])[:, kept].bool()
                # Left padding predicts the first token.
                query_positions = torch.where(query_mask, query_positions, 0)
            query_input_ids = self.fixed_queries(query_positions).expand(input_ids.shape[0], -1)
        else:
            num_queries = query_input_ids.shape[1]
            following = following_position(input_ids, attention_mask, position_ids, cache)
            query_positions = following + torch.arange(1 - num_queries, 1, device=following.device)
            query_mask = None
        if documents is not None:
            documents = torch.cat([documents, documents[:, kept]], dim=1)
        is_last = isinstance(logits_to_keep, int) and query_positions.shape[1] == 1
        outputs = self.model(
            input_ids,
            query_input_ids,
            block_size=1,
            position_ids=position_ids,
            noisy_position_ids=query_positions,
            noisy_mask=query_mask,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            noise_level=1.0,
            document_ids=documents,
            is_causal=is_last,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        # CODEPATH: masked checkpoints have a mask token, which is no text; uniform ones have none.
        if self.config.diffusion_type == "masked":
            # Samplers and log-likelihoods outside of this package do not know it.
            logits[..., self.config.mask_token_id] = torch.finfo(logits.dtype).min
        return with_logits(outputs, logits)

    def _causal_use_cache(self, use_cache: bool | None) -> bool:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing_active and use_cache:
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
            )
            return False
        return use_cache

    def _next_token_forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int | torch.Tensor,
        document_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> BlockGenOutput:
        """As every causal language model: the last layer of a token predicts the next one."""
        position_ids, document_ids = next_token_positions(input_ids, attention_mask, position_ids, cache, document_ids)
        outputs = next_token_states(
            self.model, input_ids, position_ids, attention_mask, cache, use_cache, document_ids, **kwargs
        )
        hidden_states = outputs.last_hidden_state[:, _kept(logits_to_keep)]
        return with_logits(outputs, self.lm_head(hidden_states))

    def _denoise(
        self,
        input_ids: torch.Tensor,
        noisy_input_ids: torch.Tensor,
        block_size: BlockSize,
        noisy_position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        noise_level: torch.Tensor | float | None,
        document_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        num_clean, num_noisy = input_ids.shape[1], noisy_input_ids.shape[1]
        aligned = noisy_position_ids is None and num_noisy == num_clean > 0
        cached = cache is not None or use_cache
        ordered = aligned and position_ids is None and not cached
        if document_ids is not None:
            if not ordered or document_ids.shape != input_ids.shape:
                raise ValueError(
                    "`document_ids` must have the shape of `input_ids`, with as many `noisy_input_ids`, and without "
                    "`position_ids`, `noisy_position_ids` and a cache: positions restart with each document."
                )
            position_ids = document_positions(document_ids, attention_mask)
            document_ids = (position_ids == 0).cumsum(1)  # an id that comes back is another document
        else:
            document_ids = restarting_documents(position_ids, attention_mask, input_ids.shape[0], cache is not None)
            if document_ids is not None and not aligned and num_noisy:
                raise ValueError(
                    "`position_ids` start again within a row, as those of documents packed into it do: this needs as "
                    "many `noisy_input_ids` as `input_ids`, without `noisy_position_ids`."
                )
        position_ids = clean_positions(input_ids, attention_mask, position_ids, cache)
        noisy_mask, follows = None, False
        if aligned:
            noisy_position_ids = position_ids
            noisy_mask = None if attention_mask is None else last_columns(attention_mask, num_clean)
        elif noisy_position_ids is None:
            if num_clean > 0 and num_noisy > 0:
                raise ValueError(
                    f"`noisy_position_ids` must be given when the number of noisy tokens ({num_noisy}) is neither "
                    f"that of `input_ids` ({num_clean}) nor is `input_ids` empty."
                )
            follows = True
            start = following_position(input_ids, attention_mask, position_ids, cache)
            noisy_position_ids = start + torch.arange(num_noisy, device=noisy_input_ids.device)
        elif noisy_position_ids.shape[-1] != num_noisy:
            raise ValueError(
                f"`noisy_position_ids` must give a position for each of the {num_noisy} `noisy_input_ids`, but have "
                f"the shape {list(noisy_position_ids.shape)}."
            )
        if num_clean > 0 and num_noisy > 0:
            check_leak(self.config, block_size, None if aligned else noisy_position_ids)
        return self.model(
            input_ids,
            noisy_input_ids,
            block_size=block_size,
            position_ids=position_ids,
            noisy_position_ids=noisy_position_ids,
            noisy_mask=noisy_mask,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            noise_level=noise_level,
            is_causal=num_noisy == 0 and self.config.clean_attention == "causal",
            document_ids=document_ids,
            is_full=follows and num_clean == 0 and isinstance(block_size, int) and num_noisy <= block_size,
            is_aligned=ordered,
            **kwargs,
        )

    def fixed_queries(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Fully noised tokens that depend on their position only: mask tokens, or for uniform noise a fixed draw."""
        generator = CounterGenerator.from_seed(0, position_ids.device).fold_in(position_ids)
        return self.diffusion.prior(position_ids.shape, position_ids.device, generator)

    @property
    def gradient_checkpointing_active(self) -> bool:
        return self.training and self.model.gradient_checkpointing

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """
        As [`PreTrainedModel.save_pretrained`]; the folder carries the modeling code too, so that
        `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where this package is not installed.
        """
        module = f"{self.__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"
        self.config.auto_map = {
            "AutoConfig": f"configuration_blockgen.{type(self.config).__name__}",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
        }
        super().save_pretrained(save_directory, *args, **kwargs)


def _kept(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


BlockGenConfig.register_for_auto_class()
BlockGenForDiffusionLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["BlockGenForDiffusionLM"]
