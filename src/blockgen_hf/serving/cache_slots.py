"""
Keys and values of rows that come, go, and have lengths of their own.

All rows stand in one tensor per layer, `[slots, heads, columns, head_dim]`, each from column 0 on. A pass over some of
the rows reads and writes there. New tokens are written behind the longest row, as in any batch, and then moved to the
end of their own row, so that the tokens of a row have no gaps between them.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..modeling.cache_blockgen import GrowingLayer


class RowLayer(DynamicLayer):
    """What a generation of one row knows of its cache: how many tokens it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0


class RowCache(Cache):
    """The cache of one row, whose keys and values are those of a slot."""

    def __init__(self) -> None:
        self.row = RowLayer()
        super().__init__(layers=[self.row])
        self.slot = -1

    @property
    def length(self) -> int:
        return self.row.length


class CacheSlots:
    """
    The slots of all rows that are being generated. Rows stand in the first slots: when one leaves, the last takes its
    place.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.rows: list[RowCache] = []
        # Keys and values of each layer; none before the first pass has shown their shape.
        self._buffers: list[list[torch.Tensor]] = []

    @property
    def num_tokens(self) -> int:
        """How many tokens there is memory for."""
        return self._buffers[0][0].shape[0] * self._buffers[0][0].shape[2] if self._buffers else 0

    def add(self, row: RowCache) -> None:
        row.slot = len(self.rows)
        self.rows.append(row)

    def remove(self, row: RowCache) -> None:
        last = self.rows.pop()
        if last is not row:
            self.rows[row.slot] = last
            if last.length:  # otherwise there may be no memory for it yet
                for buffer in self._all_buffers():
                    buffer[row.slot, :, : last.length] = buffer[last.slot, :, : last.length]
            last.slot = row.slot
        row.slot = -1
        if not self.rows:
            self._buffers = []

    def for_pass(self, rows: Sequence[RowCache], num_new: int) -> tuple[Cache, int]:
        """
        The cache of a pass over these rows, which have ascending slots, with room for so many new tokens.

        Returns:
            the cache; and how many columns it holds: as many as the longest of the rows.
        """
        length = max(row.length for row in rows)
        layers = [GrowingLayer() for _ in range(self.num_layers)]
        if self._buffers:
            self._fit(max(length + num_new, *(row.length for row in self.rows)))
            slots = [row.slot for row in rows]
            is_run = slots[-1] - slots[0] == len(slots) - 1
            index = torch.tensor(slots, device=self._buffers[0][0].device)
            for layer, buffers in zip(layers, self._buffers, strict=True):
                if is_run:
                    keys, values = (buffer[slots[0] : slots[-1] + 1] for buffer in buffers)
                else:
                    keys, values = (buffer[:, :, : length + num_new].index_select(0, index) for buffer in buffers)
                layer.lazy_initialization(keys, values)
                layer._buffers = (keys, values)
                layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
        return Cache(layers=layers), length

    def store(self, cache: Cache, rows: Sequence[RowCache], counts: Sequence[int], start: int) -> None:
        """After a pass: of what stands from column `start` on, each row keeps the first so many tokens."""
        moved = [
            (place, row.slot, start + i, row.length + i)
            for place, (row, count) in enumerate(zip(rows, counts, strict=True))
            for i in range(count)
        ]
        if not moved:
            return
        if not self._buffers:
            self._buffers = [
                [states.new_zeros(len(self.rows), states.shape[1], 0, states.shape[3]) for states in pair]
                for pair in ((layer.keys, layer.values) for layer in cache.layers)
            ]
            self._fit(max(column for *_, column in moved) + 1)
        device = self._buffers[0][0].device
        for row, count in zip(rows, counts, strict=True):
            row.row.length += count
        stands = cache.layers[0].keys.untyped_storage().data_ptr() == self._buffers[0][0].untyped_storage().data_ptr()
        if stands and all(source == target for *_, source, target in moved):
            return
        place, slot, source, target = torch.tensor(moved, device=device).unbind(-1)
        for layer, (keys, values) in zip(cache.layers, self._buffers, strict=True):
            keys[slot, :, target] = layer.keys[place, :, source]
            values[slot, :, target] = layer.values[place, :, source]

    def _fit(self, num_columns: int) -> None:
        """Room for all rows and so many columns: neither too little, nor four times too much."""
        shape = self._buffers[0][0].shape
        wanted = len(self.rows) * max(num_columns, 64)
        if shape[0] >= len(self.rows) and shape[2] >= num_columns and shape[0] * shape[2] <= 4 * wanted:
            return
        # A little more, so that not every token and every row asks for memory.
        num_rows = shape[0] if shape[0] == len(self.rows) else len(self.rows) + len(self.rows) // 4
        num_columns += max(64, num_columns // 4)
        length = max(row.length for row in self.rows)
        for buffers in self._buffers:
            for index, old in enumerate(buffers):
                # Zeros: what no one may see is multiplied by zero, and has to be finite.
                new = old.new_zeros(num_rows, old.shape[1], num_columns, old.shape[3])
                kept = min(len(self.rows), shape[0])
                new[:kept, :, :length] = old[:kept, :, :length]
                buffers[index] = new

    def _all_buffers(self) -> list[torch.Tensor]:
        return [buffer for pair in self._buffers for buffer in pair]


__all__ = ["CacheSlots", "RowCache"]
