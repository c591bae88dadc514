"""The training mask in chunks of queries (CPUs with sdpa): against the rule by hand, the dense mask, and eager."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD, tiny_model, words
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.modeling import layers_blockgen, masking_blockgen
from blockgen_hf.modeling.inputs_blockgen import document_positions
from blockgen_hf.modeling.layers_blockgen import BlockGenLayerNorm
from blockgen_hf.modeling.masking_blockgen import (
    AttentionChunk,
    BlockSize,
    attend_in_chunks,
    build_layout,
    make_training_mask,
)


exactly = dict(atol=1e-9, rtol=1e-9)
Chunks = tuple[AttentionChunk, ...]


def forget_masks() -> None:
    """Empties the cache of masks, which knows nothing of a changed chunk size."""
    cached = masking_blockgen._plain_training_mask
    getattr(cached, "_torchdynamo_orig_callable", cached).cache_clear()


@contextmanager
def chunk_size(size: int) -> Iterator[None]:
    """Chunks of `size` queries within the block."""
    before = masking_blockgen.CHUNK_SIZE
    masking_blockgen.CHUNK_SIZE = size
    forget_masks()
    try:
        yield
    finally:
        masking_blockgen.CHUNK_SIZE = before
        forget_masks()


@pytest.fixture
def chunks_of_8() -> Iterator[None]:
    with chunk_size(8):
        yield


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norms and eager's softmax in the dtype of their input: the model's round to float32."""

    def norm(
        self: BlockGenLayerNorm, hidden_states: Any, shift: Any = None, scale: Any = None, weight: None = None
    ) -> Any:
        normed = torch.nn.functional.layer_norm(hidden_states, self.weight.shape, self.weight, eps=self.eps)
        return normed if shift is None else normed * (1 + scale) + shift

    def eager(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        weights = ((query @ key.transpose(2, 3)) * scaling + mask).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setattr(BlockGenLayerNorm, "forward", norm)
    monkeypatch.setattr(layers_blockgen, "eager_attention_forward", eager)


# ---- the mask itself
def dense(chunks: Chunks, batch_size: int) -> torch.Tensor:
    """The mask `[B, Q, Q]` that chunks stand for; they cover every query once, in order, and no key twice."""
    assert [chunk.queries.start for chunk in chunks] == [0, *(chunk.queries.stop for chunk in chunks[:-1])]
    size = chunks[-1].queries.stop
    mask = torch.zeros(batch_size, size, size, dtype=torch.bool)
    for chunk in chunks:
        queries = torch.arange(chunk.queries.start, chunk.queries.stop)
        keys = torch.cat([torch.arange(run.start, run.stop) for run in chunk.keys])
        assert len(keys.unique()) == len(keys)
        assert int(keys.min()) >= 0
        assert int(keys.max()) < size
        if chunk.mask is None:
            assert torch.equal(queries, keys)
            mask[:, queries[:, None], keys] = keys <= queries[:, None]
        else:
            mask[:, queries[:, None], keys] = chunk.mask[:, 0].expand(batch_size, -1, -1)
    return mask


def by_rule(
    positions: torch.Tensor,
    sizes: list[int],
    clean_block_size: int,
    valid: torch.Tensor,
    documents: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """`[B, 2 L, 2 L]`: the attention rule token by token, with padding that sees itself only."""
    reach = math.inf if window is None else window
    length = valid.shape[1]
    masks = []
    for size, place, real, document in zip(sizes, *(t.tolist() for t in (positions, valid, documents)), strict=True):

        def sees(query: int, key: int) -> bool:
            i, j = query % length, key % length
            q, k = place[i], place[j]  # noqa: B023
            if not (real[i] and real[j]):  # noqa: B023
                return query == key
            if document[i] != document[j]:  # noqa: B023
                return False
            if query < length:
                end = (q // clean_block_size + 1) * clean_block_size
                return (i == j and key < length) or (key < length and end - reach <= k < end)
            start = q // size * size  # noqa: B023
            return start - reach <= k < start if key < length else k // size == q // size  # noqa: B023

        masks.append([[sees(query, key) for key in range(2 * length)] for query in range(2 * length)])
    return torch.tensor(masks)


def check_chunks(
    chunk: int,
    length: int,
    block_size: BlockSize,
    clean_block_size: int,
    valid: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    num_rows: int = 1,
    window: int | None = None,
) -> Chunks:
    """The chunks of a mask are the rule, and the predicate that the other implementations render."""
    positions = torch.arange(length)[None]
    if documents is not None:
        positions = document_positions(documents)
    elif valid is not None:
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    with chunk_size(chunk):
        chunks = make_training_mask(
            positions, block_size, clean_block_size, "sdpa", torch.float32, valid, documents, window=window
        )
    layout = build_layout(
        positions, positions, block_size, clean_block_size, torch.zeros(1, 0, dtype=torch.long), False,
        clean_valid=valid, noisy_valid=valid, document_ids=documents, window=window,
    )  # fmt: skip
    index = torch.arange(2 * length)
    grid = layout.sees(torch.arange(len(layout.clean_limit))[:, None, None], 0, index[:, None], index)
    mask = dense(chunks, num_rows)
    assert torch.equal(mask, grid.expand_as(mask))
    sizes = [block_size] * num_rows if isinstance(block_size, int) else [*block_size]
    everything = torch.ones(num_rows, length, dtype=torch.bool)
    expected = by_rule(
        positions.expand(num_rows, -1),
        sizes,
        clean_block_size,
        everything if valid is None else valid,
        torch.zeros(num_rows, length) if documents is None else documents,
        window,
    )
    assert torch.equal(mask, expected)
    return chunks


@pytest.mark.parametrize(
    ("block_size", "length", "clean_block_size"),
    [
        *((1, 1, 1), (1, 8, 4), (1, 21, 3), (2, 9, 1), (3, 7, 3), (3, 16, 1), (3, 21, 4), (4, 9, 4), (4, 21, 1)),
        *((8, 8, 1), (8, 16, 3), (12, 9, 1), (12, 16, 4), (12, 21, 1), (30, 1, 3), (30, 21, 1)),
    ],
)
def test_chunks_of_a_plain_row_are_the_rule(block_size: int, length: int, clean_block_size: int) -> None:
    """Chunks of 8: lengths below, at and above it; blocks that divide it, do not, or are larger than chunk and row."""
    check_chunks(8, length, block_size, clean_block_size)


@st.composite
def masks(draw: st.DrawFn) -> dict[str, Any]:
    """A chunk size and a batch: block sizes, padding, documents and a window, each or none."""
    length, num_rows = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    rows = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(num_rows)]
    padding = draw(st.sampled_from(["none", "left", "right", "anywhere"]))
    valid = None if padding == "none" else torch.tensor(rows)
    if padding in ("left", "right"):
        valid = valid.sort(dim=-1, descending=padding == "right").values
    starts = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(num_rows)]
    sizes = st.integers(1, 16)
    return dict(
        chunk=draw(st.integers(1, 16)),
        length=length,
        block_size=draw(sizes | st.tuples(*[sizes] * num_rows)),
        clean_block_size=draw(st.sampled_from([1, 1, 2, 3, 4])),
        valid=valid,
        documents=torch.tensor(starts).long().cumsum(-1) if draw(st.booleans()) else None,
        num_rows=num_rows,
        window=draw(st.none() | st.integers(1, 16)),
    )


@settings(max_examples=60)
@given(masks())
def test_chunks_are_the_rule(mask: dict[str, Any]) -> None:
    """Whatever the chunks, lengths, block sizes, padding, documents and window."""
    check_chunks(**mask)


@pytest.mark.slow
@settings(max_examples=800)
@given(masks())
def test_chunks_are_the_rule_in_many_cases(mask: dict[str, Any]) -> None:
    """As above."""
    check_chunks(**mask)


def read_keys(chunks: Chunks, length: int) -> list[int]:
    """How many noisy keys each chunk of noisy queries reads."""
    return [
        sum(run.stop - run.start for run in chunk.keys if run.start >= length)
        for chunk in chunks
        if chunk.queries.start >= length
    ]


def test_a_chunk_reads_few_keys() -> None:
    """The clean keys before its end, the noisy ones of its blocks. Causal clean tokens are one chunk, for kernels."""
    chunks = check_chunks(8, 32, 4, 1)
    assert (chunks[0].queries, chunks[0].keys, chunks[0].mask) == (slice(0, 32), (slice(0, 32),), None)
    assert [chunk.keys[0] for chunk in chunks[1:]] == [slice(0, end) for end in (8, 16, 24, 32)]
    assert read_keys(chunks, 32) == [8] * 4
    assert read_keys(check_chunks(8, 32, 3, 1), 32) == [10, 12, 12, 10]  # blocks reach over both ends
    chunks = check_chunks(8, 32, 4, 4)
    assert [chunk.keys[0].stop for chunk in chunks[:4]] == [11, 19, 27, 32]
    chunks = check_chunks(8, 32, 4, 1, window=6)  # nor clean keys that have left the window
    assert [chunk.keys[0] for chunk in chunks[:4]] == [slice(max(0, end - 14), end) for end in (8, 16, 24, 32)]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_chunk_of_a_padded_row_reads_few_keys_too(padding: str, documents: bool) -> None:
    """Padding at the ends, a mask of ones and documents spread no block over the row."""
    valid = torch.ones(2, 32, dtype=torch.bool)
    if padding != "none":
        valid[1, slice(0, 5) if padding == "left" else slice(27, 32)] = False
    ids = torch.arange(32)[None].expand(2, -1) // 10 if documents else None
    chunks = check_chunks(8, 32, 4, 1, valid=valid, documents=ids, num_rows=2)
    assert max(read_keys(chunks, 32)) <= 8 + 2 * 3


# ---- attention
def test_attention_in_chunks_is_attention_with_the_dense_mask(chunks_of_8: None) -> None:
    """Outputs and the gradients of queries, keys and values, in float64."""
    length, sizes = 19, (3, 8, 16)
    valid = torch.ones(3, length, dtype=torch.bool)
    valid[1, :4] = False
    valid[2, 15:] = False
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    chunks = make_training_mask(positions, sizes, 1, "sdpa", torch.float64, valid=valid)
    mask = by_rule(positions, [*sizes], 1, valid, torch.zeros(3, length))[:, None]
    states = [torch.randn(3, 2, 2 * length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scaling = 0.4

    def attend(query: Any, key: Any, value: Any, mask: Any, is_causal: bool) -> Any:
        module = torch.nn.Module()
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=is_causal)

    outputs, weights = attend_in_chunks(attend, *states, chunks)
    expected = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask, scale=scaling).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(outputs, expected, **exactly)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(outputs, states, direction), torch.autograd.grad(expected, states, direction), **exactly
    )


def padded(side: str, length: int) -> torch.Tensor:
    """`attention_mask` of three rows, the first without padding."""
    mask = torch.ones(3, length, dtype=torch.long)
    if side == "gaps":
        mask[1, 2:4] = mask[1, 9:15] = mask[2, 1::3] = 0
    else:
        mask[1, slice(0, 4) if side == "left" else slice(length - 4, length)] = 0
        mask[2, slice(0, 11) if side == "left" else slice(length - 11, length)] = 0
    return mask


def documents(length: int) -> torch.Tensor:
    """Three rows of documents, the first row of one."""
    return (torch.arange(length) // torch.tensor([[100], [6], [9]])).long()


def training_step(model: BlockGenForDiffusionLM, **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the tokens and gradients of all parameters, the noise being a function of the shape."""
    model.zero_grad()
    outputs = model(**kwargs)
    outputs.loss.backward()
    return outputs.token_losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def eager_and_chunks(variant: str, length: int, **kwargs: Any) -> None:
    """A training step with `eager` and one with chunks of `sdpa` give the same, in float64."""
    text = words(3, length)
    labels = text
    if "attention_mask" in kwargs:
        labels = torch.where(kwargs["attention_mask"] == 1, text, -100)
        text = torch.where(kwargs["attention_mask"] == 1, text, PAD)
    results = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model(variant, attn_implementation=implementation).double().train()
        noisy = model.diffusion.corrupt(text, 0.4, torch.Generator().manual_seed(1), keep=labels == -100)
        inputs = dict(input_ids=text, noisy_input_ids=noisy, labels=labels, noise_level=0.6)
        with recorded_masks(model) as seen:
            results.append(training_step(model, **inputs, **kwargs))
        assert all(isinstance(mask, tuple) == (implementation == "sdpa") for mask in seen)
    (losses, gradients), (chunk_losses, chunk_gradients) = results
    assert losses.abs().sum() > 0
    torch.testing.assert_close(chunk_losses, losses, **exactly)
    torch.testing.assert_close(chunk_gradients, gradients, **exactly)


@contextmanager
def recorded_masks(model: BlockGenForDiffusionLM) -> Iterator[list[Any]]:
    """What the layers get as mask."""
    masks: list[Any] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    handles = [layer.self_attn.register_forward_pre_hook(record, with_kwargs=True) for layer in model.model.layers]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()
    assert masks


@pytest.mark.parametrize(
    ("length", "block_size"), [(5, 1), (5, 3), (16, 1), (16, 4), (16, 12), (19, 1), (19, 3), (19, 12)]
)
def test_training_in_chunks_is_training_with_eager(
    length: int, block_size: int, exact: None, chunks_of_8: None
) -> None:
    """Losses and gradients of all parameters: lengths around the chunk, blocks of every kind."""
    eager_and_chunks("masked", length, block_size=block_size)


@pytest.mark.parametrize(
    ("variant", "block_size", "case"),
    [  # every two of the three together
        ("masked", 3, "left"),
        ("uniform_time_conditional", [4, 1, 16], "left"),
        ("masked", [4, 1, 16], "right"),
        ("uniform_time_conditional", 3, "right"),
        ("masked", 3, "gaps"),
        ("uniform_time_conditional", [4, 1, 16], "gaps"),
        ("masked", [4, 1, 16], "documents"),
        ("uniform_time_conditional", 3, "documents"),
        ("masked", 3, "documents_right"),
        ("uniform_time_conditional", [4, 1, 16], "documents_right"),
    ],
)
def test_training_with_padding_and_documents_in_chunks_is_that_with_eager(
    variant: str, block_size: int | list[int], case: str, exact: None, chunks_of_8: None
) -> None:
    """With a block size a row, too."""
    kwargs = {}
    if case != "documents":
        kwargs["attention_mask"] = padded(case.removeprefix("documents_"), 19)
    if case.startswith("documents"):
        kwargs["document_ids"] = documents(19)
    eager_and_chunks(variant, 19, block_size=block_size, **kwargs)


@pytest.mark.parametrize(
    ("block_size", "case"),
    [(4, "plain"), ([4, 12, 8], "plain"), ([4, 12, 8], "left"), (4, "right"), ([4, 12, 8], "gaps"), (4, "documents")],
)
def test_block_causal_training_in_chunks_is_that_with_eager(
    block_size: int | list[int], case: str, exact: None
) -> None:
    """Clean tokens see to the end of their block, beyond the end of a chunk of 6."""
    kwargs = {"documents": {"document_ids": documents(19)}, "plain": {}}.get(case)
    if kwargs is None:
        kwargs = {"attention_mask": padded(case, 19)}
    with chunk_size(6):
        eager_and_chunks("block_causal", 19, block_size=block_size, **kwargs)


def test_training_in_chunks_as_they_are_shipped_is_that_with_eager(exact: None) -> None:
    """The real chunk size, over more than one chunk."""
    assert masking_blockgen.CHUNK_SIZE == 256
    eager_and_chunks("masked", 261, block_size=[3, 16, 260])


# ---- masks that are built once
@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The arguments of every layout that was built for training since the start of the test."""
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return build_layout(*args, **kwargs)

    monkeypatch.setattr(masking_blockgen, "build_layout", record)
    forget_masks()
    yield calls
    forget_masks()


def step(model: BlockGenForDiffusionLM, length: int = 8, **kwargs: Any) -> Any:
    return model(words(2, length), labels=words(2, length), **{"block_size": 4, **kwargs})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_is_built_once_for_each_length_and_block_size(implementation: str, built: list[Any]) -> None:
    """For all steps, all batches and all models alike."""
    model = tiny_model(attn_implementation=implementation).train()
    for _ in range(3):
        for length, block_size in ((8, 4), (8, 2), (12, 4)):
            step(model, length, block_size=block_size)
    assert len(built) == 3
    step(tiny_model(attn_implementation=implementation, seed=1), block_size=[2, 2])
    with torch.no_grad():
        model(words(3, 12), words(3, 12), block_size=4)
    assert len(built) == 3


def test_masks_of_different_models_are_different(built: list[Any]) -> None:
    """Clean attention, implementation and dtype belong to the mask: whichever model asks first."""

    def losses() -> list[torch.Tensor]:
        torch.manual_seed(0)
        models = [
            tiny_model("block_causal"),
            tiny_model(),
            tiny_model(attn_implementation="eager"),
            tiny_model(attn_implementation="eager").bfloat16(),
        ]
        results = []
        for model in models:
            with torch.no_grad():
                noisy = torch.full((2, 8), model.config.mask_token_id)
                results.append(step(model, noisy_input_ids=noisy, noise_level=0.9).loss)
            assert results[-1].isfinite()
        return results

    together = losses()
    assert len(built) == 4
    torch.testing.assert_close(together[1], together[2])
    assert abs(float(together[0] - together[1])) > 1e-3


def test_masks_of_padding_documents_and_rows_are_not_kept(built: list[Any]) -> None:
    """They are those of the batch: a second batch gets its own."""
    model = tiny_model().train()
    ones = torch.ones(2, 8, dtype=torch.long)
    one_pad = ones.clone()
    one_pad[0, 0] = 0
    cases = [
        (dict(attention_mask=ones), dict(attention_mask=one_pad)),
        (dict(document_ids=0 * ones), dict(document_ids=ones.cumsum(-1) // 5)),
        (dict(block_size=[4, 2]), dict(block_size=[2, 4])),
    ]
    for first, second in cases:
        with recorded_masks(model) as masks:
            step(model, **first)
            step(model, **second)
        one, other = (dense(mask, 2) for mask in (masks[0], masks[-2]))  # the last layer has a part of its mask
        assert not torch.equal(one, other)
    assert len(built) == 6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["masked", "block_causal"])
def test_a_mask_made_in_inference_mode_serves_training(variant: str, implementation: str, built: list[Any]) -> None:
    """Inference tensors cannot be saved for the backward pass: the mask must not be one."""
    model = tiny_model(variant, attn_implementation=implementation)
    with torch.inference_mode(), recorded_masks(model) as masks:
        step(model)
    tensors = [chunk.mask for chunk in masks[0] if chunk.mask is not None] if implementation == "sdpa" else masks
    assert tensors
    assert not any(mask.is_inference() for mask in tensors)
    made = len(built)  # that of both halves, and where draws share the clean half, that of the noisy one
    step(model.train()).loss.backward()
    assert len(built) == made
    assert all(p.grad.isfinite().all() for p in model.parameters())
