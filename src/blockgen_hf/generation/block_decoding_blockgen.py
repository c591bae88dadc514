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
The block loop (BlockGen, Sec. 4 and Algorithm 1): AR seeding, then a block at a time: canvas, denoise, propose,
verify, re-noise, commit.

Draws are keyed by (seed, row, new token, step, purpose), see `sampling_blockgen`.
"""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import is_flash_attention_requested

from ..modeling.diffusion_blockgen import MaskedDiffusion
from ..modeling.sampling_blockgen import CounterGenerator
from .correctors_blockgen import penalties, worst_positions
from .decoding_state_blockgen import DecodingState, row_generator
from .denoising_blockgen import Block, Purpose, TimeGrid, denoise, denoise_adaptively, hit_first
from .frames_blockgen import FrameRecorder
from .generation_configuration_blockgen import AR_CORRECTORS, DISTRIBUTION_CORRECTORS
from .logits_blockgen import BlockText, Prediction, looks_at_text, process_logits, without_padding


# So many clean tokens are committed by the first denoising pass of the block behind them. More are worth a pass of
# their own, whose causal attention needs no mask.
_MAX_RIDERS = 256


class BlockDecoder:
    """
    One call of `generate`. The arguments are those of `GenerationMixin._sample`.

    After [`~BlockDecoder.run`], `sequences()`, `num_function_evaluations`, `num_new_tokens`, `trajectory()`,
    `frames()` and `returned_cache()` hold the result.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool = True,
        logits_to_keep: int | None = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> None:
        unused = [name for name, value in model_kwargs.items() if value is not None]
        if unused:
            raise ValueError(f"`decoding={generation_config.decoding!r}` does not take {unused}.")
        self.model = model
        self.process = model.diffusion
        self.settings = generation_config
        self.stopping_criteria = stopping_criteria
        self.streamer = streamer
        # Whether the streamer sees the block after every step.
        self.shows_steps = hasattr(streamer, "put_draft")
        self.block_size = generation_config.block_size
        config = model.config
        self.block_grid = config.block_sizes[0] if config.clean_attention == "block_causal" else 1
        cache = cache if use_cache else None
        max_new_tokens = generation_config.max_length - input_ids.shape[1]
        mask_length = attention_mask.shape[1] if attention_mask is not None else generation_config._mask_length
        self._new_state = partial(
            DecodingState,
            input_ids,
            attention_mask,
            cache,
            num_cached=0 if cache is None else int(cache.get_seq_length()),
            prompt_is_cached=mask_length == input_ids.shape[1],
            pad_token_id=self._pad_token_id(input_ids.shape[0]),
            grid=self.block_grid,
            is_anchored=config.predicts_from_clean,
            keep_all_rows=getattr(cache, "_is_user_defined", False) or self._may_have_row_adapters(model),
            window=generation_config.cache_window,
        )
        self.state = self._new_state(max_new_tokens=max_new_tokens, spare=self.block_size)
        # Log-probabilities with which the new tokens were drawn, `[B, new]`, where they are asked for.
        self.confidence: torch.Tensor | None = None
        self.logits_processor = without_padding(logits_processor, input_ids, self.state.padding)
        self.rows = row_generator(model.draw_seed(), input_ids, attention_mask)
        self._numbers_ahead: torch.Tensor | None = None
        self.num_seeded = max_new_tokens if generation_config.decoding == "ar" else generation_config.ar_seed_tokens
        self._trajectory: list[tuple[torch.Tensor, ...]] = []
        self.recorder = self._frame_recorder(input_ids)
        self._modulations = model.base_model.constant_modulations(input_ids.device)
        if generation_config.decoding != "ar":
            num_steps = generation_config.num_denoising_steps()
            self.grid = TimeGrid.of(self.process.schedule, num_steps, input_ids.device)

    def _frame_recorder(self, input_ids: torch.Tensor) -> FrameRecorder | None:
        """Where frames are asked for, or the streamer takes them."""
        listener = getattr(self.streamer, "put_frame", None)
        if not self.settings.output_trajectory and listener is None:
            return None
        mask = self.process.mask_token_id if isinstance(self.process, MaskedDiffusion) else None
        return FrameRecorder(input_ids, self.state.padding, self.settings, mask, listener)

    @staticmethod
    def _may_have_row_adapters(model: PreTrainedModel) -> bool:
        """PEFT gives rows adapters by their place in the batch (`adapter_names`), and tells only its own layers."""
        return len(getattr(model, "peft_config", {})) > 1

    def _pad_token_id(self, batch_size: int) -> int:
        pad = self.settings._pad_token_tensor
        if pad is not None:
            return int(pad)
        bounds = (MaxLengthCriteria, MaxTimeCriteria)
        if batch_size > 1 and not all(isinstance(criterion, bounds) for criterion in self.stopping_criteria):
            raise ValueError("`pad_token_id` must be set: rows of the batch may end at different lengths.")
        return 0

    # results

    @property
    def num_function_evaluations(self) -> torch.Tensor:
        return self.state.num_function_evaluations

    @property
    def num_new_tokens(self) -> torch.Tensor:
        return self.state.num_new_tokens

    def sequences(self) -> torch.Tensor:
        return self.state.sequences()

    def trajectory(self) -> tuple[tuple[torch.Tensor, ...], ...] | None:
        return tuple(self._trajectory) if self.settings.output_trajectory else None

    def frames(self, generation_config: GenerationConfig) -> tuple[dict[str, Any], ...] | None:
        """Those of a call with these settings, which may be others than those of a draft."""
        if self.recorder is None or not generation_config.output_trajectory:
            return None
        return self.recorder.documents(generation_config)

    def returned_cache(self) -> Any:
        lost_rows = self.state.dropped_rows and not self.state.keep_all_rows
        return None if lost_rows or self.state.cache_start is not None else self.state.cache

    # the loop

    @torch.no_grad()
    def run(self) -> None:
        self._generate_blocks()
        if self.streamer is not None:
            self.streamer.end()

    def _generate_blocks(self) -> None:
        for _ in range(min(self.num_seeded, self.state.max_new_tokens)):
            if self.state.is_finished:
                break
            self._accept(self._autoregressive_token(), "ar")
        while not self.state.is_finished:
            self._accept(self._denoise_block(self._block_length()))

    def _block_length(self) -> int:
        """The last block is as long as what is left; on the grid of a block-causal model every block is whole."""
        return min(self.block_size, self.state.columns_left) if self.block_grid == 1 else self.block_size

    def _accept(self, tokens: torch.Tensor, event: str = "commit") -> None:
        self._put(self._take(tokens, event))

    def _take(self, tokens: torch.Tensor, event: str) -> torch.Tensor:
        """The next tokens `[A, n]` become text; see [`DecodingState.accept`]."""
        state = self.state
        if self.recorder is None:
            return state.accept(tokens, self.stopping_criteria)
        going_on = ~state.done
        rows, columns = state.active[going_on], state.columns(tokens.shape[1])[going_on]
        new_tokens = state.accept(tokens, self.stopping_criteria)
        self.recorder.take(state, rows, columns, event)
        return new_tokens

    def _show(self, event: str, tokens: torch.Tensor, **facts: Any) -> None:
        """A frame of the block in work; see [`FrameRecorder.canvas`]."""
        if self.recorder is not None:
            self.recorder.canvas(event, self.state, tokens, **facts)

    def _put(self, new_tokens: torch.Tensor) -> None:
        """Streams new tokens `[B, n]`."""
        if self.streamer is not None:
            self.streamer.put((new_tokens[0] if new_tokens.shape[0] == 1 else new_tokens).cpu())

    def _autoregressive_token(self) -> torch.Tensor:
        """The next token of every row by block size 1, `[A, 1]`."""
        state = self.state
        logits = self._next_token_logits()
        canvas = state.tokens[state.active[:, None], state.columns(1)]
        everywhere = torch.ones_like(canvas, dtype=torch.bool)
        prediction = self._predicted(logits.flatten(0, 1), everywhere, canvas)
        tokens = prediction.sample(self._ar_numbers(1))
        if self.confidence is not None:
            self.confidence[state.active[:, None], state.columns(1) - state.prompt_width] = prediction.log_prob(
                tokens
            )[:, None]
        if self.recorder is not None:
            self.recorder.judge(state, tokens[:, None], prediction)
        return tokens[:, None]

    def _next_token_logits(self) -> torch.Tensor:
        """One pass of the causal language model, `[A, 1, V]`; it commits the tokens before."""
        state = self.state
        if state.is_anchored:
            return self._clean_logits(self.state.tokens[state.active[:, None], state.columns(1)])
        outputs = self._forward(
            input_ids=state.pending,
            query_input_ids=self._queries(state.next_positions(1)),
            attention_mask=state.context_mask,
            use_cache=state.cache is not None,
            logits_to_keep=1,
        )
        state.count_evaluation()
        state.mark_pending_committed()
        return outputs.logits

    def _clean_logits(
        self, tokens: torch.Tensor, rows: torch.Tensor | None = None, commits: bool = True
    ) -> torch.Tensor:
        """
        One pass of the causal language model whose clean tokens predict: logits of these tokens `[A, n]`, each from
        those before it, `[A, n, V]`. It commits the tokens before all of them, if asked to.
        """
        state, length = self.state, tokens.shape[1]
        commits = commits and state.cache is not None
        outputs = self._forward(
            input_ids=torch.cat([state.pending, state.canvas(tokens)], dim=1),
            attention_mask=state.mask_with(length),
            use_cache=commits,
            num_committed=state.pending.shape[1] + 1 if commits else None,
            logits_to_keep=length,
        )
        state.count_evaluation(rows)
        if commits:
            state.mark_anchor_committed()
        return outputs.logits

    def _queries(self, positions: torch.Tensor) -> torch.Tensor:
        """
        The fully noised tokens by which the next tokens, at these positions `[A or 1, n]`, are predicted
        autoregressively, `[A, n]`.
        """
        # Greedy decoding takes the model's own fixed queries: the text is then that of repeated `forward` calls.
        if not self.settings.do_sample:
            return self.model.fixed_queries(positions).expand(self.state.active.numel(), -1)
        return self._prior(positions.shape[1], Purpose.AR_QUERY)

    def _denoise_block(self, length: int) -> torch.Tensor:
        """Algorithm 1: from a fully noised block to a clean one, `[A, length]`."""
        state = self.state
        columns = state.columns(length)
        fixed = state.fixed(columns)
        # Rows that are done, and stay for the sake of their cache, need no pass: their pads are fixed too.
        free = (~state.done[:, None]).expand_as(columns) if fixed is None else ~(fixed | state.done[:, None])
        return self._denoise_canvas(state.tokens[state.active[:, None], columns], free)

    def _denoise_canvas(self, tokens: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """The next tokens `[A, n]`, of which those that are `free` are replaced by noise and denoised."""
        state, settings = self.state, self.settings
        generator = self._generator(tokens.shape[1])
        z_t = torch.where(free, self._prior(tokens.shape[1], Purpose.PRIOR), tokens)
        self._show("noise", z_t, noise=free, free=free)
        states = [z_t] if settings.output_trajectory else None
        where = state.active[:, None], state.columns(tokens.shape[1]) - state.prompt_width
        confidence = None if self.confidence is None else self.confidence[where]
        block = self._block(generator, free, states, confidence=confidence)
        if settings.sampler == "first_hitting":
            z_t = hit_first(block, z_t)
        elif settings.sampler != "ancestral":
            z_t = denoise_adaptively(block, z_t, settings.sampler, settings.acceptance_bound())
        else:
            z_t = self._denoise_by_steps(block, z_t)
        if self.confidence is not None and confidence is not None:
            self.confidence[where] = confidence
        if states is not None:
            self._trajectory.append(tuple(self._all_rows(z) for z in states))
        return z_t

    def _block(
        self, generator: CounterGenerator, free: torch.Tensor, states: list[torch.Tensor] | None = None, **others: Any
    ) -> Block:
        """A [`Block`] of this model and these settings."""
        greedy_end, time_conditioning = self.settings.noise_removal == "greedy", self.model.config.time_conditioning
        return Block(
            self.process,
            self.grid,
            self._denoise,
            generator,
            free,
            greedy_end,
            time_conditioning,
            states,
            show=self._show if self.recorder is not None else None,
            **others,
        )

    def _denoise_by_steps(self, block: Block, z_t: torch.Tensor) -> torch.Tensor:
        """Ancestral steps, and between them the informed ones."""
        num_steps = self.grid.num_steps
        informed = [step for step in range(num_steps) if self.settings.is_informed(step, num_steps)]
        first = 0
        for step in [*informed, num_steps]:
            if first < step:
                z_t = denoise(block, z_t, first, step)
            if step < num_steps:
                z_t = self._informed_step(block, z_t, step)
                if block.states is not None:
                    block.states.append(z_t)
            first = step + 1
        return z_t

    def _informed_step(self, block: Block, z_t: torch.Tensor, step: int) -> torch.Tensor:
        """A clean proposal, and its k worst tokens back to the prior, k matching the noise level of time s."""
        settings, generator = self.settings, block.generator.fold_in(step)
        needs_whole = settings.corrector in DISTRIBUTION_CORRECTORS
        proposal, prediction = self._propose(block, z_t, step, needs_whole)
        is_noise = None if isinstance(self.process, MaskedDiffusion) else torch.zeros_like(block.free)
        self._show("propose", proposal, step=step, noise=is_noise, free=block.free)
        corrector, verification, diffusion_log_probs = settings.corrector, None, None
        if needs_whole and prediction is not None:
            logits = prediction.logits.unflatten(0, z_t.shape)
            diffusion_log_probs = self.process.log_probs(logits.double(), z_t)
        if corrector in AR_CORRECTORS:
            verification = self._verify(proposal, generator.fold_in(Purpose.AR_QUERY), block.free.any(-1))
            if self.recorder is not None:
                self.recorder.judge(self.state, proposal, verification)
        numbers = generator.fold_in(Purpose.SCORE)
        penalty = penalties(corrector, proposal, diffusion_log_probs, verification, numbers.uniform())
        count = ((1 - self.grid.alphas[step + 1]) * self._num_proposed(block)).round().clamp(min=1)
        worst = worst_positions(penalty, count, ~block.free, numbers.uniform(1))
        noise = self.process.prior(proposal.shape, proposal.device, generator.fold_in(Purpose.RENOISE))
        z_s = torch.where(worst, noise, proposal)
        self._show("correct", z_s, step=step + 1, noise=worst, free=block.free)
        return z_s

    def _num_proposed(self, block: Block) -> int | torch.Tensor:
        """L' of which the k worst tokens are a share: one number, or one of each row, `[A, 1]`."""
        return block.free.shape[1]

    def _propose(
        self, block: Block, z_t: torch.Tensor, step: int, needs_whole: bool
    ) -> tuple[torch.Tensor, Prediction | None]:
        """A draw at alpha_s = 1, `[A, n]`, and what it was drawn from: at the masked positions, or everywhere."""
        everywhere = torch.ones_like(block.free)
        is_masked = isinstance(self.process, MaskedDiffusion)
        rows = block.free.any(-1)
        masked = block.masked(z_t)
        where = everywhere
        if is_masked and not needs_whole:
            where, rows = masked, masked.any(-1)
            if not rows.any():
                return z_t, None
        prediction = block.predict(z_t, where, rows, self.grid.times[step].expand(len(z_t)))
        generator = block.generator.fold_in(step, Purpose.PROPOSE)
        if is_masked:
            tokens = prediction if where is masked else prediction[masked.flatten()]
            drawn = tokens.sample(generator.uniform()[masked])
            block.keep_confidence(masked, tokens, drawn)
            return z_t.masked_scatter(masked, drawn), prediction
        z_prob = prediction.prob(z_t.flatten()).view_as(z_t)
        proposal = self.process.sample_transition(
            z_prob, prediction.sample_at, z_t, 1.0, self.grid.alphas[step], generator
        )
        return torch.where(block.free, proposal, z_t), prediction

    # forward passes

    def _forward(self, **arguments: Any) -> Any:
        """A pass of the model over the tokens of the call, behind those of the cache."""
        state = self.state
        return self.model(
            cache=state.cache,
            cache_window=state.window,
            cache_start=state.cache_start,
            modulations=self._modulations,
            **arguments,
        )

    def _denoise(self, z_t: torch.Tensor, where: torch.Tensor, rows: torch.Tensor, time: torch.Tensor) -> Prediction:
        """One denoiser pass, as [`Predict`] says; the first of a block commits the tokens before it."""
        state, config = self.state, self.model.config
        self._commit_what_cannot_ride()
        has_drafts = self.shows_steps
        tells_likely = self.recorder is not None and self.recorder.top_k > 0
        wanted = torch.ones_like(where) if has_drafts or tells_likely else where
        num_wanted = int(wanted.sum())
        # How many tokens are wanted differs from pass to pass, and would be compiled anew each time.
        is_compiled = self.model._compiled_call_impl is not None or hasattr(
            self.model.forward, "_torchdynamo_orig_callable"
        )
        blocks, canvas = self._noisy_blocks(z_t.shape[1]), state.canvas(z_t)
        has_positions = state.pending.shape[1] > 0 or blocks is not None
        # Canvases whose blocks are given begin with a clean token of the call: it is read, and not committed.
        has_anchor = state.is_anchored and blocks is not None
        clean = torch.cat([state.pending, canvas[:, :1]], dim=1) if has_anchor else state.pending
        outputs = self._forward(
            input_ids=clean,
            noisy_input_ids=canvas,
            noisy_position_ids=state.next_positions(z_t.shape[1]) if has_positions else None,
            noisy_block_ids=blocks,
            block_size=self.block_size,
            attention_mask=state.mask_with(1) if has_anchor else state.context_mask,
            use_cache=state.cache is not None,
            num_committed=state.pending.shape[1] if has_anchor and state.cache is not None else None,
            noise_level=time if self.model.config.time_conditioning else None,
            logits_to_keep=0 if is_compiled or num_wanted == wanted.numel() else wanted,
        )
        state.mark_pending_committed()
        state.count_evaluation(rows)
        logits = outputs.logits.flatten(0, -2)
        logits = logits[wanted.flatten()] if len(logits) > num_wanted else logits
        prediction = self._predicted(logits, wanted, z_t)
        if has_drafts:
            self._put_draft(self.streamer, prediction, z_t)
        if self.recorder is not None and tells_likely:
            is_open = rows[:, None] & (z_t == config.mask_token_id if config.diffusion_type == "masked" else wanted)
            self.recorder.predict("diffusion", state, is_open, prediction[is_open.flatten()])
        if has_drafts or tells_likely:
            prediction = prediction[where.flatten()]
        return prediction

    def _noisy_blocks(self, length: int) -> torch.Tensor | None:
        """The blocks of the next tokens, `[A, length]`, where they are not simply one."""
        return None

    def _verify(
        self, proposal: torch.Tensor, generator: CounterGenerator, rows: torch.Tensor | None = None
    ) -> Prediction:
        """One AR pass over the proposal, for these rows `[A]`: p_AR at each of its positions."""
        state = self.state
        length = proposal.shape[1]
        everywhere = torch.ones_like(proposal, dtype=torch.bool)
        if state.is_anchored:
            logits = self._clean_logits(proposal, rows, commits=False)
            return self._predicted(logits.flatten(0, 1), everywhere, proposal)
        outputs = self._forward(
            input_ids=torch.cat([state.pending, proposal], dim=1),
            noisy_input_ids=self.process.prior(proposal.shape, proposal.device, generator),
            noisy_position_ids=state.next_positions(length) if state.pending.shape[1] else None,
            block_size=1,
            attention_mask=state.mask_with(length),
            noise_level=1.0,
        )
        state.count_evaluation(rows)
        return self._predicted(outputs.logits.flatten(0, 1), everywhere, proposal)

    def _commit_what_cannot_ride(self) -> None:
        """Writes finished tokens to the cache, but for those that the next pass commits."""
        state = self.state
        if state.cache is None:
            return
        # Tokens of a block see one another under block-causal attention: they are committed together.
        chunk = self.settings.prefill_chunk_size if self.block_grid == 1 else None
        # A pass that commits and denoises needs a mask.
        riders = 0 if is_flash_attention_requested(self.model.config) else min(chunk or _MAX_RIDERS, _MAX_RIDERS)
        while state.pending.shape[1] > riders:
            tokens = state.pending[:, : chunk or state.pending.shape[1]]
            length = state.num_cached + tokens.shape[1]
            self._forward(
                input_ids=tokens,
                noisy_input_ids=tokens[:, :0],
                attention_mask=None if state.context_mask is None else state.context_mask[:, :length],
                use_cache=True,
                noise_level=1.0,
            )
            state.mark_committed(tokens.shape[1])

    # helpers

    def _generator(self, length: int) -> CounterGenerator:
        """Keys of the next tokens, `[A, length]`: by row and by index among its new tokens."""
        new_index = self.state.columns(length) - self.state.prompt_width
        return self.rows.select(self.state.active).fold_in(new_index)

    def _prior(self, length: int, purpose: Purpose) -> torch.Tensor:
        """The next `length` tokens, fully noised, `[A, length]`."""
        # CODEPATH: uniform noise is drawn; mask tokens are all alike.
        is_drawn = not isinstance(self.process, MaskedDiffusion)
        keys = self._generator(length).fold_in(purpose) if is_drawn else None
        return self.process.prior((self.state.active.numel(), length), self.state.tokens.device, keys)

    def _ar_numbers(self, length: int) -> torch.Tensor:
        """
        What the next `length` tokens are drawn with autoregressively, `[A length]`; nothing where they are not drawn.
        Those of the whole text are computed at once.
        """
        state = self.state
        if not self.settings.do_sample:
            return torch.empty(0)
        if self._numbers_ahead is None:
            index = torch.arange(state.tokens.shape[1] - state.prompt_width, device=state.tokens.device)
            self._numbers_ahead = self.rows.fold_in(index, Purpose.AR_TOKEN).uniform()
        return self._numbers_ahead[state.active[:, None], state.columns(length) - state.prompt_width].flatten()

    def _predicted(self, logits: torch.Tensor, where: torch.Tensor, canvas: torch.Tensor) -> Prediction:
        """x_hat from the raw logits `[M, V]` of some positions of the next block, through the logits processors."""
        config, state = self.model.config, self.state
        logits = logits.float()
        if config.has_mask_row:  # impossible, and it must not fill a place of top-k or top-p
            logits[:, config.mask_token_id] = -torch.inf
        if looks_at_text(self.logits_processor):
            columns = state.columns(canvas.shape[1])
            text = BlockText(*state.clean_context(), state.padding, canvas, columns, state.active)
            logits = process_logits(logits, where, text, self.logits_processor)
        else:
            for processor in self.logits_processor:
                logits = processor(canvas, logits)
        return Prediction(logits, self.settings.do_sample)

    def _put_draft(self, streamer: Any, prediction: Prediction, z_t: torch.Tensor) -> None:
        """The clean text as the model sees it now, to a streamer such as `TextDiffusionStreamer`."""
        # Tokens of the prompt that stand in the block (block-causal models) were streamed already.
        fixed = self.state.fixed(self.state.columns(z_t.shape[1]))
        known = 0 if fixed is None else int(fixed.all(0).sum())
        log_probs = self.process.log_probs(prediction.logits.unflatten(0, z_t.shape), z_t)[:, known:]
        config = self.model.config
        is_mask = (z_t == config.mask_token_id)[:, known:].cpu() if config.diffusion_type == "masked" else None
        self._show_block(streamer, log_probs.cpu(), is_mask)

    def _show_block(self, streamer: Any, log_probs: torch.Tensor, is_mask: torch.Tensor | None) -> None:
        """As much as the streamer takes: log-probabilities `[A, n, V]`, with or without the masks, or the tokens."""
        if getattr(streamer, "_takes_masks", False):
            streamer.put_draft(logits=log_probs, is_mask=is_mask)
        elif getattr(streamer, "_takes_logits", False):
            streamer.put_draft(logits=log_probs)
        else:
            streamer.put_draft(value=log_probs.argmax(-1))

    @staticmethod
    def _one_hot(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Tokens `[A, n]` as log-probabilities `[A, n, V]` on the CPU, for streamers that take these."""
        tokens = tokens.cpu()
        return torch.full((*tokens.shape, vocab_size), -torch.inf).scatter_(-1, tokens[..., None], 0.0)

    def _all_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[A, n]` to `[B, n]`, pads in the rows that are done."""
        rows = tokens.new_full((self.state.tokens.shape[0], tokens.shape[1]), self.state.pad_token_id)
        rows[self.state.active] = torch.where(self.state.done[:, None], self.state.pad_token_id, tokens)
        return rows


__all__ = ["BlockDecoder"]
