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
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging

from .generation_blockgen import BlockGenGenerationMixin
from .generation_configuration_blockgen import BlockGenGenerationConfig
from .anchors_blockgen import anchored_pass, canvas_states
from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import diffusion_from_config
from .evaluation_draws_blockgen import evaluation_draws
from .inputs_blockgen import (
    ForwardInputs,
    TrunkInputs,
    causal_pass,
    check_window,
    checked_block_size,
    denoising_pass,
    kept_logits,
    next_token_pass,
    whole_text_pass,
)
from .masking_blockgen import BlockSize
from .objective_blockgen import (
    TrainingDraw,
    autoregressive_draw,
    check_clean_cache,
    check_training_arguments,
    chunked_mixture_loss,
    draw_training_noise,
    mixture_loss,
    next_token_draw,
    refuse_count_without_labels,
    shift_right,
    weight_of_block_size_1,
)
from .releases_blockgen import CACHE_NAME, BothCacheNames, given_cache, named_cache
from .sampling_blockgen import CounterGenerator
from .trunk_blockgen import BlockGenModel, BlockGenPreTrainedModel


logger = logging.get_logger(__name__)


@auto_docstring
@dataclass
class BlockGenOutput(BothCacheNames, CausalLMOutputWithPast):
    """
    Output of [`BlockGenForDiffusionLM`].

    Args:
        loss (`torch.FloatTensor` of shape `[]`, *optional*, returned when `labels` is given):
            The mixture bound (Eq. 7), in nats a scored token: one draw of it in training mode, in evaluation mode its
            mean over fixed draws of all block sizes.
        logits (`torch.FloatTensor` of shape `[B, N, V]`):
            Raw scores of the clean token at every noisy position; with `ar_prediction="clean"` of the token behind
            it. None where the loss was computed without them. With a loss of several draws, those of the first: the
            smallest block size of the mixture.
        cache (`Cache`, *optional*, `past_key_values` too):
            The cache, with the clean tokens of the call if `use_cache=True`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            Input of the first layer and output of every layer, each `[B, C + N, hidden_size]`, clean tokens first
            (none with `labels` if one block is the whole text).
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            Attention weights of every layer, each `[B, heads, C + N, keys]`.
        token_losses (`torch.FloatTensor` of shape `[B, L]`, *optional*, returned when `labels` is given):
            The loss of every token, in nats; zero where it is not scored. Without gradients.
        ar_token_losses (`torch.FloatTensor` of shape `[B, L]`, *optional*):
            In training mode with `ar_prediction="clean"`: the losses by block size 1, which the same pass gives;
            `token_losses` are those by the larger block size.
    """

    token_losses: torch.Tensor | None = None
    ar_token_losses: torch.Tensor | None = None


@auto_docstring
class BlockGenForDiffusionLM(BlockGenPreTrainedModel, BlockGenGenerationMixin):
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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.diffusion = diffusion_from_config(config)
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """
        As [`PreTrainedModel.resize_token_embeddings`]; the diffusion works on the new vocabulary.

        Raises:
            ValueError: the mask token would be cut off.
        """
        # CODEPATH: BlockGen checkpoints have a mask token in the vocabulary, adapted ones behind it.
        mask_token_id = self.config.mask_token_id if self.config.has_mask_row else None
        if new_num_tokens is not None and mask_token_id is not None and new_num_tokens <= mask_token_id:
            raise ValueError(
                f"`new_num_tokens` must be at least {mask_token_id + 1}, as the mask token is {mask_token_id}, "
                f"but is {new_num_tokens}."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        # CODEPATH: the mask token of adapted checkpoints is the id behind the vocabulary.
        if self.config.mask_token_id is not None and mask_token_id is None:
            self.config.mask_token_id = self.config.vocab_size
        self.diffusion = diffusion_from_config(self.config)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The output layer starts at zero, as in the paper's backbone."""
        if module is self.lm_head and not self.config.tie_word_embeddings:
            init.zeros_(module.weight)
            if module.bias is not None:
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
        noisy_block_ids: torch.Tensor | None = None,
        isolate_first: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_committed: int | None = None,
        cache_window: int | None = None,
        cache_start: torch.Tensor | None = None,
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
                behind the cache if there are no `input_ids` (generation). With `ar_prediction="clean"` the noisy
                tokens are canvases: see [`anchored_pass`].
            noisy_block_ids (`torch.LongTensor` of shape `[B or 1, N]`, *optional*):
                The blocks of the noisy tokens, in place of `block_size`: those of one id, from 0 on, are a block that
                starts at the smallest of their positions. Blocks may overlap, so that one pass can ask for several
                continuations. With `noisy_position_ids`.
            isolate_first (`bool`, defaults to `False`):
                With `noisy_block_ids`: the first token of each block sees no other token of it, as with block size 1,
                and is seen by them. One pass then predicts the next token autoregressively and drafts those behind it.
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
            num_committed (`int`, *optional*):
                With noisy tokens and `use_cache=True`: how many of the clean tokens to commit, from the first on; the
                others, a draft for instance, are only read. Default: all.
            cache_window (`int`, *optional*):
                A sliding window of W clean tokens: a clean token sees the last W up to itself (with block-causal
                attention up to the end of its block), a noisy token the last W before its block, and its block.
                Older ones may leave the cache. Default: all clean tokens are seen.
            cache_start (`torch.LongTensor` of shape `[B or 1, 1]`, *optional*):
                With a window: position of the first token in the cache, that is, how many tokens have left it. The
                positions of the others go on from there. Default: 0.
            labels (`torch.LongTensor` of shape `[B, C]`, *optional*):
                The clean tokens to learn (not shifted). Where they are -100 the noisy half is clean and costs nothing.
                In training mode the loss is one draw of the mixture bound. In evaluation mode it is the bound, by two
                fixed draws of each block size, unless noise or objective are given: reproducible, at the cost of
                1 + 2 (S - 1) passes of a masked model with S block sizes. With noise, an empty `cache` may be given in
                evaluation mode: further calls with it and the same tokens compute the noisy half alone.
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
            parameterisation. With `ar_prediction="clean"` and with `next_token_prediction` always `logits[:, i]`
            predict the token at position i + 1, and no label scores the first token of a text.

        Raises:
            ValueError: arguments that contradict one another, or attention that the implementation cannot compute.
        """
        cache = given_cache(cache, past_key_values)
        check_window(self.config, cache_window)
        # CODEPATH: the paper's AR baseline has neither noise nor blocks.
        if self.config.next_token_prediction:
            _refuse_noise(noisy_input_ids=noisy_input_ids, query_input_ids=query_input_ids, objective=objective)
            _refuse_noise(block_size=None if block_size == 1 else block_size, noise_level=noise_level)
        if labels is not None:
            columns = dict(noisy_input_ids=noisy_input_ids, attention_mask=attention_mask, document_ids=document_ids)
            is_new = self.training or noisy_input_ids is None or self.config.predicts_from_clean
            refused = cache if is_new else None
            check_training_arguments(input_ids, labels, columns, cache=refused, use_cache=use_cache, **kwargs)
            check_clean_cache(cache, labels.shape[1], columns | {"position_ids": position_ids})
        else:
            refuse_count_without_labels(num_items_in_batch)
            if input_ids is None and noisy_input_ids is None:
                raise ValueError("`forward` needs `input_ids`, `noisy_input_ids`, or both.")
        clean_input_ids = input_ids if input_ids is not None else cast(torch.Tensor, noisy_input_ids)[:, :0]
        inputs = ForwardInputs(
            clean_input_ids,
            noisy_input_ids,
            position_ids=position_ids,
            noisy_position_ids=noisy_position_ids,
            attention_mask=attention_mask,
            document_ids=document_ids,
            cache=cache,
            use_cache=bool(use_cache),
            num_committed=num_committed,
            noise_level=noise_level,
            noisy_block_ids=noisy_block_ids,
            cache_window=cache_window,
            cache_start=cache_start,
            isolate_first=isolate_first,
        )
        if labels is None and noisy_input_ids is None:
            inputs = replace(inputs, use_cache=self._causal_use_cache(use_cache))
            return self._causal_forward(inputs, query_input_ids, logits_to_keep, **kwargs)
        num_rows = clean_input_ids.shape[0]  # not by `len`, which an exported graph takes for a constant
        if labels is not None:
            size = None if block_size is None else checked_block_size(self.config, block_size, num_rows)
            draws = self._training_draws(inputs, labels, size, objective)
            return self._training_forward(inputs, draws, num_items_in_batch, skip_logits, **kwargs)
        inputs = replace(inputs, block_size=checked_block_size(self.config, block_size, num_rows))
        denoising = self._denoising_pass(inputs)
        outputs = self.model(**vars(denoising), **kwargs)
        is_mask = isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool
        hidden_states = canvas_states(denoising, outputs.last_hidden_state)
        hidden_states = hidden_states[logits_to_keep if is_mask else (slice(None), kept_logits(logits_to_keep))]
        return _with_logits(outputs, self.lm_head(hidden_states))

    def _causal_forward(
        self,
        inputs: ForwardInputs,
        query_input_ids: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> BlockGenOutput:
        # CODEPATH: adapted models and the paper's AR baseline predict the next token from the clean ones themselves.
        if self.config.predicts_from_clean:
            _refuse_queries(query_input_ids)
            outputs = self.model(**vars(next_token_pass(inputs)), **kwargs)
            return _with_logits(outputs, self.lm_head(outputs.last_hidden_state[:, kept_logits(logits_to_keep)]))
        if inputs.document_ids is not None:
            raise ValueError("`document_ids` serve training and the denoiser, not the causal language model.")
        queries = causal_pass(self.config, inputs, query_input_ids, logits_to_keep, self.fixed_queries)
        outputs = self.model(**vars(queries), **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        # CODEPATH: masked checkpoints have a mask token, which is no text; uniform ones have none.
        if self.config.has_mask_row:
            # Samplers and log-likelihoods outside of this package do not know it.
            logits[..., self.config.mask_token_id] = torch.finfo(logits.dtype).min
        return _with_logits(outputs, logits)

    def _denoising_pass(self, inputs: ForwardInputs) -> TrunkInputs:
        # CODEPATH: blocks of adapted models begin with the clean token before them.
        if self.config.is_anchored:
            return anchored_pass(self.config, inputs)
        return denoising_pass(self.config, inputs)

    def _causal_use_cache(self, use_cache: bool | None) -> bool:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing_active and use_cache:
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
            )
            return False
        return use_cache

    # training

    def _training_draws(
        self, inputs: ForwardInputs, labels: torch.Tensor, block_size: BlockSize | None, objective: str | None
    ) -> list[TrainingDraw]:
        """
        What is denoised and scored: in training mode one draw of block size, noise level and noise, in evaluation mode
        [`evaluation_draws`]. What is given is not drawn.
        """
        scored = labels != -100
        targets = torch.where(scored, labels, inputs.input_ids)
        is_given = not (inputs.noise_level is None and inputs.noisy_input_ids is None and objective is None)
        # CODEPATH: the paper's AR baseline draws nothing, and has no clean half besides.
        if self.config.next_token_prediction:
            positions = next_token_pass(replace(inputs, input_ids=targets)).position_ids
            return [next_token_draw(targets, scored, positions)]
        # CODEPATH: adapted models do not predict the first token of a text either.
        if self.config.is_anchored:
            scored = scored & (next_token_pass(replace(inputs, input_ids=targets)).position_ids > 0)
        if not self.training and not is_given and (block_size is None or isinstance(block_size, int)):
            inputs = replace(inputs, input_ids=targets)
            return list(evaluation_draws(self.diffusion, self.config, inputs, scored, block_size))
        draw = draw_training_noise(
            self.diffusion,
            self.config,
            targets,
            scored,
            block_size=block_size,
            noise_level=inputs.noise_level,
            noisy_input_ids=inputs.noisy_input_ids,
            objective=objective,
        )
        return [draw]

    def _training_forward(
        self,
        inputs: ForwardInputs,
        draws: list[TrainingDraw],
        num_items_in_batch: torch.Tensor | int | None,
        skip_logits: bool | None,
        **kwargs: Any,
    ) -> BlockGenOutput:
        """The mixture bound (Eq. 7): a pass for each draw."""
        if skip_logits and not self._has_plain_head:
            raise ValueError(
                "`skip_logits=True` needs the output layer as a plain linear layer whose weights are at hand, but it "
                f"is a {type(self.lm_head).__name__}, wrapped or sharded."
            )
        if skip_logits is None:
            skip_logits = self.training and self._has_plain_head
        first, *others = draws
        is_placed = inputs.position_ids is not None or inputs.document_ids is not None
        # CODEPATH: the clean tokens of adapted models and of the paper's AR baseline predict: no draw shares them.
        if others and not (torch.is_grad_enabled() or is_placed or self.config.predicts_from_clean):
            inputs = replace(inputs, cache=DynamicCache(config=self.config))  # of the clean half, for all draws
        # CODEPATH: the clean half of adapted models scores block size 1.
        score = self._score_both if self.config.is_anchored and self.training else self._score
        outputs, total, losses = score(first, inputs, skip_logits, **kwargs)
        for draw in others:  # the logits are those of the first
            _, more, more_losses = self._score(draw, inputs, self._has_plain_head, **kwargs)
            total, losses = total + more, losses + more_losses
        count = first.scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        outputs.loss, outputs.token_losses = total / count, losses
        return outputs

    def _score(
        self, draw: TrainingDraw, inputs: ForwardInputs, skip_logits: bool, **kwargs: Any
    ) -> tuple[BlockGenOutput, torch.Tensor, torch.Tensor]:
        """One pass: its output, the sum of the losses of the scored tokens, and the loss of each."""
        training_pass = self._training_pass(draw, inputs)
        outputs = self.model(**vars(training_pass), **kwargs)
        states = canvas_states(training_pass, outputs.last_hidden_state)
        total, losses, logits = self._losses(draw, states, skip_logits)
        return replace(_with_logits(outputs, logits), **named_cache(None)), total, losses

    def _score_both(
        self, draw: TrainingDraw, inputs: ForwardInputs, skip_logits: bool, **kwargs: Any
    ) -> tuple[BlockGenOutput, torch.Tensor, torch.Tensor]:
        """
        As [`~BlockGenForDiffusionLM._score`], for a model whose clean tokens predict: block size 1 is scored by the
        clean half of the same pass, by its weight in the mixture. Where nothing that it depends on is trained, as with
        an adapter of the noisy tokens, it is left out.
        """
        training_pass = self._training_pass(draw, inputs)
        outputs = self.model(**vars(training_pass), **kwargs)
        states = outputs.last_hidden_state
        total, losses, logits = self._losses(draw, canvas_states(training_pass, states), skip_logits)
        weight = weight_of_block_size_1(self.config)
        if draw.block_size == 1 or weight == 0 or self._is_clean_half_frozen:
            return _with_logits(outputs, logits), total, losses
        ar_draw = autoregressive_draw(self.diffusion, draw)
        ar_total, ar_losses, _ = self._losses(ar_draw, states[:, : draw.input_ids.shape[1]], skip_logits)
        outputs = _with_logits(outputs, logits)
        outputs.ar_token_losses = ar_losses
        return outputs, weight * ar_total + (1 - weight) * total, losses

    def _losses(
        self, draw: TrainingDraw, states: torch.Tensor, skip_logits: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """From the hidden states that score the tokens: the sum of their losses, each of them, and the logits."""
        shift = self.config.predicts_from_clean
        if skip_logits:
            states = shift_right(states) if shift else states
            total, losses = chunked_mixture_loss(self.diffusion, draw, states, self.lm_head.weight, self.lm_head.bias)
            return total, losses, None
        logits = self.lm_head(states)
        total, losses = mixture_loss(self.diffusion, draw, shift_right(logits) if shift else logits)
        return total, losses, logits

    @property
    def _is_clean_half_frozen(self) -> bool:
        """Whether all that is trained acts on noisy tokens alone: an adapter, and the embedding of the noise."""
        # CODEPATH: adapters of adapted models act on noisy tokens, those of BlockGen checkpoints on all.
        if self.config.adapter_rows != "noisy":
            return False
        return all(
            "lora_" in name or "noise_embedding" in name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        )

    def _training_pass(self, draw: TrainingDraw, inputs: ForwardInputs) -> TrunkInputs:
        cache = inputs.cache  # of the clean half
        inputs = replace(
            inputs,
            cache=None,
            input_ids=draw.input_ids,
            noisy_input_ids=draw.noisy_input_ids,
            noisy_position_ids=None,
            block_size=draw.block_size,
            noise_level=draw.noise_level,
        )
        # CODEPATH: the paper's AR baseline has clean tokens only; so has block size 1 of adapted models.
        if self.config.next_token_prediction or (self.config.is_anchored and draw.block_size == 1):
            return next_token_pass(inputs)
        # CODEPATH: blocks of adapted models begin with the clean token before them.
        if self.config.is_anchored:
            return anchored_pass(self.config, inputs)
        is_one_block = isinstance(draw.block_size, int) and draw.block_size >= draw.input_ids.shape[1]
        if is_one_block and inputs.position_ids is None and inputs.document_ids is None:
            return whole_text_pass(inputs)
        whole = denoising_pass(self.config, inputs)
        if cache is None:
            return whole
        if cache.get_seq_length() == 0:  # the first draw commits the clean half, later ones read it
            return replace(whole, cache=cache, use_cache=True)
        return replace(whole, input_ids=whole.input_ids[:, :0], position_ids=whole.position_ids[:, :0], cache=cache)

    @property
    def _has_plain_head(self) -> bool:
        """
        Not with an adapter, quantised, sharded by tensor parallelism, or gathered, or fetched by a hook of accelerate,
        for its own forward only.
        """
        weight = self.lm_head.weight
        plain = type(self.lm_head) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor)
        plain = plain and "forward" not in vars(self.lm_head)
        return plain and len(weight) == self.config.vocab_size

    def fixed_queries(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Fully noised tokens that depend on their position only: mask tokens, or for uniform noise a fixed draw."""
        generator = CounterGenerator.from_seed(0, position_ids.device).fold_in(position_ids)
        return self.diffusion.prior(position_ids.shape, position_ids.device, generator)

    @property
    def gradient_checkpointing_active(self) -> bool:
        return self.training and self.model.gradient_checkpointing


def _with_logits(outputs: BaseModelOutputWithPast, logits: torch.Tensor | None) -> BlockGenOutput:
    return BlockGenOutput(
        logits=logits,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        **named_cache(getattr(outputs, CACHE_NAME)),
    )


def _refuse_queries(query_input_ids: torch.Tensor | None) -> None:
    if query_input_ids is not None:
        raise ValueError(
            "`query_input_ids` have no meaning with `ar_prediction='clean'`: clean tokens predict. Leave them out."
        )


def _refuse_noise(**arguments: Any) -> None:
    """Raises a `ValueError` for an argument that means noise."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` has no meaning for a model with `next_token_prediction=True`, which knows neither noise "
                "nor blocks: leave it out."
            )


__all__ = ["BlockGenForDiffusionLM", "BlockGenOutput"]
