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
Draft, then revise (Diffusion in Diffusion, Structural Block Diffusion): stage 1 generates the whole text with a small
block size B(1). Every later stage k puts the share gamma(k) of its least certain tokens back to noise (Snapshot
Confidence Remask) and denoises them with a larger block size B(k), while the other tokens stay as they are, so that
they are chosen again with text on both sides.

A stage is the block loop over a text that is known but for its noise: its blocks go from left to right, and a block as
large as the text sees all of it. What a criterion stops is found anew in every stage, on the text as it is then; no
text gets longer than its draft, and the tokens that ended a draft, all those of a stop string, are not revised.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from .cache_blockgen import check_restart, restart
from .sampling_blockgen import CounterGenerator
from .block_decoding_blockgen import BlockDecoder
from .correctors_blockgen import worst_positions
from .denoising_blockgen import Block, Purpose, TimeGrid
from .generation_configuration_blockgen import BlockGenGenerationConfig, Revision


class EndOfDraft(StoppingCriteria):
    """
    Stops each row where its draft ends.

    Args:
        lengths (`torch.LongTensor` of shape `[B]`): columns of each row, its prompt included.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.lengths <= input_ids.shape[1]


def num_ending(criteria: Sequence[StoppingCriteria], text: torch.Tensor, row: int, pad_token_id: int) -> int:
    """
    How many of the last tokens of a row of `text` `[B, length]` ended it: the fewest for which a criterion stops it,
    whatever stands before them. 1 where it is not the text that stopped it.
    """
    length = text.shape[1]

    def stops(count: int) -> bool:
        rest = text.clone()
        rest[row, : length - count] = pad_token_id
        return any(bool(torch.as_tensor(criterion(rest, None)).expand(len(text))[row]) for criterion in criteria)

    return next((count for count in range(1, length + 1) if stops(count)), 1)


class RevisionDecoder(BlockDecoder):
    """
    One call of `generate` with `decoding="draft_revise"`. After [`~RevisionDecoder.run`] it holds, beside what a
    [`BlockDecoder`] holds, `drafts` and `revised`: for each revision the new tokens before it, `[B, n]`, and which of
    them went back to noise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: BlockGenGenerationConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        settings = generation_config.drafting()
        super().__init__(model, input_ids, logits_processor, stopping_criteria, settings, *args, **kwargs)
        # A stage that revises nothing leaves the text alone.
        stages = generation_config.revisions(longest=self.state.max_new_tokens)
        self.stages = [stage for stage in stages if stage.ratio > 0]
        self.score = generation_config.revise_score
        self.is_last_stage = not self.stages
        self.drafts: tuple[torch.Tensor, ...] = ()
        self.revised: tuple[torch.Tensor, ...] = ()
        self.lengths: torch.Tensor | None = None  # of the drafts, `[B]`, in a revision
        if self.stages:
            new_tokens = self.state.tokens[:, self.state.prompt_width :]
            self.confidence = torch.zeros(new_tokens.shape, dtype=torch.float64, device=new_tokens.device)
        self._longest = self.state.max_new_tokens
        self._num_cached = self.state.num_cached
        if self.stages and self.state.cache is not None:
            check_restart(self.state.cache, self._num_cached)
        self._clocks = [criterion for criterion in stopping_criteria if isinstance(criterion, MaxTimeCriteria)]

    @torch.no_grad()
    def run(self) -> None:
        draft_rows = self.rows
        self._generate_blocks()
        for stage in self.stages:
            if self._is_time_up():
                break
            self._begin(stage, draft_rows)
            while not self.state.is_finished:
                self._accept(self._revise_block(self._block_length()))
        if self.streamer is not None:
            text = self._text()
            if not self.is_last_stage and text.shape[1]:
                self._put(text)
            self.streamer.end()

    def _accept(self, tokens: torch.Tensor, event: str = "commit") -> None:
        """Tokens that may still be revised are not streamed."""
        if self.is_last_stage:
            super()._accept(tokens, event)
        else:
            self._take(tokens, event)

    def _text(self) -> torch.Tensor:
        """The new tokens, `[B, n]`; pads behind the end of a row."""
        return self.state.sequences()[:, self.state.prompt_width :]

    def _is_time_up(self) -> bool:
        return any(bool(torch.as_tensor(clock(self.state.tokens, None)).any()) for clock in self._clocks)

    # a revision

    def _begin(self, stage: Revision, draft_rows: CounterGenerator) -> None:
        """Starts again behind the prompts, with the text so far as the draft. Its rows had the keys `draft_rows`."""
        before, index = self.state, len(self.drafts)
        draft, self.lengths = self._text(), before.num_new_tokens
        if before.cache is not None:
            restart(before.cache, self._num_cached)
        self.block_size = stage.block_size
        self.state = self._new_state(max_new_tokens=draft.shape[1], spare=stage.block_size)
        self.state.num_function_evaluations = before.num_function_evaluations
        self.grid = TimeGrid.of(self.process.schedule, stage.num_steps, draft.device)
        self.rows = draft_rows.fold_in(-Purpose.REVISE, index)  # negative: the index of no token
        self._numbers_ahead = None
        # Time that is up ends the revision, not the text.
        criteria = [criterion for criterion in self.stopping_criteria if not isinstance(criterion, MaxTimeCriteria)]
        end = EndOfDraft(self.state.prompt_width + self.lengths)
        self.stopping_criteria = StoppingCriteriaList([*(c for c in criteria if not isinstance(c, EndOfDraft)), end])
        self.is_last_stage = index == len(self.stages) - 1
        self.drafts = (*self.drafts, draft)
        self.revised = (*self.revised, self._least_certain(draft, self.lengths, stage.ratio))
        if self.recorder is not None:
            self.recorder.revise(self.state, self.revised[-1])

    def _least_certain(self, draft: torch.Tensor, lengths: torch.Tensor, ratio: float) -> torch.Tensor:
        """
        Snapshot Confidence Remask: the bottom gamma-quantile of the tokens of each draft, `[B, n]`. The tokens that
        ended a row before its time are not among them: the text behind them was never written.
        """
        offsets = torch.arange(draft.shape[1], device=draft.device)
        fixed = offsets >= (lengths - self._num_ending(draft, lengths))[:, None]
        count = (ratio * lengths.double() + 0.5).floor().long()
        numbers = self._generator(draft.shape[1]).fold_in(Purpose.SCORE)
        penalty = numbers.uniform() if self.score == "random" else -self._confidence_in(draft)
        return worst_positions(penalty, count[:, None], fixed, numbers.uniform(1))

    def _num_ending(self, draft: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """How many tokens ended each draft before its time, `[B]`."""
        state, counts = self.state, torch.zeros_like(lengths)
        text = torch.cat([state.tokens[:, : state.prompt_width], draft], dim=1)
        criteria = [criterion for criterion in self.stopping_criteria if not isinstance(criterion, EndOfDraft)]
        for row in (lengths < self._longest).nonzero().flatten().tolist():
            end = state.prompt_width + int(lengths[row])
            counts[row] = num_ending(criteria, text[:, :end], row, state.pad_token_id)
        return counts

    def _confidence_in(self, draft: torch.Tensor) -> torch.Tensor:
        """
        Log-probability of each token, `[B, n]`: as it was committed; or for comparison, seen from the finished draft.
        """
        if self.score == "snapshot" and self.confidence is not None:
            return self.confidence[:, : draft.shape[1]]
        self._commit_what_cannot_ride()
        if self.score == "ar_surprisal":
            prediction = self._verify(draft, self._generator(draft.shape[1]).fold_in(Purpose.AR_QUERY))
            if self.recorder is not None:
                self.recorder.judge(self.state, draft, prediction)
        else:
            prediction = self._reread(draft)
        return prediction.log_prob(draft.flatten()).view(draft.shape)

    def _reread(self, draft: torch.Tensor) -> Any:
        """One denoising pass over the finished draft, without noise and in the blocks of the revision."""
        state, length = self.state, draft.shape[1]
        blocks = self._noisy_blocks(length)
        if blocks is None and state.is_anchored:  # given, so that the anchors are those among the clean tokens
            blocks = self._blocks(length)[None]
        outputs = self._forward(
            input_ids=torch.cat([state.pending, state.canvas(draft)], dim=1),
            noisy_input_ids=state.canvas(draft),
            noisy_position_ids=state.next_positions(length),
            noisy_block_ids=blocks,
            block_size=self.block_size,
            attention_mask=state.mask_with(length),
            noise_level=0.0,
        )
        state.count_evaluation()
        return self._predicted(outputs.logits.flatten(0, 1), torch.ones_like(draft, dtype=torch.bool), draft)

    def _revise_block(self, length: int) -> torch.Tensor:
        """The next tokens of every row, `[A, length]`: those to be revised denoised from noise."""
        state = self.state
        where = state.active[:, None], self._offsets(length)
        tokens, free = self.drafts[-1][where], self.revised[-1][where] & ~state.done[:, None]
        if self._is_time_up() or not free.any():
            return tokens
        return self._denoise_canvas(tokens, free)

    def _num_proposed(self, block: Block) -> int | torch.Tensor:
        return super()._num_proposed(block) if self.lengths is None else block.free.sum(-1, keepdim=True)

    def _offsets(self, length: int) -> torch.Tensor:
        """The index of the next tokens among the new ones, `[A, length]`."""
        return self.state.columns(length) - self.state.prompt_width

    def _noisy_blocks(self, length: int) -> torch.Tensor | None:
        """Tokens of a draft do not see the pads behind its end, which stand in a block of their own."""
        if self.lengths is None:
            return None
        inside = self._offsets(length) < self.lengths[self.state.active, None]
        if inside.all():
            return None
        blocks = self._blocks(length)
        return torch.where(inside, blocks, blocks + length)

    def _blocks(self, length: int) -> torch.Tensor:
        """The blocks of the next tokens, `[length]`."""
        return torch.arange(length, device=self.state.tokens.device) // self.block_size

    # streaming

    def _show_block(self, streamer: Any, log_probs: torch.Tensor, is_mask: torch.Tensor | None) -> None:
        """With the text around the block that is not streamed yet: before it the new one, behind it the draft."""
        state, length = self.state, log_probs.shape[1]
        offset = state.first_column - state.prompt_width
        parts = [(log_probs, is_mask)]
        if not self.is_last_stage:
            before = state.tokens[state.active, state.prompt_width : state.first_column]
            parts.insert(0, self._known(before, log_probs, is_mask))
        if self.lengths is not None:
            behind = self.drafts[-1][state.active, offset + length :]
            parts.append(self._known(behind, log_probs, is_mask))
        masks = None if is_mask is None else torch.cat([mask for _, mask in parts if mask is not None], dim=1)
        super()._show_block(streamer, torch.cat([part for part, _ in parts], dim=1), masks)

    def _known(
        self, tokens: torch.Tensor, log_probs: torch.Tensor, is_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens `[A, m]` as log-probabilities `[A, m, V]`, and that none of them is a mask."""
        known = self._one_hot(tokens, log_probs.shape[-1]).to(log_probs.dtype)
        return known, None if is_mask is None else torch.zeros(tokens.shape, dtype=torch.bool)


__all__ = ["RevisionDecoder"]
