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
"""`generate` for BlockGen: transformers' own preparation, then a block loop instead of one token after the other."""

from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.generic import is_flash_attention_requested

from .cache_blockgen import make_growing
from .releases_blockgen import CACHE_NAME, BothCacheNames, named_cache, take_cache
from .block_decoding_blockgen import BlockDecoder
from .draft_lengths_blockgen import MeasuredRoundCosts, RoundCosts
from .generation_configuration_blockgen import (
    AR_CORRECTORS,
    DIFFUSION_CORRECTORS,
    NEVER_NONE,
    BlockGenGenerationConfig,
)
from .logits_blockgen import STATEFUL_PROCESSORS, OccurrencePenalties, looks_at_neighbours
from .revision_blockgen import RevisionDecoder
from .sliding_window_blockgen import check_sliding_window, largest_blocks, most_cached
from .speculation_blockgen import SpeculativeDecoder


# Decodings that are not those of the block loop alone.
_DECODERS: dict[str, type[BlockDecoder]] = {"speculative": SpeculativeDecoder, "draft_revise": RevisionDecoder}


def decoder_class(generation_config: GenerationConfig) -> type[BlockDecoder]:
    return _DECODERS.get(generation_config.decoding, BlockDecoder)


# Outputs that only GenerationMixin's own loop collects.
_STEPWISE_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


# The least that a draft has by default (Diffusion in Diffusion: B(1) = 4).
_DRAFT_BLOCK_SIZE = 4


@dataclass
class BlockGenGenerateOutput(BothCacheNames, GenerateDecoderOnlyOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)`. `scores`, `logits`, `attentions` and `hidden_states` are
    None: with `output_scores=True` and the like the output is transformers' own [`GenerateDecoderOnlyOutput`].

    Args:
        sequences (`torch.LongTensor` of shape `[B, prompt + new]`):
            Prompts and new tokens; pads behind the end of a row.
        num_function_evaluations (`torch.LongTensor` of shape `[B]`):
            Denoiser and AR passes that each row took part in. Prefilling the prompt and committing a finished block
            predict nothing and are not counted.
        num_new_tokens (`torch.LongTensor` of shape `[B]`):
            New tokens of each row, up to its end and with it.
        tokens_per_forward (`torch.FloatTensor` of shape `[B]`):
            New tokens divided by function evaluations.
        num_drafted_tokens, num_accepted_tokens (`torch.LongTensor` of shape `[B]`, *optional*):
            With `decoding="speculative"`: tokens of each row that were drafted and verified, and those of them that
            stand in the text. The difference was rejected.
        drafts (`tuple(torch.LongTensor)`, *optional*):
            With `decoding="draft_revise"`: the new tokens `[B, n]` before each revision; pads behind.
        revised (`tuple(torch.BoolTensor)`, *optional*):
            With `decoding="draft_revise"`: which of them went back to noise, `[B, n]`.
        trajectory (`tuple(tuple(torch.LongTensor))`, *optional*, returned with `output_trajectory=True`):
            For each block the states of its tokens, `[B, n]`: fully noised, then after every denoising step. With
            `decoding="speculative"` for each round the draft, and what was accepted of it with the token that follows;
            pads behind. With `decoding="draft_revise"` the blocks of the draft, then those of each revision in which a
            token is revised: first with noise in its place.
        frames (`tuple(dict)`, *optional*, returned with `output_trajectory=True`):
            For each row a frame after every step, of every decoding, as plain data with token ids (docs/replay.md).
            `blockgen_hf.generation.frames` adds the texts of the tokens.
        cache (`Cache`, *optional*, `past_key_values` too):
            The cache, for a following call: prompt and new tokens but for the last block, which no one needed yet.
            None if rows ended early and left the batch (pass a cache of your own to keep them in), or if tokens left
            a sliding window.
    """

    num_function_evaluations: torch.Tensor | None = None
    num_new_tokens: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    trajectory: tuple[tuple[torch.Tensor, ...], ...] | None = None
    num_drafted_tokens: torch.Tensor | None = None
    num_accepted_tokens: torch.Tensor | None = None
    drafts: tuple[torch.Tensor, ...] | None = None
    revised: tuple[torch.Tensor, ...] | None = None
    frames: tuple[dict[str, Any], ...] | None = None


class BlockGenGenerationMixin(GenerationMixin):
    """Adds the decodings of BlockGen to [`GenerationMixin`]; beam search and assisted decoding stay what they are."""

    generation_config: GenerationConfig

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        # Which of its two names the cache has in GenerationMixin, and in the hooks below, depends on the release.
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raises:
            ValueError: always. transformers' continuous batching, `generate_batch` too, has a loop and a paged cache
                of its own, which know nothing of blocks and of query tokens.
        """
        raise ValueError(
            "Continuous batching (`generate_batch`, `init_continuous_batching`) is not supported for BlockGen models: "
            "pass a left-padded batch to `generate`."
        )

    # 1. settings

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = BlockGenGenerationConfig.upgrade(self.generation_config)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        self.generation_config = BlockGenGenerationConfig.upgrade(self.generation_config)
        if generation_config is None:
            # Settings of the call, before the parent fills what is None; a None of the call is meant as such.
            generation_config = BlockGenGenerationConfig()
            kwargs_left = generation_config.update(**kwargs)
            unset = [
                name
                for name, value in kwargs.items()
                if value is None and hasattr(generation_config, name) and name not in NEVER_NONE
            ]
            generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs_left)
            for name in unset:
                setattr(generation_config, name, None)
        else:
            generation_config = BlockGenGenerationConfig.upgrade(generation_config)
            if kwargs.get("do_sample") is False:  # pipelines pass a copy of the model's own beside the call's settings
                generation_config = generation_config.without_sampling(kept=kwargs)
            generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        known = vars(BlockGenGenerationConfig())
        unknown = [name for name in vars(generation_config) if name not in known and not name.startswith("_")]
        if unknown:
            raise ValueError(
                f"Unknown generation settings {unknown}; see `BlockGenGenerationConfig` for the known ones."
            )
        if generation_config.decoding is None:
            generation_config.decoding = "ar" if self.config.block_sizes == [1] else "block_diffusion"
        largest = max(self.config.block_sizes)
        if generation_config.decoding == "draft_revise":
            if generation_config.block_size is None:
                generation_config.block_size = min(
                    (size for size in self.config.block_sizes if size >= _DRAFT_BLOCK_SIZE), default=largest
                )
            if generation_config.revise_block_size is None:
                generation_config.revise_block_size = largest
        if generation_config.block_size is None:
            generation_config.block_size = largest
        return generation_config, model_kwargs

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        penalties = (generation_config.presence_penalty, generation_config.frequency_penalty)
        if any(penalties):
            processors.insert(0, OccurrencePenalties(*penalties, prompt_length=input_ids_seq_length or 0))
        return processors

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        if generation_config.decoding != "ar":
            if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise ValueError(
                    f"`decoding={generation_config.decoding!r}` does not go with {generation_mode.value}: beams, "
                    "assistants and prompt lookup need `decoding='ar'`."
                )
            for name in _STEPWISE_OUTPUTS:
                if getattr(generation_config, name):
                    raise ValueError(
                        f"`{name}=True` needs `decoding='ar'`; `output_trajectory=True` gives the states of a block."
                    )
            if generation_mode_kwargs.get("synced_gpus"):
                raise ValueError(
                    f"`decoding={generation_config.decoding!r}` cannot run with `synced_gpus=True` (FSDP, ZeRO-3): "
                    "ranks finish after different numbers of forward passes. Gather the model first, or use "
                    "`decoding='ar'`."
                )
            generation_config.num_denoising_steps()
        if self.config.next_token_prediction and generation_config.decoding != "ar":
            raise ValueError(
                f"`decoding={generation_config.decoding!r}` needs a diffusion model: one with "
                "`next_token_prediction=True` has `decoding='ar'` only."
            )
        self._validate_adapter()
        positions = self.config.max_position_embeddings
        for name, size in largest_blocks(generation_config).items():
            if size > positions:
                raise ValueError(
                    f"`{name}` must be at most {positions}, the positions of the model (`max_position_embeddings`), "
                    f"but is {size}."
                )
        if generation_config.decoding == "draft_revise" and is_flash_attention_requested(self.config):
            raise ValueError(
                f"`decoding='draft_revise'` needs masks: `attn_implementation={self.config._attn_implementation!r}` "
                "takes none, use 'sdpa' or 'flex_attention'."
            )
        self._validate_corrector(generation_config)
        self._validate_sampler(generation_config)
        self._validate_clean_attention(generation_config)
        if generation_config.cache_window is not None:
            stepwise = [name for name in _STEPWISE_OUTPUTS if getattr(generation_config, name)]
            stepwise += ["synced_gpus"] if generation_mode_kwargs.get("synced_gpus") else []
            check_sliding_window(self.config, generation_config, generation_mode, stepwise)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_adapter(self) -> None:
        # PEFT puts a method of its own model in the place of ours while that generates.
        wrapper = getattr(self.prepare_inputs_for_generation, "__self__", self)
        adapter = getattr(wrapper, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT's {type(adapter).__name__} cannot be used with BlockGen: its virtual tokens stand before the "
                "prompt, where the passes of a block do not look. Train an adapter of the weights, such as LoRA."
            )

    def _validate_corrector(self, generation_config: GenerationConfig) -> None:
        corrector = generation_config.corrector
        if (
            "arpc" in (generation_config.decoding, generation_config.draft_decoding)
            and corrector in DIFFUSION_CORRECTORS
            and self.config.diffusion_type == "masked"
        ):
            raise ValueError(
                f"`corrector={corrector!r}` is not for masked models: their predictions at tokens that are fixed "
                f"already were never trained (BlockGen, Suppl. B.1). Use one of {[*AR_CORRECTORS, 'random']}."
            )

    def _validate_sampler(self, generation_config: GenerationConfig) -> None:
        is_used = generation_config.decoding != "ar"
        if is_used and generation_config.sampler == "first_hitting" and self.config.diffusion_type != "masked":
            raise ValueError(
                "`sampler='first_hitting'` is for masked models, whose tokens change once: use 'ancestral'."
            )

    def _validate_clean_attention(self, generation_config: GenerationConfig) -> None:
        grid = self.config.block_sizes[0]
        if self.config.clean_attention == "causal" or grid == 1:
            return
        if generation_config.decoding == "draft_revise":
            raise ValueError(
                "`decoding='draft_revise'` needs a model with `clean_attention='causal'`, whose blocks may end where "
                "each text does: with 'block_causal' they keep the grid of training."
            )
        needs_ar = generation_config.decoding in ("ar", "speculative") or generation_config.ar_seed_tokens > 0
        if needs_ar or (generation_config.decoding == "arpc" and generation_config.corrector in AR_CORRECTORS):
            raise ValueError(
                "`decoding='ar'` and `'speculative'`, `ar_seed_tokens` and the AR correctors need a model with "
                "`clean_attention='causal'`: with 'block_causal' the clean tokens of a block would reveal the tokens "
                "to be predicted."
            )
        if generation_config.block_size % grid != 0:
            raise ValueError(
                f"`block_size` must be a multiple of {grid}, the grid of a model with "
                f"`clean_attention='block_causal'`, but is {generation_config.block_size}."
            )

    # 2. prompts

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Without a prompt the text starts from the prior at position 0: no BOS is forced."""
        has_nothing = inputs is None and all(value is None for value in model_kwargs.values())  # pipelines pass Nones
        if has_nothing and not self.config.predicts_from_clean:
            return torch.zeros(1, 0, dtype=torch.long, device=self.device)
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if inputs.dtype.is_floating_point or inputs.ndim != 2 or inputs.shape[0] == 0:
            raise ValueError(
                "`inputs` must be token ids of shape [batch, length], of one row at least, but have shape "
                f"{list(inputs.shape)}."
            )
        self._check_attention_mask(inputs, model_kwargs.get("attention_mask"), model_kwargs.get(CACHE_NAME))
        self._check_prompt(inputs, model_kwargs.get("attention_mask"))
        if inputs.shape[1] == 0 and inputs.shape[0] > 1:
            # generate() looks at the last prompt token of batches: pass it one empty prompt, expanded below.
            model_kwargs = {**model_kwargs, "num_empty_prompts": inputs.shape[0]}
            if model_kwargs.get("attention_mask") is not None:
                model_kwargs["attention_mask"] = model_kwargs["attention_mask"][:1]
            inputs = inputs[:1]
        return inputs, input_name, model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        num_empty_prompts: int = 1,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size * num_empty_prompts,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if num_empty_prompts > 1:  # for the cache, which is made next, and for as many rows as there were before
            model_kwargs["num_empty_prompts"] = num_empty_prompts
        return input_ids, model_kwargs

    @staticmethod
    def _check_attention_mask(
        input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> None:
        if attention_mask is None:
            return
        rows, width = input_ids.shape
        fits = attention_mask.ndim == 2 and attention_mask.shape[0] == rows
        if not fits or attention_mask.shape[1] < width or (cache is None and attention_mask.shape[1] > width):
            raise ValueError(
                f"`attention_mask` must have a number for each of the prompt tokens, shape {[rows, width]}, or for "
                f"those in `cache` too, but has the shape {list(attention_mask.shape)}."
            )

    def _check_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if self.config.predicts_from_clean:
            is_empty = input_ids.shape[1] == 0
            if is_empty or (attention_mask is not None and (attention_mask.sum(-1) == 0).any()):
                raise ValueError(
                    "`inputs` must hold a token in every row for a model whose clean tokens predict "
                    "(`ar_prediction='clean'`, `next_token_prediction=True`): begin with the BOS token."
                )
        if input_ids.numel() == 0:
            return
        if input_ids.min() < 0 or input_ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"`inputs` must be ids of the vocabulary (0 to {self.config.vocab_size - 1}), but range from "
                f"{input_ids.min().item()} to {input_ids.max().item()}."
            )
        if self.config.diffusion_type == "masked":
            is_mask = input_ids == self.config.mask_token_id
            if attention_mask is not None and attention_mask.shape == input_ids.shape:
                is_mask = is_mask & attention_mask.bool()
            if is_mask.any():
                raise ValueError(
                    f"`inputs` contain the mask token ({self.config.mask_token_id}): prompts are clean text. "
                    "Infilling is not what `generate` does."
                )

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """`forward` derives them from attention mask and cache, for empty rows too."""
        return None

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        positions = self.config.max_position_embeddings
        has_window = generation_config.cache_window is not None
        if input_ids_length >= positions and not has_window:
            raise ValueError(
                f"`inputs` have {input_ids_length} tokens, but the model has {positions} positions "
                "(`max_position_embeddings`), at least one of them for new text. With `cache_window` a text may be "
                "longer."
            )
        if generation_config.max_length > positions and not has_window:
            raise ValueError(
                f"`max_new_tokens` must be at most {positions - input_ids_length} with a prompt of {input_ids_length} "
                f"tokens: the model has {positions} positions. It is "
                f"{generation_config.max_length - input_ids_length}. With `cache_window` a text may be longer."
            )
        rope = self.config.rope_parameters
        reach = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
        if generation_config.decoding == "speculative" and reach is not None and generation_config.max_length > reach:
            raise ValueError(
                "`decoding='speculative'` verifies tokens of several positions in one pass, but with "
                f"`rope_type='longrope'` what a token is rotated by depends on the pass behind {reach} positions "
                f"(`original_max_position_embeddings`), and the text may have {generation_config.max_length}: use "
                "`decoding='ar'`, or ask for fewer new tokens."
            )
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        implementation = generation_config.cache_implementation or ""
        if implementation.startswith("offloaded") and self.device.type == "cpu":
            raise ValueError(
                f"`cache_implementation={implementation!r}` keeps the cache in the CPU's memory and copies it to the "
                "model's device, but the model is on the CPU: leave it out, or use 'static'."
            )
        given = model_kwargs.get(CACHE_NAME)
        if given is not None and generation_config.cache_window is not None:
            raise ValueError(
                f"`cache` cannot be passed with `cache_window={generation_config.cache_window}`: tokens leave it, and "
                "a later call could not tell which. Pass the whole text."
            )
        num_empty_prompts = model_kwargs.pop("num_empty_prompts", 1)
        if args:
            *others, num_rows, longest = args
            if generation_config.cache_window is not None:
                longest = min(longest, most_cached(generation_config))
            args = (*others, num_rows * num_empty_prompts, longest)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None:
            make_growing(model_kwargs.get(CACHE_NAME))

    # 3. forward passes of GenerationMixin's own loops (beams, assistants)

    def create_masks_for_generate(
        self, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """The 2-D mask as it is: the model renders its own for every kind of cache."""
        return attention_mask

    # 4. decoding

    def draw_seed(self) -> int:
        """
        The seed of all random numbers of one `generate`: drawn from torch's default generator, so that
        `torch.manual_seed` and `set_seed` reproduce the text.
        """
        return int(torch.randint(2**62, ()))

    def measured_round_costs(self, device: torch.device, draft_passes: int) -> RoundCosts:
        """What rounds of speculation cost here: see [`MeasuredRoundCosts`]. A server knows what its rows share."""
        return MeasuredRoundCosts(device, draft_passes)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> BlockGenGenerateOutput | torch.Tensor:
        """
        Where `generate` arrives for greedy decoding and sampling. Every decoding is the block loop, `"ar"` too:
        tokens are drawn exactly and a row at a time. GenerationMixin's own loop serves what is made for it: per-token
        outputs (`output_scores` ...), synchronised ranks, and processors that count tokens.
        """
        # Training mode with gradient checkpointing has no cache.
        if self.gradient_checkpointing_active:
            model_kwargs["use_cache"] = False
            take_cache(model_kwargs)
        stateful = any(isinstance(item, STATEFUL_PROCESSORS) for item in logits_processor)
        if generation_config.decoding != "ar":
            self._validate_processors(logits_processor, generation_config)
        if stateful and generation_config.cache_window is not None:
            names = [type(item).__name__ for item in logits_processor if isinstance(item, STATEFUL_PROCESSORS)]
            raise ValueError(
                f"`cache_window={generation_config.cache_window}` does not go with {names[0]}, which has a loop of "
                "its own."
            )
        if generation_config.cache_window is not None:
            for criterion in stopping_criteria:
                if isinstance(criterion, MaxLengthCriteria):
                    criterion.max_position_embeddings = None  # it would warn of a text that is longer
        stepwise = synced_gpus or any(getattr(generation_config, name) for name in _STEPWISE_OUTPUTS)
        if generation_config.decoding == "ar" and (stepwise or stateful):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        decoder = decoder_class(generation_config)(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            cache=take_cache(model_kwargs),
            **model_kwargs,
        )
        decoder.run()
        if not generation_config.return_dict_in_generate:
            return decoder.sequences()
        return BlockGenGenerateOutput(
            sequences=decoder.sequences(),
            num_function_evaluations=decoder.num_function_evaluations,
            num_new_tokens=decoder.num_new_tokens,
            tokens_per_forward=decoder.num_new_tokens / decoder.num_function_evaluations.clamp(min=1),
            trajectory=decoder.trajectory(),
            frames=decoder.frames(generation_config),
            num_drafted_tokens=getattr(decoder, "num_drafted_tokens", None),
            num_accepted_tokens=getattr(decoder, "num_accepted_tokens", None),
            drafts=getattr(decoder, "drafts", None),
            revised=getattr(decoder, "revised", None),
            **named_cache(decoder.returned_cache()),
        )

    @staticmethod
    def _validate_processors(logits_processor: LogitsProcessorList, generation_config: GenerationConfig) -> None:
        for processor in logits_processor:
            name = type(processor).__name__
            if isinstance(processor, STATEFUL_PROCESSORS):
                raise ValueError(f"{name} works token by token: it needs `decoding='ar'`.")
            is_exact = generation_config.decoding == "speculative"  # each position has the text before it
            has_blocks = generation_config.block_size > 1 or generation_config.decoding == "draft_revise"
            if has_blocks and not is_exact and looks_at_neighbours(processor):
                raise ValueError(
                    f"{name} looks at the tokens just before, which a block draws at the same time: it needs "
                    "`decoding='ar'` or `block_size=1`."
                )


__all__ = ["BlockGenGenerateOutput", "BlockGenGenerationMixin", "decoder_class"]
