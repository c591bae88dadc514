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
"""transformers' logits processors, written for one next token a row, on the logits of a whole block."""

from copy import copy
from dataclasses import dataclass

import torch
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .sampling_blockgen import NO_DISTRIBUTION, sample_categorical


# What they do to a row of logits depends on nothing but that row: rows may come in any number and order.
ROW_PROCESSORS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.SuppressTokensLogitsProcessor,
)
# They look at the tokens just before: each position needs its own text, without the padding of its row.
_TEXT_PROCESSORS = (
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
)
# They look at the length or at the end of the text: each position needs its own. Lengths count padding, as everywhere.
POSITION_PROCESSORS = (
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    *_TEXT_PROCESSORS,
)
# They count calls or rows, run a model of their own, or hash a prefix that may still change: a block at a time they
# would silently do something else.
STATEFUL_PROCESSORS = (
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.WatermarkLogitsProcessor,
)


def looks_at_neighbours(processor: LogitsProcessor) -> bool:
    """Whether it bans or favours a token for those just before, which a block draws at the same time."""
    if isinstance(processor, logits_process.SequenceBiasLogitsProcessor):
        return any(len(sequence) > 1 for sequence in processor.sequence_bias)
    if isinstance(processor, logits_process.EncoderNoRepeatNGramLogitsProcessor):
        return processor.ngram_size > 1
    return isinstance(processor, logits_process.NoRepeatNGramLogitsProcessor)


class OccurrencePenalties(logits_process.RepetitionPenaltyLogitsProcessor):
    """
    OpenAI's penalties: from the logit of a token that stands in the generated text, the presence penalty is subtracted
    once, and the frequency penalty once for each time that it stands there. The prompt does not count.

    A repetition penalty by type, which is called in the same way: with some rows of the text, of which it knows how
    much to ignore.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        super().__init__(penalty=1.0, prompt_ignore_length=prompt_length)
        self.presence = presence
        self.frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self.prompt_ignore_length or 0 :]
        counts = torch.zeros_like(scores).scatter_add(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.presence * (counts > 0).to(scores.dtype) - self.frequency * counts


class PromptProcessors(LogitsProcessor):
    """
    Processors of the prompts, `encoder_repetition_penalty` and `encoder_no_repeat_ngram_size`: one for each row, which
    knows the row's prompt without its padding.
    """

    def __init__(self, processors: list[LogitsProcessor]) -> None:
        self.processors = processors

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(self.processors, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([processor(ids, row) for processor, ids, row in rows])


def without_padding(
    processors: LogitsProcessorList, input_ids: torch.Tensor, padding: torch.Tensor
) -> LogitsProcessorList:
    """
    The processors, of which those that were made of the padded prompts `[B, W]` do not take padding for text.

    Args:
        padding (`torch.LongTensor` of shape `[B]`): columns of padding before each prompt.
    """
    if not padding.any():
        return processors
    prompts = [ids[None, skipped:] for ids, skipped in zip(input_ids, padding.tolist(), strict=True)]
    ours = LogitsProcessorList()
    for processor in processors:
        if type(processor) is logits_process.EncoderRepetitionPenaltyLogitsProcessor:
            rows = [copy(processor) for _ in prompts]
            for row, prompt in zip(rows, prompts, strict=True):
                row.encoder_input_ids = prompt
            processor = PromptProcessors(rows)
        elif type(processor) is logits_process.EncoderNoRepeatNGramLogitsProcessor:
            processor = PromptProcessors([type(processor)(processor.ngram_size, prompt) for prompt in prompts])
        ours.append(processor)
    return ours


@dataclass(frozen=True)
class BlockText:
    """
    The text around the positions of a block, as logits processors see it.

    Args:
        context (`torch.LongTensor` of shape `[B, length]`): clean text before the block, of every row of the batch.
        known (`torch.LongTensor` of shape `[A]`): how many columns of it stand before the block, of each of its rows:
            those of a block-causal model keep their own grid, and some are ahead of others.
        padding (`torch.LongTensor` of shape `[B]`): how many columns of padding each of them begins with.
        canvas (`torch.LongTensor` of shape `[A, n]`): the block as it stands.
        columns (`torch.LongTensor` of shape `[A, n]`): how many tokens stand before each position of the block.
        rows (`torch.LongTensor` of shape `[A]`): which rows of the batch the block has.
    """

    context: torch.Tensor
    known: torch.Tensor
    padding: torch.Tensor
    canvas: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor


def looks_at_text(processors: LogitsProcessorList) -> bool:
    """Whether any of the processors may look at more than the row of logits that it changes."""
    return any(type(processor) not in ROW_PROCESSORS for processor in processors)


def process_logits(
    logits: torch.Tensor, where: torch.Tensor, text: BlockText, processors: LogitsProcessorList
) -> torch.Tensor:
    """
    Applies the processors to the logits of some positions of a block.

    Args:
        logits (`torch.Tensor` of shape `[M, V]`): raw logits, float32. They may be overwritten.
        where (`torch.BoolTensor` of shape `[A, n]`): the M positions, row by row.
        text ([`BlockText`]): the text around them.
        processors (`LogitsProcessorList`): applied in order. They see the clean text; those that look at its length or
            at its end see, for each position, the block before it as it stands. All but transformers' own are called
            with the whole batch, a position after the other.

    Returns:
        `torch.Tensor` of shape `[M, V]`.
    """
    index, position = where.nonzero().unbind(-1)
    for processor in processors:
        if type(processor) in ROW_PROCESSORS:
            logits = processor(text.context[text.rows[index]], logits)
        elif isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
            logits = _penalised(processor, index, text, logits)
        elif isinstance(processor, POSITION_PROCESSORS):
            logits = _process_by_position(logits, index, text.columns[where], text, processor)
        else:
            logits = _process_by_batch(logits, index, position, text, processor)
    return logits


def _penalised(
    processor: logits_process.RepetitionPenaltyLogitsProcessor,
    index: torch.Tensor,
    text: BlockText,
    logits: torch.Tensor,
) -> torch.Tensor:
    """
    A repetition penalty knows how much of the text of a row to ignore, besides its padding. What is ignored becomes a
    token behind the vocabulary: not every supported transformers takes a length for each row.
    """
    rows = text.rows[index]
    ignored, vocab_size = processor.prompt_ignore_length, logits.shape[-1]
    lengths = text.padding if ignored is None else torch.as_tensor(ignored, device=logits.device).maximum(text.padding)
    processor = copy(processor)
    processor.prompt_ignore_length = None
    context = text.context[rows]
    columns = torch.arange(context.shape[1], device=logits.device)
    is_ignored = (columns < lengths[rows, None]) | (columns >= text.known[index, None])
    counted = context.masked_fill(is_ignored, vocab_size)
    return processor(counted, torch.nn.functional.pad(logits, (0, 1)))[:, :vocab_size]


def _process_by_position(
    logits: torch.Tensor, index: torch.Tensor, columns: torch.Tensor, text: BlockText, processor: LogitsProcessor
) -> torch.Tensor:
    """Calls the processor once a column, with the text that stands before it."""
    width = int(text.columns.max()) + 1
    context = text.context[text.rows]
    before = torch.nn.functional.pad(context, (0, max(0, width - context.shape[1])))
    before = before.scatter(1, text.columns, text.canvas)
    starts = text.padding[text.rows[index]] if isinstance(processor, _TEXT_PROCESSORS) else torch.zeros_like(columns)
    for start, column in torch.stack([starts, columns], dim=-1).unique(dim=0).tolist():
        here = (columns == column) & (starts == start)
        logits[here] = processor(before[index[here], start:column], logits[here])
    return logits


def _process_by_batch(
    logits: torch.Tensor, index: torch.Tensor, position: torch.Tensor, text: BlockText, processor: LogitsProcessor
) -> torch.Tensor:
    """
    Calls the processor as `generate` calls it elsewhere, with all rows of the batch in their order, `[B, V]`, once for
    each position, and for each length where those of the rows differ. Those that are done, or not asked about here,
    are given scores of zero.
    """
    processed = torch.empty_like(logits)
    rows, known = text.rows[index], text.known[index]
    for place, length in torch.stack([position, known], dim=-1).unique(dim=0).tolist():
        here = (position == place) & (known == length)
        scores = logits.new_zeros(len(text.context), logits.shape[-1])
        scores[rows[here]] = logits[here]
        processed[here] = processor(text.context[:, :length], scores)[rows[here]]
    return processed


class Prediction:
    """
    x_hat at M positions, from their logits, which are float32 `[M, V]`, processed, and minus infinity where a token is
    impossible.

    Args:
        do_sample (`bool`): False: the whole mass is on the arg-max.
    """

    def __init__(self, logits: torch.Tensor, do_sample: bool) -> None:
        self.logits = logits
        self.do_sample = do_sample

    def __getitem__(self, index: torch.Tensor) -> "Prediction":
        return Prediction(self.logits[index], self.do_sample)

    def sample(self, uniform: torch.Tensor) -> torch.Tensor:
        """A token for each position, `[M]`, from uniform numbers `[M]`."""
        return sample_categorical(self.logits.softmax(-1), uniform) if self.do_sample else self.best()

    def sample_at(self, where: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """A token for k of the positions, `[k]`, from a mask over all, of any shape, and k uniform numbers."""
        return self[where.flatten()].sample(uniform)

    def best(self) -> torch.Tensor:
        """
        The most likely token of each position, `[M]`.

        Raises:
            RuntimeError: logits that give no distribution, as [`sample_categorical`].
        """
        largest, tokens = self.logits.max(-1)
        torch._assert_async(largest.isfinite().all(), NO_DISTRIBUTION)
        return tokens

    def prob(self, tokens: torch.Tensor) -> torch.Tensor:
        """x_hat of a token for each position, `[M]`, float64."""
        if not self.do_sample:
            return (self.best() == tokens).double()
        return self.log_prob(tokens).exp()

    def log_prob(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of a token for each position, `[M]`, float64; sampled from or not."""
        chosen = self.logits.gather(-1, tokens[:, None]).squeeze(-1)
        return chosen.double() - self.logits.logsumexp(-1).double()

    def log_probs(self) -> torch.Tensor:
        """The whole distribution, `[M, V]`, float64; sampled from or not."""
        return self.logits.double().log_softmax(-1)


__all__ = [
    "BlockText",
    "OccurrencePenalties",
    "Prediction",
    "looks_at_text",
    "process_logits",
    "without_padding",
]
