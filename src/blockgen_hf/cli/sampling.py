"""One call of `generate`, and what it cost."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..default_decoding import CORRECTOR_PERIOD
from ..generation.frames import frames
from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
from ..prompts import PromptEncoder
from .parsing import CommandError
from .streamers import StreamedText


_NEW_TOKENS = 64  # where neither the user nor the model's generation config says how many


@dataclass(frozen=True)
class Sample:
    """
    A text, prompt included, and the denoiser and AR passes that it took. Speculation also tells how many tokens were
    drafted, and how many of them were accepted.
    """

    text: str
    completion: str
    num_new_tokens: int
    num_function_evaluations: int
    tokens_per_forward: float
    num_drafted_tokens: int | None = None
    num_accepted_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Generation:
    """The samples of one call of `generate`, its settings in effect, and the time that it took without drawing."""

    settings: dict[str, Any]
    samples: list[Sample]
    seconds: float
    frames: list[dict[str, Any]] = field(default_factory=list)  # of each sample, where they are asked for

    @property
    def num_new_tokens(self) -> int:
        return sum(sample.num_new_tokens for sample in self.samples)

    @property
    def num_function_evaluations(self) -> int:
        return sum(sample.num_function_evaluations for sample in self.samples)

    @property
    def num_drafted_tokens(self) -> int | None:
        """None without speculation."""
        return self._total("num_drafted_tokens")

    @property
    def num_accepted_tokens(self) -> int | None:
        return self._total("num_accepted_tokens")

    def _total(self, name: str) -> int | None:
        counts = [count for sample in self.samples if (count := getattr(sample, name)) is not None]
        return sum(counts) if counts else None

    @property
    def tokens_per_forward(self) -> float:
        return self.num_new_tokens / max(1, self.num_function_evaluations)

    @property
    def tokens_per_second(self) -> float:
        return self.num_new_tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        drafts = {"num_drafted_tokens": self.num_drafted_tokens, "num_accepted_tokens": self.num_accepted_tokens}
        return {
            "decoding": self.settings["decoding"],
            "settings": self.settings,
            "num_new_tokens": self.num_new_tokens,
            "num_function_evaluations": self.num_function_evaluations,
            **({} if self.num_drafted_tokens is None else drafts),
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "seconds": round(self.seconds, 4),
            "samples": [sample.to_dict() for sample in self.samples],
        }


class Sampler:
    """
    A prompt that a model continues.

    Args:
        prompt: a text; empty: the model starts one.
        seed: of every call, so that calls differ in their settings only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        num_samples: int,
        seed: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.num_samples = num_samples
        self.seed = seed
        try:
            token_ids = PromptEncoder(tokenizer)(prompt)
        except ValueError as error:
            raise CommandError(error) from error
        self.input_ids = torch.tensor([token_ids], dtype=torch.long, device=model.device)
        self.defaults: dict[str, Any] = {}
        if model.generation_config.max_new_tokens is None and model.generation_config.max_length is None:
            room = model.config.max_position_embeddings - len(token_ids)
            self.defaults["max_new_tokens"] = max(1, min(_NEW_TOKENS, room))

    def settings_in_effect(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What `generate` makes of these settings and of the model's own."""
        try:
            config = self._config(self._with_defaults(settings))
            effective: dict[str, Any] = {"decoding": config.decoding}
            num_steps = config.num_denoising_steps() if config.decoding != "ar" else 0
            if config.decoding == "speculative":
                effective |= {
                    "block_size": config.block_size,
                    "acceptance": config.acceptance,
                    "draft_steps": num_steps,
                    "draft_decoding": config.draft_decoding,
                    "fused_drafts": config.fused_drafts,
                    "ar_seed_tokens": config.ar_seed_tokens,
                }
            elif config.decoding != "ar":
                steps = config.drafting() if config.decoding == "draft_revise" else config
                effective |= {
                    "block_size": config.block_size,
                    "denoising_steps": num_steps,
                    "informed_steps": [step for step in range(num_steps) if steps.is_informed(step, num_steps)],
                    "function_evaluations_per_block": steps.function_evaluations(num_steps),
                    "noise_removal": config.noise_removal,
                    "ar_seed_tokens": config.ar_seed_tokens,
                }
            if config.decoding == "draft_revise":
                effective |= self._revisions(config)
        except ValueError as error:
            raise CommandError(error) from error
        names = ["max_new_tokens", "do_sample", "repetition_penalty"]
        names += ["stop_strings"] if config.stop_strings else []
        names += ["cache_window"] if config.cache_window is not None else []
        if config.do_sample:
            names += ["temperature", "top_k", "top_p"]
        drafts_by_arpc = config.decoding in ("speculative", "draft_revise") and config.draft_decoding == "arpc"
        if config.decoding == "arpc" or drafts_by_arpc:
            names += ["corrector", "corrector_start", "corrector_period"]
        return effective | {name: getattr(config, name) for name in names}

    def _revisions(self, config: BlockGenGenerationConfig) -> dict[str, Any]:
        """Those of `decoding="draft_revise"`, with a number for each stage."""
        longest = config.max_new_tokens or self.model.config.max_position_embeddings
        stages = config.revisions(longest)
        return {
            "draft_decoding": config.draft_decoding,
            "revise_block_size": [stage.block_size for stage in stages],
            "revise_ratio": [stage.ratio for stage in stages],
            "revise_steps": [stage.num_steps for stage in stages],
            "revise_score": config.revise_score,
        }

    def _config(self, settings: dict[str, Any]) -> BlockGenGenerationConfig:
        config, _ = self.model._prepare_generation_config(None, **settings)
        return config

    def _with_defaults(self, settings: dict[str, Any]) -> dict[str, Any]:
        """
        With the length, and with a budget for ARPC where neither the settings nor the model's own say one: two thirds
        of the block size, less than two tokens for each forward pass, with as many informed steps as it pays for.
        """
        settings = {**self.defaults, **settings}
        config = self._config(settings)
        has_budget = config.denoising_steps is not None or config.nfe_per_block is not None
        first_informed = config.corrector_start + 2  # as in `num_denoising_steps`
        if config.decoding != "arpc" or has_budget or first_informed > config.block_size:
            return settings
        smallest = config.function_evaluations(first_informed)
        budget = max(smallest, 2 * config.block_size // 3)
        return {"corrector_period": CORRECTOR_PERIOD, "nfe_per_block": budget, **settings}

    def generate(self, settings: dict[str, Any], streamer: StreamedText | None = None) -> Generation:
        """One call of `generate`; ValueErrors, which tell what is wrong with a setting, become a CommandError."""
        effective = self.settings_in_effect(settings)
        set_seed(self.seed)
        started = time.perf_counter()
        try:
            outputs = self.model.generate(
                self.input_ids,
                attention_mask=torch.ones_like(self.input_ids),
                num_return_sequences=self.num_samples,
                return_dict_in_generate=True,
                streamer=streamer,
                tokenizer=self.tokenizer,  # for stop strings
                **self._with_defaults(settings),
            )
        except ValueError as error:
            raise CommandError(error) from error
        sequences = outputs.sequences.tolist()  # waits for the device
        seconds = time.perf_counter() - started - (0.0 if streamer is None else streamer.seconds)
        columns = [outputs.num_new_tokens, outputs.num_function_evaluations, outputs.tokens_per_forward]
        if effective["decoding"] == "speculative":
            columns += [outputs.num_drafted_tokens, outputs.num_accepted_tokens]
        costs = zip(*(column.tolist() for column in columns), strict=True)
        samples = [self._sample(row, *cost) for row, cost in zip(sequences, costs, strict=True)]
        documents = [] if outputs.frames is None else frames(outputs, self.tokenizer)
        return Generation(effective, samples, seconds, documents)

    def _sample(self, token_ids: list[int], *cost: Any) -> Sample:
        prompt_length = self.input_ids.shape[1]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        prompt = self.tokenizer.decode(token_ids[:prompt_length], skip_special_tokens=True)
        return Sample(text, text.removeprefix(prompt), *cost)


def describe(settings: dict[str, Any]) -> str:
    """Settings in effect in a few words; what samples from the model's own distribution goes without saying."""
    words = []
    if settings["decoding"] == "speculative":
        words += [f"block size {settings['block_size']}", *_describe_drafts(settings)]
    elif settings["decoding"] != "ar":
        words += [f"block size {settings['block_size']}", f"{settings['denoising_steps']} steps"]
        if "arpc" in (settings["decoding"], settings.get("draft_decoding")):
            words.append(f"{len(settings['informed_steps'])} with {settings['corrector']}")
        if settings["noise_removal"] != "ancestral":
            words.append(f"{settings['noise_removal']} last step")
        if settings["decoding"] == "draft_revise":
            words += _describe_revisions(settings)
    if settings.get("ar_seed_tokens"):
        words.append(f"{settings['ar_seed_tokens']} AR seed tokens")
    if settings.get("cache_window"):
        words.append(f"window {settings['cache_window']}")
    if not settings["do_sample"]:
        words.append("greedy")
    for name, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("repetition_penalty", 1.0)):
        value = settings.get(name)
        if value is not None and value != neutral:
            words.append(f"{name.replace('_', ' ')} {value:g}")
    return ", ".join(words)


def _describe_revisions(settings: dict[str, Any]) -> list[str]:
    stages = zip(settings["revise_ratio"], settings["revise_block_size"], settings["revise_steps"], strict=True)
    words = [f"then {ratio:.0%} revised in blocks of {size} by {steps} steps" for ratio, size, steps in stages]
    return words + ([f"score {settings['revise_score']}"] if settings["revise_score"] != "snapshot" else [])


def _describe_drafts(settings: dict[str, Any]) -> list[str]:
    steps = settings["draft_steps"]
    words = [f"{steps} draft step{'s' * (steps > 1)}"]
    if settings["draft_decoding"] == "arpc":
        words.append(f"arpc drafts with {settings['corrector']}")
    if settings["fused_drafts"]:
        words.append("fused drafts")
    if settings["do_sample"]:  # greedy decoding keeps the same tokens either way
        words.append(f"acceptance {settings['acceptance']}")
    return words
