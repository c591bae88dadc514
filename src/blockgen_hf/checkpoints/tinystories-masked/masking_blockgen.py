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
Who sees whom: one rule for training, verification, generation and the causal language model (BlockGen, Fig. 5).

A forward pass reads keys of up to three kinds, in this order: the slots of the cache, the clean tokens of the call,
its noisy tokens. Clean tokens see clean tokens only, causally or by blocks. A noisy query at position q sees the
clean tokens before the start s(q) of its block, and the noisy tokens of its own block; blocks are counted from the
first noisy position in steps of the block size. Positions, not places in the tensor, decide: so the rule holds with
left padding, with a cache and when clean and noisy half stand at the same positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


# A block size, or one for each row of the batch.
BlockSize = int | tuple[int, ...]

# Behind every position: keys that no clean limit reaches.
_NEVER = 2**62


@dataclass(frozen=True)
class AttentionLayout:
    """
    The rule in numbers. Query q sees key k if k is a clean token before q's limit, or of q's own group.

    Args:
        clean_limit (`torch.LongTensor` of shape `[B or 1, Q]`): a query sees the clean tokens at positions below it.
        query_group (`torch.LongTensor` of shape `[B or 1, Q]`): noisy tokens of a block form a group; every other
            token is a group of its own, so that padding sees itself and no row of the softmax is empty.
        key_position (`torch.LongTensor` of shape `[B or 1, K]`): positions of clean keys, out of reach for all others.
        key_group (`torch.LongTensor` of shape `[B or 1, K]`): the groups of the keys.
        query_document, key_document (`torch.LongTensor` of shapes `[B, Q]` and `[B, K]`, *optional*): documents packed
            into a row see their own tokens only.
    """

    clean_limit: torch.Tensor
    query_group: torch.Tensor
    key_position: torch.Tensor
    key_group: torch.Tensor
    query_document: torch.Tensor | None = None
    key_document: torch.Tensor | None = None

    def sees(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        """The mask predicate, by index, as transformers' mask interface and FlexAttention take it."""
        before = self.key_position[batch, key] < self.clean_limit[batch, query]
        visible = before | (self.key_group[batch, key] == self.query_group[batch, query])
        if self.query_document is None or self.key_document is None:
            return visible
        return visible & (self.key_document[batch, key] == self.query_document[batch, query])


def block_starts(
    positions: torch.Tensor, block_size: torch.Tensor | int, first: torch.Tensor | int = 0
) -> torch.Tensor:
    """s(q) of every position: the start of its block, counted from `first` in steps of `block_size`."""
    return first + (positions - first).div(block_size, rounding_mode="floor") * block_size


def build_layout(
    clean_positions: torch.Tensor,
    noisy_positions: torch.Tensor,
    block_size: BlockSize,
    clean_block_size: int,
    cached_positions: torch.Tensor,
    clean_is_committed: bool,
    clean_valid: torch.Tensor | None = None,
    noisy_valid: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> AttentionLayout:
    """
    Lays out one forward pass.

    Args:
        clean_positions (`torch.LongTensor` of shape `[B or 1, C]`): positions of the call's clean tokens.
        noisy_positions (`torch.LongTensor` of shape `[B or 1, N]`): positions of its noisy tokens.
        block_size (`int` or `tuple[int]`): block size of the noisy tokens, or one a row.
        clean_block_size (`int`): 1 for causal attention among clean tokens, else the grid of block-causal attention.
        cached_positions (`torch.LongTensor` of shape `[B or 1, slots]`): positions of the clean tokens in the slots
            that the cache returns, of this call's too if it commits them; [`unreachable`] for padding and free slots.
        clean_is_committed (`bool`): whether the call's clean tokens stand in the slots of the cache, instead of
            behind.
        clean_valid, noisy_valid (`torch.BoolTensor` of shape `[B, C]` and `[B, N]`, *optional*): False for padding.
        document_ids (`torch.LongTensor` of shape `[B, C]` or `[B, C + N]`, *optional*): the documents of the clean
            tokens, and of the noisy ones, which are as many or none where they are left out; the positions restart
            with each document, and nothing is cached.
    """
    num_clean = clean_positions.shape[-1]
    sizes: torch.Tensor | int
    if isinstance(block_size, int):
        sizes = block_size
    else:
        sizes = torch.tensor(block_size, device=clean_positions.device)[:, None]
        noisy_positions = noisy_positions.expand(len(block_size), -1)
    alone = -1 - torch.arange(num_clean + noisy_positions.shape[-1], device=clean_positions.device)

    # Padding stands at position 0, where blocks start anyway: the first noisy position is that of the first token.
    first = noisy_positions.amin(-1, keepdim=True) if noisy_positions.shape[-1] else noisy_positions
    starts = block_starts(noisy_positions, sizes, first)
    noisy_group, noisy_limit = starts, starts
    clean_limit = block_starts(clean_positions, clean_block_size) + clean_block_size
    clean_keys, clean_group = clean_positions, alone[:num_clean].expand_as(clean_positions)
    if clean_valid is not None:
        clean_limit = torch.where(clean_valid, clean_limit, -1)
        clean_keys = torch.where(clean_valid, clean_keys, _NEVER)
        clean_group = clean_group.expand_as(clean_valid)
    if noisy_valid is not None:
        noisy_limit = torch.where(noisy_valid, noisy_limit, -1)
        noisy_group = torch.where(noisy_valid, noisy_group, alone[num_clean:])

    query_group = concat(clean_group, noisy_group)
    key_position = concat(clean_keys, unreachable(noisy_positions))
    key_group = query_group
    documents = None
    if document_ids is not None:
        num_noisy = noisy_positions.shape[-1]
        documents = concat(document_ids[:, :num_clean], document_ids[:, document_ids.shape[1] - num_noisy :])
    if clean_is_committed:
        key_position, key_group = key_position[:, num_clean:], key_group[:, num_clean:]
    return AttentionLayout(
        clean_limit=concat(clean_limit, noisy_limit),
        query_group=query_group,
        key_position=concat(cached_positions, key_position),
        key_group=concat(unreachable(cached_positions), key_group),
        query_document=documents,
        key_document=documents,
    )


def unreachable(positions: torch.Tensor) -> torch.Tensor:
    """Positions and groups that no query reaches, of the same shape."""
    return torch.full_like(positions, _NEVER)


def concat(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Concatenates `[B or 1, m]` and `[B or 1, n]` along the sequence."""
    rows = max(left.shape[0], right.shape[0])
    return torch.cat([left.expand(rows, -1), right.expand(rows, -1)], dim=-1)


def make_attention_mask(layout: AttentionLayout, attn_implementation: str, dtype: torch.dtype, **kwargs: Any) -> Any:
    """
    Renders the predicate for an attention implementation: a float mask for `eager`, a boolean one for `sdpa`, a
    `BlockMask` for `flex_attention`, and what a custom implementation registered for itself.
    """
    render: Callable = ALL_MASK_ATTENTION_FUNCTIONS[attn_implementation]
    return render(
        batch_size=layout.key_position.shape[0],
        q_length=layout.clean_limit.shape[-1],
        kv_length=layout.key_position.shape[-1],
        mask_function=layout.sees,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=layout.key_position.device,
        **kwargs,
    )


__all__ = ["AttentionLayout", "BlockSize", "build_layout", "make_attention_mask"]
