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
The dense causal transformer of the paper's AR baseline (`next_token_prediction=True`): no noisy half, the hidden state
of a token predicts the next one. The first token of a text follows nothing, and is never predicted.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .objective_blockgen import TrainingDraw
from .positions_blockgen import clean_positions, document_positions, restarting_documents


def refuse_noise(**arguments: Any) -> None:
    """Raises a `ValueError` for an argument that means noise."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` has no meaning for a model with `next_token_prediction=True`, which knows neither noise "
                "nor blocks: leave it out."
            )


def next_token_positions(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    document_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Positions of the tokens, `[B or 1, C]`, and the documents where there are several, `[B, C]`: the positions restart
    with each.

    Raises:
        ValueError: no token, or documents with what contradicts them.
    """
    if input_ids.shape[1] == 0:
        raise ValueError(
            "`input_ids` must hold a token at least for a model with `next_token_prediction=True`, which predicts the "
            "next token from the last: begin with the BOS token."
        )
    if document_ids is None:
        documents = restarting_documents(position_ids, attention_mask, input_ids.shape[0], cache is not None)
        return clean_positions(input_ids, attention_mask, position_ids, cache), documents
    if document_ids.shape != input_ids.shape or position_ids is not None or cache is not None:
        raise ValueError(
            "`document_ids` must have the shape of `input_ids`, without `position_ids` and a cache: positions restart "
            "with each document."
        )
    positions = document_positions(document_ids, attention_mask)
    return positions, (positions == 0).cumsum(1)  # an id that comes back is another document


def next_token_states(
    trunk: nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None = None,
    use_cache: bool = False,
    document_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """One causal pass: hidden states of the tokens, `[B, C, hidden_size]`, that of each for the token behind it."""
    outputs: BaseModelOutputWithPast = trunk(
        input_ids,
        input_ids[:, :0],
        position_ids=position_ids,
        noisy_position_ids=position_ids[:, :0],
        attention_mask=attention_mask,
        cache=cache,
        use_cache=use_cache,
        document_ids=document_ids,
        is_causal=True,
        is_full=input_ids.shape[1] == 1,
        **kwargs,
    )
    return outputs


def next_token_draw(input_ids: torch.Tensor, scored: torch.Tensor, position_ids: torch.Tensor) -> TrainingDraw:
    """What is scored, in the words of the mixture loss: all but the first token of a text, by cross entropy."""
    scored = scored & (position_ids > 0)
    time = torch.ones(len(input_ids), 1, dtype=torch.float64, device=input_ids.device)
    return TrainingDraw(input_ids, input_ids, scored, 1, time, "cross_entropy")


def shift_right(states: torch.Tensor) -> torch.Tensor:
    """`[B, L, n]`: what was at l - 1 at l; zeros at 0."""
    return nn.functional.pad(states[:, :-1], (0, 0, 1, 0))


__all__ = ["next_token_draw", "next_token_positions", "next_token_states", "refuse_noise", "shift_right"]
