"""`cache_window`: texts longer than the model has positions, and which tokens each of theirs sees."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny import PAD, generate, left_padded, record_forwards, tiny_model, words
from transformers import DynamicCache

from blockgen_hf import BlockGenForDiffusionLM


WINDOW = 6
LENGTH = 30  # of the new text
POSITIONS = 24  # of the model
DECODINGS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "ar_greedy": {"decoding": "ar", "do_sample": False},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 2},
    "arpc": {"decoding": "arpc", "block_size": 4, "denoising_steps": 3, "ar_seed_tokens": 3},
    "speculative": {"decoding": "speculative", "block_size": 4},
    "speculative_fused": {"decoding": "speculative", "block_size": 4, "fused_drafts": True},
    "draft_revise": {"decoding": "draft_revise", "block_size": 4, "revise_block_size": 16, "revise_steps": 2},
}
PROMPTS = left_padded([words(3), words(9, seed=1), words(0)])


def short_model(variant: str = "masked", **overrides: Any) -> BlockGenForDiffusionLM:
    return tiny_model(variant, max_position_embeddings=POSITIONS, **overrides)


def text(model: BlockGenForDiffusionLM, **settings: Any) -> torch.Tensor:
    prompts = settings.pop("prompts", PROMPTS)
    common = dict(cache_window=WINDOW, max_new_tokens=LENGTH, pad_token_id=PAD)
    return generate(model, prompts["input_ids"], **{**common, **settings}, attention_mask=prompts["attention_mask"])


# ---- the same text, however it is computed
@pytest.mark.parametrize("variant", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_long_text_is_that_of_the_uncached_computation_on_the_window(variant: str, decoding: str) -> None:
    """Left-padded rows that end at different lengths; growing and static cache, prompts in chunks."""
    model, settings = short_model(variant), {**DECODINGS[decoding], "eos_token_id": 7}
    expected = text(model, use_cache=False, **settings)
    assert expected.shape[1] > model.config.max_position_embeddings
    for how in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}):
        assert torch.equal(text(model, **settings, **how), expected)


@pytest.mark.parametrize("variant", ["block_causal", "uniform_block_causal"])
def test_blocks_on_a_grid_slide_too(variant: str) -> None:
    model, settings = short_model(variant), {"block_size": 4, "denoising_steps": 2, "eos_token_id": 7}
    expected = text(model, use_cache=False, **settings)
    assert torch.equal(text(model, **settings), expected)
    assert torch.equal(text(model, cache_implementation="static", **settings), expected)


def test_a_row_has_its_text_alone_and_in_a_batch() -> None:
    """Rows of a speculation slide at their own pace."""
    model = short_model()
    for decoding in ("block_diffusion", "speculative"):
        together = text(model, **DECODINGS[decoding])
        for row, prompt in enumerate([words(3), words(9, seed=1)]):
            alone = text(model, prompts=left_padded([prompt]), **DECODINGS[decoding])
            assert torch.equal(together[row, 9:], alone[0, len(prompt) :])


def test_speculation_has_the_text_of_autoregressive_decoding() -> None:
    model = short_model()
    for decoding in ("speculative", "speculative_fused"):
        assert torch.equal(text(model, **DECODINGS[decoding]), text(model, **DECODINGS["ar"]))


def test_a_window_larger_than_the_text_changes_nothing() -> None:
    model, settings = short_model(), {"max_new_tokens": 12}
    for decoding in ("ar", "block_diffusion"):
        whole = text(model, cache_window=None, **settings, **DECODINGS[decoding])
        assert torch.equal(text(model, cache_window=POSITIONS, **settings, **DECODINGS[decoding]), whole)
        assert not torch.equal(text(model, **settings, **DECODINGS[decoding]), whole)


# ---- what the window is
@pytest.mark.parametrize("next_token_prediction", [False, True])
def test_with_one_layer_the_text_before_the_window_does_not_exist(next_token_prediction: bool) -> None:
    """States of later layers have seen more than the window; those of the first are those of a text cut off there."""
    overrides = {"next_token_prediction": True, "block_sizes": [1]} if next_token_prediction else {}
    model, prompt = short_model(num_hidden_layers=1, **overrides), words(2, 3)
    found = generate(model, prompt, decoding="ar", do_sample=False, cache_window=WINDOW, max_new_tokens=LENGTH)
    expected = prompt
    for _ in range(LENGTH):
        logits = model(expected[:, -WINDOW:], use_cache=False).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", ["masked", "uniform", "block_causal"])
@torch.no_grad()
def test_forward_over_a_long_text_is_that_of_its_parts(variant: str) -> None:
    """Logits of a block by one pass over the whole text, and by passes that commit what the window holds."""
    model, clean, noisy = short_model(variant), words(2, 36), words(2, 4, seed=1)
    how: dict[str, Any] = dict(block_size=4, cache_window=WINDOW, noise_level=0.5)
    positions = torch.arange(36, 40)[None]
    expected = model(clean, noisy, noisy_position_ids=positions, **how).logits
    cache, start = DynamicCache(config=model.config), 0
    for begin in range(0, 36, 4):
        held = dict(cache=cache, cache_start=torch.tensor([[start]]), **how)
        model(clean[:, begin : begin + 4], noisy[:, :0], use_cache=True, **held)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, -WINDOW:], layer.values[:, :, -WINDOW:]
        start = begin + 4 - cache.get_seq_length()
    found = model(None, noisy, cache=cache, cache_start=torch.tensor([[start]]), **how).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        model(clean, noisy, noisy_position_ids=positions, **{**how, "cache_window": None}).logits, found
    )


def test_old_tokens_leave_the_cache() -> None:
    """It never holds more than a window, a quarter of it, a block and the token behind it."""
    model = short_model()
    for settings in DECODINGS.values():
        with record_forwards(model) as calls:
            lengths = [0]
            handle = model.register_forward_hook(partial(note_length, calls, lengths))
            text(model, prompts=left_padded([words(3)]), cache_window=12, **settings)
            handle.remove()
        largest = settings.get("revise_block_size", 4)
        assert 12 <= max(lengths) <= 12 + 3 + largest + 1


def note_length(calls: list[dict[str, Any]], lengths: list[int], *_: Any) -> None:
    lengths.append(int(calls[-1]["cache"].get_seq_length()))


def test_a_cache_that_tokens_left_is_not_returned() -> None:
    model = short_model()
    settings = dict(decoding="ar", return_dict_in_generate=True, cache_window=WINDOW)
    assert generate(model, words(1, 3), max_new_tokens=20, **settings).cache is None
    assert generate(model, words(1, 3), max_new_tokens=3, **settings).cache is not None


# ---- what is refused
def test_without_a_window_a_long_text_is_refused_with_a_hint() -> None:
    model = short_model()
    with pytest.raises(ValueError, match="`max_new_tokens` must be at most 21 .*`cache_window`"):
        generate(model, words(1, 3), max_new_tokens=22)
    with pytest.raises(ValueError, match="`inputs` have 24 tokens.*`cache_window`"):
        generate(model, words(1, 24), max_new_tokens=1)
    assert generate(model, words(1, 30), max_new_tokens=5, cache_window=WINDOW).shape == (1, 35)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"decoding": "ar", "num_beams": 2}, "does not go with beam"),
    "scores": ({"decoding": "ar", "output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
    "counting": (
        {"decoding": "ar", "prefix_allowed_tokens_fn": lambda row, ids: [1, 2]},
        "PrefixConstrainedLogitsProcessor",
    ),
    "quantized": ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    "cache": ({"cache": DynamicCache()}, "`cache` cannot be passed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_slide_is_refused_by_name(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        generate(short_model(), words(1, 3), cache_window=WINDOW, max_new_tokens=4, **settings)
    assert f"`cache_window={WINDOW}`" in str(caught.value)


def test_rotations_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        generate(short_model(rope_parameters=rope), words(1, 3), cache_window=WINDOW, max_new_tokens=4)


def test_a_window_holds_a_block_of_the_grid() -> None:
    with pytest.raises(ValueError, match="`cache_window` must be an integer of at least 4.*but is 3"):
        generate(short_model("block_causal"), words(1, 3), cache_window=3, max_new_tokens=4)
