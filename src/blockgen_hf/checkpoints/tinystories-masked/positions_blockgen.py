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
"""Where the tokens of a forward pass stand: positions of clean tokens, of those behind them, of packed documents."""

import torch
from transformers.cache_utils import Cache


def last_columns(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` columns, also for 0."""
    return mask[:, mask.shape[1] - count :]


def document_positions(document_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Positions that restart where a document does, `[B, L]`, from the documents of consecutive tokens, `[B, L]`. Padding
    belongs to no document.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    if attention_mask is not None:
        starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def restarting_documents(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, num_rows: int, is_cached: bool
) -> torch.Tensor | None:
    """
    The documents `[B, C]` of rows whose `position_ids` start again (flattened, padding-free batches), or None where
    they go up from one end to the other.

    Raises:
        ValueError: they start again, and a cache is read or written, which knows of no documents.
    """
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    position_ids = position_ids.expand(num_rows, -1)
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    valid = torch.ones_like(index, dtype=torch.bool)
    if attention_mask is not None:
        valid = last_columns(attention_mask, position_ids.shape[1]).bool()
    last = torch.where(valid, index, -1).cummax(dim=1).values[:, :-1]
    previous = torch.where(last >= 0, position_ids.gather(1, last.clamp(min=0)), -1)
    starts = torch.zeros_like(valid)
    starts[:, 1:] = valid[:, 1:] & (position_ids[:, 1:] <= previous)
    if not torch.compiler.is_compiling() and not starts.any():  # a graph cannot look at them
        return None
    if not is_cached:
        return starts.long().cumsum(1)
    if torch.compiler.is_compiling():  # nor raise
        return None
    raise ValueError(
        "`position_ids` start again within a row, as those of documents packed into it do, which a cache cannot keep "
        "apart: pass no cache."
    )


def clean_positions(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> torch.Tensor:
    """Positions of the clean tokens of the call, `[B or 1, C]`."""
    num_clean = input_ids.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None:
        # The length of a static cache is a tensor, whose value would cost a synchronisation.
        expected = attention_mask.shape[1] if isinstance(past, torch.Tensor) else past + num_clean
        if attention_mask.ndim != 2 or attention_mask.shape[1] != expected:
            raise ValueError(
                f"`attention_mask` must have the shape [batch, past + clean tokens] = [{input_ids.shape[0]}, "
                f"{expected}], but has {list(attention_mask.shape)}."
            )
    if position_ids is not None:
        if position_ids.shape[-1] != num_clean:
            raise ValueError(
                f"`position_ids` must give a position for each of the {num_clean} `input_ids`, but have the shape "
                f"{list(position_ids.shape)}."
            )
        return position_ids
    if attention_mask is not None:
        return last_columns((attention_mask.long().cumsum(-1) - 1).clamp(min=0), num_clean)
    return torch.arange(num_clean, device=input_ids.device)[None] + past


def following_position(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache | None,
) -> torch.Tensor:
    """The position behind the last clean token, `[B or 1, 1]`."""
    if attention_mask is not None:
        length = attention_mask.long().sum(-1, keepdim=True)
        # An empty row of a padded batch starts at 0, whatever the position of its padding.
        return length if input_ids.shape[1] == 0 else torch.where(length > 0, position_ids[:, -1:] + 1, 0)
    if input_ids.shape[1] > 0:
        return position_ids[:, -1:] + 1
    past = 0 if cache is None else cache.get_seq_length()
    return torch.zeros(1, 1, dtype=torch.long, device=input_ids.device) + past


__all__ = ["clean_positions", "document_positions", "following_position", "last_columns", "restarting_documents"]
