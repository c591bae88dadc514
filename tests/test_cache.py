"""Caches: read by the denoiser, written by commits only, and never a reason for another result."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tiny import (
    BLOCK_CAUSAL,
    CAUSAL,
    MASK,
    VARIANTS,
    left_padded,
    record_forwards,
    skip_without_quantised_caches,
    tiny_model,
    words,
)
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM


# The variants whose caches differ in more than a noise; the others run among the slow tests.
FAST = ("masked", "block_causal", "time_conditional")


def fast_or_slow(variants: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in variants]


def fp8_cache(config: BlockGenConfig) -> Cache:
    skip_without_quantised_caches("fp8")
    return QuantizedCache("fp8", config)


def quanto_cache(config: BlockGenConfig) -> Cache:
    skip_without_quantised_caches("quanto")
    return QuantizedCache("quanto", config, nbits=4, q_group_size=8, residual_length=3)


# What each class may lose, in logits relative to their size: a quantised cache its own rounding error.
CACHES: dict[str, tuple[Callable[[BlockGenConfig], Cache], float]] = {
    "dynamic": (lambda config: DynamicCache(config=config), 1e-5),
    "dynamic_without_config": (lambda config: DynamicCache(), 1e-5),
    "static": (lambda config: StaticCache(config, max_cache_len=20), 1e-5),
    "quantized_fp8": (fp8_cache, 0.25),
    "quantized_quanto": (quanto_cache, 0.5),
    "offloaded": (lambda config: DynamicCache(config=config, offloading=True), 1e-5),
    "offloaded_static": (lambda config: StaticCache(config, max_cache_len=20, offloading=True), 1e-5),
}


def make_cache(name: str, config: BlockGenConfig) -> tuple[Cache, float]:
    """An empty cache and the relative difference in logits that it may make."""
    if name.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloaded caches copy on CUDA streams; no GPU here")
    make, tolerance = CACHES[name]
    return make(config), tolerance


def contents(cache: Cache) -> list[Any]:
    """Everything that the layers of a cache hold, copied."""
    held: list[Any] = []
    for layer in cache.layers:
        for name, value in sorted(vars(layer).items()):
            parts = value if isinstance(value, tuple) else (value,)
            for part in parts:
                if isinstance(part, torch.Tensor):
                    dense = (
                        part.dequantize() if hasattr(part, "dequantize") and part.dtype != part.float().dtype else part
                    )
                    held.append((name, tuple(part.shape), dense.detach().clone()))
                elif isinstance(part, int | float | bool):
                    held.append((name, part))
    return held


def assert_same_contents(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for left, right in zip(before, after, strict=True):
        assert left[:-1] == right[:-1]
        if isinstance(left[-1], torch.Tensor):
            assert torch.equal(left[-1].reshape(-1).view(torch.uint8), right[-1].reshape(-1).view(torch.uint8)), left[
                0
            ]
        else:
            assert left == right


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what was expected."""
    return float((logits - expected).norm() / expected.norm())


def denoise(model: BlockGenForDiffusionLM, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, noise_level=0.5, **kwargs).logits


def words_only(logits: torch.Tensor) -> torch.Tensor:
    """Without the mask token, whose autoregressive logit is the smallest number there is."""
    return logits[..., :MASK]


def commit(model: BlockGenForDiffusionLM, tokens: torch.Tensor, cache: Cache, **kwargs: Any) -> None:
    """Clean tokens to the cache, in a call without a noisy token."""
    with torch.no_grad():
        model(tokens, tokens[:, :0], cache=cache, use_cache=True, noise_level=1.0, **kwargs)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("variant", fast_or_slow(VARIANTS))
def test_denoiser_with_cache_equals_the_denoiser_without(variant: str, name: str) -> None:
    """The prefix may be all in the cache, committed at once or in parts, or half in it and half in the call."""
    model = tiny_model(variant)
    text, noisy, positions = words(2, 12), words(2, 4, seed=1), torch.arange(12, 16)[None]
    expected = denoise(model, text, noisy, block_size=4, noisy_position_ids=positions)
    for parts in ([12], [4, 8], [8]):
        cache, tolerance = make_cache(name, model.config)
        start = 0
        for length in parts:
            commit(model, text[:, start : start + length], cache)
            start += length
        assert int(cache.get_seq_length()) == start
        logits = denoise(model, text[:, start:], noisy, block_size=4, cache=cache, noisy_position_ids=positions)
        assert difference(logits, expected) < tolerance
        if start == 12:
            default = denoise(model, None, noisy, block_size=4, cache=cache)
            assert difference(default, expected) < tolerance


@pytest.mark.parametrize("name", ["quantized_fp8", "quantized_quanto"])
def test_error_of_a_quantised_cache_is_that_of_what_it_holds(name: str) -> None:
    """With the rounded keys and values in a dynamic cache the denoiser gives the same logits exactly."""
    model = tiny_model()
    cache, _ = make_cache(name, model.config)
    commit(model, words(2, 5), cache)
    commit(model, words(2, 2), cache)
    exact = DynamicCache(config=model.config)
    nothing = torch.zeros(2, 2, 0, 8)
    for index in range(2):
        exact.update(*cache.update(nothing, nothing, index), index)
    noisy = words(2, 4, seed=1)
    logits = denoise(model, None, noisy, block_size=4, cache=cache)
    expected = denoise(model, None, noisy, block_size=4, cache=exact)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_denoiser_reads_without_writing(name: str) -> None:
    """After a denoising or a verifying pass the cache is bit for bit what it was."""
    model = tiny_model()
    cache, _ = make_cache(name, model.config)
    text = words(2, 5)
    commit(model, text[:, :3], cache)
    commit(model, text[:, 3:], cache)
    before, length = contents(cache), int(cache.get_seq_length())
    expected = denoise(model, None, words(2, 4), block_size=4, cache=cache)
    for _ in range(2):
        again = denoise(model, None, words(2, 4), block_size=4, cache=cache)
        assert (again - expected).abs().max() == 0
        denoise(
            model,
            words(2, 4),
            torch.full((2, 4), MASK),
            block_size=1,
            cache=cache,
            noisy_position_ids=torch.arange(5, 9)[None],
        )
    assert int(cache.get_seq_length()) == length
    assert_same_contents(before, contents(cache))


@pytest.mark.parametrize("name", CACHES)
def test_an_empty_cache_is_read_and_stays_empty(name: str) -> None:
    """The first block of a text without a prompt; quantised caches cannot even be asked."""
    model = tiny_model()
    cache, _ = make_cache(name, model.config)
    noisy = words(2, 4)
    logits = denoise(model, None, noisy, block_size=4, cache=cache)
    torch.testing.assert_close(logits, denoise(model, None, noisy, block_size=4), atol=1e-5, rtol=1e-5)
    assert int(cache.get_seq_length()) == 0


def test_noisy_tokens_are_never_committed() -> None:
    """`use_cache=True` in a denoising call commits the clean tokens of that call, and those only."""
    model = tiny_model()
    text, noisy, positions = words(2, 6), words(2, 4, seed=1), torch.arange(6, 10)[None]
    cache = DynamicCache(config=model.config)
    expected = denoise(model, text, noisy, block_size=4, noisy_position_ids=positions)
    fused = denoise(model, text, noisy, block_size=4, cache=cache, use_cache=True, noisy_position_ids=positions)
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 6
    separate = DynamicCache(config=model.config)
    commit(model, text, separate)
    for left, right in zip(cache.layers, separate.layers, strict=True):
        torch.testing.assert_close(left.keys, right.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left.values, right.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("variant", fast_or_slow(CAUSAL))
def test_autoregressive_steps_with_cache_equal_one_pass_without(variant: str, name: str) -> None:
    """The causal language model, one token after the other, and in two parts."""
    model, text = tiny_model(variant), words(2, 8)
    with torch.no_grad():
        expected = words_only(model(text, use_cache=False).logits)
        for parts in ([1] * 8, [5, 3], [4, 1, 1, 2]):
            cache, tolerance = make_cache(name, model.config)
            start = 0
            for length in parts:
                outputs = model(text[:, start : start + length], cache=cache, use_cache=True)
                assert difference(words_only(outputs.logits), expected[:, start : start + length]) < tolerance
                start += length
            assert outputs.cache is cache and int(cache.get_seq_length()) == 8


@pytest.mark.parametrize("name", ["dynamic", "static", "quantized_fp8", "quantized_quanto"])
@pytest.mark.parametrize("variant", fast_or_slow(VARIANTS))
def test_cached_left_padded_rows_equal_one_by_one(variant: str, name: str) -> None:
    """Prompts of different lengths in one cache, one of them empty; then two blocks, the first committed."""
    model = tiny_model(variant)
    lengths = [8, 4, 0] if variant in BLOCK_CAUSAL else [7, 4, 1, 0]
    prompts = [words(length, seed=length) for length in lengths]
    batch, rows = left_padded(prompts), len(lengths)
    mask = batch["attention_mask"]
    first, second = words(rows, 4, seed=5), words(rows, 4, seed=6)
    cache, tolerance = make_cache(name, model.config)
    commit(model, batch["input_ids"], cache, attention_mask=mask)
    first_logits = denoise(model, None, second, block_size=4, cache=cache, attention_mask=mask)
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    commit(model, first, cache, attention_mask=mask)
    second_logits = denoise(model, None, second, block_size=4, cache=cache, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, first[row]])[None]
        n = len(prompt)
        alone = denoise(
            model,
            text[:, :n],
            second[row : row + 1],
            block_size=4,
            noisy_position_ids=torch.arange(n, n + 4)[None],
        )
        assert difference(first_logits[row], alone[0]) < tolerance
        alone = denoise(
            model,
            text,
            second[row : row + 1],
            block_size=4,
            noisy_position_ids=torch.arange(n + 4, n + 8)[None],
        )
        assert difference(second_logits[row], alone[0]) < tolerance


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_given_positions_are_kept_with_a_cache(name: str) -> None:
    """Positions decide who sees whom, not slots: given ones mean the same with and without a cache."""
    model, text, positions = tiny_model(), words(2, 8), (torch.arange(8) + 5)[None]
    with torch.no_grad():
        expected = model(text, position_ids=positions, use_cache=False).logits
        cache, _ = make_cache(name, model.config)
        logits = model(text, position_ids=positions, cache=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_is_made_on_request_and_follows_the_configuration() -> None:
    """Default of the causal language model: `config.use_cache`; of the denoiser: none."""
    model, text = tiny_model(), words(1, 4)
    assert model(text).cache.get_seq_length() == 4
    assert model(text, use_cache=False).cache is None
    assert tiny_model(use_cache=False)(text).cache is None
    assert model(text, text, block_size=4).cache is None
    assert model(text, text, block_size=4, use_cache=True).cache.get_seq_length() == 4


def test_training_has_no_cache() -> None:
    """`labels` with a cache is a contradiction."""
    model, text = tiny_model(), words(1, 8)
    with pytest.raises(ValueError, match="`cache`"):
        model(text, labels=text, cache=DynamicCache())
    with pytest.raises(ValueError, match="`use_cache=True`"):
        model(text, labels=text, use_cache=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_in_training_mode_does_not_lose_the_cache_silently() -> None:
    """Layers that run under checkpointing drop the cache: the causal model goes without, the rest says so."""
    model, text = tiny_model(), words(1, 6)
    expected = model(text).logits
    cache = DynamicCache(config=model.config)
    commit(model, text[:, :3], cache)
    model.gradient_checkpointing_enable()
    model.train()
    outputs = model(text)
    assert outputs.cache is None
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`cache`"):
        model(text[:, 3:], cache=cache)
    with pytest.raises(ValueError, match="`cache`"):
        model(None, words(1, 4), block_size=4, cache=cache)
    assert cache.get_seq_length() == 3
    model.eval()
    torch.testing.assert_close(model(text[:, 3:], cache=cache).logits, expected[:, 3:], atol=1e-5, rtol=1e-5)


def test_no_state_of_a_sequence_stays_in_a_module() -> None:
    """A second sequence has the logits that it has in a fresh model."""
    used, fresh = tiny_model(), tiny_model()
    attributes = {name: set(vars(module)) for name, module in used.named_modules()}
    used(words(2, 9))
    denoise(used, words(2, 9), words(2, 9), block_size=4)
    assert torch.equal(used(words(1, 5, seed=3)).logits, fresh(words(1, 5, seed=3)).logits)
    for name, module in used.named_modules():
        assert set(vars(module)) == attributes[name]


def test_recorded_forwards_of_generate_never_cache_noisy_tokens() -> None:
    """In a whole `generate` the cache grows by clean tokens only: passes with noisy tokens leave its length alone."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    lengths = []
    with record_forwards(model) as calls:
        hook = model.register_forward_hook(lambda *_: lengths.append(cache.get_seq_length()))
        model.generate(words(1, 3), max_new_tokens=8, decoding="arpc", block_size=4, denoising_steps=3, cache=cache)
        hook.remove()
    previous = 0
    for call, length in zip(calls, lengths, strict=True):
        committed = call["input_ids"].shape[1] if call.get("use_cache") else 0
        assert length == previous + committed
        previous = length
    assert previous == 3 + 4  # the last block is never committed


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("decoding", ["ar", "block_diffusion"])
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_of_a_model_on_the_cpu_is_refused(implementation: str, decoding: str) -> None:
    with pytest.raises(ValueError, match="`cache_implementation='offloaded"):
        tiny_model().generate(words(1, 3), decoding=decoding, max_new_tokens=4, cache_implementation=implementation)
