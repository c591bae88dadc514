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
first noisy position in steps of the block size. With a window, every token sees the last W of these clean tokens only.
Positions, not places in the tensor, decide: so the rule holds with left padding, with a cache and when clean and noisy
half stand at the same positions.

Anchored blocks (`ar_prediction="clean"`) begin with a clean token, their anchor: the noisy tokens behind it see the
clean tokens up to it, and one another, all of them or those before. Its own row in the noisy half, where it has one,
is not used: the state of the clean token stands for it.

Three quarters of the training mask of [x0 ; z_t] are empty. FlexAttention skips them on GPUs; on CPUs, which have no
such kernel, the queries are cut into chunks, each of which is attended to the few keys that it can see at all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
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
        window (`int`, *optional*): W, a query sees the clean tokens at the last W positions below its limit.
        query_order, key_order (`torch.LongTensor` of shapes `[B or 1, Q]` and `[B or 1, K]`, *optional*): a query sees
            the keys of its group up to its own place in this order only.
    """

    clean_limit: torch.Tensor
    query_group: torch.Tensor
    key_position: torch.Tensor
    key_group: torch.Tensor
    query_document: torch.Tensor | None = None
    key_document: torch.Tensor | None = None
    window: int | None = None
    query_order: torch.Tensor | None = None
    key_order: torch.Tensor | None = None

    def sees(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        """The mask predicate, by index, as transformers' mask interface and FlexAttention take it."""
        if self.key_position.shape[0] == 1:  # of all rows, which kernels count
            batch = batch * 0
        position, limit = self.key_position[batch, key], self.clean_limit[batch, query]
        before = position < limit
        if self.window is not None:
            before = before & (position >= limit - self.window)
        inside = self.key_group[batch, key] == self.query_group[batch, query]
        if self.query_order is not None and self.key_order is not None:
            inside = inside & (self.key_order[batch, key] <= self.query_order[batch, query])
        visible = before | inside
        if self.query_document is None or self.key_document is None:
            return visible
        return visible & (self.key_document[batch, key] == self.query_document[batch, query])


def block_starts(
    positions: torch.Tensor, block_size: torch.Tensor | int, first: torch.Tensor | int = 0
) -> torch.Tensor:
    """s(q) of every position: the start of its block, counted from `first` in steps of `block_size`."""
    return first + (positions - first).div(block_size, rounding_mode="floor") * block_size


def noisy_blocks(
    noisy_positions: torch.Tensor, block_size: BlockSize, noisy_block_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The blocks of noisy tokens: the position at which the block of each starts, and a number that tells blocks apart,
    `[B or 1, N]` each. The arguments are those of [`build_layout`].
    """
    if noisy_block_ids is not None:
        same = noisy_block_ids[:, :, None] == noisy_block_ids[:, None, :]
        starts = torch.where(same, noisy_positions[:, None, :], _NEVER).amin(-1)
        return starts, noisy_block_ids.expand(starts.shape[0], -1)
    sizes: torch.Tensor | int
    if isinstance(block_size, int):
        sizes = block_size
    else:
        sizes = torch.tensor(block_size, device=noisy_positions.device)[:, None]
        noisy_positions = noisy_positions.expand(len(block_size), -1)
    # Padding stands at position 0, where blocks start anyway: the first noisy position is that of the first token.
    first = noisy_positions.amin(-1, keepdim=True) if noisy_positions.shape[-1] else noisy_positions
    starts = block_starts(noisy_positions, sizes, first)
    return starts, starts


def build_layout(
    clean_positions: torch.Tensor,
    noisy_positions: torch.Tensor,
    block_size: BlockSize,
    clean_block_size: int,
    cached_positions: torch.Tensor,
    num_committed: int,
    clean_valid: torch.Tensor | None = None,
    noisy_valid: torch.Tensor | None = None,
    noisy_block_ids: torch.Tensor | None = None,
    isolate_first: bool | torch.Tensor = False,
    document_ids: torch.Tensor | None = None,
    window: int | None = None,
    has_anchors: bool = False,
    is_noise_causal: bool = False,
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
        num_committed (`int`): how many of the call's clean tokens stand in the slots of the cache, instead of behind.
        clean_valid, noisy_valid (`torch.BoolTensor` of shape `[B, C]` and `[B, N]`, *optional*): False for padding.
        noisy_block_ids (`torch.LongTensor` of shape `[B or 1, N]`, *optional*): noisy tokens of one id, from 0 on, are
            a block, which starts at the smallest of their positions; blocks may overlap.
        isolate_first (`bool` or `torch.BoolTensor` of shape `[B, 1]`): the first token of a block sees no other token
            of it, and is seen by them; in all rows, or in some.
        document_ids (`torch.LongTensor` of shape `[B, C]` or `[B, C + N]`, *optional*): the documents of the clean
            tokens, and of the noisy ones, which are as many or none where they are left out; the positions restart
            with each document, and nothing is cached.
        window (`int`, *optional*): how many clean tokens each token sees, the nearest ones.
        has_anchors (`bool`): whether the first noisy token of each block is the place of its anchor, which is seen
            among the clean tokens.
        is_noise_causal (`bool`): whether a noisy token sees those of its block before it only.
    """
    num_clean = clean_positions.shape[-1]
    alone = -1 - torch.arange(num_clean + noisy_positions.shape[-1], device=clean_positions.device)

    noisy_limit, noisy_group = noisy_blocks(noisy_positions, block_size, noisy_block_ids)
    noisy_positions = noisy_positions.expand(noisy_limit.shape[0], -1)
    if has_anchors:
        noisy_group = torch.where(noisy_positions == noisy_limit, alone[num_clean:], noisy_group)
        noisy_limit = noisy_limit + 1
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
    key_position, key_group = key_position[:, num_committed:], key_group[:, num_committed:]
    query_order = key_order = None
    if is_noise_causal:
        query_order = concat(clean_positions, noisy_positions)
        key_order = concat(cached_positions, query_order[:, num_committed:])
    elif isinstance(isolate_first, torch.Tensor) or isolate_first:
        is_behind = (noisy_positions > noisy_limit) & isolate_first
        query_order = concat(torch.zeros_like(clean_positions), is_behind.long())
        key_order = concat(torch.zeros_like(cached_positions), query_order[:, num_committed:])
    return AttentionLayout(
        clean_limit=concat(clean_limit, noisy_limit),
        query_group=query_group,
        key_position=concat(cached_positions, key_position),
        key_group=concat(unreachable(cached_positions), key_group),
        query_document=documents,
        key_document=documents,
        window=window,
        query_order=query_order,
        key_order=key_order,
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


# Queries a chunk on CPUs: fewer make short products, more read keys that most of them do not see.
CHUNK_SIZE = 256


@dataclass(frozen=True)
class AttentionChunk:
    """
    Consecutive queries and the keys that they may see.

    Args:
        queries (`slice`): the queries.
        keys (`tuple[slice]`): a run of clean keys, and one of noisy keys if they see any.
        mask (`torch.BoolTensor` of shape `[B or 1, 1, queries, keys]`, *optional*): which of these keys each query
            sees. None: causal, queries and keys being the same.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None

    def moved(self, number: int) -> "AttentionChunk":
        """The same queries, so many places further."""
        return replace(self, queries=slice(self.queries.start + number, self.queries.stop + number))


# What the attention layers take as a mask besides the tensors and `BlockMask`s of transformers.
AttentionChunks = tuple[AttentionChunk, ...]


def make_training_mask(
    position_ids: torch.Tensor,
    block_size: BlockSize,
    clean_block_size: int,
    attn_implementation: str,
    dtype: torch.dtype,
    valid: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    window: int | None = None,
    has_anchors: bool = False,
    is_noise_causal: bool = False,
    clean_is_cached: bool = False,
) -> Any:
    """
    The mask of a clean and a noisy half at the same positions, which follow the order of the tokens.

    Args:
        position_ids (`torch.LongTensor` of shape `[B or 1, L]`): of both halves.
        block_size, clean_block_size, document_ids, window, has_anchors, is_noise_causal: as in [`build_layout`].
        attn_implementation (`str`): a name of transformers' attention interface.
        dtype (`torch.dtype`): of the mask of eager attention.
        valid (`torch.BoolTensor` of shape `[B, L]`, *optional*): False for padding.
        clean_is_cached (`bool`): only the noisy half has queries; the keys are those of both all the same.

    Returns:
        what the implementation takes as mask, or [`AttentionChunk`]s on CPUs with `sdpa`. Without padding, documents
        and block sizes a row it is built once for each length, block size and device.
    """
    if window is not None and window >= position_ids.shape[-1]:
        window = None
    # A compiled graph builds its mask itself: it cannot call what keeps masks.
    if valid is None and document_ids is None and isinstance(block_size, int) and not torch.compiler.is_compiling():
        length, device = position_ids.shape[-1], position_ids.device
        return _plain_training_mask(
            length,
            block_size,
            clean_block_size,
            attn_implementation,
            dtype,
            device,
            window=window,
            has_anchors=has_anchors,
            is_noise_causal=is_noise_causal,
            clean_is_cached=clean_is_cached,
        )
    rules: dict[str, Any] = dict(window=window, has_anchors=has_anchors, is_noise_causal=is_noise_causal)
    rules["clean_is_cached"] = clean_is_cached
    return _render(
        position_ids, block_size, clean_block_size, attn_implementation, dtype, valid, document_ids, **rules
    )


@lru_cache(maxsize=32)
def _plain_training_mask(
    length: int,
    block_size: int,
    clean_block_size: int,
    attn_implementation: str,
    dtype: torch.dtype,
    device: torch.device,
    **rules: Any,
) -> Any:
    with torch.inference_mode(False):  # a mask made while evaluating serves the next training step too
        positions = torch.arange(length, device=device)[None]
        return _render(positions, block_size, clean_block_size, attn_implementation, dtype, None, None, **rules)


def _render(
    position_ids: torch.Tensor,
    block_size: BlockSize,
    clean_block_size: int,
    attn_implementation: str,
    dtype: torch.dtype,
    valid: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    clean_is_cached: bool,
    **rules: Any,
) -> Any:
    clean_positions, clean_valid, cached_positions = position_ids, valid, position_ids.new_empty(1, 0)
    if clean_is_cached:
        cached_positions = position_ids if valid is None else torch.where(valid, position_ids, _NEVER)
        clean_positions, clean_valid = position_ids[:, :0], None
    layout = build_layout(
        clean_positions,
        position_ids,
        block_size,
        clean_block_size,
        cached_positions,
        num_committed=0,
        clean_valid=clean_valid,
        noisy_valid=valid,
        document_ids=document_ids,
        **rules,
    )
    if attn_implementation != "sdpa" or position_ids.device.type != "cpu":
        return make_attention_mask(layout, attn_implementation, dtype)
    length = position_ids.shape[-1]
    largest = block_size if isinstance(block_size, int) else max(block_size)
    if valid is None and document_ids is None:  # blocks start at the start of the row
        overlap = 0 if isinstance(block_size, int) and CHUNK_SIZE % block_size == 0 else largest - 1
        is_causal = clean_block_size == 1 and layout.window is None
        return _chunks(layout, length, overlap, clean_block_size - 1, is_causal, clean_is_cached)
    # Where padding stands between tokens, a block may be spread over the row.
    has_gaps = valid is not None and _has_gaps(valid)
    overlap, clean_overlap = (length, length) if has_gaps else (largest - 1, clean_block_size - 1)
    return _chunks(layout, length, overlap, clean_overlap, False, clean_is_cached)


def _has_gaps(valid: torch.Tensor) -> bool:
    """Whether padding stands between the tokens of a row, `[B, L]`. A compiled graph cannot look: it may."""
    if torch.compiler.is_compiling():
        return True
    return bool((valid[:, 0] + (valid[:, 1:] > valid[:, :-1]).sum(-1)).gt(1).any())


def _chunks(
    layout: AttentionLayout,
    length: int,
    noisy_overlap: int,
    clean_overlap: int,
    is_causal: bool,
    clean_is_cached: bool,
) -> AttentionChunks:
    """
    Args:
        noisy_overlap, clean_overlap: how far a block of noisy or clean tokens may reach over the ends of a chunk.
        is_causal: whether nothing but causality restricts the clean half, which then is one chunk for fused kernels.
        clean_is_cached: whether the queries are those of the noisy half alone.
    """
    chunks: list[AttentionChunk] = []
    bounds = [(start, min(start + CHUNK_SIZE, length)) for start in range(0, length, CHUNK_SIZE)]
    reach = length if layout.window is None else layout.window + noisy_overlap  # how far back a chunk sees
    first_noisy = 0 if clean_is_cached else length
    if is_causal and not clean_is_cached:
        chunks.append(AttentionChunk(slice(0, length), (slice(0, length),), None))
    elif not clean_is_cached:
        for start, end in bounds:
            keys = slice(max(start - reach, 0), min(end + clean_overlap, length))
            chunks.append(_chunk(layout, slice(start, end), (keys,)))
    for start, end in bounds:
        block = slice(length + max(start - noisy_overlap, 0), length + min(end + noisy_overlap, length))
        keys = slice(max(start - reach, 0), end)
        chunks.append(_chunk(layout, slice(first_noisy + start, first_noisy + end), (keys, block)))
    return tuple(chunks)


def _chunk(layout: AttentionLayout, queries: slice, keys: tuple[slice, ...]) -> AttentionChunk:
    device = layout.clean_limit.device
    rows = torch.arange(layout.clean_limit.shape[0], device=device)[:, None, None]
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.cat([torch.arange(run.start, run.stop, device=device) for run in keys])
    return AttentionChunk(queries, keys, layout.sees(rows, 0, query, key)[:, None])


def attend_in_chunks(
    attend: Callable[..., tuple[torch.Tensor, None]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: AttentionChunks,
) -> tuple[torch.Tensor, None]:
    """
    Attention of all queries, a chunk after the other.

    Args:
        attend: an attention function of transformers' interface, `(query, key, value, mask, is_causal=...)`.
        query, key, value (`torch.Tensor` of shape `[B, heads, 2 L, head_dim]`): of the clean and the noisy half;
            queries of the noisy half alone, `[B, heads, L, head_dim]`, where the clean one is cached.

    Returns:
        `torch.Tensor` of shape `[B, 2 L, heads, head_dim]`, or `[B, L, heads, head_dim]`, and no weights.
    """
    # Splitting costs nothing in the backward pass, where each slice costs a tensor of zeros of the whole length.
    queries = query.split([chunk.queries.stop - chunk.queries.start for chunk in chunks], dim=2)
    keys, values = _select_keys(key, chunks), _select_keys(value, chunks)
    outputs = [
        attend(queries[number], keys[number], values[number], chunk.mask, is_causal=chunk.mask is None)[0]
        for number, chunk in enumerate(chunks)
    ]
    return torch.cat(outputs, dim=1), None


def _select_keys(states: torch.Tensor, chunks: AttentionChunks) -> list[torch.Tensor]:
    """The keys (or values) of every chunk: a run of the clean half, and one of the noisy half if it has one."""
    length = states.shape[2] // 2
    clean, noisy = states.split(length, dim=2)
    runs = [chunk.keys[1] for chunk in chunks if len(chunk.keys) > 1]
    bounds = [length, *(run.stop for run in runs)]
    if [run.start for run in runs] == bounds[:-1]:  # one behind the other
        noisy_parts = iter(noisy.split([run.stop - run.start for run in runs], dim=2))
    else:
        noisy_parts = iter([noisy[:, :, run.start - length : run.stop - length] for run in runs])
    selected = []
    for chunk in chunks:
        run = chunk.keys[0]
        clean_part = clean if run == slice(0, length) else clean[:, :, run]
        selected.append(clean_part if len(chunk.keys) == 1 else torch.cat([clean_part, next(noisy_parts)], dim=2))
    return selected


__all__ = [
    "AttentionChunks",
    "AttentionLayout",
    "BlockSize",
    "attend_in_chunks",
    "build_layout",
    "make_attention_mask",
    "make_training_mask",
    "noisy_blocks",
]
