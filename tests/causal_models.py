"""Tiny causal language models of transformers, one a family, and what `convert_checkpoint` makes of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.hub import convert_checkpoint
from blockgen_hf.hub.causal_lm import blockgen_config
from blockgen_hf.hub.families import Choices


ROWS = 40
SIZES: dict[str, Any] = dict(
    vocab_size=ROWS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "tied_llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 10}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"sliding_window": 16}),  # which its config says is not used
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 10, "tie_word_embeddings": True}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0]}),
}


def original(family: str = "tied_llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of transformers, in evaluation mode, that is sure of some of its tokens."""
    config_class, model_class, own = FAMILIES[family]
    model = model_class(config_class(**{**SIZES, **own, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 1.5 * noise / parameter.shape[-1] ** 0.5)
        model.model.embed_tokens.weight.mul_(2)
    return model


def adopted(source: PreTrainedModel, noisy_attention: str = "block", **chosen: Any) -> BlockGenForDiffusionLM:
    """The BlockGen model of a model of transformers, with its weights."""
    model = BlockGenForDiffusionLM(blockgen_config(source.config, Choices(**chosen), noisy_attention)).eval()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if model.model.noise_embedding is not None:
        state["model.noise_embedding.weight"] = state["model.embed_tokens.weight"].mean(0, keepdim=True)
    model.load_state_dict(state)
    model.generation_config.update(decoding="ar", do_sample=False)
    return model


def converted(folder: Path, model: PreTrainedModel, name: str = "converted", **options: Any) -> BlockGenForDiffusionLM:
    """The same, converted by way of folders."""
    model.save_pretrained(folder / f"{name}-source")
    convert_checkpoint(folder / f"{name}-source", folder / name, family="causal-lm", **options)
    return BlockGenForDiffusionLM.from_pretrained(folder / name).eval()


def texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids that are no padding."""
    return torch.randint(2, ROWS, (rows, length), generator=torch.Generator().manual_seed(seed))
