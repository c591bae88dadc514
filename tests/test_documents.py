"""Documents packed into a row, and block sizes a row: each computes what it computes alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import MASK, PAD, VOCAB_SIZE, tiny_model, words
from transformers import DynamicCache

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.modeling import masking_blockgen
from blockgen_hf.modeling.inputs_blockgen import document_positions


closely = dict(atol=1e-5, rtol=1e-4)
# What computes documents differently.
SOME = ["masked", "uniform", "block_causal", "time_conditional", "without_adaln"]

# Lengths of the documents of a row, 19 tokens in all, and their ids, which may be any.
PACKED = [[5, 8, 1, 5], [19], [3, 16]]
IDS = [[7, 3, -1, 4], [0], [2, 1]]
# Every document: its row and its place there.
SPANS = [
    (row, slice(sum(lengths[:i]), sum(lengths[: i + 1])))
    for row, lengths in enumerate(PACKED)
    for i in range(len(lengths))
]


@pytest.fixture(params=["eager", "sdpa_in_chunks"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Attention with a dense mask, and with many chunks of it; a single chunk is for test_training_mask.py."""
    cached = masking_blockgen._plain_training_mask
    cached = getattr(cached, "_torchdynamo_orig_callable", cached)
    monkeypatch.setattr(masking_blockgen, "CHUNK_SIZE", 4 if request.param == "sdpa_in_chunks" else 256)
    cached.cache_clear()
    yield request.param.removesuffix("_in_chunks")
    cached.cache_clear()


def document_ids() -> torch.Tensor:
    return torch.stack(
        [torch.repeat_interleave(torch.tensor(i), torch.tensor(n)) for i, n in zip(IDS, PACKED, strict=True)]
    )


def noised(model: BlockGenForDiffusionLM, text: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    return model.diffusion.corrupt(text, 0.4, torch.Generator().manual_seed(1), keep=keep)


def packed_batch(model: BlockGenForDiffusionLM) -> dict[str, torch.Tensor]:
    """Three rows of documents; each token has its own noise level, the same within a document."""
    text = words(3, 19)
    levels = (document_ids() + 2) / 10
    return dict(input_ids=text, noisy_input_ids=noised(model, text), noise_level=levels)


def part(inputs: dict[str, Any], row: int, span: slice) -> dict[str, Any]:
    return {name: value[row : row + 1, span] for name, value in inputs.items()}


# ---- documents alone and packed
@pytest.mark.parametrize("variant", SOME)
def test_a_packed_document_has_the_hidden_states_and_logits_it_has_alone(variant: str, implementation: str) -> None:
    """In the denoiser: clean and noisy half, all layers; positions and blocks start anew with each document."""
    model = tiny_model(variant, attn_implementation=implementation)
    inputs = packed_batch(model)
    with torch.no_grad():
        packed = model(**inputs, document_ids=document_ids(), block_size=4, output_hidden_states=True)
        for row, span in SPANS:
            alone = model(**part(inputs, row, span), block_size=4, output_hidden_states=True)
            torch.testing.assert_close(packed.logits[row, span], alone.logits[0], **closely)
            for states, expected in zip(packed.hidden_states, alone.hidden_states, strict=True):
                halves = torch.cat([states[row, :19][span], states[row, 19:][span]])
                torch.testing.assert_close(halves, expected[0], **closely)
        unpacked = model(**inputs, block_size=4)
    assert not torch.allclose(unpacked.logits[0], packed.logits[0], **closely)
    torch.testing.assert_close(unpacked.logits[1], packed.logits[1], **closely)  # one document


@pytest.mark.parametrize(
    ("variant", "block_size"),
    [("masked", 1), ("masked", 3), ("uniform_time_conditional", 3), ("uniform_time_conditional", 16)],
)
def test_a_packed_document_costs_what_it_costs_alone(variant: str, block_size: int, implementation: str) -> None:
    """In training: the losses of its tokens, and the gradients of the documents' sum."""
    model = tiny_model(variant, attn_implementation=implementation).train()
    inputs = packed_batch(model)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, 6] = inputs["labels"][2, :2] = -100
    settings = dict(block_size=block_size, num_items_in_batch=10)
    packed = model(**inputs, document_ids=document_ids(), **settings)
    packed.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for row, span in SPANS:
        alone = model(**part(inputs, row, span), **settings)
        alone.loss.backward()
        total += alone.loss.item()
        torch.testing.assert_close(packed.token_losses[row, span], alone.token_losses[0], **closely)
    assert packed.loss.item() == pytest.approx(total, rel=1e-4)
    torch.testing.assert_close(gradients, {n: p.grad for n, p in model.named_parameters()}, atol=1e-4, rtol=1e-4)


def test_block_causal_documents_cost_what_they_cost_alone(implementation: str) -> None:
    """Clean blocks, too, are counted from the start of the document."""
    model = tiny_model("block_causal", attn_implementation=implementation).train()
    inputs = packed_batch(model)
    inputs["labels"] = inputs["input_ids"]
    packed = model(**inputs, document_ids=document_ids(), block_size=8)
    for row, span in SPANS:
        alone = model(**part(inputs, row, span), block_size=8)
        torch.testing.assert_close(packed.token_losses[row, span], alone.token_losses[0], **closely)


def test_positions_restart_with_each_document() -> None:
    """Whatever the ids are."""
    positions = document_positions(torch.tensor([[7, 7, 7, 3, 3, -1, 4], [0, 0, 0, 0, 0, 0, 1]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 0]]
    assert document_positions(torch.zeros(2, 1, dtype=torch.long)).tolist() == [[0], [0]]


@pytest.mark.parametrize("half", ["input_ids", "noisy_input_ids"])
@pytest.mark.parametrize("variant", ["masked", "block_causal"])
def test_a_token_changes_nothing_in_another_document(variant: str, half: str, implementation: str) -> None:
    """Bit for bit; and something in its own."""
    model = tiny_model(variant, attn_implementation=implementation)
    inputs = packed_batch(model)
    ids = document_ids()

    @torch.no_grad()
    def states(text: torch.Tensor) -> torch.Tensor:
        outputs = model(**{**inputs, half: text}, document_ids=ids, block_size=4, output_hidden_states=True)
        clean, noisy = outputs.hidden_states[-1].split(19, dim=1)
        return torch.cat([clean, noisy], dim=-1)

    base = states(inputs[half])
    for place in (0, 4, 5, 8, 12, 13, 14, 18):
        changed = inputs[half].clone()
        changed[0, place] = (changed[0, place] + 7) % 20
        moved = (states(changed) != base).any(-1)
        assert moved[0, place]
        assert not moved[1:].any()
        assert not moved[0][ids[0] != ids[0, place]].any()


@pytest.mark.parametrize(
    ("variant", "pads"),
    [
        ("block_causal", "of_the_last_document"),
        ("uniform_time_conditional", "of_the_last_document"),
        ("uniform_time_conditional", "of_their_own"),
        ("block_causal", "without_attention_mask"),
    ],
)
def test_right_padding_changes_no_document(variant: str, pads: str, implementation: str) -> None:
    """Rows of documents with pads behind: as part of the last document, or as a document; then no mask is needed."""
    model = tiny_model(variant, attn_implementation=implementation).train()
    inputs = packed_batch(model)
    inputs["labels"] = inputs["input_ids"]
    ids = document_ids()
    settings = dict(block_size=4, num_items_in_batch=1)
    expected = model(**inputs, document_ids=ids, **settings)

    extra = torch.full((3, 6), PAD)
    inputs["noise_level"] = torch.cat([inputs["noise_level"], torch.full((3, 6), 0.5)], dim=1)
    for name, fill in (("input_ids", PAD), ("noisy_input_ids", 3), ("labels", -100)):
        inputs[name] = torch.cat([inputs[name], torch.full_like(extra, fill)], dim=1)
    attention_mask = torch.ones(3, 25, dtype=torch.long)
    attention_mask[:, 19:] = 0
    if pads == "without_attention_mask":
        attention_mask = None
    of_pads = ids[:, -1:] if pads == "of_the_last_document" else torch.full((3, 1), 99)
    ids = torch.cat([ids, of_pads.expand(-1, 6)], dim=1)
    outputs = model(**inputs, document_ids=ids, attention_mask=attention_mask, **settings)
    torch.testing.assert_close(outputs.token_losses[:, :19], expected.token_losses, **closely)
    assert (outputs.token_losses[:, 19:] == 0).all()
    torch.testing.assert_close(outputs.loss, expected.loss, **closely)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_left_padding_with_an_id_of_its_own_changes_no_document(implementation: str) -> None:
    """Pads in front are a document, too."""
    model = tiny_model("uniform_time_conditional", attn_implementation=implementation)
    inputs = packed_batch(model)
    expected = model(**inputs, document_ids=document_ids(), block_size=4).logits
    padded = {name: torch.cat([torch.full_like(value[:, :3], 0), value], dim=1) for name, value in inputs.items()}
    ids = torch.cat([torch.full((3, 3), 50), document_ids()], dim=1)
    mask = (ids != 50).long()
    for attention_mask in (None, mask):
        outputs = model(**padded, document_ids=ids, attention_mask=attention_mask, block_size=4)
        torch.testing.assert_close(outputs.logits[:, 3:], expected, **closely)


def test_an_id_that_comes_back_is_another_document(implementation: str) -> None:
    """Positions restart with every change of the id, so that tokens of an earlier document with it are none of it."""
    model = tiny_model(attn_implementation=implementation)
    text = words(1, 16)
    noisy = noised(model, text)
    lengths = torch.tensor([6, 4, 6])
    expected, logits = (
        model(text, noisy, block_size=4, document_ids=torch.tensor(ids).repeat_interleave(lengths)[None]).logits
        for ids in ([0, 1, 2], [0, 1, 0])
    )
    torch.testing.assert_close(logits, expected, **closely)


def test_noise_is_drawn_for_packed_documents() -> None:
    """Any training loop may pass them: what is not given is drawn as without them."""
    model, text = tiny_model().train(), words(3, 19)
    losses = []
    for ids in (None, torch.zeros(3, 19, dtype=torch.long), document_ids()):
        torch.manual_seed(0)
        losses.append(model(text, labels=text, block_size=4, document_ids=ids).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_what_documents_cannot_go_with_is_refused() -> None:
    """A cache, given positions, another shape, noisy tokens elsewhere, and the causal language model."""
    model, text = tiny_model(), words(2, 8)
    ids = torch.zeros(2, 8, dtype=torch.long)
    cache = DynamicCache(config=model.config)
    refused = [
        dict(cache=cache),
        dict(use_cache=True),
        dict(position_ids=torch.arange(8)[None]),
        dict(noisy_position_ids=torch.arange(8)[None]),
        dict(document_ids=ids[:, :7]),
        dict(document_ids=ids[:1]),
        dict(document_ids=ids[0]),
        dict(noisy_input_ids=text[:, :4]),
        dict(input_ids=None),
    ]
    for wrong in refused:
        arguments = dict(input_ids=text, noisy_input_ids=text, document_ids=ids, block_size=4) | wrong
        with pytest.raises(ValueError, match="`document_ids` must have the shape of `input_ids`"):
            model(**arguments)
    for wrong in (dict(position_ids=torch.arange(8)[None]), dict(document_ids=ids[:, :7])):
        with pytest.raises(ValueError, match="`document_ids`"):
            model(**(dict(input_ids=text, labels=text, document_ids=ids, block_size=4) | wrong))
    with pytest.raises(ValueError, match="`cache` and `use_cache=True`"):
        model(text, labels=text, document_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="`document_ids` serve training and the denoiser"):
        model(text, document_ids=ids)
    assert cache.get_seq_length() == 0


# ---- a block size a row
SIZES = [4, 1, 16, 3]


@pytest.mark.parametrize("variant", ["masked", "uniform", "uniform_time_conditional", "without_adaln"])
def test_a_row_with_its_block_size_is_denoised_as_alone(variant: str, implementation: str) -> None:
    """`block_size=[...]`, a list or a tuple, with and without padding."""
    model = tiny_model(variant, attn_implementation=implementation)
    text = words(4, 18)
    noisy = noised(model, text)
    mask = torch.ones(4, 18, dtype=torch.long)
    mask[1, :3] = mask[2, 14:] = 0
    levels = torch.tensor([0.3, 0.5, 0.7, 0.9])
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            logits = model(text, noisy, block_size=SIZES, noise_level=levels, **kwargs).logits
            as_tuple = model(text, noisy, block_size=tuple(SIZES), noise_level=levels, **kwargs).logits
            assert torch.equal(logits, as_tuple)
            for i, size in enumerate(SIZES):
                row = {name: value[i : i + 1] for name, value in kwargs.items()}
                alone = model(
                    text[i : i + 1], noisy[i : i + 1], block_size=size, noise_level=levels[i : i + 1], **row
                ).logits
                real = mask[i].bool() if kwargs else slice(None)
                torch.testing.assert_close(logits[i, real], alone[0, real], **closely)


@pytest.mark.parametrize(
    ("variant", "objective"),
    [
        ("masked", "cross_entropy"),
        ("masked", "elbo"),
        ("uniform", "cross_entropy"),
        ("uniform_time_conditional", "elbo"),
    ],
)
def test_a_row_with_its_block_size_costs_what_it_costs_alone(
    variant: str, objective: str, implementation: str
) -> None:
    """The losses of its tokens, and their sum over all rows; rows of block size 1 are fully noised, at t = 1."""
    model = tiny_model(variant, attn_implementation=implementation, training_objective=objective)
    text = words(4, 18)
    labels = text.clone()
    labels[0, :5] = -100
    noisy = noised(model, text, keep=labels == -100)
    noisy[1] = model.diffusion.prior((18,), "cpu", torch.Generator().manual_seed(2))
    levels = torch.tensor([0.3, 0.5, 0.7, 0.9])
    for training in (False, True):
        model.train(training)
        outputs = model(text, noisy, labels=labels, block_size=SIZES, noise_level=levels)
        total = 0.0
        for i, size in enumerate(SIZES):
            row = slice(i, i + 1)
            alone = model(text[row], noisy[row], labels=labels[row], block_size=size, noise_level=levels[row])
            torch.testing.assert_close(outputs.token_losses[i], alone.token_losses[0], **closely)
            total += alone.token_losses.sum().item()
        assert outputs.loss.item() == pytest.approx(total / (4 * 18 - 5), rel=1e-4)


def test_rows_of_documents_may_have_their_block_sizes(implementation: str) -> None:
    """Both at once: a document costs what it costs alone with the block size of its row."""
    model = tiny_model("uniform_time_conditional", attn_implementation=implementation).train()
    inputs = packed_batch(model)
    inputs["labels"] = inputs["input_ids"]
    sizes = [3, 1, 8]
    packed = model(**inputs, document_ids=document_ids(), block_size=sizes)
    for row, span in SPANS:
        alone = model(**part(inputs, row, span), block_size=sizes[row])
        torch.testing.assert_close(packed.token_losses[row, span], alone.token_losses[0], **closely)


def test_rows_behind_a_cache_may_have_their_block_sizes() -> None:
    """Generation: blocks are counted from the first noisy token, the prefix being in the cache."""
    model = tiny_model()
    prefix, noisy = words(3, 5), words(3, 6, seed=1)
    noisy[:, ::2] = MASK

    def denoise(rows: slice, block_size: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prefix[rows], noisy[rows][:, :0], cache=cache, use_cache=True)
            return model(noisy_input_ids=noisy[rows], cache=cache, block_size=block_size).logits

    sizes = [4, 2, 6]
    logits = denoise(slice(None), sizes)
    for i, size in enumerate(sizes):
        torch.testing.assert_close(logits[i], denoise(slice(i, i + 1), size)[0], **closely)


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_drawn_noise_follows_the_block_size_of_the_row(variant: str) -> None:
    """Rows of block size 1 are fully noised, at t = 1; the others at the noise level that they are given."""
    model = tiny_model(variant)
    trunk_calls: list[dict[str, Any]] = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: trunk_calls.append(kwargs), with_kwargs=True)
    text = words(3, 200)
    model(text, labels=text, block_size=[4, 1, 4], noise_level=torch.tensor([0.1, 0.1, 0.9]))
    kwargs = trunk_calls[0]
    changed = (kwargs["noisy_input_ids"] != text).double().mean(-1)
    fully = 1.0 if variant == "masked" else 1 - 1 / VOCAB_SIZE
    assert changed[0] < 0.25
    assert changed[1] == pytest.approx(fully, abs=0 if variant == "masked" else 0.05)
    assert 0.75 < changed[2] < 1
    assert kwargs["noise_level"].flatten().tolist() == pytest.approx([0.1, 1.0, 0.9])
    assert kwargs["block_size"] == (4, 1, 4)


def test_equal_block_sizes_are_one_block_size() -> None:
    """So that the mask that is built once serves."""
    model, text = tiny_model(), words(3, 8)
    noisy = noised(model, text)
    assert torch.equal(model(text, noisy, block_size=[4, 4, 4]).logits, model(text, noisy, block_size=4).logits)


@pytest.mark.parametrize("use", ["denoiser", "training"])
def test_block_sizes_that_fit_no_row_are_refused(use: str) -> None:
    """As many as rows, positive integers all; block-causal models: on their grid all."""
    text = words(3, 8)
    kwargs = {"labels": text} if use == "training" else {"noisy_input_ids": text}
    for wrong in ([4, 4], [4, 2, 4, 2], [4], (4, 4), []):
        with pytest.raises(ValueError, match="`block_size` must be one number, or 3, one for each row"):
            tiny_model()(text, block_size=wrong, **kwargs)
    for wrong in ([4, 0, 4], [4, -1, 2], [4, 2.0, 4], [4, True, 4], [4, None, 4]):
        with pytest.raises(ValueError, match="`block_size` must be a positive integer"):
            tiny_model()(text, block_size=wrong, **kwargs)
    model = tiny_model("block_causal")
    for wrong in ([4, 2, 4], [4, 8, 6], [1, 4, 4]):
        with pytest.raises(ValueError, match="`block_size=.*clean_attention='block_causal'"):
            model(text, block_size=wrong, **kwargs)


def test_block_causal_rows_may_have_multiples_of_their_grid() -> None:
    """Row by row as alone."""
    model, text = tiny_model("block_causal"), words(3, 13)
    noisy = noised(model, text)
    with torch.no_grad():
        logits = model(text, noisy, block_size=[4, 12, 8]).logits
        for i, size in enumerate([4, 12, 8]):
            alone = model(text[i : i + 1], noisy[i : i + 1], block_size=size).logits
            torch.testing.assert_close(logits[i], alone[0], **closely)
