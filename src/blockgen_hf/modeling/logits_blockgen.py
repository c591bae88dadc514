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

from .sampling_blockgen import sample_categorical


# They look at the length or at the end of the text: each position needs its own.
POSITION_PROCESSORS = (
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
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
    return isinstance(processor, logits_process.NoRepeatNGramLogitsProcessor)


@dataclass(frozen=True)
class BlockText:
    """
    The text around the positions of a block, as logits processors see it.

    Args:
        context (`torch.LongTensor` of shape `[A, length]`): clean text before the block.
        canvas (`torch.LongTensor` of shape `[A, n]`): the block as it stands.
        columns (`torch.LongTensor` of shape `[A, n]`): how many tokens stand before each position of the block.
        rows (`torch.LongTensor` of shape `[A]`): which rows of the batch they are.
    """

    context: torch.Tensor
    canvas: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor


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
            at its end see, for each position, the block before it as it stands.

    Returns:
        `torch.Tensor` of shape `[M, V]`.
    """
    rows = where.nonzero()[:, 0]
    for processor in processors:
        if isinstance(processor, POSITION_PROCESSORS):
            logits = _process_by_position(logits, rows, text.columns[where], text, processor)
        else:
            logits = _of_rows(processor, text.rows[rows])(text.context[rows], logits)
    return logits


def _of_rows(processor: LogitsProcessor, rows: torch.Tensor) -> LogitsProcessor:
    """A repetition penalty knows how far the padding of each row goes; here it gets those of some rows, `[M]`."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(lengths, torch.Tensor):
        return processor
    processor = copy(processor)
    processor.prompt_ignore_length = lengths[rows]
    return processor


def _process_by_position(
    logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, text: BlockText, processor: LogitsProcessor
) -> torch.Tensor:
    """Calls the processor once a column, with the text that stands before it."""
    width = int(text.columns.max()) + 1
    before = torch.nn.functional.pad(text.context, (0, max(0, width - text.context.shape[1])))
    before = before.scatter(1, text.columns, text.canvas)
    for column in columns.unique().tolist():
        here = columns == column
        logits[here] = processor(before[rows[here], :column], logits[here])
    return logits


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
        """The most likely token of each position, `[M]`."""
        return self.logits.argmax(-1)

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


__all__ = ["BlockText", "Prediction", "process_logits"]
