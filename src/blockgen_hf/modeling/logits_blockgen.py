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

import torch
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList


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


def process_logits(
    logits: torch.Tensor,
    context: torch.Tensor,
    canvas: torch.Tensor,
    columns: torch.Tensor,
    processors: LogitsProcessorList,
    mask_token_id: int | None,
) -> torch.Tensor:
    """
    Applies the processors to the logits of a block.

    Args:
        logits (`torch.Tensor` of shape `[A, n, V]`): raw logits.
        context (`torch.LongTensor` of shape `[A, length]`): clean text before the block.
        canvas (`torch.LongTensor` of shape `[A, n]`): the block as it stands.
        columns (`torch.LongTensor` of shape `[A, n]`): how many tokens stand before each position of the block.
        processors (`LogitsProcessorList`): applied in order. They see the clean text; those that look at its length or
            at its end see, for each position, the block before it as it stands.
        mask_token_id (`int`, *optional*): a token that is impossible, and must not fill a place of top-k or top-p.

    Returns:
        `torch.Tensor` of shape `[A, n, V]`.
    """
    logits = logits.to(copy=True, dtype=torch.float32)
    if mask_token_id is not None:
        logits[..., mask_token_id] = -torch.inf
    for processor in processors:
        if isinstance(processor, POSITION_PROCESSORS):
            logits = _process_by_position(logits, context, canvas, columns, processor)
        else:
            rows = context.repeat_interleave(logits.shape[1], dim=0)
            logits = processor(rows, logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
    return logits


def _process_by_position(
    logits: torch.Tensor,
    context: torch.Tensor,
    canvas: torch.Tensor,
    columns: torch.Tensor,
    processor: LogitsProcessor,
) -> torch.Tensor:
    """Calls the processor once a column, with the text that stands before it."""
    first, last = int(columns.min()), int(columns.max())
    text = torch.nn.functional.pad(context, (0, max(0, last + 1 - context.shape[1]))).scatter(1, columns, canvas)
    for column in range(first, last + 1):
        here = columns == column
        if here.any():
            rows = here.any(-1).nonzero().squeeze(-1)
            logits[here] = processor(text[rows, :column], logits[here])
    return logits


__all__ = ["process_logits"]
