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
"""How keys and values are cached: committed tokens are written, noisy ones are only read along with them."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer


class GrowingLayer(DynamicLayer):
    """
    A [`DynamicLayer`] with room behind its tokens, up to a quarter more, or 64 tokens. What is added is written there,
    and what is there is not copied: concatenation copies all of it, in every pass.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.extended(key_states, value_states, key_states.shape[-2])

    def extended(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_committed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Keys and values with these behind them, `[B, heads, length + new, head_dim]`; good until the next call. The
        first `num_committed` of the new ones stay.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        # What autograd has saved may not be overwritten. Compiled code cannot ask where a tensor lies.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            added = ((self.keys, key_states), (self.values, value_states))
            keys, values = (torch.cat(pair, dim=-2) if length else pair[1] for pair in added)
            self._commit(keys, values, length, num_committed)
            return keys, values
        end = length + key_states.shape[-2]
        if not self._has_room(key_states, length, end):
            self._buffers = (
                self._buffer(self.keys, key_states, length),
                self._buffer(self.values, value_states, length),
            )
            # What is cached stands in the new buffers from now on, also if this call only reads.
            if length:
                self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        keys, values = (buffer[:, :, :end] for buffer in self._buffers or ())
        keys[:, :, length:] = key_states
        values[:, :, length:] = value_states
        self._commit(keys, values, length, num_committed)
        return keys, values

    def _commit(self, keys: torch.Tensor, values: torch.Tensor, length: int, num_committed: int) -> None:
        if num_committed:
            self.keys, self.values = keys[:, :, : length + num_committed], values[:, :, : length + num_committed]

    def reset(self) -> None:
        self._buffers = None
        super().reset()

    def _has_room(self, new: torch.Tensor, length: int, end: int) -> bool:
        """Whether the tokens stand in the buffers still (others are put in their place to reorder rows), with room."""
        if self._buffers is None:
            return False
        buffer = self._buffers[0]
        if buffer.is_inference() and not torch.is_inference_mode_enabled():  # may not be written to any more
            return False
        stands = length == 0 or self.keys.data_ptr() == buffer.data_ptr()
        return stands and buffer.shape[0] == new.shape[0] and buffer.shape[2] >= end and buffer.dtype == new.dtype

    @staticmethod
    def _buffer(old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        end = length + new.shape[-2]
        rows, heads, _, width = new.shape
        buffer = new.new_empty(rows, heads, end + max(64, end // 4), width)
        if length:
            buffer[:, :, :length] = old
        return buffer


def make_growing(cache: Any) -> None:
    """An empty dynamic cache gets layers that grow in place."""
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


def commit_and_read(
    cache: Cache, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor, num_committed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keys and values of the cached tokens, then of those of the call, of which the first so many are stored.

    Every cache class returns what it holds when it is updated, also with no token at all: so this reads them all.
    """
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, GrowingLayer):
        return layer.extended(key_states, value_states, num_committed)
    if num_committed == 0 and type(layer) is DynamicLayer and not cache.offloading:
        cached = (layer.keys, layer.values)  # an update would copy them
    else:
        cached = cache.update(key_states[:, :, :num_committed], value_states[:, :, :num_committed], layer_idx)
    key_states, value_states = key_states[:, :, num_committed:], value_states[:, :, num_committed:]
    if key_states.shape[2] == 0:
        return cached
    return torch.cat([cached[0], key_states], dim=2), torch.cat([cached[1], value_states], dim=2)


def keep_rows(cache: Cache, rows: torch.Tensor, num_cached: int) -> None:
    """
    The cache of some rows of the batch. `Cache.reorder_cache` leaves a layer alone that holds no token, though a
    static one has room for every row by then: it is made anew.
    """
    if num_cached:
        cache.reorder_cache(rows)
    else:
        for layer in cache.layers:
            layer.is_initialized = False


def restart(cache: Cache, num_cached: int) -> None:
    """
    Forgets all but the first tokens, `num_cached` of each row. Without any the cache may hold other rows from then on.

    Raises:
        ValueError: tokens are to stay in a cache that cannot be cropped.
    """
    if num_cached == 0:
        for layer in cache.layers:
            layer.reset()
            layer.is_initialized = False
        return
    check_restart(cache, num_cached)
    keys = next(layer.keys for layer in cache.layers)
    gather_tokens(cache, torch.arange(num_cached, device=keys.device).expand(len(keys), num_cached))


def check_restart(cache: Cache, num_cached: int) -> None:
    """
    Raises:
        ValueError: as [`restart`] will.
    """
    if num_cached and not can_gather(cache):
        raise ValueError(
            f"`cache` holds {num_cached} tokens, and a {type(cache).__name__} cannot be cropped to them when the text "
            "is revised: pass an empty one with the whole text, or a DynamicCache or StaticCache."
        )


def can_gather(cache: Cache) -> bool:
    """Whether [`gather_tokens`] knows all layers of the cache."""
    known = (DynamicLayer, GrowingLayer, StaticLayer)
    return not cache.offloading and all(type(layer) in known for layer in cache.layers)


def gather_tokens(cache: Cache, index: torch.Tensor) -> None:
    """
    Puts the cached tokens of every row in another order, and leaves some out.

    Args:
        index (`torch.LongTensor` of shape `[B, length]`): which of its cached tokens each row holds from now on.
    """
    length = index.shape[1]
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        for name in ("keys", "values"):
            states = getattr(layer, name)
            rows, heads, _, width = states.shape
            kept = states.gather(2, index[:, None, :, None].expand(rows, heads, length, width))
            if isinstance(layer, StaticLayer):
                states[:, :, :length] = kept
            else:
                setattr(layer, name, kept)
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(length)


__all__ = [
    "GrowingLayer",
    "can_gather",
    "check_restart",
    "commit_and_read",
    "gather_tokens",
    "keep_rows",
    "make_growing",
    "restart",
]
