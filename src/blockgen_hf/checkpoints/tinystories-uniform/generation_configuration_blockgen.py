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
"""The settings of BlockGen's decodings, as a generation config that is saved with the model."""

import copy
from bisect import bisect_right
from collections.abc import Collection
from math import ceil
from typing import Any, NamedTuple

from transformers import GenerationConfig


DECODINGS = ("ar", "block_diffusion", "arpc", "speculative", "draft_revise")
ACCEPTANCES = ("match", "rejection")
DRAFT_DECODINGS = ("block_diffusion", "arpc")
REVISE_SCORES = ("snapshot", "ar_surprisal", "posthoc", "random")
SAMPLERS = ("ancestral", "first_hitting", "confidence", "entropy_bound")
NOISE_REMOVALS = ("ancestral", "greedy")
AR_CORRECTORS = ("ar_surprisal", "ar_gap", "ar_entropy", "ar_kl", "ar_reverse_kl", "ar_tv")
DIFFUSION_CORRECTORS = ("entropy", "confidence", "margin")
# Their scores are made of the whole diffusion distribution.
DISTRIBUTION_CORRECTORS = ("ar_kl", "ar_reverse_kl", "ar_tv", *DIFFUSION_CORRECTORS)
CORRECTORS = (*AR_CORRECTORS, *DIFFUSION_CORRECTORS, "random")

# Steps of a block, and what is counted in them: ten times what any paper takes.
_MOST_STEPS = 10_000

# What `generate` assumes where neither the call nor the model's own generation config says anything.
_DEFAULTS: dict[str, Any] = {
    "ar_seed_tokens": 0,
    "corrector": "ar_surprisal",
    "corrector_start": 0,
    "corrector_period": 1,
    "noise_removal": "ancestral",
    "sampler": "ancestral",
    "confidence_threshold": 0.9,
    "entropy_bound": 0.1,
    "acceptance": "match",
    "draft_steps": 1,
    "draft_decoding": "block_diffusion",
    "revise_ratio": 0.25,
    "revise_score": "snapshot",
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "output_trajectory": False,
    "trajectory_top_k": 0,
    # A diffusion model is sampled from, and from its whole distribution: transformers' default top_k=50 cuts it
    # silently.
    "do_sample": True,
    "top_k": 0,
}
# They shape the distribution that is drawn from, and mean nothing where nothing is drawn.
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Settings that None means nothing for: in a call it leaves the default, or the model's own.
NEVER_NONE = tuple(name for name in _DEFAULTS if name not in ("do_sample", "top_k"))
_SETTINGS = (
    "decoding",
    "block_size",
    "denoising_steps",
    "nfe_per_block",
    "fused_drafts",
    "revise_block_size",
    "revise_steps",
    "cache_window",
    *(name for name in _DEFAULTS if name not in ("do_sample", "top_k")),
)


class Revision(NamedTuple):
    """A stage of `decoding="draft_revise"` behind the draft: block size B(k), share gamma(k), and denoising steps."""

    block_size: int
    ratio: float
    num_steps: int


class BlockGenGenerationConfig(GenerationConfig):
    r"""
    [`GenerationConfig`] with the settings of block diffusion. Unset settings are None; `generate` fills them from the
    model's own generation config, then from the defaults below.

    Args:
        decoding (`str`, *optional*):
            `"ar"`, `"block_diffusion"`, `"arpc"` (AR-informed predictor-corrector, Algorithm 1; the paper calls it
            AIPC), `"speculative"` (the text of `"ar"` in fewer passes) or `"draft_revise"` (a draft of small blocks
            whose least certain tokens are denoised again in large ones, Diffusion in Diffusion). Default: block
            diffusion, or `"ar"` if the model knows block size 1 only.
        block_size (`int`, *optional*):
            L', tokens denoised together. Default: the largest that the model was trained for; of a draft that is
            revised, the smallest of at least 4.
        denoising_steps (`int`, *optional*):
            T, denoiser steps a block. Default: `block_size`.
        nfe_per_block (`int`, *optional*):
            Instead of `denoising_steps`: function evaluations a block, the AR passes counted. T is the largest that
            fits.
        ar_seed_tokens (`int`, defaults to 0):
            AR seeding (Sec. 4): so many new tokens autoregressively before the first block.
        corrector (`str`, defaults to `"ar_surprisal"`):
            Score g of the informed steps. With an AR pass: `"ar_surprisal"`, `"ar_gap"`, `"ar_entropy"`, `"ar_kl"`,
            `"ar_reverse_kl"`, `"ar_tv"`; without: `"entropy"`, `"confidence"`, `"margin"` (uniform models only, Suppl.
            B.1) and `"random"`.
        corrector_start (`int`, defaults to 0):
            k_init: index of the first informed step.
        corrector_period (`int`, defaults to 1):
            pc: every so many steps from `corrector_start` on are informed. The last step never is.
        noise_removal (`str`, defaults to `"ancestral"`):
            The last step: `"ancestral"` draws, `"greedy"` takes the arg-max.
        sampler (`str`, defaults to `"ancestral"`):
            How a block is denoised. `"ancestral"`: T steps of the posterior. `"first_hitting"`: masked models only,
            the same law for T to infinity, a function evaluation for each token. `"confidence"` and `"entropy_bound"`:
            at every step the tokens that the model is sure of, T steps at most.
        confidence_threshold (`float`, defaults to 0.9):
            Of `sampler="confidence"`: tokens whose most likely value has this probability are accepted.
        entropy_bound (`float`, defaults to 0.1):
            Of `sampler="entropy_bound"`: the most certain tokens are accepted whose entropies, but for the largest,
            add up to so many nats at most.
        acceptance (`str`, defaults to `"match"`):
            Of `decoding="speculative"`. `"match"`: draft tokens are kept as long as they are those that `"ar"` draws,
            so the text is that of `decoding="ar"` for the same seed. `"rejection"`: they are kept with the probability
            min(1, p / q), so the law of the text is that of `"ar"`, and more of them are kept.
        draft_steps (`int`, defaults to 1):
            Of `decoding="speculative"`: denoising steps a draft. More than one needs `acceptance="match"`.
        draft_decoding (`str`, defaults to `"block_diffusion"`):
            Of `decoding="speculative"`: how a draft of several steps is made; `"arpc"` takes the corrector settings.
            Of `decoding="draft_revise"`: how the draft and its revisions are denoised.
        fused_drafts (`bool`, *optional*):
            Of `decoding="speculative"`: whether one pass verifies a draft and makes the next one, behind every token
            that the verification may end with. That takes fewer passes of more tokens. Default: whatever is faster by
            the measured costs; with `acceptance="rejection"`, whose text depends on it, on accelerators and not on
            CPUs. Drafts of several steps have passes of their own.
        revise_block_size (`int` or `list[int]`, *optional*):
            Of `decoding="draft_revise"`: B(k), tokens of the text that are revised together. A list has one for each
            stage behind the draft. Default: the largest that the model was trained for.
        revise_ratio (`float` or `list[float]`, defaults to 0.25):
            Of `decoding="draft_revise"`: gamma(k), the share of the generated tokens that goes back to noise.
        revise_steps (`int` or `list[int]`, *optional*):
            Of `decoding="draft_revise"`: denoising steps a block of the revision. Default: as many as tokens of a
            block are revised in the mean.
        revise_score (`str`, defaults to `"snapshot"`):
            Of `decoding="draft_revise"`: which tokens are revised. `"snapshot"`: those whose probability was lowest
            when they were committed. For comparison: `"ar_surprisal"` and `"posthoc"`, the least likely under an AR
            pass, or a denoising pass in blocks of `revise_block_size`, over the finished draft; and `"random"`.
        cache_window (`int`, *optional*):
            A sliding window: every token sees the last so many clean tokens before its block, and older ones leave the
            cache. A text may then be longer than the model has positions. Default: all tokens are seen.
        presence_penalty (`float`, defaults to 0.0):
            Subtracted from the logits of tokens that the generated text has already, as in OpenAI's API: from -2 to 2.
        frequency_penalty (`float`, defaults to 0.0):
            The same, for each time that the generated text has the token.
        output_trajectory (`bool`, defaults to `False`):
            Whether to return the states of each step and the frames that show them, with
            `return_dict_in_generate=True`.
        trajectory_top_k (`int`, defaults to 0):
            With `output_trajectory=True`: how many of the most likely tokens the frames give for each position that a
            pass predicts, under diffusion and under AR. The passes then compute the logits of all noisy tokens.
        kwargs:
            Everything that [`GenerationConfig`] takes.

    Raises:
        ValueError: a setting has a value that it does not accept, or two contradict one another.

    ```python
    >>> from blockgen_hf import BlockGenGenerationConfig

    >>> BlockGenGenerationConfig(decoding="arpc", block_size=16, nfe_per_block=8, corrector_period=3).denoising_steps
    ```"""

    do_sample: bool | None
    top_k: int | None

    def __init__(self, **kwargs: Any) -> None:
        # Before super().__init__, which validates.
        for name in _SETTINGS:
            setattr(self, name, kwargs.get(name))
        super().__init__(**kwargs)

    @classmethod
    def upgrade(cls, generation_config: GenerationConfig) -> "BlockGenGenerationConfig":
        """The same settings as a BlockGen generation config."""
        # By name: a checkpoint's remote code and the installed package have two classes of this name.
        if type(generation_config).__name__ == cls.__name__:
            return generation_config
        settings = generation_config.to_dict()
        # Saved with this flag, a reload would drop every setting that GenerationConfig itself does not know.
        settings.pop("_from_model_config", None)
        upgraded = cls.from_dict(settings)
        upgraded._original_object_hash = hash(upgraded)
        return upgraded

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BlockGenGenerationConfig":
        return cls.upgrade(GenerationConfig.from_model_config(model_config))

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return GenerationConfig._get_default_generation_params() | _DEFAULTS

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        # `denoising_steps` and `nfe_per_block` are two ways to say one thing: the one that is said last replaces the
        # other.
        for name, other in (("denoising_steps", "nfe_per_block"), ("nfe_per_block", "denoising_steps")):
            if defaults_only and getattr(self, name) is not None:
                kwargs.pop(other, None)
            elif not defaults_only and kwargs.get(name) is not None and kwargs.get(other) is None:
                setattr(self, other, None)
        if defaults_only and self.do_sample is False:
            # Greedy by the call's choice: a temperature of the model's own has no part in it, and transformers would
            # warn of it as if the call had asked for both.
            neutral = self._get_default_generation_params()
            for name in SAMPLING_SETTINGS:
                if kwargs.get(name) != neutral.get(name):
                    kwargs.pop(name, None)
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs)

    def without_sampling(self, kept: Collection[str]) -> "BlockGenGenerationConfig":
        """A greedy copy, in which the settings of sampling are unset but for those to be kept."""
        greedy = copy.deepcopy(self)
        greedy.do_sample = False
        for name in SAMPLING_SETTINGS:
            if name not in kept:
                setattr(greedy, name, None)
        return greedy

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        # The parent finds fault with a temperature where `do_sample` is unset, which is greedy to it and sampling
        # here, and with any `top_k` but its own default, 50, where nothing is sampled. Ours is 0.
        do_sample, top_k = self.do_sample, self.top_k
        self.do_sample, self.top_k = do_sample is None or do_sample, top_k or None
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.do_sample, self.top_k = do_sample, top_k
        for name, accepted in (
            ("decoding", DECODINGS),
            ("corrector", CORRECTORS),
            ("noise_removal", NOISE_REMOVALS),
            ("sampler", SAMPLERS),
            ("acceptance", ACCEPTANCES),
            ("draft_decoding", DRAFT_DECODINGS),
            ("revise_score", REVISE_SCORES),
            ("fused_drafts", (True, False)),
            ("output_trajectory", (True, False)),
        ):
            value = getattr(self, name)
            if value is not None and value not in accepted:
                raise ValueError(f"`{name}` must be one of {list(accepted)}, but is {value!r}.")
        for name, smallest, largest in (
            ("block_size", 1, None),
            ("denoising_steps", 1, _MOST_STEPS),
            ("nfe_per_block", 1, _MOST_STEPS),
            ("draft_steps", 1, _MOST_STEPS),
            ("ar_seed_tokens", 0, None),
            ("trajectory_top_k", 0, 100),
            ("corrector_start", 0, _MOST_STEPS),
            ("corrector_period", 1, _MOST_STEPS),
            ("cache_window", 1, None),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ValueError(f"`{name}` must be an integer of at least {smallest}, but is {value!r}.")
            if largest is not None and value > largest:
                raise ValueError(f"`{name}` must be at most {largest:,}, but is {value}.")
        self._validate_sampler()
        self._validate_drafts()
        self._validate_revisions()
        if self.denoising_steps is not None and self.nfe_per_block is not None:
            raise ValueError(
                f"`denoising_steps` ({self.denoising_steps}) and `nfe_per_block` ({self.nfe_per_block}) contradict "
                "one another: the second is the budget from which the number of steps follows. Give one of them."
            )

    def _validate_sampler(self) -> None:
        if self.sampler not in (None, "ancestral") and self.decoding == "arpc":
            raise ValueError(
                f"`sampler={self.sampler!r}` does not go with `decoding='arpc'`, whose steps are ancestral."
            )
        if self.sampler == "first_hitting" and self.nfe_per_block is not None:
            raise ValueError(
                f"`nfe_per_block` ({self.nfe_per_block}) and `sampler='first_hitting'` contradict one another: it "
                "takes a function evaluation for each token. Pass `nfe_per_block=None`."
            )
        for name, smallest, largest in (
            ("confidence_threshold", 0.0, 1.0),
            ("entropy_bound", 0.0, float("inf")),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not smallest <= value <= largest):
                raise ValueError(f"`{name}` must be a number from {smallest:g} to {largest:g}, but is {value!r}.")

    def _validate_drafts(self) -> None:
        if self.decoding != "speculative":
            return
        has_steps = self.draft_steps not in (None, 1) or self.draft_decoding == "arpc"
        if self.acceptance == "rejection" and has_steps:
            raise ValueError(
                f"`acceptance='rejection'` needs drafts of one step, whose probabilities are known, but `draft_steps` "
                f"is {self.draft_steps} and `draft_decoding` {self.draft_decoding!r}: use `acceptance='match'`."
            )
        if self.fused_drafts and has_steps:
            raise ValueError(
                f"`fused_drafts=True` needs drafts of one step, but `draft_steps` is {self.draft_steps} and "
                f"`draft_decoding` {self.draft_decoding!r}."
            )
        if self.sampler not in (None, "ancestral"):
            raise ValueError(
                f"`sampler={self.sampler!r}` does not go with `decoding='speculative'`, whose drafts are ancestral."
            )

    def _validate_revisions(self) -> None:
        lengths = {}
        for name, smallest, largest in (("revise_block_size", 1, None), ("revise_steps", 1, _MOST_STEPS)):
            for value in _listed(getattr(self, name)):
                is_number = isinstance(value, int) and not isinstance(value, bool)
                if not is_number or value < smallest or (largest is not None and value > largest):
                    bound = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest:,}"
                    raise ValueError(
                        f"`{name}` must be an integer {bound}, or a list of them, one for each stage, but is "
                        f"{getattr(self, name)!r}."
                    )
        for value in _listed(self.revise_ratio):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(
                    "`revise_ratio` must be a number from 0 to 1, or a list of them, one for each stage, but is "
                    f"{self.revise_ratio!r}."
                )
        for name in ("revise_block_size", "revise_ratio", "revise_steps"):
            if isinstance(getattr(self, name), (list, tuple)):
                lengths[name] = len(getattr(self, name))
        if 0 in lengths.values() or len(set(lengths.values())) > 1:
            listed = ", ".join(f"`{name}={getattr(self, name)!r}`" for name in lengths)
            raise ValueError(
                f"Lists of stages must have one number for each stage, all of them as many, but are {listed}."
            )
        if (
            self.decoding == "draft_revise"
            and self.draft_decoding == "arpc"
            and self.sampler not in (None, "ancestral")
        ):
            raise ValueError(
                f"`sampler={self.sampler!r}` does not go with `draft_decoding='arpc'`, whose steps are ancestral."
            )

    def drafting(self) -> "BlockGenGenerationConfig":
        """The settings of the drafts of `decoding="draft_revise"` and `"speculative"`."""
        settings = copy.copy(self)
        settings.decoding = self.draft_decoding
        if self.decoding == "speculative":
            settings.denoising_steps, settings.nfe_per_block = self.draft_steps, None
        return settings

    def revisions(self, longest: int) -> list[Revision]:
        """The stages behind a draft of so many tokens at most; `revise_block_size` is known by now."""
        given = (self.revise_block_size, self.revise_ratio, self.revise_steps)
        count = max(len(value) if isinstance(value, (list, tuple)) else 1 for value in given)
        columns = [value if isinstance(value, (list, tuple)) else [value] * count for value in given]
        return [
            Revision(size, ratio, max(1, ceil(ratio * min(size, longest))) if num_steps is None else num_steps)
            for size, ratio, num_steps in zip(*columns, strict=True)
        ]

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: settings of ours that are unset say nothing."""
        return {
            name: value for name, value in super().to_diff_dict().items() if value is not None or name not in _SETTINGS
        }

    def is_informed(self, step: int, num_steps: int) -> bool:
        """GUIDED(i) of Algorithm 1: from `corrector_start` on every `corrector_period`-th step, the last one never."""
        start, period = self.corrector_start, self.corrector_period
        return self.decoding == "arpc" and start <= step < num_steps - 1 and (step - start) % period == 0

    def acceptance_bound(self) -> float:
        """What the adaptive sampler compares with."""
        return float(self.confidence_threshold if self.sampler == "confidence" else self.entropy_bound)

    def function_evaluations(self, num_steps: int) -> int:
        """Function evaluations of a block of T steps: T, and one more for each informed step that needs an AR pass."""
        if self.decoding != "arpc" or self.corrector not in AR_CORRECTORS:
            return num_steps
        return num_steps + len(range(self.corrector_start, num_steps - 1, self.corrector_period))

    def num_denoising_steps(self) -> int:
        """T: given, or the largest that `nfe_per_block` pays for, or the block size; to speculate, `draft_steps`."""
        if self.decoding in ("speculative", "draft_revise"):
            return self.drafting().num_denoising_steps()
        if self.nfe_per_block is None:
            return self.denoising_steps if self.denoising_steps is not None else self.block_size
        first_informed = self.corrector_start + 2  # the last step never is, so that T must be larger
        needed = self.function_evaluations(first_informed)
        if self.decoding == "arpc" and needed > self.nfe_per_block:
            raise ValueError(
                f"`nfe_per_block={self.nfe_per_block}` is too small for a single informed step: with "
                f"`corrector={self.corrector!r}` and `corrector_start={self.corrector_start}` ARPC needs at least "
                f"{needed} function evaluations a block."
            )
        affordable = range(1, self.nfe_per_block + 1)
        return bisect_right(affordable, self.nfe_per_block, key=self.function_evaluations)


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    if value is None:
        return []
    return value if isinstance(value, (list, tuple)) else [value]


__all__ = ["BlockGenGenerationConfig", "Revision"]
