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
Anchored blocks, of models whose clean tokens predict (`ar_prediction="clean"`): how a denoising pass lays out its
canvases, and which hidden state scores which token.
"""

from dataclasses import replace

import torch

from .configuration_blockgen import BlockGenConfig
from .inputs_blockgen import (
    ForwardInputs,
    TrunkInputs,
    denoising_pass,
    last_columns,
    next_token_pass,
    noisy_tokens,
)
from .masking_blockgen import noisy_blocks


def anchored_pass(config: BlockGenConfig, inputs: ForwardInputs) -> TrunkInputs:
    """
    The denoiser of a model whose blocks are anchored, of which `noisy_input_ids` are canvases: each block is the clean
    token before it, x_s, and noisy tokens behind that. The clean token is read as one, like those before it. Use
    [`canvas_states`] on what the trunk returns.

    - At the positions of `input_ids` (training) canvases are cut from the noisy tokens, and what stands at the first
      place of each is not looked at: x_s is among the clean tokens.
    - A single canvas (generation) begins right behind the clean tokens of cache and call. Its x_s is not committed.
    - Several canvases at positions of their own (`noisy_block_ids`, or more tokens than a block has) begin with
      clean tokens of the call.

    Raises:
        ValueError: positions or documents that contradict the tokens.
    """
    num_clean, num_noisy = inputs.num_clean, noisy_tokens(inputs).shape[1]
    is_inside = inputs.noisy_position_ids is None and num_noisy == num_clean > 0
    if is_inside and inputs.block_size == 1:  # nothing but anchors
        return next_token_pass(inputs)
    aligned = denoising_pass(config, inputs)
    if num_noisy == 0:
        return aligned
    is_single = inputs.noisy_block_ids is None and isinstance(inputs.block_size, int)
    if not is_inside and is_single and num_noisy <= aligned.block_size:  # type: ignore[operator]
        return _single_canvas(config, inputs, aligned)
    positions = aligned.noisy_position_ids
    starts, _ = noisy_blocks(positions, inputs.block_size, inputs.noisy_block_ids)
    if is_inside:
        rows = torch.arange(num_clean, device=positions.device).expand_as(starts)
    else:
        same = aligned.position_ids[:, None, :] == positions[:, :, None]
        if inputs.attention_mask is not None:
            same = same & last_columns(inputs.attention_mask, num_clean)[:, None, :].bool()
        rows = torch.where(same.any(-1), same.long().argmax(-1) if num_clean else positions, -1)
    return replace(
        aligned,
        num_kept=num_clean + num_noisy,
        anchor_rows=torch.where(positions == starts, rows, -1),
        is_full=False,
    )


def _single_canvas(config: BlockGenConfig, inputs: ForwardInputs, apart: TrunkInputs) -> TrunkInputs:
    """A pass over one canvas behind the clean tokens, of which the first token is one more clean token."""
    canvas, positions = apart.noisy_input_ids, apart.noisy_position_ids
    if (
        inputs.noisy_position_ids is not None
        and not torch.compiler.is_compiling()  # a graph cannot look at them
        and (positions[:, :1] != inputs.following_position(apart.position_ids)).any()
    ):
        raise ValueError(
            "`noisy_position_ids` must begin right behind the clean tokens of `cache` and `input_ids` with "
            "`ar_prediction='clean'`: a canvas begins with the last clean token, which is not among them, but they "
            f"begin at {positions[:, 0].tolist()}."
        )
    mask = inputs.attention_mask
    num_committed = inputs.num_committed
    if inputs.use_cache and num_committed is None:
        num_committed = inputs.num_clean
    rows = max(positions.shape[0], apart.position_ids.shape[0])
    return replace(
        apart,
        input_ids=torch.cat([apart.input_ids, canvas[:, :1]], dim=1),
        position_ids=torch.cat([apart.position_ids.expand(rows, -1), positions[:, :1].expand(rows, -1)], dim=1),
        noisy_input_ids=canvas[:, 1:],
        noisy_position_ids=positions[:, 1:],
        attention_mask=None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1),
        num_committed=num_committed,
        num_kept=canvas.shape[1],
        is_causal=config.noisy_attention == "causal" or canvas.shape[1] == 1,
        is_full=False,
    )


def canvas_states(inputs: TrunkInputs, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    The hidden states of the noisy tokens, `[B, N, d]`, from what the trunk returned; those of anchors are the clean
    tokens' own.
    """
    rows = inputs.anchor_rows
    if rows is None:
        return hidden_states
    num_noisy = inputs.noisy_input_ids.shape[1]
    clean, noisy = hidden_states.split([hidden_states.shape[1] - num_noisy, num_noisy], dim=1)
    if not inputs.is_aligned:
        index = rows.clamp(min=0)[..., None].expand(len(noisy), -1, noisy.shape[-1])
        clean = clean.gather(1, index)
    return torch.where((rows >= 0)[..., None], clean, noisy)


__all__ = ["anchored_pass", "canvas_states"]
