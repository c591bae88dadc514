"""`cache`, and its name before transformers 5.24, `past_key_values`: both work on every supported release."""

from typing import Any

import pytest
import torch
from tiny import generate, tiny_model, words
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from blockgen_hf import BlockGenForDiffusionLM


NAMES = ["cache", "past_key_values"]
DECODINGS: dict[str, dict[str, Any]] = {
    "ar": dict(decoding="ar"),
    "block_diffusion": dict(decoding="block_diffusion", block_size=4),
    "arpc": dict(decoding="arpc", block_size=4),
    "ar with scores": dict(decoding="ar", output_scores=True),
    "beams": dict(decoding="ar", num_beams=2, do_sample=False),
}


def filled(model: BlockGenForDiffusionLM, tokens: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(tokens, cache=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("name", NAMES)
def test_forward_reads_and_fills_a_cache_of_either_name(name: str) -> None:
    model, text, block = tiny_model(), words(2, 9), words(2, 4)
    expected = model(text, block, block_size=4, noisy_position_ids=torch.arange(9, 13)[None]).logits
    cache = DynamicCache(config=model.config)
    outputs = model(text, **{name: cache}, use_cache=True)
    assert outputs.cache is cache and cache.get_seq_length() == 9
    found = model(noisy_input_ids=block, block_size=4, **{name: cache}).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_outputs_give_the_cache_by_both_names() -> None:
    model = tiny_model()
    for outputs in (
        model(words(2, 5)),
        generate(model, words(2, 5), decoding="ar", max_new_tokens=3, return_dict_in_generate=True),
    ):
        assert outputs.cache is not None
        for name in NAMES:
            assert getattr(outputs, name) is outputs.cache and outputs[name] is outputs.cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_generate_continues_from_a_cache_of_either_name(decoding: str, name: str) -> None:
    model, text = tiny_model(), words(1, 7)
    settings = {**DECODINGS[decoding], "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = generate(model, text, **settings).sequences
    cache = filled(model, text[:, :5])
    if decoding == "beams":  # GenerationMixin expects a row for each beam
        cache.batch_repeat_interleave(2)
    assert torch.equal(generate(model, text, **{name: cache}, **settings).sequences, expected)
    assert cache.get_seq_length() > 7  # it was used


def test_both_names_at_once_are_refused() -> None:
    model, text = tiny_model(), words(1, 5)
    both = dict(cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="`cache` and `past_key_values`"):
        model(text, **both)
    for settings in DECODINGS.values():
        with pytest.raises(ValueError, match="`cache` and `past_key_values`"):
            model.generate(text, max_new_tokens=3, **settings, **both)


@pytest.mark.parametrize("name", NAMES)
def test_no_cache_at_all_may_be_passed_by_either_name(name: str) -> None:
    """Pipelines and wrappers hand on what they were given, None too."""
    model, text = tiny_model(), words(1, 5)
    assert model(text, **{name: None}).logits.shape[1] == 5
    expected = generate(model, text, decoding="arpc", block_size=4, max_new_tokens=4)
    found = generate(model, text, decoding="arpc", block_size=4, max_new_tokens=4, **{name: None})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_assistant_and_prompt_lookup_give_the_greedy_text(cache_implementation: str | None) -> None:
    model, text = tiny_model(), words(1, 8)
    settings = dict(decoding="ar", do_sample=False, max_new_tokens=8)
    expected = generate(model, text, **settings)
    if cache_implementation == "static" and "cache" not in BaseModelOutputWithPast.__annotations__:
        pytest.skip("before transformers 5.24 static caches cannot be cropped")
    if cache_implementation is not None:
        settings["cache_implementation"] = cache_implementation
    assert torch.equal(generate(model, text, prompt_lookup_num_tokens=2, **settings), expected)
    assert torch.equal(generate(model, text, assistant_model=tiny_model(), **settings), expected)


def test_trainer_and_accelerate_know_what_is_no_prediction_and_stays_on_its_device() -> None:
    model = tiny_model()
    assert set(NAMES) <= set(model.config.keys_to_ignore_at_inference)
    assert set(NAMES) <= set(model._skip_keys_device_placement)


def test_another_model_of_transformers_assists() -> None:
    """The two models of assisted decoding name their caches alike."""
    model, text = tiny_model(), words(1, 8)
    vocab_size = model.config.vocab_size
    other = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    settings = dict(decoding="ar", do_sample=False, max_new_tokens=8)
    expected = generate(model, text, **settings)
    assert torch.equal(generate(model, text, assistant_model=other, **settings), expected)


def test_the_auto_class_continues_a_conversation(tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path)
    model, text = AutoModelForCausalLM.from_pretrained(tmp_path), words(1, 5)
    settings = dict(decoding="block_diffusion", block_size=4, max_new_tokens=8, return_dict_in_generate=True)
    first = generate(model, text, **settings)
    assert first.cache.get_seq_length() > 5
    second = torch.cat([first.sequences, words(1, 3)], dim=1)
    expected = generate(model, second, **settings).sequences
    for name in NAMES:
        cache = generate(model, text, **settings).cache
        assert torch.equal(generate(model, second, **{name: cache}, **settings).sequences, expected)


def test_continuous_batching_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="`generate_batch`"):
        tiny_model().generate_batch([[1, 2, 3]])
