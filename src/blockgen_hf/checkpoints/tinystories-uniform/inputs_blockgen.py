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
From the arguments of a call to one pass of the trunk: which tokens it reads, where they stand, what of them is
padding, and what is packed into a row but has to be kept apart.

`forward` collects its arguments in [`ForwardInputs`]. Five functions, one for each thing that the model can be, make
[`TrunkInputs`] of them: [`causal_pass`], [`denoising_pass`], [`whole_text_pass`], and for models whose clean tokens
predict, [`next_token_pass`] and [`anchored_pass`].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from .configuration_blockgen import BlockGenConfig
from .masking_blockgen import BlockSize


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ForwardInputs:
    """
    The arguments of [`BlockGenForDiffusionLM.forward`] that belong together; their meaning stands there.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, C]`): clean tokens of the call.
        noisy_input_ids (`torch.LongTensor` of shape `[B, N]`, *optional*): noisy tokens.
        block_size (`int` or `tuple[int]`): of the noisy tokens, or one a row.
        position_ids (`torch.LongTensor` of shape `[B or 1, C]`, *optional*): positions of the clean tokens.
        noisy_position_ids (`torch.LongTensor` of shape `[B or 1, N]`, *optional*): positions of the noisy tokens.
        attention_mask (`torch.Tensor` of shape `[B, past + C]`, *optional*): zero for padding.
        document_ids (`torch.LongTensor` of shape `[B, C]`, *optional*): documents packed into a row.
        cache (`Cache`, *optional*): of clean tokens before those of the call.
        use_cache (`bool`): whether to add the call's clean tokens to it.
        num_committed (`int`, *optional*): how many of them, from the first on; default: all.
        noisy_block_ids (`torch.LongTensor` of shape `[B or 1, N]`, *optional*): the blocks of the noisy tokens.
        isolate_first (`bool`): whether the first token of each block sees no other of it.
        noise_level (`torch.Tensor` or `float`, *optional*): time t of the noisy tokens.
        cache_window (`int`, *optional*): how many clean tokens each token sees, the nearest ones.
        cache_start (`torch.LongTensor` of shape `[B or 1, 1]`, *optional*): position of the first cached token.
    """

    input_ids: torch.Tensor
    noisy_input_ids: torch.Tensor | None = None
    block_size: BlockSize = 1
    position_ids: torch.Tensor | None = None
    noisy_position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    cache: Cache | None = None
    use_cache: bool = False
    num_committed: int | None = None
    noise_level: torch.Tensor | float | None = None
    noisy_block_ids: torch.Tensor | None = None
    cache_window: int | None = None
    cache_start: torch.Tensor | None = None
    isolate_first: bool = False

    @property
    def num_clean(self) -> int:
        return self.input_ids.shape[1]

    @property
    def past_length(self) -> int | torch.Tensor:
        """How many tokens are cached; a tensor for static caches, whose value would cost a synchronisation."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def first_position(self) -> int | torch.Tensor:
        """That of the first token of the cache, or of the call where nothing is cached; `[B or 1, 1]` if not 0."""
        return 0 if self.cache_start is None else self.cache_start

    def clean_mask(self) -> torch.Tensor | None:
        """The columns of the attention mask that belong to the clean tokens of the call, `[B, C]`."""
        return None if self.attention_mask is None else last_columns(self.attention_mask, self.num_clean)

    def clean_positions(self) -> torch.Tensor:
        """
        Positions of the clean tokens of the call, `[B or 1, C]`.

        Raises:
            ValueError: attention mask or positions of another length.
        """
        past, mask = self.past_length, self.attention_mask
        if mask is not None:
            expected = mask.shape[1] if isinstance(past, torch.Tensor) else past + self.num_clean
            if mask.ndim != 2 or mask.shape[1] != expected:
                raise ValueError(
                    f"`attention_mask` must have the shape [batch, past + clean tokens] = [{self.input_ids.shape[0]}, "
                    f"{expected}], but has {list(mask.shape)}."
                )
        if self.position_ids is not None:
            if self.position_ids.shape[-1] != self.num_clean:
                raise ValueError(
                    f"`position_ids` must give a position for each of the {self.num_clean} `input_ids`, but have the "
                    f"shape {list(self.position_ids.shape)}."
                )
            return self.position_ids
        if mask is not None:
            return last_columns((mask.long().cumsum(-1) - 1).clamp(min=0), self.num_clean) + self.first_position
        return torch.arange(self.num_clean, device=self.input_ids.device)[None] + past + self.first_position

    def following_position(self, clean_positions: torch.Tensor) -> torch.Tensor:
        """The position behind the last clean token, `[B or 1, 1]`."""
        if self.attention_mask is not None:
            length = self.attention_mask.long().sum(-1, keepdim=True)
            if self.num_clean == 0:
                return length + self.first_position
            # An empty row of a padded batch starts at 0, whatever the position of its padding.
            return torch.where(length > 0, clean_positions[:, -1:] + 1, 0)
        if self.num_clean > 0:
            return clean_positions[:, -1:] + 1
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.input_ids.device)
        return zero + self.past_length + self.first_position

    def restarting_documents(self) -> torch.Tensor | None:
        """
        The documents `[B, C]` of rows whose `position_ids` start again (flattened, padding-free batches), or None
        where they go up from one end to the other.

        Raises:
            ValueError: they start again, and a cache is read or written, which knows of no documents.
        """
        if self.position_ids is None or self.position_ids.shape[-1] < 2:
            return None
        position_ids = self.position_ids.expand(self.input_ids.shape[0], -1)
        index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
        valid = torch.ones_like(index, dtype=torch.bool)
        if self.attention_mask is not None:
            valid = last_columns(self.attention_mask, position_ids.shape[1]).bool()
        last = torch.where(valid, index, -1).cummax(dim=1).values[:, :-1]
        previous = torch.where(last >= 0, position_ids.gather(1, last.clamp(min=0)), -1)
        starts = torch.zeros_like(valid)
        starts[:, 1:] = valid[:, 1:] & (position_ids[:, 1:] <= previous)
        if not torch.compiler.is_compiling() and not starts.any():  # a graph cannot look at them
            return None
        if self.cache is None:
            return starts.long().cumsum(1)
        if torch.compiler.is_compiling():  # nor raise
            return None
        raise ValueError(
            "`position_ids` start again within a row, as those of documents packed into it do, which a cache cannot "
            "keep apart: pass no cache."
        )


@dataclass(frozen=True)
class TrunkInputs:
    """
    One pass of the trunk: the arguments of [`BlockGenModel.forward`], with their meaning.

    Args:
        anchor_rows (`torch.LongTensor` of shape `[B or 1, N]`, *optional*): which noisy tokens are the places of
            anchors: the clean token of the call, by its index, whose state stands for each of them; -1 elsewhere.
    """

    input_ids: torch.Tensor
    noisy_input_ids: torch.Tensor
    position_ids: torch.Tensor
    noisy_position_ids: torch.Tensor
    block_size: BlockSize = 1
    noisy_mask: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    cache: Cache | None = None
    use_cache: bool = False
    num_committed: int | None = None
    noise_level: torch.Tensor | float | None = None
    noisy_block_ids: torch.Tensor | None = None
    isolate_first: bool = False
    document_ids: torch.Tensor | None = None
    cache_window: int | None = None
    cache_start: torch.Tensor | None = None
    is_causal: bool = False
    is_full: bool = False
    is_aligned: bool = False
    num_kept: int | None = None
    anchor_rows: torch.Tensor | None = None


def causal_pass(
    config: BlockGenConfig,
    inputs: ForwardInputs,
    query_input_ids: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    fixed_queries: Callable[[torch.Tensor], torch.Tensor],
) -> TrunkInputs:
    """
    The causal language model: a fully noised query at the position behind every kept token, by block size 1.

    Args:
        query_input_ids (`torch.LongTensor` of shape `[B, Q]`, *optional*): the queries of the last Q predictions.
        fixed_queries: makes the queries at some positions where none are given.
    """
    check_leak(config, 1)
    documents = inputs.restarting_documents()
    position_ids = inputs.clean_positions()
    following = inputs.following_position(position_ids)
    query_mask = None
    if query_input_ids is not None:
        kept: slice | torch.Tensor = slice(-query_input_ids.shape[1], None)
        query_positions = following + torch.arange(1 - query_input_ids.shape[1], 1, device=following.device)
    else:
        kept = kept_logits(logits_to_keep)
        if inputs.num_clean == 0:  # nothing precedes the one logit of an empty text
            query_positions = following
        else:
            query_positions = (position_ids + 1)[:, kept]
            clean_mask = inputs.clean_mask()
            if clean_mask is not None:
                query_mask = clean_mask[:, kept].bool()
                # Left padding predicts the first token.
                query_positions = torch.where(query_mask, query_positions, 0)
        query_input_ids = fixed_queries(query_positions).expand(inputs.input_ids.shape[0], -1)
    if documents is not None:
        documents = torch.cat([documents, documents[:, kept]], dim=1)
    return TrunkInputs(
        inputs.input_ids,
        query_input_ids,
        position_ids,
        query_positions,
        noisy_mask=query_mask,
        attention_mask=inputs.attention_mask,
        cache=inputs.cache,
        use_cache=inputs.use_cache,
        noise_level=1.0,
        document_ids=documents,
        cache_window=inputs.cache_window,
        cache_start=inputs.cache_start,
        is_causal=isinstance(logits_to_keep, int) and query_positions.shape[1] == 1,
    )


def denoising_pass(config: BlockGenConfig, inputs: ForwardInputs) -> TrunkInputs:
    """
    The denoiser: noisy tokens at the positions of the clean ones (training, verification), behind them or behind the
    cache (generation), or wherever `noisy_position_ids` says.

    Raises:
        ValueError: positions or documents that contradict the tokens.
    """
    num_clean, noisy_input_ids = inputs.num_clean, noisy_tokens(inputs)
    num_noisy = noisy_input_ids.shape[1]
    _check_blocks(config, inputs, num_noisy)
    aligned = inputs.noisy_position_ids is None and num_noisy == num_clean > 0
    ordered = aligned and inputs.position_ids is None and inputs.cache is None and not inputs.use_cache
    documents = inputs.document_ids
    if documents is not None:
        if not ordered or documents.shape != inputs.input_ids.shape:
            raise ValueError(
                "`document_ids` must have the shape of `input_ids`, with as many `noisy_input_ids`, and without "
                "`position_ids`, `noisy_position_ids` and a cache: positions restart with each document."
            )
        inputs, documents = _by_documents(inputs, documents)
    else:
        documents = inputs.restarting_documents()
        if documents is not None and not aligned and num_noisy:
            raise ValueError(
                "`position_ids` start again within a row, as those of documents packed into it do: this needs as "
                "many `noisy_input_ids` as `input_ids`, without `noisy_position_ids`."
            )
    position_ids = inputs.clean_positions()
    noisy_position_ids, follows = inputs.noisy_position_ids, False
    if aligned:
        noisy_position_ids = position_ids
    elif noisy_position_ids is None:
        if num_clean > 0 and num_noisy > 0:
            raise ValueError(
                f"`noisy_position_ids` must be given when the number of noisy tokens ({num_noisy}) is neither "
                f"that of `input_ids` ({num_clean}) nor is `input_ids` empty."
            )
        follows = True
        start = inputs.following_position(position_ids)
        noisy_position_ids = start + torch.arange(num_noisy, device=noisy_input_ids.device)
    elif noisy_position_ids.shape[-1] != num_noisy:
        raise ValueError(
            f"`noisy_position_ids` must give a position for each of the {num_noisy} `noisy_input_ids`, but have "
            f"the shape {list(noisy_position_ids.shape)}."
        )
    if num_clean > 0 and num_noisy > 0:
        check_leak(config, inputs.block_size, None if aligned else noisy_position_ids)
    return TrunkInputs(
        inputs.input_ids,
        noisy_input_ids,
        position_ids,
        noisy_position_ids,
        block_size=inputs.block_size,
        noisy_mask=inputs.clean_mask() if aligned else None,
        attention_mask=inputs.attention_mask,
        cache=inputs.cache,
        use_cache=inputs.use_cache,
        num_committed=inputs.num_committed,
        noise_level=inputs.noise_level,
        noisy_block_ids=inputs.noisy_block_ids,
        isolate_first=inputs.isolate_first,
        document_ids=documents,
        cache_window=inputs.cache_window,
        cache_start=inputs.cache_start,
        is_causal=num_noisy == 0 and config.clean_attention == "causal",
        is_full=follows and num_clean == 0 and isinstance(inputs.block_size, int) and num_noisy <= inputs.block_size,
        is_aligned=ordered,
    )


def whole_text_pass(inputs: ForwardInputs) -> TrunkInputs:
    """The whole text as one block, which sees no clean token: so there are none (MDLM, Duo)."""
    noisy_input_ids = noisy_tokens(inputs)
    position_ids = replace(inputs, input_ids=noisy_input_ids).clean_positions()
    return TrunkInputs(
        noisy_input_ids[:, :0],
        noisy_input_ids,
        position_ids[:, :0],
        position_ids,
        block_size=noisy_input_ids.shape[1],
        noisy_mask=inputs.attention_mask,
        noise_level=inputs.noise_level,
        is_full=inputs.attention_mask is None,
    )


def next_token_pass(inputs: ForwardInputs) -> TrunkInputs:
    """
    The causal language model of adapted models, and the dense causal transformer of the paper's AR baseline: no noisy
    tokens, the state of each token predicts the one behind it.

    Raises:
        ValueError: no token, or documents with what contradicts them.
    """
    if inputs.num_clean == 0:
        raise ValueError(
            "`input_ids` must hold a token at least for a model with `ar_prediction='clean'` or "
            "`next_token_prediction=True`, which predicts the next token from the last: begin with the BOS token."
        )
    _check_num_committed(inputs)
    documents = inputs.document_ids
    if documents is None:
        documents = inputs.restarting_documents()
    else:
        is_placed = inputs.position_ids is not None or inputs.cache is not None
        if documents.shape != inputs.input_ids.shape or is_placed:
            raise ValueError(
                "`document_ids` must have the shape of `input_ids`, without `position_ids` and a cache: positions "
                "restart with each document."
            )
        inputs, documents = _by_documents(inputs, documents)
    position_ids = inputs.clean_positions()
    return TrunkInputs(
        inputs.input_ids,
        inputs.input_ids[:, :0],
        position_ids,
        position_ids[:, :0],
        attention_mask=inputs.attention_mask,
        cache=inputs.cache,
        use_cache=inputs.use_cache,
        num_committed=inputs.num_committed,
        document_ids=documents,
        cache_window=inputs.cache_window,
        cache_start=inputs.cache_start,
        is_causal=True,
        is_full=inputs.num_clean == 1,
        num_kept=inputs.num_clean,
    )


def _check_num_committed(inputs: ForwardInputs) -> None:
    count = inputs.num_committed
    if count is not None and (not inputs.use_cache or not 0 <= count <= inputs.num_clean):
        raise ValueError(
            f"`num_committed` must be a number of the {inputs.num_clean} clean tokens, with `use_cache=True`, but is "
            f"{count}."
        )


def _check_blocks(config: BlockGenConfig, inputs: ForwardInputs, num_noisy: int) -> None:
    _check_num_committed(inputs)
    ids = inputs.noisy_block_ids
    if ids is None:
        if inputs.isolate_first:
            raise ValueError("`isolate_first=True` needs `noisy_block_ids`, whose blocks it is about.")
        return
    if inputs.noisy_position_ids is None or ids.shape[-1] != num_noisy or config.clean_attention != "causal":
        raise ValueError(
            f"`noisy_block_ids` must give a block for each of the {num_noisy} `noisy_input_ids`, with "
            "`noisy_position_ids`, for a model with `clean_attention='causal'`, but have the shape "
            f"{list(ids.shape)}."
        )


def noisy_tokens(inputs: ForwardInputs) -> torch.Tensor:
    return inputs.input_ids[:, :0] if inputs.noisy_input_ids is None else inputs.noisy_input_ids


def _by_documents(inputs: ForwardInputs, document_ids: torch.Tensor) -> tuple[ForwardInputs, torch.Tensor]:
    """With positions that restart with each document, and the documents: an id that comes back is another one."""
    positions = document_positions(document_ids, inputs.attention_mask)
    return replace(inputs, position_ids=positions), (positions == 0).cumsum(1)


def document_positions(document_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Positions that restart where a document does, `[B, L]`, from the documents of consecutive tokens, `[B, L]`. Padding
    belongs to no document.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    if attention_mask is not None:
        starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def last_columns(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` columns, also for 0."""
    return mask[:, mask.shape[1] - count :]


def kept_logits(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """The columns whose logits are asked for: the last so many (0: all), or these."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def checked_block_size(config: BlockGenConfig, block_size: int | Sequence[int] | None, num_rows: int) -> BlockSize:
    """
    The block size of the noisy tokens, or one a row where they differ. Default: the largest that was trained. Another
    than those that were trained warns once.

    Raises:
        ValueError: sizes that are not positive integers, or not one for each row.
    """
    trained = config.block_sizes
    if block_size is None:
        return max(trained)
    if isinstance(block_size, (list, tuple)) and len(block_size) != num_rows:
        raise ValueError(f"`block_size` must be one number, or {num_rows}, one for each row, but is {block_size}.")
    sizes = block_size if isinstance(block_size, (list, tuple)) else (block_size,)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`block_size` must be a positive integer, but is {block_size!r}.")
        if size not in trained:
            logger.warning_once(
                f"`block_size={size}` is not one of the block sizes that the model was trained for: {trained}."
            )
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def check_window(config: BlockGenConfig, window: int | None) -> None:
    """
    Raises:
        ValueError: a window that is no number of tokens, or that hides a part of a token's own block.
    """
    if window is None:
        return
    smallest = 1 if config.clean_attention == "causal" else config.block_sizes[0]
    if not isinstance(window, int) or isinstance(window, bool) or window < smallest:
        reason = "" if smallest == 1 else ", a block of a model with `clean_attention='block_causal'`"
        raise ValueError(f"`cache_window` must be an integer of at least {smallest}{reason}, but is {window!r}.")


def check_leak(config: BlockGenConfig, block_size: BlockSize, noisy_position_ids: torch.Tensor | None = None) -> None:
    """
    Block-causal clean tokens see their whole block: no noisy block may start inside of one.

    Raises:
        ValueError: it does.
    """
    if config.clean_attention == "causal":
        return
    grid = config.block_sizes[0]
    if (
        noisy_position_ids is not None
        and not torch.compiler.is_compiling()  # a graph cannot look at them
        and (noisy_position_ids[:, 0] % grid != 0).any()
    ):
        raise ValueError(
            f"`noisy_position_ids` must start at a multiple of {grid}, the grid of a model with "
            f"`clean_attention='block_causal'`, but start at {noisy_position_ids[:, 0].tolist()}."
        )
    sizes = (block_size,) if isinstance(block_size, int) else block_size
    if any(size % grid != 0 for size in sizes):
        raise ValueError(
            f"`block_size={block_size}` is not possible with `clean_attention='block_causal'` and blocks of "
            f"{grid}: clean tokens would reveal the tokens to be predicted. Autoregressive predictions and "
            "verification need a model with `clean_attention='causal'`; other block sizes must be multiples."
        )


__all__ = [
    "ForwardInputs",
    "TrunkInputs",
    "causal_pass",
    "check_leak",
    "check_window",
    "checked_block_size",
    "denoising_pass",
    "document_positions",
    "kept_logits",
    "last_columns",
    "next_token_pass",
    "noisy_tokens",
    "whole_text_pass",
]
