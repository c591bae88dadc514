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
"""What `forward` does with `labels`: the mixture bound (BlockGen, Eq. 7), by one draw or by several fixed ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .block_size_blockgen import checked_block_size
from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import DiffusionProcess
from .evaluation_loss_blockgen import evaluation_draws
from .next_token_blockgen import next_token_draw, next_token_positions, next_token_states, shift_right
from .objective_blockgen import (
    TrainingDraw,
    check_training_arguments,
    chunked_mixture_loss,
    draw_training_noise,
    mixture_loss,
)
from .outputs_blockgen import BlockGenOutput, with_logits
from .positions_blockgen import clean_positions


class BlockGenTrainingMixin:
    """The loss of [`BlockGenForDiffusionLM`]."""

    if TYPE_CHECKING:  # of the model
        config: BlockGenConfig
        diffusion: DiffusionProcess
        lm_head: nn.Linear
        model: Any
        training: bool
        _denoise: Any

    def _denoise_whole(
        self,
        noisy_input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        noise_level: torch.Tensor,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The whole text as one block, which sees no clean token: so there are none (MDLM, Duo)."""
        position_ids = clean_positions(noisy_input_ids, attention_mask, None, None)
        return self.model(
            noisy_input_ids[:, :0],
            noisy_input_ids,
            block_size=noisy_input_ids.shape[1],
            position_ids=position_ids[:, :0],
            noisy_position_ids=position_ids,
            noisy_mask=attention_mask,
            noise_level=noise_level,
            is_full=attention_mask is None,
            **kwargs,
        )

    def _training_forward(
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        noisy_input_ids: torch.Tensor | None,
        block_size: int | Sequence[int] | None,
        noise_level: torch.Tensor | float | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        document_ids: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        objective: str | None,
        skip_logits: bool | None,
        **kwargs: Any,
    ) -> BlockGenOutput:
        """
        The mixture bound (Eq. 7): in training mode by one draw of block size, noise level and noise, in evaluation
        mode by [`evaluation_draws`]. What is given is not drawn.
        """
        columns = {"noisy_input_ids": noisy_input_ids, "attention_mask": attention_mask, "document_ids": document_ids}
        input_ids = check_training_arguments(input_ids, labels, columns, cache=cache, use_cache=use_cache, **kwargs)
        if skip_logits and not self._has_plain_head:
            raise ValueError(
                "`skip_logits=True` needs the output layer as a plain linear layer whose weights are at hand, but it "
                f"is a {type(self.lm_head).__name__}, wrapped or sharded."
            )
        scored = labels != -100
        targets = torch.where(scored, labels, input_ids)
        if block_size is not None:
            block_size = checked_block_size(self.config, block_size, len(input_ids))
        is_drawn = noise_level is None and noisy_input_ids is None and objective is None
        # CODEPATH: the paper's AR baseline draws nothing, and has no clean half besides.
        if self.config.next_token_prediction:
            position_ids, document_ids = next_token_positions(
                targets, attention_mask, position_ids, None, document_ids
            )
            draws = [next_token_draw(targets, scored, position_ids)]
        elif is_drawn and not self.training and (block_size is None or isinstance(block_size, int)):
            given = (block_size, attention_mask, position_ids, document_ids)
            draws = list(evaluation_draws(self.diffusion, self.config, targets, scored, *given))
        else:
            noise = (block_size, noise_level, noisy_input_ids, objective)
            draws = [draw_training_noise(self.diffusion, self.config, targets, scored, *noise)]
        if skip_logits is None:
            skip_logits = self.training and self._has_plain_head
        first, *others = draws
        outputs, total, losses = self._score(first, attention_mask, position_ids, document_ids, skip_logits, **kwargs)
        for draw in others:  # the logits are those of the first
            skip = self._has_plain_head
            _, more, more_losses = self._score(draw, attention_mask, position_ids, document_ids, skip, **kwargs)
            total, losses = total + more, losses + more_losses
        count = first.scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        outputs.loss, outputs.token_losses = total / count, losses
        return outputs

    def _score(
        self,
        draw: TrainingDraw,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        skip_logits: bool,
        **kwargs: Any,
    ) -> tuple[BlockGenOutput, torch.Tensor, torch.Tensor]:
        """One pass: its output, the sum of the losses of the scored tokens, and the loss of each."""
        targets, shift = draw.input_ids, self.config.next_token_prediction
        is_one_block = isinstance(draw.block_size, int) and draw.block_size >= targets.shape[1]
        if self.config.next_token_prediction:
            positions = cast(torch.Tensor, position_ids)
            outputs = next_token_states(
                self.model, targets, positions, attention_mask, document_ids=document_ids, **kwargs
            )
        elif is_one_block and position_ids is None and document_ids is None:
            outputs = self._denoise_whole(draw.noisy_input_ids, attention_mask, draw.noise_level, **kwargs)
        else:
            outputs = self._denoise(
                targets, draw.noisy_input_ids, draw.block_size, None, attention_mask, position_ids, None, False,
                draw.noise_level, document_ids, **kwargs,
            )  # fmt: skip
        states, logits = outputs.last_hidden_state, None
        if skip_logits:
            states = shift_right(states) if shift else states
            total, losses = chunked_mixture_loss(self.diffusion, draw, states, self.lm_head.weight, self.lm_head.bias)
        else:
            logits = self.lm_head(states)
            total, losses = mixture_loss(self.diffusion, draw, shift_right(logits) if shift else logits)
        return with_logits(outputs, logits), total, losses

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


__all__ = ["BlockGenTrainingMixin"]
