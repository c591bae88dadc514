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
"""What a running `generate` knows of its rows: their tokens, what of them is cached, who is done."""

import torch
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .cache_blockgen import can_gather, gather_tokens, keep_rows
from .inputs_blockgen import last_columns
from .sampling_blockgen import CounterGenerator
from .sliding_window_blockgen import slack_of_window


class DecodingState:
    """
    The rows of a running generation. Row i of the output stands in `tokens[i]`; only the `active` rows are computed.

    Columns count from the left end of the padded prompts: new token k of every row stands in column `prompt_width +
    k`.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, W]`): prompts, left padded.
        attention_mask (`torch.Tensor` of shape `[B, past + W]` or `[B, W]`, *optional*): zero for padding.
        cache (`Cache`, *optional*): where clean tokens are committed; None recomputes them in every pass.
        num_cached (`int`): tokens that the cache holds already.
        prompt_is_cached (`bool`): whether these are the first tokens of `input_ids`, and not what came before them.
        max_new_tokens (`int`): room for new tokens.
        spare (`int`): columns behind that room, for blocks that end beyond it.
        pad_token_id (`int`): what stands behind the end of a row.
        grid (`int`): blocks of a block-causal model start at multiples of it, 1: anywhere.
        is_anchored (`bool`): whether the last token of each row predicts the next one: it is neither pending nor
            cached then, but the first token of the canvas that follows.
        keep_all_rows (`bool`): whether rows that are done stay in the batch: the caller owns the cache, or the model
            knows the rows by their place.
        window (`int`, *optional*): how many clean tokens a token sees; older ones leave the cache.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        num_cached: int,
        prompt_is_cached: bool,
        max_new_tokens: int,
        spare: int,
        pad_token_id: int,
        grid: int,
        is_anchored: bool,
        keep_all_rows: bool,
        window: int | None = None,
    ) -> None:
        batch_size, self.prompt_width = input_ids.shape
        self.is_anchored = is_anchored
        # Whether the last pass has committed the anchor too, until the next tokens are accepted.
        self.anchor_is_committed = False
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        self.cache = cache
        self.keep_all_rows = keep_all_rows
        self.window = window
        # Position of the first token in the cache, `[A, 1]`, as soon as older ones have left it.
        self.cache_start: torch.Tensor | None = None
        self.dropped_rows = False
        device = input_ids.device

        # On a grid, rows may run ahead of the one that is furthest behind by a block of the grid.
        spare = spare + grid - 1
        room = torch.full((batch_size, max_new_tokens + spare), pad_token_id, dtype=torch.long, device=device)
        self.tokens = torch.cat([input_ids, room], dim=1)
        self.num_new_tokens = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.num_function_evaluations = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.active = torch.arange(batch_size, device=device)
        self.done = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.num_done = 0  # of the active rows: looking at `done` waits for the device, once a call of `accept`
        # How many columns of padding stand before each prompt, `[B]`.
        self.padding = torch.zeros(batch_size, dtype=torch.long, device=device)
        if attention_mask is not None:
            is_padding = attention_mask.long().cumsum(-1) == 0
            self.padding = last_columns(is_padding, self.prompt_width).sum(-1)

        if prompt_is_cached and num_cached > self.prompt_width:
            raise ValueError(
                f"`cache` hold {num_cached} tokens, but `inputs` only {self.prompt_width}: pass the whole "
                "text, or the new tokens with an `attention_mask` that covers the cached ones too."
            )
        self.pending = input_ids[:, num_cached:] if prompt_is_cached else input_ids
        self.num_cached = num_cached
        self.context_mask = attention_mask
        # Column at which the next block starts, of every active row, and the smallest of them: rows of a model with a
        # grid start at columns of their own.
        self.start = torch.full((batch_size, 1), self.prompt_width, device=device)
        self.first_column = self.prompt_width
        # Whether all active rows are known to start at `first_column`: looking would wait for the device.
        self.is_even = True
        if is_anchored:
            self._hold_back_anchor()
        if grid > 1:
            self._hold_back_remainder(grid)

    def _hold_back_anchor(self) -> None:
        if self.pending.shape[1] == 0:
            raise ValueError(
                f"`cache` holds all {self.num_cached} tokens of `inputs`, but the last one must not be in it, as it "
                "predicts the next: crop the cache by one token."
            )
        self.pending = self.pending[:, :-1]
        if self.context_mask is not None:
            self.context_mask = self.context_mask[:, :-1]

    def canvas(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        What stands in a canvas for the next tokens `[A, n]`: these, or the last token of each row and all but the last
        of these, each of which is scored one place before its own.
        """
        if not self.is_anchored:
            return tokens
        return torch.cat([self.tokens[self.active[:, None], self.start - 1], tokens[:, :-1]], dim=1)

    def _hold_back_remainder(self, grid: int) -> None:
        """Prompt tokens behind the last multiple of the grid are not committed: they stand in the first block."""
        if self.context_mask is None:
            held_back = (self.num_cached + self.pending.shape[1]) % grid
            self.pending = self.pending[:, : self.pending.shape[1] - held_back]
            self.start = self.start - held_back
        else:
            self.is_even = False
            remainders = self.context_mask.long().sum(-1, keepdim=True) % grid
            self.start = self.start - remainders
            context_columns = torch.arange(self.context_mask.shape[1], device=remainders.device)
            self.context_mask = self.context_mask * (context_columns < self.context_mask.shape[1] - remainders)
        self.first_column = int(self.start.min())

    @property
    def is_finished(self) -> bool:
        return self.active.numel() == 0 or self.first_column >= self.prompt_width + self.max_new_tokens

    @property
    def columns_left(self) -> int:
        return self.prompt_width + self.max_new_tokens - self.first_column

    def columns(self, length: int) -> torch.Tensor:
        """Columns of the next `length` tokens, `[A, length]`."""
        return self.start + torch.arange(length, device=self.start.device)

    def fixed(self, columns: torch.Tensor) -> torch.Tensor | None:
        """Where the columns hold prompt tokens, `[A, n]`; None if nowhere."""
        return columns < self.prompt_width if self.first_column < self.prompt_width else None

    def clean_context(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of all rows, `[B, columns]`, and of how many columns the active ones are known, `[A]`."""
        known = self.start.squeeze(-1).clamp(min=self.prompt_width)
        width = max(self.prompt_width, self.first_column) if self.is_even else int(known.max())
        return self.tokens[:, :width].clone(), known

    def mask_with(self, length: int) -> torch.Tensor | None:
        """The attention mask of the context, followed by so many valid tokens."""
        if self.context_mask is None:
            return None
        return torch.nn.functional.pad(self.context_mask, (0, length), value=1)

    def next_positions(self, length: int) -> torch.Tensor:
        """Positions of a canvas for the next `length` tokens, `[A or 1, length]`."""
        offsets = torch.arange(length, device=self.start.device)
        first = 0 if self.cache_start is None else self.cache_start
        if self.context_mask is None:
            return (offsets + self.num_cached + self.pending.shape[1])[None] + first
        return self.context_mask.long().sum(-1, keepdim=True) + offsets + first

    def count_evaluation(self, rows: torch.Tensor | None = None) -> None:
        """A pass that these active rows `[A]` needed; default: all of them."""
        needed = ~self.done if rows is None else rows & ~self.done
        self.num_function_evaluations[self.active] += needed.long()

    def mark_committed(self, count: int) -> None:
        """The first `count` pending tokens are in the cache now."""
        self.pending = self.pending[:, count:]
        self.num_cached += count
        if self.window is not None and self.num_cached >= self.window + slack_of_window(self.window):
            self._slide(self.window)

    def _slide(self, window: int) -> None:
        """
        Takes the tokens out of the cache that no later one sees: of each row all but the last W. The keys of the
        others keep the rotation of their position, as only differences of positions matter.
        """
        if self.cache is None:
            return
        cached = self.num_cached
        mask = self.pending.new_ones(len(self.pending), cached)
        if self.context_mask is not None:
            mask = self.context_mask[:, :cached].long()
        lengths = mask.sum(-1, keepdim=True)
        width = min(window, int(lengths.max()))
        order = mask.argsort(dim=-1, stable=True)[:, cached - width :]  # padding first
        gather_tokens(self.cache, order)
        if self.context_mask is not None:
            kept = self.context_mask[:, :cached].gather(1, order)
            self.context_mask = torch.cat([kept, self.context_mask[:, cached:]], dim=1)
        left = (lengths - window).clamp(min=0)
        self.cache_start = left if self.cache_start is None else self.cache_start + left
        self.num_cached = width

    def mark_pending_committed(self) -> None:
        """After a pass that read all pending tokens: where there is a cache, they are in it now."""
        if self.cache is not None:
            self.mark_committed(self.pending.shape[1])

    def mark_anchor_committed(self) -> None:
        """As [`~DecodingState.mark_pending_committed`], after a pass that committed the last token of each row too."""
        if self.cache is not None:
            self.context_mask = self.mask_with(1)
            self.pending = torch.cat([self.pending, self.tokens[self.active[:, None], self.start - 1]], dim=1)
            self.mark_committed(self.pending.shape[1])
            self.anchor_is_committed = True

    def accept(
        self, tokens: torch.Tensor, stopping_criteria: StoppingCriteriaList, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Takes the next tokens `[A, n]`, or so many of each row as `counts` `[A]` says, up to the end of each row. They
        become pending; rows that end leave the batch.

        Returns:
            The new tokens of all rows, as far as the row that is furthest behind has them, `[B, ...]`; pads behind the
            end of a row.
        """
        length = tokens.shape[1]
        rows, columns = self.active[:, None], self.columns(length)
        if self.keep_all_rows:
            tokens = torch.where(self.done[:, None], self.pad_token_id, tokens)
        taken = None
        if counts is not None:
            self.is_even = len(counts) == 1
            taken = torch.arange(length, device=counts.device) < counts[:, None]
            tokens = torch.where(taken, tokens, self.tokens[rows, columns])
        self.tokens[rows, columns] = tokens
        first = max(self.prompt_width, self.first_column)
        is_even = self.is_even and counts is None
        self._find_ends(columns, taken, first, is_even, stopping_criteria)

        # With the pads that now stand behind an end: the cache holds what the sequences say.
        skipped = int(self.anchor_is_committed)
        added = columns[:, skipped:] - int(self.is_anchored)  # the anchor before, and all but the one behind
        self.anchor_is_committed = False
        self.pending = torch.cat([self.pending, self.tokens[rows, added]], dim=1)
        if taken is None:
            self.start = self.start + length
            self.context_mask = self.mask_with(length - skipped)
            self.first_column += length
        else:
            self.start = self.start + taken.sum(-1, keepdim=True)
            self._leave_out(taken[:, skipped:])
            self.first_column = int(self.start.min())
        self._drop_done_rows()
        if counts is not None:
            self._close_gaps()
        if self.is_finished:
            return self.sequences()[:, first:]
        return self.tokens[:, first : self.first_column]

    def _leave_out(self, taken: torch.Tensor) -> None:
        """The last pending columns hold what is `taken` `[A, n]` of them: the others are padding between tokens."""
        if taken.shape[1] == 0:
            return
        empty = taken.shape[1] - int(taken.sum(-1).max())
        taken = taken[:, : taken.shape[1] - empty]
        self.pending = self.pending[:, : self.pending.shape[1] - empty]
        if self.context_mask is None and bool(taken.all()):
            return
        num_context = self.num_cached + self.pending.shape[1] - taken.shape[1]
        if self.context_mask is None:
            self.context_mask = torch.ones(len(taken), num_context, dtype=torch.long, device=taken.device)
        self.context_mask = torch.cat([self.context_mask, taken.to(self.context_mask.dtype)], dim=1)

    def _close_gaps(self) -> None:
        """
        Takes the padding out that stands between the tokens of rows which go at their own pace, when it is more than a
        quarter of what is cached.
        """
        if self.context_mask is None or not self.is_ragged or self.is_finished:
            return
        mask, cached = self.context_mask.bool(), self.num_cached
        if self.cache is not None:
            longest = int(mask[:, :cached].sum(-1).max())
            if cached - longest < 64 + longest // 4:
                return
            order = (~mask[:, :cached]).long().argsort(dim=-1, stable=True)[:, :longest]
            gather_tokens(self.cache, order)
            kept = self.context_mask[:, :cached].gather(1, order)
            self.context_mask = torch.cat([kept, self.context_mask[:, cached:]], dim=1)
            self.num_cached = longest
        else:
            order = (~mask).long().argsort(dim=-1, stable=True)[:, : int(mask.sum(-1).max())]
            self.pending = self.pending.gather(1, order)
            self.context_mask = self.context_mask.gather(1, order)

    def room(self) -> torch.Tensor:
        """How many tokens each row may take until its end, `[A]`."""
        return self.prompt_width + self.max_new_tokens - self.start.squeeze(-1)

    @property
    def is_ragged(self) -> bool:
        """
        Whether rows may go at their own pace: where they leave the batch when done, and the gaps between their tokens
        have room in the cache and can be closed.
        """
        if self.keep_all_rows:
            return False
        return self.cache is None or (not self.cache.is_compileable and can_gather(self.cache))

    def _find_ends(
        self,
        columns: torch.Tensor,
        taken: torch.Tensor | None,
        first: int,
        is_even: bool,
        stopping_criteria: StoppingCriteriaList,
    ) -> None:
        """
        Evaluates the criteria on every prefix that the new columns complete, as they would be token by token, and
        fills with pads behind. The clock is looked at once: it stops everyone, and no finished block is thrown away
        for it.

        Args:
            columns: of the new tokens, `[A, n]`.
            taken: which of them a row takes, `[A, n]`; default: all.
            first: before it there is the prompt.
            is_even: whether the columns of all rows are the same.
            stopping_criteria: of the call.
        """
        by_text = [criterion for criterion in stopping_criteria if not isinstance(criterion, MaxTimeCriteria)]
        by_clock = [criterion for criterion in stopping_criteria if isinstance(criterion, MaxTimeCriteria)]
        width = self.prompt_width + self.max_new_tokens
        ahead = 0 if is_even else int(self.start.max() - self.start.min())
        last = min(self.first_column + columns.shape[1] + ahead, width)
        was_done = self.done
        new = ~was_done[:, None] & (columns < last)
        if first > self.first_column:
            new = new & (columns >= first)
        if taken is not None:
            new = new & taken
        ends = self._ends_by_token(columns, by_text, last)
        if ends is None:
            completed = range(first, last) if is_even else columns[new].unique().tolist()
            for column in completed:
                present = ((columns == column) & new).any(-1) & ~self.done
                self.num_new_tokens[self.active] += present.long()
                self.done = self.done | (present & self._stops(by_text, column + 1))
        else:
            ends = (ends & new).long()
            self.num_new_tokens[self.active] += (new & (ends.cumsum(-1) == ends)).sum(-1)
            self.done = was_done | ends.any(-1)
        num_done = int(self.done.sum())
        if num_done > self.num_done:
            behind = torch.arange(self.tokens.shape[1], device=columns.device) >= (
                self.prompt_width + self.num_new_tokens[self.active, None]
            )
            ended = (self.done & ~was_done)[:, None] & behind
            self.tokens[self.active] = self.tokens[self.active].masked_fill(ended, self.pad_token_id)
        if by_clock:
            self.done = self.done | self._stops(by_clock, last)
            num_done = int(self.done.sum())
        self.num_done = num_done

    def _ends_by_token(
        self, columns: torch.Tensor, criteria: list[StoppingCriteria], last: int
    ) -> torch.Tensor | None:
        """
        Where a text may end, `[A, n]`, by criteria that look at its last token or its length only; None if there are
        others, or if one warns of the length.
        """
        tokens = self.tokens[self.active[:, None], columns]
        ends = torch.zeros_like(columns, dtype=torch.bool)
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                ends = ends | torch.isin(tokens, criterion.eos_token_id.to(tokens.device))
            elif type(criterion) is MaxLengthCriteria and last <= (criterion.max_position_embeddings or last):
                if last >= criterion.max_length:
                    ends = ends | (columns + 1 >= criterion.max_length)
            else:
                return None
        return ends

    def _stops(self, criteria: list[StoppingCriteria], length: int) -> torch.Tensor:
        """Whether any criterion stops each active row `[A]`. Criteria see every row, done or not, as everywhere."""
        stops = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        for criterion in criteria:
            stops = stops | torch.as_tensor(criterion(self.tokens[:, :length], None), device=stops.device)
        return stops[self.active]

    def _drop_done_rows(self) -> None:
        if self.num_done == self.done.numel():
            self.dropped_rows = self.dropped_rows or self.active.numel() < self.tokens.shape[0]
            self.active = self.active[:0]
        elif self.num_done and not self.keep_all_rows:
            kept = (~self.done).nonzero().squeeze(-1)
            self.num_done = 0
            self.dropped_rows = True
            self.active, self.done, self.start = self.active[kept], self.done[kept], self.start[kept]
            self.first_column = int(self.start.min())  # the row that was furthest behind may have left
            self.pending = self.pending[kept]
            if self.context_mask is not None:
                self.context_mask = self.context_mask[kept]
            if self.cache_start is not None:
                self.cache_start = self.cache_start[kept]
            if self.cache is not None:
                keep_rows(self.cache, kept, self.num_cached)

    def sequences(self) -> torch.Tensor:
        """Prompts and new tokens up to the end of the longest row."""
        return self.tokens[:, : self.prompt_width + int(self.num_new_tokens.max())]


def row_generator(seed: int, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> CounterGenerator:
    """
    A key a row, `[B, 1]`, from the seed and from what the row is: its prompt, and how many rows before it have the
    same prompt. So a row gets the same text alone and in any batch, and copies of a prompt get different texts.
    """
    batch_size, width = input_ids.shape
    device = input_ids.device
    valid = (
        torch.ones_like(input_ids)
        if attention_mask is None
        else attention_mask[:, -width:].long()
        if width
        else input_ids
    )
    positions = valid.cumsum(-1)
    token_keys = CounterGenerator.from_seed(0, device).fold_in(input_ids, positions).keys
    prompt_keys = (token_keys * valid).sum(-1)
    _, group = prompt_keys.unique(return_inverse=True)
    order = group.argsort(stable=True)
    ordered = group[order]
    index = torch.arange(batch_size, device=device)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first_index = torch.where(is_first, index, 0).cummax(0).values
    copies = torch.empty_like(index).scatter_(0, order, index - first_index)
    return CounterGenerator.from_seed(seed, device).fold_in(prompt_keys[:, None], copies[:, None])


__all__ = ["DecodingState", "row_generator"]
