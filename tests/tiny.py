"""Tiny models and a tiny tokenizer that every test can afford, and small tools to look at them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM


VOCAB_SIZE = 23
PAD, EOS, MASK = 20, 21, 22  # as in a checkpoint: the mask token is the last id
NUM_WORDS = 20  # ids below are words
LETTERS = "abcdefghijklmnopqrst"  # as the tokenizer writes them

# Everything that changes what a model computes, an id each.
VARIANTS: dict[str, dict[str, Any]] = {
    "masked": {},
    "uniform": {"diffusion_type": "uniform"},
    "block_causal": {"clean_attention": "block_causal", "block_sizes": [4]},
    "uniform_block_causal": {
        "diffusion_type": "uniform",
        "clean_attention": "block_causal",
        "block_sizes": [4],
    },
    "time_conditional": {"time_conditioning": True},
    "uniform_time_conditional": {"diffusion_type": "uniform", "time_conditioning": True},
    "without_adaln": {"adaptive_layer_norm": False},
}
CAUSAL = tuple(name for name, overrides in VARIANTS.items() if "clean_attention" not in overrides)
BLOCK_CAUSAL = ("block_causal", "uniform_block_causal")


def tiny_config(variant: str = "masked", **overrides: Any) -> BlockGenConfig:
    """Two layers of width 16, blocks of 1, 2, 4 and 8, 64 positions."""
    settings = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        cond_dim=8,
        hidden_dropout=0.0,
        block_sizes=[1, 2, 4, 8],
        pad_token_id=PAD,
        eos_token_id=None,  # tests that want an end of text say so
    )
    return BlockGenConfig(**{**settings, **VARIANTS[variant], **overrides})


def tiny_model(variant: str = "masked", seed: int = 0, scale: float = 1.5, **overrides: Any) -> BlockGenForDiffusionLM:
    """A model in evaluation mode with random parameters, none of them zero (output layer and adaLN start at zero)."""
    model = BlockGenForDiffusionLM(tiny_config(variant, **overrides)).eval()
    randomize(model, seed, scale)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 1.5) -> None:
    """Draws every parameter anew; `scale` is about the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm.weight" in name or "layernorm.weight" in name:
            parameter.copy_(1 + 0.2 * noise)
        elif name == "lm_head.weight":
            parameter.copy_(scale * noise / math.sqrt(parameter.shape[-1]))
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        elif "modulation" in name:  # shifts, scales and gates of about a half
            parameter.copy_(0.5 * noise / math.sqrt(parameter.shape[-1]) if parameter.ndim == 2 else 0.5 * noise)
        elif parameter.ndim == 2:
            parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[-1]))
        else:
            parameter.copy_(0.3 * noise)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter, `a` to `t`; pad, end and mask are the ids of [`tiny_config`]; pads on the left."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<pad>": PAD, "<end>": EOS, "<mask>": MASK}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        mask_token="<mask>",
        padding_side="left",
        model_max_length=64,
    )


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens, written with spaces between them."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer


def framed_tokenizer() -> PreTrainedTokenizerFast:
    """As [`tiny_tokenizer`], but a text stands between special tokens, as in BERT's `[CLS] ... [SEP]`."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <end>", special_tokens=[("<pad>", PAD), ("<end>", EOS)]
    )
    return tokenizer


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random clean ids, neither pad nor end nor mask."""
    return torch.randint(NUM_WORDS, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """1-D prompts as `input_ids` and `attention_mask`, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), PAD)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def generate(model: BlockGenForDiffusionLM, inputs: Any, seed: int = 0, **settings: Any) -> Any:
    """`model.generate` from a seed."""
    torch.manual_seed(seed)
    return model.generate(inputs, **settings)


@contextmanager
def record_forwards(model: BlockGenForDiffusionLM) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward pass within the block, `input_ids` among them."""
    calls: list[dict[str, Any]] = []

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {**kwargs, "input_ids": args[0]}
        calls.append(kwargs)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """
    Equal but for rounding, in float32: processors round otherwise when a weight lies elsewhere in memory, as a loaded
    or offloaded one does, so logits of reloaded models are not compared bit for bit.
    """
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def num_rows(call: dict[str, Any]) -> int:
    """Batch size of a recorded forward pass."""
    ids = call["input_ids"] if call.get("input_ids") is not None else call["noisy_input_ids"]
    return ids.shape[0]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come to pass"
        time.sleep(0.01)


def skip_without_quantised_caches(backend: str) -> None:
    """`"quanto"` or `"fp8"`: what is not installed, or does not work, in the releases of today."""
    if backend == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    elif not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 caches, which came with 5.21")
    elif version.parse(torch.__version__) < version.parse("2.7"):
        pytest.skip("with torch 2.6, fp8 caches of transformers give NaN on CPUs")
