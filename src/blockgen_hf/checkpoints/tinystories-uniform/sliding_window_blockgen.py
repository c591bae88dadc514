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
Texts longer than the model has positions (`cache_window`): what can slide, and how much of a text is cached.

The window itself is a rule of the attention mask (`masking_blockgen`); `decoding_state_blockgen` takes the tokens out
of the cache that nobody sees any more. transformers' `DynamicSlidingWindowLayer` serves layers that write each token
they read, in rows of one pace: it has neither passes that only read, nor padding between the tokens of a row.
"""

from transformers import GenerationConfig, PretrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .inputs_blockgen import check_window


logger = logging.get_logger(__name__)


def slack_of_window(window: int) -> int:
    """How many tokens more than a window the cache may hold, so that few of its tokens are moved for each new one."""
    return 1 + window // 4


def most_cached(generation_config: GenerationConfig) -> int:
    """How many tokens the cache ever holds: the prompt or a block behind those of the window."""
    window, new_tokens = generation_config.cache_window, generation_config.max_new_tokens
    prompt = generation_config.max_length - (new_tokens or 0)
    return window + slack_of_window(window) + max(prompt, *largest_blocks(generation_config).values(), 1)


def largest_blocks(generation_config: GenerationConfig) -> dict[str, int]:
    """The largest blocks of the decoding, by the setting that they come from; none for autoregressive decoding."""
    if generation_config.decoding == "ar":
        return {}
    sizes = {"block_size": generation_config.block_size}
    if generation_config.decoding == "draft_revise":
        stages = generation_config.revisions(longest=generation_config.block_size)
        sizes["revise_block_size"] = max(stage.block_size for stage in stages)
    return sizes


def check_sliding_window(
    config: PretrainedConfig, generation_config: GenerationConfig, generation_mode: GenerationMode, stepwise: list[str]
) -> None:
    """
    Warns of a window that is wider than what the model was trained for.

    Args:
        stepwise (`list[str]`): arguments of the call that need a loop of transformers.

    Raises:
        ValueError: a window that does not fit to the model, or something that does not go with it.
    """
    window, named = generation_config.cache_window, f"`cache_window={generation_config.cache_window}`"
    check_window(config, window)
    by_itself = generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    if by_itself or stepwise:
        what = generation_mode.value if by_itself else f"`{stepwise[0]}=True`"
        raise ValueError(f"{named} does not go with {what}, which has a loop of its own.")
    if is_flash_attention_requested(config):
        raise ValueError(
            f"{named} needs a mask, which `attn_implementation={config._attn_implementation!r}` does not take: use "
            "'sdpa' or 'flex_attention'."
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{named} needs rotary embeddings that do not depend on the length of the text, but the model has "
            f"`rope_type={rope_type!r}`."
        )
    implementation = generation_config.cache_implementation
    if implementation not in (None, "dynamic", "static"):
        raise ValueError(
            f"{named} needs a cache that tokens can leave, but `cache_implementation={implementation!r}`: use "
            "'dynamic' or 'static'."
        )
    reach = window + max(largest_blocks(generation_config).values(), default=1)
    if reach > config.max_position_embeddings:
        logger.warning_once(
            f"With {named} the tokens of a block see others at a distance of up to {reach - 1}, but the model was "
            f"trained for {config.max_position_embeddings} positions (`max_position_embeddings`)."
        )


__all__ = ["check_sliding_window", "largest_blocks", "most_cached", "slack_of_window"]
