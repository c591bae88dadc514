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
Speculation: the text of autoregressive decoding in fewer passes, with the model's own blocks as drafts.

Block size B drafts, block size 1 verifies. A pass reads the clean tokens and a draft, with a fully noised query behind
every prefix of it: these are the queries of `decoding="ar"`, with the same random numbers. The draft is kept as long
as it agrees, and the first token that does not is replaced by the autoregressive one, so that every pass gives one
token at least. What was kept rides on the next pass, which commits it: no rejected token ever reaches the cache, of
whatever class that is.

The next draft is made by the same passes. Behind a query stand more noised tokens, which see it and one another: with
it they are a block of B, whose first token is drawn autoregressively, and whose others are the draft behind it. Blocks
stand behind every prefix of a draft, so that one of them is the next draft whatever is kept (`fused_drafts`), or
behind the text alone, in a pass that has no draft to verify.
"""

from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .diffusion_blockgen import MaskedDiffusion
from .sampling_blockgen import sample_categorical
from .block_decoding_blockgen import BlockDecoder
from .denoising_blockgen import Purpose
from .draft_lengths_blockgen import DraftLength, RoundCosts
from .generation_configuration_blockgen import BlockGenGenerationConfig
from .logits_blockgen import ROW_PROCESSORS, BlockText, Prediction, looks_at_text, process_logits


class SpeculativeDecoder(BlockDecoder):
    """
    One call of `generate` with `decoding="speculative"`. After [`~SpeculativeDecoder.run`] it holds, beside what a
    [`BlockDecoder`] holds, `num_drafted_tokens` and `num_accepted_tokens` `[B]`.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: BlockGenGenerationConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        drafting = generation_config.drafting()
        super().__init__(model, input_ids, logits_processor, stopping_criteria, drafting, *args, **kwargs)
        self.shows_steps = False  # a draft is shown when it is finished
        # Drafts need not be right: processors that look at the text before a token have their say in the verification.
        self.verifying_processors = self.logits_processor
        self.logits_processor = LogitsProcessorList(
            processor for processor in self.verifying_processors if type(processor) in ROW_PROCESSORS
        )
        self.rejects = generation_config.acceptance == "rejection" and drafting.do_sample
        self.has_steps = generation_config.draft_steps > 1 or generation_config.draft_decoding == "arpc"
        rows, device = input_ids.shape[0], input_ids.device
        draft_passes = drafting.function_evaluations(generation_config.draft_steps) * self.has_steps
        # No clock has a say where the text depends on what is drafted.
        self.costs = (RoundCosts if self.rejects else model.measured_round_costs)(device, draft_passes)
        longest = self.block_size if self.has_steps else max(1, self.block_size - 1)
        ways = self._ways(generation_config.fused_drafts, device)
        # A row that does not draft saves nothing as long as another one does: the rows of a batch draft as one. Where
        # the text depends on what is drafted, each row decides for itself, as it would alone.
        self.lengths = [DraftLength(longest, self.costs, ways) for _ in range(rows if self.rejects else 1)]
        self._counts = [[0, 0] for _ in range(rows)]  # drafted and accepted tokens
        # The next draft `[A, n]`, how much of it each row of the batch has, and what its tokens were drawn from.
        self.draft = input_ids.new_empty(rows, 0)
        self.in_hand = [0] * rows
        self.proposal: Prediction | None = None

    def _ways(self, is_fused: bool | None, device: torch.device) -> tuple[bool, ...]:
        """Whether drafts are fused with a verification: as asked for, or whatever turns out to be faster."""
        if self.has_steps:
            return (False,)
        if is_fused is None:
            return (device.type != "cpu",) if self.rejects else (False, True)
        return (is_fused,)

    @property
    def num_drafted_tokens(self) -> torch.Tensor:
        return torch.tensor([drafted for drafted, _ in self._counts], device=self.state.tokens.device)

    @property
    def num_accepted_tokens(self) -> torch.Tensor:
        return torch.tensor([accepted for _, accepted in self._counts], device=self.state.tokens.device)

    @torch.no_grad()
    def run(self) -> None:
        # The first round reads the prompt, the second tells how long a round without a draft takes.
        for number in range(self.state.max_new_tokens):
            if self.state.is_finished:
                break
            num_rows = self.state.active.numel()
            self.costs.start()
            passes, tokens = self._round(may_draft=number >= self.num_seeded)
            if self.state.active.numel() < num_rows:
                self.costs.forget()
            elif number:
                self.costs.stop(passes, tokens)
        if self.streamer is not None:
            self.streamer.end()

    def _round(self, may_draft: bool) -> tuple[int, int]:
        """
        A pass that verifies a draft, makes the next one, or both; at least one token of every row.

        Returns:
            how many passes and tokens of all rows it had more than a round of autoregressive decoding.
        """
        rows, room = self.state.active.tolist(), self.state.room().tolist()
        passes, tokens = 0, 0
        if may_draft and self.costs.is_ready:
            if self.has_steps:
                passes, tokens = self._make_draft(max(room) - 1)
            widths = self._widths(rows, room)
        else:
            widths = [0] * len(rows)
        # The last token of a row is never drafted: the verification ends with it.
        limits = [min(self.in_hand[row], left - 1) for row, left in zip(rows, room, strict=True)]
        if max(limits) > 0 or max(widths) > 0:
            return passes, tokens + self._draft_round(rows, limits, widths)
        self._plain_round(rows)
        return 0, 0

    def _widths(self, rows: list[int], room: list[int]) -> list[int]:
        """How long the next draft of each row shall be, 0: none. A row that verifies one makes another if fused."""
        if self.has_steps:
            return [0] * len(rows)
        if self.rejects:
            found = [self.lengths[row].best() for row in rows]
        else:
            found = [self.lengths[0].best(len(rows))] * len(rows)
        bounds = room if self.rejects else [max(room)] * len(rows)
        return [
            max(0, min(length, bound - 2)) if is_fused or not self.in_hand[row] else 0
            for row, (length, is_fused), bound in zip(rows, found, bounds, strict=True)
        ]

    def _plain_round(self, rows: list[int]) -> None:
        """A token of every row, at the price that it has with `decoding="ar"`."""
        self._drop_draft()
        if len(rows) > 1 and looks_at_text(self.verifying_processors):
            self._draft_round(rows, [0] * len(rows), [0] * len(rows))  # each row has another text before the token
        else:
            drafting, self.logits_processor = self.logits_processor, self.verifying_processors
            token = self._autoregressive_token()
            self.logits_processor = drafting
            self._record(token[:, :0], token, [1] * len(rows))
            self._accept(token, "ar")
        for length in [self.lengths[row] for row in rows] if self.rejects else self.lengths:
            length.wait()

    def _draft_round(self, rows: list[int], limits: list[int], widths: list[int]) -> int:
        """
        A pass that verifies so much of the draft of each row as `limits` says, and drafts so much as `widths` says.

        Returns:
            how many tokens of all rows it had more than a round of autoregressive decoding.
        """
        state = self.state
        draft = self.draft[:, : max(limits)]
        is_fused = any(limit and width for limit, width in zip(limits, widths, strict=True))
        num_read = state.pending.shape[1]
        if draft.shape[1]:
            is_drafted = self._range(draft.shape[1]) < torch.tensor(limits, device=draft.device)[:, None]
            self._show("draft", draft, noise=torch.zeros_like(is_drafted), free=is_drafted)
        logits, drafts = self._pass(draft, widths, num_blocks=len(draft[0]) + 1 if is_fused else 1)
        tokens, accepted = self._verify_draft(logits, draft, limits)
        kept = accepted.tolist()
        counts = [count + 1 for count in kept]
        if not state.is_ragged:
            going_on = [count for count, done in zip(counts, state.done.tolist(), strict=True) if not done]
            counts = [min(going_on)] * len(counts)
        self._record(draft, tokens, counts)

        before, known = state.active, state.num_new_tokens.clone()
        new_tokens = self._accept_some(tokens, counts)
        taken = (state.num_new_tokens - known)[before].tolist()
        kept = [min(numbers) for numbers in zip(kept, counts, taken, strict=True)]
        if self.recorder is not None:
            self.recorder.verified(state, rows, draft, limits, kept, taken)
        for row, limit, count, number in zip(rows, limits, kept, taken, strict=True):
            self._counts[row][0] += limit if number else 0
            self._counts[row][1] += count
        self._learn(rows, limits, kept, is_fused)
        if new_tokens.shape[1]:
            self._put(new_tokens)
        self._next_draft(drafts, [count - 1 for count in counts], widths, torch.isin(before, state.active))
        num_noisy = logits.shape[1] + (0 if drafts is None else drafts.shape[1] * drafts.shape[2])
        return (num_read + draft.shape[1] + num_noisy - 2) * len(rows)

    def _accept_some(self, tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """So many of the tokens `[A, n]` of each row become text."""
        tokens = tokens[:, : max(counts)]
        if min(counts) == max(counts):
            return self.state.accept(tokens, self.stopping_criteria)
        return self.state.accept(tokens, self.stopping_criteria, torch.tensor(counts, device=tokens.device))

    def _learn(self, rows: list[int], limits: list[int], kept: list[int], is_fused: bool) -> None:
        if not self.rejects:
            if max(limits):
                self.lengths[0].record(limits, kept, is_fused)
            return
        for row, limit, count in zip(rows, limits, kept, strict=True):
            if limit:
                self.lengths[row].record([limit], [count], is_fused)
            else:
                self.lengths[row].wait()

    # drafts

    def _make_draft(self, bound: int) -> tuple[int, int]:
        """A draft by several denoising steps, in passes of its own: how many, and their tokens."""
        state, num_rows = self.state, self.state.active.numel()
        length = min(self.lengths[0].best(num_rows)[0], bound)
        if length <= 0:
            return 0, 0
        evaluations = state.num_function_evaluations.max()
        generator, goes_on = self._generator(length), ~state.done
        numbers = generator.fold_in(self._purpose).uniform()
        noise = self._prior(length, Purpose.PRIOR)
        block = self._block(generator, goes_on[:, None].expand_as(noise), numbers=numbers)
        is_verified = self._range(length) < state.room()[:, None] - 1
        self._show("noise", noise, noise=block.free, free=block.free & is_verified)
        self.draft, self.in_hand = self._denoise_by_steps(block, noise), [length] * len(self.in_hand)
        self._show_draft()
        passes = int(state.num_function_evaluations.max() - evaluations)
        return passes, passes * length * num_rows

    @property
    def _purpose(self) -> Purpose:
        """
        What the tokens of a draft are drawn with. With the number of the autoregressive draw two laws that are alike
        give the same token most often; a test of probabilities needs a number of its own.
        """
        return Purpose.DRAFT if self.rejects else Purpose.AR_TOKEN

    def _drop_draft(self) -> None:
        self.draft, self.proposal = self.state.tokens.new_empty(self.state.active.numel(), 0), None
        self.in_hand = [0] * len(self.in_hand)

    def _next_draft(
        self, drafts: torch.Tensor | None, kept: list[int], widths: list[int], stays: torch.Tensor
    ) -> None:
        """
        The draft behind the prefix that was kept.

        Args:
            drafts (`torch.Tensor` of shape `[A, n + 1 or 1, m, V]`, *optional*): logits behind every prefix, or behind
                the text.
            kept (`list[int]`): how many drafted tokens of each of the A rows were kept.
            widths (`list[int]`): how long their drafts are.
            stays (`torch.BoolTensor` of shape `[A]`): rows that did not end.
        """
        self._drop_draft()
        if drafts is None or self.state.is_finished:
            return
        # Where there is no draft behind what was kept, none was asked for.
        place = torch.tensor(kept, device=stays.device).clamp(max=drafts.shape[1] - 1)
        logits = drafts[torch.arange(len(drafts), device=stays.device), place][stays]
        numbers = self._numbers(self._purpose, logits.shape[1])
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        canvas = torch.zeros_like(everywhere, dtype=torch.long)
        self.proposal = self._predicted(logits.flatten(0, 1), everywhere, canvas)
        if self.recorder is not None:
            self.recorder.predict("diffusion", self.state, everywhere, self.proposal)
        self.draft = self.proposal.sample(numbers).view_as(canvas)
        staying = [width for width, row_stays in zip(widths, stays.tolist(), strict=True) if row_stays]
        for row, width in zip(self.state.active.tolist(), staying, strict=True):
            self.in_hand[row] = width
        self._show_draft()

    def _show_draft(self) -> None:
        if hasattr(self.streamer, "put_draft") and self.draft.shape[1]:
            self._show_block(self.streamer, self._one_hot(self.draft, self.model.config.vocab_size), None)

    # verification

    def _verify_draft(
        self, logits: torch.Tensor, draft: torch.Tensor, limits: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        From the logits behind every prefix of a draft `[A, n]`, n = 0 included, of which each row uses so much as
        `limits` says.

        Returns:
            the tokens of decoding autoregressively `[A, n + 1]`, right up to the first that is not in the draft, and
            how many of the draft are accepted, `[A]`.
        """
        state, num_drafted = self.state, draft.shape[1]
        prediction = self._verified(logits, draft)
        if self.rejects and num_drafted:
            tokens, accepted = self._test_probabilities(prediction, draft, limits)
        else:
            tokens = prediction.sample(self._ar_numbers(num_drafted + 1)).view(len(draft), -1)
            accepted = (tokens[:, :num_drafted] == draft).long().cumprod(-1).sum(-1)
            if min(limits) < num_drafted:
                accepted = accepted.minimum(torch.tensor(limits, device=accepted.device))
        if self.recorder is not None:
            self.recorder.judge(state, tokens, prediction)
        return torch.where(state.done[:, None], state.pad_token_id, tokens), accepted

    def _test_probabilities(
        self, prediction: Prediction, draft: torch.Tensor, limits: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Speculative sampling (Leviathan et al., 2023): a token is kept with the probability min(1, p / q); the first
        that is not is replaced by a draw from (p - q)+, and behind the whole draft there is one from p.

        Returns:
            tokens `[A, n + 1]`, those behind the first that is not kept without meaning, and how many are kept, `[A]`.
        """
        num_rows, num_drafted = draft.shape
        logits = prediction.logits.unflatten(0, (num_rows, num_drafted + 1))
        p = Prediction(logits[:, :-1].flatten(0, 1), True).log_prob(draft.flatten()).view_as(draft)
        if self.proposal is None:
            raise RuntimeError("a draft has no distribution that it was drawn from.")
        proposal = self.proposal.logits.unflatten(0, (num_rows, -1))[:, :num_drafted]
        q = Prediction(proposal.flatten(0, 1), True).log_prob(draft.flatten()).view_as(draft)
        usable = torch.tensor(limits, device=draft.device)
        generator = self._generator(num_drafted + 1)
        passes = generator.fold_in(Purpose.ACCEPT).uniform()[:, :num_drafted] * q.exp() < p.exp()
        accepted = (passes & (self._range(num_drafted) < usable[:, None])).long().cumprod(-1).sum(-1)

        # One draw for each row: what stands behind the tokens that are kept.
        row, is_rejected = self._range(num_rows), accepted < usable
        target = logits[row, accepted].softmax(-1)
        proposed = proposal[row, accepted.clamp(max=num_drafted - 1)].softmax(-1)
        residual = torch.where(is_rejected[:, None], (target - proposed).clamp(min=0), target)
        # Where the laws are the same but for rounding, nothing is ever rejected, and nothing is left to draw from.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
        redrawn, drawn = (generator.fold_in(purpose).uniform() for purpose in (Purpose.RESIDUAL, Purpose.AR_TOKEN))
        number = torch.where(is_rejected[:, None], redrawn, drawn)[row, accepted]
        last = sample_categorical(residual, number)
        whole = torch.nn.functional.pad(draft, (0, 1))
        return torch.where(self._range(num_drafted + 1) < accepted[:, None], whole, last[:, None]), accepted

    def _pass(
        self, draft: torch.Tensor, widths: list[int], num_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Logits of the queries behind every prefix of a draft `[A, n]`, `[A, n + 1, V]`, and of the blocks that the
        first `num_blocks` of the queries begin, `[A, num_blocks, m, V]`.
        """
        state, num_queries, width = self.state, draft.shape[1] + 1, max(widths)
        self._commit_what_cannot_ride()
        if num_queries == 1 and not width:  # as `decoding="ar"`, whose mask is simpler
            return self._next_token_logits(), None
        if state.is_anchored:
            return self._anchored_pass(draft, widths, num_blocks)
        index = self._range(num_queries)
        blocks = None
        if width:
            begins = index[:num_blocks].repeat_interleave(width)
            behind = self._range(width).repeat(num_blocks)
            place = torch.nn.functional.pad(behind, (num_queries, 0), value=-1)
            blocks = self._own_blocks(torch.cat([index, begins]), place, widths)
            index = torch.cat([index, begins + behind + 1])
        positions = state.next_positions(num_queries + width)
        outputs = self._forward(
            input_ids=torch.cat([state.pending, draft], dim=1),
            noisy_input_ids=self._noise(positions[:, :num_queries], index[num_queries:]),
            noisy_position_ids=positions[:, index],
            noisy_block_ids=blocks,
            isolate_first=blocks is not None,
            block_size=1 if blocks is None else self.block_size,
            attention_mask=state.mask_with(draft.shape[1]),
            use_cache=state.cache is not None,
            num_committed=state.pending.shape[1] if state.cache is not None else None,
            noise_level=1.0,
        )
        state.count_evaluation()
        state.mark_pending_committed()
        logits = outputs.logits
        if not width:
            return logits, None
        return logits[:, :num_queries], logits[:, num_queries:].unflatten(1, (num_blocks, width))

    def _own_blocks(self, ids: torch.Tensor, place: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """
        The blocks `[N]` of noised tokens, each with its `place` in the draft, `[N]`: `[1, N]`, or `[A, N]` where the
        drafts of the rows are not equally long. What a row has too many stands alone.
        """
        if not self.rejects or min(widths) == max(widths):
            return ids[None]
        longest = torch.tensor(widths, device=ids.device)[:, None]
        return torch.where(place < longest, ids, self._range(len(ids)) + len(ids))

    def _noise(self, positions: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """
        The queries of the next tokens, at `positions` `[A or 1, n + 1]`, and the noised tokens that are so many tokens
        `behind` the text, `[A, N]`.
        """
        queries = self._queries(positions)
        if not len(behind):
            return queries
        if isinstance(self.process, MaskedDiffusion):
            prior = self.process.prior((len(queries), len(behind)), queries.device)
        else:
            prior = self._prior(int(behind[-1]) + 1, Purpose.PRIOR)[:, behind]
        return torch.cat([queries, prior], dim=1)

    def _numbers(self, purpose: Purpose, length: int) -> torch.Tensor:
        """What the next `length` tokens are drawn with, `[A length]`; nothing where they are not drawn."""
        if not self.settings.do_sample:
            return torch.empty(0)
        return self._generator(length).fold_in(purpose).uniform().flatten()

    def _anchored_pass(
        self, draft: torch.Tensor, widths: list[int], num_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As [`~SpeculativeDecoder._pass`], where clean tokens predict: the draft is read as the text that it may become.
        A canvas behind every prefix begins with its last token, whose prediction is the verification.
        """
        state, num_queries, width = self.state, draft.shape[1] + 1, max(widths) + 1
        if width == 1:
            return self._clean_logits(torch.nn.functional.pad(draft, (0, 1))), None
        clean = state.canvas(torch.nn.functional.pad(draft, (0, 1)))  # the last token of the text, and the draft
        length = num_queries - 1 + width
        prior = self._prior(length, Purpose.PRIOR)
        place = self._range(num_queries)[:, None] + self._range(width)  # behind prefix i: i, i + 1, ...
        canvases = torch.cat([clean[..., None], prior[:, place[:, 1:]]], dim=-1)
        blocks = self._range(num_queries).repeat_interleave(width)
        outputs = self._forward(
            input_ids=torch.cat([state.pending, clean], dim=1),
            noisy_input_ids=canvases.flatten(1),
            noisy_position_ids=state.next_positions(length)[:, place.flatten()],
            noisy_block_ids=self._own_blocks(blocks, self._range(width).repeat(num_queries) - 1, widths),
            block_size=self.block_size,
            attention_mask=state.mask_with(num_queries),
            use_cache=state.cache is not None,
            num_committed=state.pending.shape[1] + 1 if state.cache is not None else None,
            noise_level=1.0,
        )
        state.count_evaluation()
        state.mark_anchor_committed()
        logits = outputs.logits.unflatten(1, (num_queries, width))
        return logits[:, :, 0], logits[:, :num_blocks, 1:]

    def _range(self, length: int) -> torch.Tensor:
        return torch.arange(length, device=self.state.tokens.device)

    def _verified(self, logits: torch.Tensor, draft: torch.Tensor) -> Prediction:
        """x_hat of the queries, `[A (n + 1)]`, through the processors, each with the text before it."""
        state, config = self.state, self.model.config
        logits = logits.float()
        if config.has_mask_row:
            logits[..., config.mask_token_id] = -torch.inf
        if looks_at_text(self.verifying_processors):
            columns = state.columns(draft.shape[1] + 1)
            text = state.tokens.clone()
            text[state.active[:, None], columns[:, :-1]] = draft
            for column in columns.unique().tolist():
                row, place = (columns == column).nonzero(as_tuple=True)
                here = BlockText(
                    text[:, :column].clone(),
                    columns[row, place],
                    state.padding,
                    text[state.active[row], column, None],
                    columns[row, place, None],
                    state.active[row],
                )
                one = torch.ones(len(row), 1, dtype=torch.bool, device=row.device)
                logits[row, place] = process_logits(logits[row, place], one, here, self.verifying_processors)
            return Prediction(logits.flatten(0, 1), self.settings.do_sample)
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return self._predicted(logits.flatten(0, 1), everywhere, torch.zeros_like(everywhere, dtype=torch.long))

    def _record(self, draft: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> None:
        """Two states a round: the draft, and what was kept of it with the token that follows; pads behind."""
        if not self.settings.output_trajectory:
            return
        longest = torch.tensor(counts, device=tokens.device)[:, None]
        kept = torch.where(self._range(tokens.shape[1]) < longest, tokens, self.state.pad_token_id)
        drafted = torch.nn.functional.pad(draft, (0, 1), value=self.state.pad_token_id)
        self._trajectory.append((self._all_rows(drafted), self._all_rows(kept)))


__all__ = ["SpeculativeDecoder"]
