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
"""Which block sizes a model can run."""

from collections.abc import Sequence

import torch
from transformers.utils import logging

from .configuration_blockgen import BlockGenConfig
from .masking_blockgen import BlockSize


logger = logging.get_logger(__name__)


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


__all__ = ["check_leak", "checked_block_size"]
