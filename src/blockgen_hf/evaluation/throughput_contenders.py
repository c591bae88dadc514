"""Who takes part in the benchmark of generation: BlockGen's decodings, and GPT-2 of the same size."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.diffusion_blockgen import NoiseSchedule
from ..modeling.layers_blockgen import BlockGenModulation
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM
from .throughput import Case, Contender, Generated


# Sizes of random models. "base" is the paper's.
SIZES: dict[str, dict[str, int]] = {
    "base": {"vocab_size": 50258, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"vocab_size": 503, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
# What one more number behind a decoding's name means. A corrector's period of 3 uses budgets of 8 and 16 up: T = 6
# with two AR passes, T = 12 with four.
_BUDGETS: dict[str, Callable[[int], dict[str, int]]] = {
    "block_diffusion": lambda number: {"denoising_steps": number},
    "arpc": lambda number: {"nfe_per_block": number, "corrector_period": 3},
}
# Nats. What a language model leaves open about a token of a noisy block, in order of magnitude.
_ENTROPY = 4.0
_PROMPT_LENGTH = 16  # of random tokens, behind which it is measured
_MODULATION_SCALE = 0.2


@dataclass(frozen=True)
class Decoding:
    """A decoding by the name that it has in tables, and as settings of `generate`."""

    name: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str, block_size: int | None = None, default: int | None = None) -> "Decoding":
        """
        `"ar"`, `"speculative"`, `"block_diffusion:16"` (denoising steps), `"arpc:8"` (function evaluations a block),
        `"draft_revise"`, each with settings of `generate` behind it: `"block_diffusion:64:noise_removal=greedy"`,
        `"speculative:acceptance=rejection"`.

        Args:
            text (`str`): the decoding.
            block_size (`int`, *optional*): what the caller asked for, where the text does not say another.
            default (`int`, *optional*): the block size where nobody asked for one. Not that of `"draft_revise"`: a
                draft as large as its revision is no draft, and `generate` has small blocks for it.

        Raises:
            ValueError: a decoding, number or setting that there is not.
        """
        decoding, *words = text.split(":")
        settings: dict[str, Any] = {"decoding": decoding}
        if block_size is None and decoding != "draft_revise":
            block_size = default
        if block_size is not None and decoding != "ar":
            settings["block_size"] = block_size
        for word in words:
            name, is_setting, value = word.partition("=")
            if is_setting:
                settings[name] = _value(value)
            elif decoding in _BUDGETS and word.isdecimal() and int(word) > 0:
                settings |= _BUDGETS[decoding](int(word))
            else:
                raise ValueError(
                    f"`{text}` is no decoding: behind `{decoding}` there may be settings (`name=value`)"
                    + (" and a positive number." if decoding in _BUDGETS else ".")
                )
        known = vars(BlockGenGenerationConfig())
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"`{text}` has settings that `generate` does not know: {unknown}.")
        BlockGenGenerationConfig(**settings)  # looks at the values
        return cls(text, settings)

    def in_effect(self, model: PreTrainedModel) -> GenerationConfig:
        """
        What `generate` makes of the settings and of the model's own.

        Raises:
            ValueError: settings that contradict one another.
        """
        config, _ = model._prepare_generation_config(None, **self.settings)
        if config.decoding != "ar":
            config.num_denoising_steps()
        return config


def _value(text: str) -> Any:
    """JSON, Python's own words for it, or a text."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def random_model(size: str, diffusion_type: str, max_position_embeddings: int = 1024) -> BlockGenForDiffusionLM:
    """
    A model with random weights that does the work of a trained one, in evaluation mode, float32.

    Layers are initialised as for training. What training starts at zero is drawn too: adaLN from a normal
    distribution, and the head, whose logits are then normal, so that probabilities have the long tail of a log-normal
    distribution; its scale is the one at which x_hat of a noised block has 4 nats. All numbers come from torch's
    default generator.
    """
    config = BlockGenConfig(
        **SIZES[size],
        diffusion_type=diffusion_type,
        max_position_embeddings=max_position_embeddings,
        hidden_dropout=0.0,
    )
    model = BlockGenForDiffusionLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BlockGenModulation):
                for parameter in module.parameters():
                    parameter.normal_(std=_MODULATION_SCALE)
        model.lm_head.weight.normal_(std=config.hidden_size**-0.5)
        model.lm_head.weight *= _scale_for_entropy(_logits_of_noise(model), _ENTROPY)
    return model


def denoiser_entropy(model: BlockGenForDiffusionLM) -> float:
    """Mean entropy of x_hat in a noised block behind a prompt of random tokens, in nats."""
    return _entropy(_logits_of_noise(model).float())


@torch.no_grad()
def _logits_of_noise(model: BlockGenForDiffusionLM) -> torch.Tensor:
    prompt = torch.randint(model.config.vocab_size - 1, (1, _PROMPT_LENGTH), device=model.device)
    noise = model.diffusion.prior((1, max(model.config.block_sizes)), model.device)
    positions = _PROMPT_LENGTH + torch.arange(noise.shape[1], device=model.device)[None]
    return model(input_ids=prompt, noisy_input_ids=noise, noisy_position_ids=positions, noise_level=1.0).logits


def _entropy(logits: torch.Tensor) -> float:
    return float(torch.special.entr(logits.softmax(-1)).sum(-1).mean())


def _scale_for_entropy(logits: torch.Tensor, entropy: float) -> float:
    """The factor of the logits at which their distributions have this entropy, by bisection: it falls with it."""
    low, high = 0.0, 64.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(middle * logits) > entropy else (low, middle)
    return (low + high) / 2


def blockgen_contenders(model: PreTrainedModel, decodings: list[Decoding], name: str = "blockgen") -> list[Contender]:
    """`model.generate` with each of the decodings."""
    return [
        Contender(name, decoding.name, model, _generate_with(model, decoding.settings), _passes(model, decoding))
        for decoding in decodings
    ]


def compiled_contenders(model: PreTrainedModel, decodings: list[Decoding]) -> list[Contender]:
    """The same on a copy whose layers `torch.compile` compiles, with a static cache, so that few shapes occur."""
    compiled = deepcopy(model)
    compiled.base_model.forward = torch.compile(compiled.base_model.forward)
    static = [Decoding(each.name, {"cache_implementation": "static", **each.settings}) for each in decodings]
    contenders = blockgen_contenders(compiled, static, "blockgen-compiled")
    return [replace(contender, is_compiled=True) for contender in contenders]


def _generate_with(model: PreTrainedModel, settings: dict[str, Any]) -> Callable[[torch.Tensor, int], Generated]:
    def generate(prompts: torch.Tensor, new_tokens: int) -> Generated:
        outputs = model.generate(
            prompts,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            return_dict_in_generate=True,
            **{"do_sample": True, "top_k": 0, **settings},
        )
        evaluations = outputs.num_function_evaluations.double().mean()
        return Generated(int(outputs.num_new_tokens.sum()), float(evaluations))

    return generate


def _passes(model: PreTrainedModel, decoding: Decoding) -> Callable[[Case], float] | None:
    """For masked ancestral sampling, of which it is known."""
    config = decoding.in_effect(model)
    is_ancestral = config.decoding == "block_diffusion" and config.sampler == "ancestral"
    if not is_ancestral or config.ar_seed_tokens or model.config.diffusion_type != "masked":
        return None
    block_size, schedule, num_steps = config.block_size, model.diffusion.schedule, config.num_denoising_steps()

    def passes(case: Case) -> float:
        whole, rest = divmod(case.new_tokens, block_size)
        lengths = [block_size] * whole + [rest] * (rest > 0)
        return sum(expected_passes(schedule, num_steps, length) for length in lengths)

    return passes


def expected_passes(schedule: NoiseSchedule, num_steps: int, num_tokens: int) -> float:
    """
    Steps of masked ancestral sampling that unmask any of so many tokens, on average: T (1 - (1 - 1/T)^n) with a
    linear schedule. The others change nothing, whatever the network says.
    """
    times = torch.linspace(1, 1e-5, num_steps + 1, dtype=torch.float64)
    alphas = schedule.alpha(times)
    alphas[-1] = 1.0
    unmasked_here = alphas.diff() / (1 - alphas[0])
    return float((1 - (1 - unmasked_here) ** num_tokens).sum())


def gpt2_like(model: PreTrainedModel) -> GPT2LMHeadModel:
    """transformers' GPT-2 of the model's size, dtype and device, with random weights."""
    like = model.config
    config = GPT2Config(
        vocab_size=like.vocab_size,
        n_positions=like.max_position_embeddings,
        n_embd=like.hidden_size,
        n_layer=like.num_hidden_layers,
        n_head=like.num_attention_heads,
        n_inner=like.intermediate_size,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).to(device=model.device, dtype=model.dtype).eval()


def gpt2_contender(model: GPT2LMHeadModel) -> Contender:
    """It samples, with its cache. It needs a first token: where there is no prompt, that of id 0."""

    def generate(prompts: torch.Tensor, new_tokens: int) -> Generated:
        if prompts.shape[1] == 0:
            prompts = prompts.new_zeros(len(prompts), 1)
        outputs = model.generate(prompts, max_new_tokens=new_tokens, do_sample=True, top_k=0)
        width = outputs.shape[1] - prompts.shape[1]
        return Generated(len(prompts) * width, float(width))

    return Contender("gpt2", "ar", model, generate)


__all__ = [
    "SIZES",
    "Decoding",
    "blockgen_contenders",
    "compiled_contenders",
    "denoiser_entropy",
    "expected_passes",
    "gpt2_contender",
    "gpt2_like",
    "random_model",
]
