"""Cache layers that grow in place: the same content as by concatenation, without copies of what is there."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generate, left_padded, tiny_model, words
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from blockgen_hf.modeling.cache_blockgen import GrowingLayer, make_growing


def states(length: int, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, length, 4, generator=torch.Generator().manual_seed(seed))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(0, 90)),
        st.tuples(st.just("extended"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(0, 50)),
        st.tuples(st.just("select"), st.integers(0, 1)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    max_size=8,
)


@torch.no_grad()
@given(OPERATIONS)
@settings(max_examples=60)
def test_a_growing_layer_holds_what_a_dynamic_one_holds(operations: list[tuple[str, int]]) -> None:
    growing, plain, rows = GrowingLayer(), DynamicLayer(), 2
    for seed, (name, count) in enumerate([("update", 3), *operations]):
        keys, values = states(count, rows, seed), states(count, rows, seed + 100)
        if name == "update":
            for ours, theirs in zip(growing.update(keys, values), plain.update(keys, values), strict=True):
                assert torch.equal(ours, theirs)
        elif name == "extended":
            ours = growing.extended(keys, values)
            assert torch.equal(ours[0], torch.cat([plain.keys, keys], dim=2))
            assert torch.equal(ours[1], torch.cat([plain.values, values], dim=2))
        elif name == "crop":
            count = min(count, plain.get_seq_length() - 1)
            growing.crop(-count)
            plain.crop(-count)
        elif name == "select":
            index = torch.arange(rows)[count:][:1] if rows > 1 else torch.zeros(1, dtype=torch.long)
            growing.batch_select_indices(index)
            plain.batch_select_indices(index)
            rows = 1
        else:
            growing = copy.deepcopy(growing)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert torch.equal(growing.keys, plain.keys) and torch.equal(growing.values, plain.values)


@torch.no_grad()
def test_what_is_there_is_not_copied_and_the_room_is_small() -> None:
    layer = GrowingLayer()
    layer.update(states(400), states(400))
    place = layer.keys.data_ptr()
    for seed in range(20):
        keys, _ = layer.extended(states(5, seed=seed), states(5, seed=seed))
        assert keys.data_ptr() == place
        layer.update(states(5, seed=seed), states(5, seed=seed))
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 500
    assert layer.keys.untyped_storage().nbytes() <= 1.25 * states(400).nbytes
    layer.update(states(5), states(5))  # the room is used up
    assert layer.get_seq_length() == 505 and layer.keys.data_ptr() != place


def test_gradients_pass_through_what_was_read() -> None:
    layer = GrowingLayer()
    layer.update(states(4), states(4))
    keys = states(2).requires_grad_()
    first, _ = layer.extended(keys, keys)
    layer.extended(states(2, seed=5), states(2, seed=5))
    first.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_what_autograd_reads_is_not_overwritten() -> None:
    """Only queries are trained: keys need no gradient, but the gradient of the queries needs the keys."""
    model, noisy = tiny_model().requires_grad_(False), words(2, 4)
    cache = generate(model, words(2, 5), max_new_tokens=9, return_dict_in_generate=True).cache
    query = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    passes = [model(noisy_input_ids=noisy + i, block_size=4, cache=cache).logits.sum() for i in range(2)]
    torch.stack(passes).sum().backward()
    assert query.grad.abs().sum() > 0


def test_a_cache_from_inference_mode_can_be_continued() -> None:
    model, settings = tiny_model(), dict(max_new_tokens=8, block_size=4)
    with torch.inference_mode():
        first = generate(model, words(2, 5), return_dict_in_generate=True, **settings)
    text = first.sequences.clone()
    continued = generate(model, text, cache=first.cache, **settings)
    assert continued.tolist() == generate(model, text, **settings).tolist()


@pytest.mark.slow
def test_a_growing_cache_breaks_no_graph() -> None:
    """A compiled model has a graph for each kind of pass, not one for each length."""
    model, compiled, counter = tiny_model(), tiny_model(), CompileCounterWithBackend("eager")
    compiled.compile(backend=counter, fullgraph=True)
    settings = dict(decoding="block_diffusion", block_size=8, denoising_steps=4, max_new_tokens=24)
    texts = [generate(one, words(2, 8), **settings).tolist() for one in (compiled, model)]
    assert texts[0] == texts[1] and 0 < counter.frame_count <= 6


def test_generate_grows_its_own_cache_and_leaves_those_of_others() -> None:
    model = tiny_model()
    settings: dict[str, Any] = dict(decoding="block_diffusion", block_size=4, return_dict_in_generate=True)
    ours = generate(model, words(2, 5), max_new_tokens=12, **settings)
    assert all(type(layer) is GrowingLayer for layer in ours.cache.layers)
    plain = DynamicCache(config=model.config)
    given_one = generate(model, words(2, 5), max_new_tokens=12, cache=plain, **settings)
    assert given_one.cache is plain and type(plain.layers[0]) is DynamicLayer
    assert given_one.sequences.tolist() == ours.sequences.tolist()
    longer = generate(model, ours.sequences, max_new_tokens=8, cache=ours.cache, **settings)
    anew = generate(model, ours.sequences, max_new_tokens=8, **settings)
    assert longer.sequences.tolist() == anew.sequences.tolist()


def test_rows_that_leave_take_their_part_of_the_cache_along() -> None:
    model, prompts = tiny_model(), left_padded([words(5), words(3, seed=1), words(6, seed=2)])
    settings: dict[str, Any] = dict(decoding="block_diffusion", block_size=4, max_new_tokens=16, eos_token_id=4)
    together = generate(model, None, **prompts, **settings)
    uncached = generate(model, None, **prompts, use_cache=False, **settings)
    assert together.tolist() == uncached.tolist()


@pytest.mark.parametrize("kind", ["static", "offloading", "filled"])
def test_other_caches_stay_as_they_are(kind: str) -> None:
    model = tiny_model()
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=16)
    elif kind == "offloading":
        cache.offloading = True
    else:
        model(words(1, 3), cache=cache, use_cache=True)
    before = [type(layer) for layer in cache.layers]
    make_growing(cache)
    assert [type(layer) for layer in cache.layers] == before


@torch.no_grad()
def test_a_layer_grows_once_and_not_again_in_every_pass_that_only_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens in blocks of 8, each read five times before it is committed: a buffer for every quarter more."""
    sizes, make = [], GrowingLayer._buffer

    def counted(old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        sizes.append(length + new.shape[-2])
        return make(old, new, length)

    monkeypatch.setattr(GrowingLayer, "_buffer", staticmethod(counted))
    layer = GrowingLayer()
    layer.update(states(5), states(5))
    for _ in range(32):
        for seed in range(5):
            layer.extended(states(8, seed=seed), states(8, seed=seed))
        layer.update(states(8), states(8))
    assert layer.get_seq_length() == 5 + 256
    assert len(sizes) == 2 * 4 and len(set(sizes)) == 4  # keys and values
