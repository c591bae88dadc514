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
"""What a BlockGen model returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import auto_docstring

from .releases_blockgen import CACHE_NAME, BothCacheNames, named_cache


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
            Raw scores of the clean token at every noisy position. None where the loss was computed without them. With
            a loss of several draws, those of the first: the smallest block size of the mixture.
        cache (`Cache`, *optional*, `past_key_values` too):
            The cache, with the clean tokens of the call if `use_cache=True`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            Input of the first layer and output of every layer, each `[B, C + N, hidden_size]`, clean tokens first
            (none with `labels` if one block is the whole text).
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            Attention weights of every layer, each `[B, heads, C + N, keys]`.
        token_losses (`torch.FloatTensor` of shape `[B, L]`, *optional*, returned when `labels` is given):
            The loss of every token, in nats; zero where it is not scored. Without gradients.
    """

    token_losses: torch.Tensor | None = None


def with_logits(
    outputs: BaseModelOutputWithPast,
    logits: torch.Tensor | None,
    loss: torch.Tensor | None = None,
    token_losses: torch.Tensor | None = None,
) -> BlockGenOutput:
    return BlockGenOutput(
        loss=loss,
        logits=logits,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        token_losses=token_losses,
        **named_cache(getattr(outputs, CACHE_NAME)),
    )


__all__ = ["BlockGenOutput", "with_logits"]
