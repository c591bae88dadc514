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

Block size B drafts, block size 1 verifies. A verification reads the clean tokens and the draft, with a fully noised
query behind every prefix of it: these are the queries of `decoding="ar"`, with the same random numbers. The draft is
kept as long as it agrees, and the first token that does not is replaced by the autoregressive one, so that every round
ends with one token at least. What was kept rides on the next pass, which commits it: no rejected token ever reaches
the cache, of whatever class that is.

Drafts have a pass of their own, or are made by the verification of the draft before: then a block of B noised tokens
stands behind every prefix, and the one behind the prefix that is kept is the next draft (`fused_drafts`).
"""

import time
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .sampling_blockgen import sample_categorical
from .block_decoding_blockgen import BlockDecoder
from .denoising_blockgen import Purpose
from .generation_configuration_blockgen import BlockGenGenerationConfig
from .logits_blockgen import ROW_PROCESSORS, BlockText, Prediction, process_logits


class DraftLengths:
    """
    How long the next draft of each row is: a token more than was accepted lately, none where drafts do not pay.

    A row whose drafts are accepted too rarely to pay for their passes, or three times in a row not at all, decodes
    autoregressively, and tries again after 16 tokens, then 32, and so on up to 256.

    Args:
        num_rows (`int`): rows of the batch.
        longest (`int`): bound of a draft.
        needed (`float`): accepted tokens a round below which a draft does not pay; 0: it always does.
    """

    _MEMORY = 0.85
    _FIRST_WAIT, _LONGEST_WAIT = 16, 256

    def __init__(self, num_rows: int, longest: int, needed: float) -> None:
        self.longest = longest
        self.needed = needed
        self.accepted = [1.5 * needed] * num_rows  # a moving average
        self.failures = [0] * num_rows  # in a row
        self.waiting = [0] * num_rows
        self.next_wait = [self._FIRST_WAIT] * num_rows

    def of_row(self, row: int) -> int:
        return 0 if self.waiting[row] > 0 else max(1, min(self.longest, round(self.accepted[row]) + 2))

    def of_rows(self, rows: list[int]) -> int:
        """The length for all of them: what is verified of one costs little for the others."""
        return max(map(self.of_row, rows), default=0)

    def record(self, row: int, drafted: int, accepted: float) -> None:
        """After a round, which ended with one token more than it accepted."""
        if self.waiting[row] > 0:
            self.waiting[row] = max(0, self.waiting[row] - int(accepted) - 1)
            return
        if drafted == 0:
            return
        # A draft that was accepted whole might have been accepted further.
        reached = accepted + 1 if accepted == drafted else accepted
        self.accepted[row] = self._MEMORY * self.accepted[row] + (1 - self._MEMORY) * reached
        self.failures[row] = 0 if accepted else self.failures[row] + 1
        if self.needed > 0 and (self.accepted[row] < self.needed or self.failures[row] == 3):
            self.waiting[row] = self.next_wait[row]
            self.next_wait[row] = min(2 * self.next_wait[row], self._LONGEST_WAIT)
            self.accepted[row], self.failures[row] = 1.1 * self.needed, 0  # one failure sends it back
        elif reached > self.needed:
            self.next_wait[row] = self._FIRST_WAIT


class RoundCosts:
    """
    What a round with a draft costs on this machine, in rounds without one: hardly more on accelerators; on CPUs more
    the more rows there are. Only where the text does not depend on what is drafted may a clock decide.
    """

    _MEMORY = 0.8

    def __init__(self, device: torch.device) -> None:
        # Of the process on CPUs, which other jobs on the machine disturb less; every round waits for its tokens.
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self._started = 0.0
        self._seconds: dict[bool, float] = {}

    def start(self) -> None:
        self._started = self._clock()

    def stop(self, drafted: bool) -> None:
        seconds = self._clock() - self._started
        before = self._seconds.get(drafted, seconds)
        self._seconds[drafted] = self._MEMORY * before + (1 - self._MEMORY) * seconds

    def needed(self, default: float) -> float:
        """How many accepted tokens a round must bring on average, or the default as long as nothing is known."""
        if len(self._seconds) < 2 or not self._seconds[False]:
            return default
        return max(0.1, self._seconds[True] / self._seconds[False] - 1)


class SpeculativeDecoder(BlockDecoder):
    """
    One call of `generate` with `decoding="speculative"`. After [`~SpeculativeDecoder.run`] it holds, beside what a
    [`BlockDecoder`] holds, `num_drafted_tokens` and `num_accepted_tokens` `[B]`.
    """

    # How many accepted tokens pay for a pass more, and for a block behind every prefix (docs/speed.md).
    _NEEDED_APART, _NEEDED_FUSED = 1.4, 0.6

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
        # Drafts need not be right: processors that look at the text before a token have their say in the verification.
        self.verifying_processors = self.logits_processor
        self.logits_processor = LogitsProcessorList(
            processor for processor in self.verifying_processors if type(processor) in ROW_PROCESSORS
        )
        self.rejects = generation_config.acceptance == "rejection" and drafting.do_sample
        self.has_steps = generation_config.draft_steps > 1 or generation_config.draft_decoding == "arpc"
        is_fused = generation_config.fused_drafts
        if is_fused is None:
            is_fused = input_ids.device.type != "cpu"
        self.is_fused = is_fused and not self.has_steps
        rows, device = input_ids.shape[0], input_ids.device
        self.needed = self._NEEDED_FUSED if self.is_fused else self._NEEDED_APART
        longest = max(1, self.block_size - self.is_fused)
        # A row that does not draft saves nothing as long as another one does: the batch stops drafting as one. Where
        # the text depends on what is drafted, each row decides for itself, as it would alone.
        self.lengths = DraftLengths(rows, longest, self.needed if self.rejects else 0.0)
        self.batch = DraftLengths(1, longest, self.needed)
        self.costs = RoundCosts(device)
        self.num_drafted_tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.num_accepted_tokens = torch.zeros(rows, dtype=torch.long, device=device)
        # Rows whose last round made them a draft, where that is part of a verification.
        self.has_draft = [False] * rows
        # The next draft `[A, n]`, and what its tokens were drawn from `[A, n, V]` where that is asked for.
        self.draft = input_ids.new_empty(rows, 0)
        self.draft_probs: torch.Tensor | None = None

    @torch.no_grad()
    def run(self) -> None:
        # The first round reads the prompt, the second tells what a round without a draft costs.
        num_plain = max(self.num_seeded, 0 if self.rejects else 2)
        num_rounds = 0
        while not self.state.is_finished:
            self.costs.start()
            drafted = self._round(may_draft=num_rounds >= num_plain)
            if num_rounds:
                self.costs.stop(drafted)
            num_rounds += 1
        if self.streamer is not None:
            self.streamer.end()

    def _round(self, may_draft: bool) -> bool:
        """
        Verifies a draft, or draws the next token where there is none; at least one token of every row.

        Returns:
            whether drafts were made or verified.
        """
        state = self.state
        rows = state.active.tolist()
        room = state.room()
        # The last token of a row is never drafted: the verification ends with it.
        may_draft = may_draft and (self.rejects or self.batch.waiting[0] == 0)
        length = min(self.lengths.of_rows(rows), int(room.max()) - 1) if may_draft else 0
        if length == 0 and len(rows) == 1:
            self._autoregressive_round(rows[0])
            return False
        # What is proposed depends on the length of the block. Where the text depends on that, it is the same for all.
        width = self.lengths.longest if self.rejects else length
        if not self.is_fused and length > 0:
            self._make_draft(width)
        draft = self.draft[:, :length]
        num_drafted = draft.shape[1]
        next_length = 0
        if self.is_fused and length > 0:  # behind the longest prefix there is no more room than that
            next_length = width if self.rejects else min(self.lengths.longest, int(room.max()) - 1)
        limits = self._own_lengths(rows, room, num_drafted)
        verified = torch.minimum(room - 1, limits)
        if num_drafted:
            is_drafted = self._range(num_drafted) < verified[:, None]
            self._show("draft", draft, noise=torch.zeros_like(is_drafted), free=is_drafted)
        tokens, accepted, drafts = self._verify_draft(draft, next_length, limits)
        counts = torch.minimum(accepted + 1, room)
        if not state.is_ragged:
            counts = torch.where(state.done, counts.max(), counts).min().expand(len(counts))
        self._record(rows, draft, tokens, counts)

        before, known = state.active, state.num_new_tokens.clone()
        new_tokens = state.accept(tokens, self.stopping_criteria, counts)
        taken = (state.num_new_tokens - known)[before]
        accepted_now = torch.minimum(torch.minimum(accepted, verified), torch.minimum(counts, taken))
        self.num_drafted_tokens[before] += torch.where(taken > 0, verified, 0)
        self.num_accepted_tokens[before] += accepted_now
        for row, drafted, kept in zip(rows, verified.tolist(), accepted_now.tolist(), strict=True):
            self.lengths.record(row, drafted, kept)
        self.batch.needed = self.costs.needed(self.needed)
        self.batch.record(0, num_drafted, float(accepted_now.double().mean()))
        if self.recorder is not None:
            self.recorder.verified(state, rows, draft, verified.tolist(), accepted_now.tolist(), taken.tolist())
        if new_tokens.shape[1]:
            self._put(new_tokens)
        self._next_draft(drafts, counts - 1, torch.isin(before, state.active))
        return length > 0

    def _own_lengths(self, rows: list[int], room: torch.Tensor, num_drafted: int) -> torch.Tensor:
        """
        How much of the draft each row may use, `[A]`. Where the text depends on that, as much as it would have alone:
        so it has the same text in every batch.
        """
        if not self.rejects:
            return torch.full_like(room, num_drafted)
        own = [self.lengths.of_row(row) for row in rows]
        if self.is_fused:
            drafted = [length if self.has_draft[row] else 0 for row, length in zip(rows, own, strict=True)]
            for row, length in zip(rows, own, strict=True):
                self.has_draft[row] = length > 0
            own = drafted
        return torch.minimum(room.new_tensor(own), room - 1).clamp(max=num_drafted)

    def _autoregressive_round(self, row: int) -> None:
        """A token of the only row, at the price that it has with `decoding="ar"`."""
        self.draft, self.draft_probs, self.has_draft[row] = self.draft[:, :0], None, False
        drafting, self.logits_processor = self.logits_processor, self.verifying_processors
        token = self._autoregressive_token()
        self.logits_processor = drafting
        self._record([row], token[:, :0], token, torch.ones_like(token[:, 0]))
        self._accept(token, "ar")
        self.lengths.record(row, 0, 0)
        self.batch.record(0, 0, 0)

    # drafts

    def _make_draft(self, length: int) -> None:
        """A draft in passes of its own, by one denoising step or by several."""
        generator, goes_on = self._generator(length), ~self.state.done
        numbers = generator.fold_in(self._purpose).uniform()
        noise = self.process.prior(numbers.shape, numbers.device, generator.fold_in(Purpose.PRIOR))
        if self.has_steps:
            block = self._block(generator, goes_on[:, None].expand_as(noise), numbers=numbers)
            is_verified = self._range(length) < self.state.room()[:, None] - 1
            self._show("noise", noise, noise=block.free, free=block.free & is_verified)
            self.draft = self._denoise_by_steps(block, noise)
        else:
            everywhere = torch.ones_like(noise, dtype=torch.bool)
            start = torch.ones(len(noise), dtype=torch.float64, device=noise.device)
            self._draw_draft(self._denoise(noise, everywhere, goes_on, start), numbers)
        self._show_draft()

    @property
    def _purpose(self) -> Purpose:
        """
        What the tokens of a draft are drawn with. With the number of the autoregressive draw two laws that are alike
        give the same token most often; a test of probabilities needs a number of its own.
        """
        return Purpose.DRAFT if self.rejects else Purpose.AR_TOKEN

    def _draw_draft(self, prediction: Prediction, numbers: torch.Tensor) -> None:
        self.draft = prediction.sample(numbers.flatten()).view_as(numbers)
        self.draft_probs = None
        if self.rejects:
            self.draft_probs = prediction.log_probs().exp().view(*numbers.shape, -1)

    def _next_draft(self, drafts: torch.Tensor | None, kept: torch.Tensor, stays: torch.Tensor) -> None:
        """
        The draft behind the prefix that was kept.

        Args:
            drafts (`torch.Tensor` of shape `[A, n + 1, m, V]`, *optional*): logits behind every prefix.
            kept (`torch.LongTensor` of shape `[A]`): how many drafted tokens were kept.
            stays (`torch.BoolTensor` of shape `[A]`): rows that did not end.
        """
        self.draft, self.draft_probs = self.state.tokens.new_empty(self.state.active.numel(), 0), None
        if drafts is None or self.state.is_finished:
            return
        logits = drafts[stays][torch.arange(len(self.draft), device=kept.device), kept[stays]]
        numbers = self._generator(logits.shape[1]).fold_in(self._purpose).uniform()
        everywhere = torch.ones_like(numbers, dtype=torch.bool)
        prediction = self._predicted(logits.flatten(0, 1), everywhere, torch.zeros_like(numbers, dtype=torch.long))
        if self.recorder is not None:
            self.recorder.predict("diffusion", self.state, everywhere, prediction)
        self._draw_draft(prediction, numbers)
        self._show_draft()

    def _show_draft(self) -> None:
        if hasattr(self.streamer, "put_draft") and self.draft.shape[1]:
            self._show_block(self.streamer, self._one_hot(self.draft, self.model.config.vocab_size), None)

    # verification

    def _verify_draft(
        self, draft: torch.Tensor, next_length: int, limits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        One pass over a draft `[A, n]`, n = 0 included, of which each row uses so much as `limits` `[A]` says.

        Returns:
            the tokens of decoding autoregressively `[A, n + 1]`, right up to the first that is not in the draft; how
            many of the draft are accepted, `[A]`; and the logits of the next draft, `[A, n + 1, m, V]`.
        """
        state, num_drafted = self.state, draft.shape[1]
        generator = self._generator(num_drafted + 1)
        logits, drafts = self._verification_pass(draft, next_length)
        prediction = self._verified(logits, draft)
        tokens = prediction.sample(generator.fold_in(Purpose.AR_TOKEN).uniform().flatten()).view(len(draft), -1)
        if self.rejects and num_drafted:
            tokens, agrees = self._test_probabilities(prediction, draft, limits, tokens)
        else:
            agrees = tokens[:, :num_drafted] == draft
        if self.recorder is not None:
            self.recorder.judge(state, tokens, prediction)
        accepted = agrees.long().cumprod(-1).sum(-1)
        return torch.where(state.done[:, None], state.pad_token_id, tokens), accepted, drafts

    def _test_probabilities(
        self, prediction: Prediction, draft: torch.Tensor, limits: torch.Tensor, drawn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Speculative sampling (Leviathan et al., 2023): a token is kept with the probability min(1, p / q); the first
        that is not is replaced by a draw from (p - q)+, and behind the whole draft there is one from p, `drawn`.

        Returns:
            tokens `[A, n + 1]`, the replacement at the first that is not kept, and which ones are kept, `[A, n]`.
        """
        num_drafted = draft.shape[1]
        generator = self._generator(num_drafted + 1)
        target = prediction.log_probs().exp().view(len(draft), num_drafted + 1, -1)
        is_proposed = self._range(num_drafted + 1) < limits[:, None]
        proposed = torch.zeros_like(target)
        if self.draft_probs is not None:
            proposed[:, :num_drafted] = self.draft_probs[:, :num_drafted]
        p = target[:, :num_drafted].gather(-1, draft[..., None]).squeeze(-1)
        q = proposed[:, :num_drafted].gather(-1, draft[..., None]).squeeze(-1)
        kept = is_proposed[:, :-1] & (generator.fold_in(Purpose.ACCEPT).uniform()[:, :num_drafted] * q < p)
        residual = (target - proposed).clamp(min=0)
        # Where the laws are the same but for rounding, nothing is ever rejected, and nothing is left to draw from.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
        replaced = sample_categorical(residual, generator.fold_in(Purpose.RESIDUAL).uniform())
        tokens = torch.where(is_proposed, replaced, drawn)
        first = torch.nn.functional.pad(kept.long().cumprod(-1), (0, 1)).bool()
        tokens = torch.where(first, torch.nn.functional.pad(draft, (0, 1)), tokens)
        return tokens, kept

    def _verification_pass(self, draft: torch.Tensor, next_length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the queries behind every prefix, `[A, n + 1, V]`, and of blocks behind them."""
        state = self.state
        num_rows, num_queries = len(draft), draft.shape[1] + 1
        # The block starts with the token that the verification draws: it is not predicted, and makes the block longer.
        width = next_length + 1 if next_length else 0
        self._commit_what_cannot_ride()
        if num_queries == 1 and not width:  # as `decoding="ar"`, whose mask is simpler
            return self._next_token_logits(), None
        if state.is_anchored:
            return self._anchored_verification_pass(draft, width)
        positions = state.next_positions(num_queries + width)
        queries = self._queries(positions[:, :num_queries])
        noisy, where, blocks = [queries], [positions[:, :num_queries]], [self._range(num_queries)[None]]
        if width:
            keys = self._generator(num_queries + width).fold_in(Purpose.PRIOR)
            prior = self.process.prior((num_rows, num_queries + width), draft.device, keys)
            place = self._range(num_queries)[:, None] + self._range(width)  # behind prefix i: i, i + 1, ...
            noisy.append(prior[:, place.flatten()])
            where.append(positions[:, place.flatten()])
            blocks.append((num_queries + self._range(num_queries)).repeat_interleave(width)[None])
        outputs = self._forward(
            input_ids=torch.cat([state.pending, draft], dim=1),
            noisy_input_ids=torch.cat(noisy, dim=1),
            noisy_position_ids=torch.cat(where, dim=1),
            noisy_block_ids=torch.cat(blocks, dim=1),
            block_size=self.block_size,
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
        behind = logits[:, num_queries:].unflatten(1, (num_queries, width))
        return logits[:, :num_queries], behind[:, :, 1:]

    def _anchored_verification_pass(self, draft: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As [`~SpeculativeDecoder._verification_pass`], where clean tokens predict: the draft is read as the text that
        it may become. A canvas behind every prefix begins with its last token, whose prediction is the verification.
        """
        state, num_queries = self.state, draft.shape[1] + 1
        clean = state.canvas(torch.nn.functional.pad(draft, (0, 1)))  # the last token of the text, and the draft
        if not width:
            return self._clean_logits(torch.nn.functional.pad(draft, (0, 1))), None
        length = num_queries - 1 + width
        keys = self._generator(length).fold_in(Purpose.PRIOR)
        prior = self.process.prior((len(draft), length), draft.device, keys)
        place = self._range(num_queries)[:, None] + self._range(width)  # behind prefix i: i, i + 1, ...
        canvases = torch.cat([clean[..., None], prior[:, place[:, 1:]]], dim=-1)
        outputs = self._forward(
            input_ids=torch.cat([state.pending, clean], dim=1),
            noisy_input_ids=canvases.flatten(1),
            noisy_position_ids=state.next_positions(length)[:, place.flatten()],
            noisy_block_ids=self._range(num_queries).repeat_interleave(width)[None],
            block_size=self.block_size,
            attention_mask=state.mask_with(num_queries),
            use_cache=state.cache is not None,
            num_committed=state.pending.shape[1] + 1 if state.cache is not None else None,
            noise_level=1.0,
        )
        state.count_evaluation()
        state.mark_anchor_committed()
        logits = outputs.logits.unflatten(1, (num_queries, width))
        return logits[:, :, 0], logits[:, :, 1:]

    def _range(self, length: int) -> torch.Tensor:
        return torch.arange(length, device=self.state.tokens.device)

    def _verified(self, logits: torch.Tensor, draft: torch.Tensor) -> Prediction:
        """x_hat of the queries, `[A (n + 1)]`, through the processors, each with the text before it."""
        state, config = self.state, self.model.config
        logits = logits.float()
        if config.has_mask_row:
            logits[..., config.mask_token_id] = -torch.inf
        if len(self.logits_processor) < len(self.verifying_processors):
            columns = state.columns(draft.shape[1] + 1)
            text = state.tokens.clone()
            text[state.active[:, None], columns[:, :-1]] = draft
            for column in columns.unique().tolist():
                row, place = (columns == column).nonzero(as_tuple=True)
                here = BlockText(
                    text[:, :column].clone(),
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

    def _record(self, rows: list[int], draft: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Two states a round: the draft, and what was kept of it with the token that follows; pads behind."""
        if not self.settings.output_trajectory:
            return
        kept = torch.where(self._range(tokens.shape[1]) < counts[:, None], tokens, self.state.pad_token_id)
        drafted = torch.nn.functional.pad(draft, (0, 1), value=self.state.pad_token_id)
        self._trajectory.append((self._all_rows(drafted), self._all_rows(kept)))


__all__ = ["DraftLengths", "SpeculativeDecoder"]
