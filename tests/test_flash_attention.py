"""
FlashAttention serves what needs no mask and refuses the rest.

The kernels are not installed where tests run, so a stand-in is registered under their name. Like them it knows full
and causal attention only, the causal one aligned to the bottom right, and it fails on a mask.
"""

from typing import Any

import pytest
import torch
from tiny import MASK, generate, left_padded, record_forwards, tiny_model, words
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blockgen_hf import BlockGenForDiffusionLM


NAMES = ["flash_attention_2", "flash_attention_3"]
REFUSAL = "(?s)attn_implementation='flash_attention.*'sdpa'"


def maskless_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None
    is_causal = module.is_causal if is_causal is None else is_causal
    scores = query @ key.transpose(2, 3) * scaling
    if is_causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def flash(monkeypatch: pytest.MonkeyPatch, name: str, *args: Any, **overrides: Any) -> BlockGenForDiffusionLM:
    """A tiny model that computes its attention by the stand-in."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, maskless_attention)
    model = tiny_model(*args, **overrides)
    model.config._attn_implementation = name
    return model


@pytest.mark.parametrize(
    "name, variant",
    [
        ("flash_attention_2", "masked"),
        pytest.param("flash_attention_2", "uniform", marks=pytest.mark.slow),
        pytest.param("flash_attention_3", "time_conditional", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        dict(decoding="ar"),
        dict(decoding="ar", do_sample=False),
        dict(decoding="ar", do_sample=False, num_beams=2),
        dict(decoding="ar", use_cache=False),
        dict(decoding="block_diffusion", block_size=4),
        dict(decoding="block_diffusion", block_size=4, prefill_chunk_size=3),
        dict(decoding="block_diffusion", block_size=8, denoising_steps=3, ar_seed_tokens=3),
        dict(decoding="arpc", corrector="random", block_size=4),
    ],
    ids=str,
)
def test_generation_without_masks_equals_sdpa(
    settings: dict[str, Any], variant: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AR decoding is plain causal attention, a denoising pass behind a cache full attention."""
    expected = generate(tiny_model(variant), words(2, 5), max_new_tokens=11, **settings)
    text = generate(flash(monkeypatch, name, variant), words(2, 5), max_new_tokens=11, **settings)
    assert torch.equal(text, expected)


def test_empty_prompts_and_full_sequences_equal_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clean token at all: one block as long as the text."""
    settings = dict(max_new_tokens=12, decoding="block_diffusion", block_size=12)
    expected = generate(tiny_model(), torch.zeros(2, 0, dtype=torch.long), **settings)
    model = flash(monkeypatch, "flash_attention_2")
    assert torch.equal(generate(model, torch.zeros(2, 0, dtype=torch.long), **settings), expected)


def test_block_causal_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clean tokens need a mask of their own."""
    model = flash(monkeypatch, "flash_attention_2", "block_causal")
    with pytest.raises(ValueError, match=REFUSAL):
        generate(model, words(1, 4), max_new_tokens=8)


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_a_mask_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, all logits at once, verification, padding, a static cache: the error says what to use instead."""
    model, text = flash(monkeypatch, name), words(2, 8)
    cache = DynamicCache(config=model.config)
    model(text, logits_to_keep=1, cache=cache)
    padded = left_padded([words(5), words(3)])
    with pytest.raises(ValueError, match=REFUSAL):
        model(text, labels=text)
    with pytest.raises(ValueError, match=REFUSAL):
        model(text)
    with pytest.raises(ValueError, match=REFUSAL):
        model(words(2, 4), torch.full((2, 4), MASK), block_size=1, cache=cache)
    with pytest.raises(ValueError, match=REFUSAL):
        model(None, words(2, 8), block_size=4, cache=cache)  # two blocks
    with pytest.raises(ValueError, match=REFUSAL):
        model(**padded, logits_to_keep=1)
    for settings in (
        dict(decoding="arpc", block_size=4),
        dict(decoding="block_diffusion", block_size=4, use_cache=False),
        dict(decoding="ar", cache_implementation="static"),
    ):
        with pytest.raises(ValueError, match=REFUSAL):
            generate(model, text, max_new_tokens=8, **settings)
    for decoding in ("ar", "block_diffusion", "arpc"):
        with pytest.raises(ValueError, match=REFUSAL):
            generate(model, max_new_tokens=8, decoding=decoding, inputs=None, **padded)


def test_loading_with_flash_attention_needs_its_package() -> None:
    """transformers says so; nothing falls back in silence."""
    with pytest.raises(ImportError, match="(?i)flash"):
        tiny_model(attn_implementation="flash_attention_2")


def test_revisions_and_windows_are_refused_before_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flash(monkeypatch, "flash_attention_2")
    with record_forwards(model) as calls:
        for settings in ({"decoding": "draft_revise"}, {"decoding": "ar", "cache_window": 8}):
            with pytest.raises(ValueError, match=REFUSAL):
                generate(model, words(1, 3), max_new_tokens=4, **settings)
    assert not calls
