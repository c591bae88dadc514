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

from enum import IntEnum
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

from .correctors_blockgen import penalties, worst_positions
from .decoding_state_blockgen import DecodingState, row_generator
from .generation_configuration_blockgen import AR_CORRECTORS
from .logits_blockgen import process_logits
from .sampling_blockgen import CounterGenerator, sample_categorical


# The grid of generation ends here, not at 0 (the last step goes to alpha = 1 whatever its time).
_LAST_TIME = 1e-5


class _Purpose(IntEnum):
    """What a random number is for."""

    PRIOR = 0
    AR_QUERY = 1
    AR_TOKEN = 2
    DENOISE = 3
    PROPOSE = 4
    SCORE = 5
    RENOISE = 6


class BlockDecoder:
    """
    One call of `generate`. The arguments are those of `GenerationMixin._sample`.

    After [`~BlockDecoder.run`], `sequences()`, `num_function_evaluations`, `num_new_tokens`, `trajectory()` and
    `returned_cache()` hold the result.
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
        past_key_values: Any = None,
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
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.streamer = streamer
        self.block_size = generation_config.block_size
        config = model.config
        self.grid = config.block_sizes[0] if config.clean_attention == "block_causal" else 1
        cache = past_key_values if use_cache else None
        max_new_tokens = generation_config.max_length - input_ids.shape[1]
        mask_length = attention_mask.shape[1] if attention_mask is not None else generation_config._mask_length
        self.state = DecodingState(
            input_ids,
            attention_mask,
            cache,
            num_cached=0 if cache is None else int(cache.get_seq_length()),
            prompt_is_cached=mask_length == input_ids.shape[1],
            max_new_tokens=max_new_tokens,
            spare=self.block_size,
            pad_token_id=self._pad_token_id(input_ids.shape[0]),
            grid=self.grid,
            keep_all_rows=getattr(cache, "_is_user_defined", False),
        )
        # Drawn from torch's default generator, so that `torch.manual_seed` and `set_seed` reproduce the text.
        seed = int(torch.randint(2**62, ()))
        self.rows = row_generator(seed, input_ids, attention_mask)
        self.num_seeded = max_new_tokens if generation_config.decoding == "ar" else generation_config.ar_seed_tokens
        self._trajectory: list[tuple[torch.Tensor, ...]] = []
        if generation_config.decoding != "ar":
            self.num_steps = generation_config.num_denoising_steps()
            times = torch.linspace(1, _LAST_TIME, self.num_steps + 1, dtype=torch.float64)
            self.times: list[float] = times.tolist()
            self.alphas: list[float] = [*self.process.schedule.alpha(times[:-1]).tolist(), 1.0]

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

    def returned_cache(self) -> Any:
        return None if self.state.dropped_rows and not self.state.keep_all_rows else self.state.cache

    # the loop

    @torch.no_grad()
    def run(self) -> None:
        for _ in range(min(self.num_seeded, self.state.max_new_tokens)):
            if self.state.is_finished:
                break
            self._accept(self._autoregressive_token())
        while not self.state.is_finished:
            self._commit_pending()
            self._accept(self._denoise_block(self._block_length()))
        if self.streamer is not None:
            self.streamer.end()

    def _block_length(self) -> int:
        """The last block is as long as what is left; on the grid of a block-causal model every block is whole."""
        return min(self.block_size, self.state.columns_left) if self.grid == 1 else self.block_size

    def _accept(self, tokens: torch.Tensor) -> None:
        new_tokens = self.state.accept(tokens, self.stopping_criteria)
        if self.streamer is not None:
            self.streamer.put((new_tokens[0] if new_tokens.shape[0] == 1 else new_tokens).cpu())

    def _autoregressive_token(self) -> torch.Tensor:
        """The next token of every row by block size 1, `[A, 1]`."""
        state, process = self.state, self.process
        generator = self._generator(1)
        prior = process.prior((state.active.numel(), 1), state.tokens.device, generator.fold_in(_Purpose.AR_QUERY))
        # Greedy decoding takes the model's own fixed queries: the text is then that of repeated `forward` calls.
        has_queries = self.settings.do_sample and not self.model.config.next_token_prediction
        queries = prior if has_queries else None
        outputs = self.model(
            input_ids=state.pending,
            query_input_ids=queries,
            attention_mask=state.context_mask,
            past_key_values=state.cache,
            use_cache=state.cache is not None,
            logits_to_keep=1,
        )
        state.count_evaluation()
        if state.cache is not None:
            state.mark_committed(state.pending.shape[1])
        log_probs = self._log_probs(outputs.logits, prior, prior, state.columns(1))
        if not self.settings.do_sample:
            return log_probs.argmax(-1)
        return sample_categorical(log_probs.exp(), generator.fold_in(_Purpose.AR_TOKEN).uniform())

    def _commit_pending(self) -> None:
        """Writes finished tokens to the cache."""
        state = self.state
        if state.cache is None:
            return
        # Tokens of a block see one another under block-causal attention: they are committed together.
        chunk = self.settings.prefill_chunk_size if self.grid == 1 else None
        chunk = chunk or max(1, state.pending.shape[1])
        while state.pending.shape[1] > 0:
            tokens = state.pending[:, :chunk]
            length = state.num_cached + tokens.shape[1]
            self.model(
                input_ids=tokens,
                noisy_input_ids=tokens[:, :0],
                attention_mask=None if state.context_mask is None else state.context_mask[:, :length],
                past_key_values=state.cache,
                use_cache=True,
                noise_level=1.0,
            )
            state.mark_committed(tokens.shape[1])

    def _denoise_block(self, length: int) -> torch.Tensor:
        """Algorithm 1: from a fully noised block to a clean one, `[A, length]`."""
        state = self.state
        columns = state.columns(length)
        fixed = state.fixed(columns)
        canvas = state.tokens[state.active[:, None], columns]  # prompt tokens where `fixed`
        z_t = self.process.prior(columns.shape, columns.device, self._generator(length).fold_in(_Purpose.PRIOR))
        z_t = z_t if fixed is None else torch.where(fixed, canvas, z_t)
        states = [z_t]
        for step in range(self.num_steps):
            z_t = self._step(step, z_t, columns, fixed)
            z_t = z_t if fixed is None else torch.where(fixed, canvas, z_t)
            states.append(z_t)
        if self.settings.output_trajectory:
            self._trajectory.append(tuple(self._all_rows(z) for z in states))
        return z_t

    def _step(self, step: int, z_t: torch.Tensor, columns: torch.Tensor, fixed: torch.Tensor | None) -> torch.Tensor:
        """From z_t to z_s: a draw of the posterior, the removal of noise, or an informed step."""
        alpha_t, alpha_s = self.alphas[step], self.alphas[step + 1]
        generator = self._generator(columns.shape[1]).fold_in(step)
        log_probs = self._denoise(z_t, self.times[step], columns)
        if hasattr(self.streamer, "put_draft"):
            # Tokens of the prompt that stand in the block (block-causal models) were streamed already.
            known = 0 if fixed is None else int(fixed.all(0).sum())
            self._put_draft(self.streamer, log_probs[:, known:])
        if step == self.num_steps - 1 and self.settings.noise_removal == "greedy":
            return log_probs.argmax(-1)
        x_probs = log_probs.exp() if self.settings.do_sample else _one_hot_arg_max(log_probs)
        if not self.settings.is_informed(step, self.num_steps):
            return self.process.sample_posterior(x_probs, z_t, alpha_s, alpha_t, generator.fold_in(_Purpose.DENOISE))
        proposal = self.process.sample_posterior(x_probs, z_t, 1.0, alpha_t, generator.fold_in(_Purpose.PROPOSE))
        if fixed is not None:
            proposal = torch.where(fixed, z_t, proposal)
        return self._renoise(proposal, log_probs, alpha_s, columns, fixed, generator)

    def _denoise(self, z_t: torch.Tensor, time: float, columns: torch.Tensor) -> torch.Tensor:
        """One denoiser pass: log x_hat, `[A, n, V]`, float64."""
        state = self.state
        outputs = self.model(
            input_ids=state.pending,
            noisy_input_ids=z_t,
            noisy_position_ids=state.next_positions(z_t.shape[1]) if state.pending.shape[1] else None,
            block_size=self.block_size,
            attention_mask=state.context_mask,
            past_key_values=state.cache,
            noise_level=time,
        )
        state.count_evaluation()
        return self._log_probs(outputs.logits, z_t, z_t, columns)

    def _verify(self, proposal: torch.Tensor, columns: torch.Tensor, generator: CounterGenerator) -> torch.Tensor:
        """One AR pass over the proposal: log p_AR of each of its positions, `[A, n, V]`, float64."""
        state = self.state
        length = proposal.shape[1]
        queries = self.process.prior(proposal.shape, proposal.device, generator.fold_in(_Purpose.AR_QUERY))
        outputs = self.model(
            input_ids=torch.cat([state.pending, proposal], dim=1),
            noisy_input_ids=queries,
            noisy_position_ids=state.next_positions(length) if state.pending.shape[1] else None,
            block_size=1,
            attention_mask=state.mask_with(length),
            past_key_values=state.cache,
            noise_level=1.0,
        )
        state.count_evaluation()
        return self._log_probs(outputs.logits, queries, proposal, columns)

    def _renoise(
        self,
        proposal: torch.Tensor,
        log_probs: torch.Tensor,
        alpha_s: float,
        columns: torch.Tensor,
        fixed: torch.Tensor | None,
        generator: CounterGenerator,
    ) -> torch.Tensor:
        """The k worst tokens of the proposal back to the prior, k matching the noise level of time s."""
        corrector = self.settings.corrector
        ar_log_probs = self._verify(proposal, columns, generator) if corrector in AR_CORRECTORS else None
        scores = generator.fold_in(_Purpose.SCORE).uniform()
        penalty = penalties(corrector, proposal, log_probs, ar_log_probs, scores)
        count = max(1, round((1 - alpha_s) * proposal.shape[1]))
        worst = worst_positions(penalty, count, fixed)
        noise = self.process.prior(proposal.shape, proposal.device, generator.fold_in(_Purpose.RENOISE))
        return torch.where(worst, noise, proposal)

    # helpers

    def _generator(self, length: int) -> CounterGenerator:
        """Keys of the next tokens, `[A, length]`: by row and by index among its new tokens."""
        new_index = self.state.columns(length) - self.state.prompt_width
        return self.rows.select(self.state.active).fold_in(new_index)

    def _log_probs(
        self, logits: torch.Tensor, z_t: torch.Tensor, canvas: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Logits through the logits processors, then log x_hat in float64."""
        config = self.model.config
        mask_token_id = config.mask_token_id if config.diffusion_type == "masked" else None
        context = self.state.clean_context()
        logits = process_logits(logits, context, canvas, columns, self.logits_processor, mask_token_id)
        return self.process.log_probs(logits.double(), z_t)

    def _put_draft(self, streamer: Any, log_probs: torch.Tensor) -> None:
        """The clean text as the model sees it now, to a streamer such as `TextDiffusionStreamer`."""
        if getattr(streamer, "_takes_logits", False):
            streamer.put_draft(logits=log_probs.cpu())
        else:
            streamer.put_draft(value=log_probs.argmax(-1).cpu())

    def _all_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[A, n]` to `[B, n]`, pads in the rows that are done."""
        rows = tokens.new_full((self.state.tokens.shape[0], tokens.shape[1]), self.state.pad_token_id)
        rows[self.state.active] = torch.where(self.state.done[:, None], self.state.pad_token_id, tokens)
        return rows


def _one_hot_arg_max(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(log_probs).scatter_(-1, log_probs.argmax(-1, keepdim=True), 1.0)


__all__ = ["BlockDecoder"]
