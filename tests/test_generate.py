"""`generate`: every decoding, seeds, batches, lengths, prompts and caches."""

import itertools
from typing import Any

import pytest
import torch
from tiny import (
    BLOCK_CAUSAL,
    CAUSAL,
    MASK,
    VOCAB_SIZE,
    generate,
    left_padded,
    num_rows,
    record_forwards,
    skip_without_quantised_caches,
    tiny_model,
    words,
)

from blockgen_hf import BlockGenForDiffusionLM


AR: dict[str, Any] = dict(decoding="ar")
DIFFUSION: dict[str, Any] = dict(decoding="block_diffusion", block_size=4)
ARPC: dict[str, Any] = dict(decoding="arpc", block_size=4)

# Every way to decode that models with causal clean attention have.
DECODINGS: dict[str, dict[str, Any]] = {
    "ar": AR,
    "ar_greedy": {**AR, "do_sample": False},
    "block_diffusion": DIFFUSION,
    "block_diffusion_many_steps": {**DIFFUSION, "denoising_steps": 6},
    "block_diffusion_odd_block": {**DIFFUSION, "block_size": 3, "denoising_steps": 2},
    "block_diffusion_greedy": {**DIFFUSION, "do_sample": False},
    "greedy_noise_removal": {**DIFFUSION, "noise_removal": "greedy"},
    "full_sequence": {**DIFFUSION, "block_size": 7},
    "seeded": {**DIFFUSION, "ar_seed_tokens": 3},
    "arpc": ARPC,
    "arpc_greedy": {**ARPC, "do_sample": False},
    "arpc_late": {**ARPC, "denoising_steps": 6, "corrector_start": 2, "corrector_period": 2},
    "arpc_random": {**ARPC, "corrector": "random"},
    "arpc_ar_kl": {**ARPC, "corrector": "ar_kl", "ar_seed_tokens": 1},
}
FEW = ("ar", "ar_greedy", "block_diffusion", "seeded", "arpc")
PLAIN = ("masked", "uniform")


def few_or_slow(decoding: str, variant: str = "masked") -> list[pytest.MarkDecorator]:
    fast = FEW if variant == "masked" else ("ar", "block_diffusion", "arpc")
    return [] if decoding in fast else [pytest.mark.slow]


VARIANTS_LEFT = [name for name in CAUSAL if name not in PLAIN]
CASES = [
    *(pytest.param(*case, marks=few_or_slow(*reversed(case))) for case in itertools.product(PLAIN, DECODINGS)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(VARIANTS_LEFT, ("ar", "arpc"))),
]
NEW_TOKENS = 7


def empty(rows: int = 1) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.long)


def new_tokens(model: BlockGenForDiffusionLM, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The text behind prompts of equal length."""
    settings.setdefault("max_new_tokens", NEW_TOKENS)
    return generate(model, prompt, **settings)[:, prompt.shape[1] :]


# ---- autoregressive decoding
@pytest.mark.parametrize("variant", CAUSAL)
def test_greedy_decoding_is_the_repeated_arg_max_of_forward(variant: str) -> None:
    """By the causal language model; for uniform noise by the queries that `forward` fixes itself."""
    model, text = tiny_model(variant), words(2, 3)
    expected = text
    for _ in range(NEW_TOKENS):
        logits = model(expected, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, text, max_new_tokens=NEW_TOKENS, **DECODINGS["ar_greedy"]), expected)


@pytest.mark.parametrize(
    ("variant", "length"), [*((variant, 3) for variant in CAUSAL), *((variant, 0) for variant in PLAIN)]
)
def test_scores_come_from_generation_mixin_with_the_same_greedy_text(length: int, variant: str) -> None:
    """`output_scores` and its like go through transformers' own loop: logits a token, same text."""
    model, text = tiny_model(variant), words(2, length)
    outputs = generate(
        model,
        text,
        max_new_tokens=6,
        do_sample=False,
        decoding="ar",
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert torch.equal(outputs.sequences, generate(model, text, max_new_tokens=6, do_sample=False, decoding="ar"))
    assert len(outputs.scores) == len(outputs.logits) == 6
    assert outputs.scores[0].shape == (2, VOCAB_SIZE)
    greedy = torch.stack(outputs.logits, dim=1).argmax(-1)
    assert torch.equal(greedy, outputs.sequences[:, length:])


def test_beam_search_finds_the_most_probable_pair() -> None:
    """With as many beams as words two tokens are searched exhaustively."""
    model, text = tiny_model(), words(1, 3)
    best = generate(model, text, max_new_tokens=2, num_beams=VOCAB_SIZE - 1, do_sample=False, decoding="ar")
    first = model(text).logits[0, -1].log_softmax(-1)
    candidates = torch.cat([text.expand(MASK, -1), torch.arange(MASK)[:, None]], dim=1)
    second = model(candidates).logits[:, -1].log_softmax(-1)
    joint = first[:MASK, None] + second[:, :MASK]
    assert best[0, 3:].tolist() == [*divmod(int(joint.argmax()), MASK)]


@pytest.mark.parametrize("variant", ["masked", "uniform"])
@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
def test_speculative_greedy_decoding_gives_the_greedy_text(how: str, variant: str) -> None:
    """transformers' prompt lookup and assisted decoding, which verify several tokens in one forward pass."""
    model, text = tiny_model(variant), words(1, 4).repeat(1, 3)
    settings = dict(max_new_tokens=12, do_sample=False, decoding="ar")
    expected = generate(model, text, **settings)
    if how == "prompt_lookup":
        settings["prompt_lookup_num_tokens"] = 3
    else:
        settings["assistant_model"] = tiny_model(variant, seed=1)
    assert torch.equal(generate(model, text, **settings), expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_beams=2),
        dict(num_beams=2, do_sample=False),
        dict(prompt_lookup_num_tokens=2, do_sample=False),
        dict(output_scores=True, return_dict_in_generate=True),
        dict(output_logits=True, return_dict_in_generate=True),
        dict(output_attentions=True, return_dict_in_generate=True),
        dict(output_hidden_states=True, return_dict_in_generate=True),
    ],
    ids=str,
)
def test_what_goes_token_by_token_is_refused_elsewhere(settings: dict[str, Any]) -> None:
    """Beams, assistants and per-token outputs need `decoding="ar"`, says the error."""
    for decoding in ("block_diffusion", "arpc"):
        with pytest.raises(ValueError, match="`decoding='ar'`"):
            generate(tiny_model(), words(1, 3), max_new_tokens=4, decoding=decoding, **settings)


def test_an_assistant_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="`decoding='ar'`"):
        generate(tiny_model(), words(1, 3), max_new_tokens=4, assistant_model=tiny_model(seed=1), **DIFFUSION)


# ---- seeds
@pytest.mark.parametrize(
    "variant, decoding",
    [pytest.param(*case, marks=few_or_slow(*reversed(case))) for case in itertools.product(PLAIN, DECODINGS)],
)
def test_seeds_reproduce(variant: str, decoding: str) -> None:
    """The same seed gives the same text; other seeds give others, unless nothing is drawn."""
    model, prompt, settings = tiny_model(variant), words(2, 3), DECODINGS[decoding]
    first = new_tokens(model, prompt, seed=5, **settings)
    assert torch.equal(first, new_tokens(model, prompt, seed=5, **settings))
    differs = any(not torch.equal(first, new_tokens(model, prompt, seed=seed, **settings)) for seed in range(6, 9))
    deterministic = decoding == "ar_greedy" or (variant != "uniform" and decoding == "arpc_greedy")
    assert differs != deterministic


def test_generation_draws_one_number_of_the_global_generator() -> None:
    """So that what runs after it does not depend on how long the text was."""
    model = tiny_model()
    states = []
    for settings, length in itertools.product((AR, DIFFUSION, ARPC), (2, 9)):
        generate(model, words(1, 3), max_new_tokens=length, **settings)
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


# ---- batches
@pytest.mark.parametrize("variant, decoding", CASES)
def test_left_padded_batch_equals_one_by_one(variant: str, decoding: str) -> None:
    """Prompts of different lengths, an empty one among them, give what they give alone."""
    model, settings = tiny_model(variant), DECODINGS[decoding]
    prompts = [words(length, seed=length) for length in (7, 1, 0)]
    together = generate(model, None, max_new_tokens=NEW_TOKENS, **left_padded(prompts), **settings)
    assert together.shape == (3, 7 + NEW_TOKENS)
    for row, prompt in enumerate(prompts):
        alone = new_tokens(model, prompt[None], **settings)
        assert together[row, 7:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("decoding", FEW)
def test_a_row_does_not_depend_on_the_order_of_the_batch(decoding: str) -> None:
    """Draws are keyed by the row's prompt, not by its place."""
    model, prompts = tiny_model(), words(4, 3)
    order = torch.tensor([2, 0, 3, 1])
    together = new_tokens(model, prompts, **DECODINGS[decoding])
    assert torch.equal(new_tokens(model, prompts[order], **DECODINGS[decoding]), together[order])


@pytest.mark.parametrize("decoding", FEW)
def test_returned_sequences_of_one_prompt_differ(decoding: str) -> None:
    """`num_return_sequences`, copies of a prompt in a batch, and empty prompts; the first is that of a single call."""
    if decoding == "ar_greedy":
        pytest.skip("greedy decoding has one text, and transformers refuses to return more")
    model, settings = tiny_model(), DECODINGS[decoding]
    prompts = words(2, 3)
    single = new_tokens(model, prompts, **settings)
    several = new_tokens(model, prompts, num_return_sequences=4, **settings)
    assert several.shape == (8, NEW_TOKENS)
    assert len({tuple(row) for row in several.tolist()}) == 8
    assert torch.equal(several[::4], single)
    for copies in (prompts[:1].repeat(4, 1), empty(4)):
        texts = new_tokens(model, copies, **settings)
        assert len({tuple(row) for row in texts.tolist()}) == 4


# ---- lengths and prompts
@pytest.mark.parametrize("decoding", [pytest.param(name, marks=few_or_slow(name)) for name in DECODINGS])
def test_any_number_of_new_tokens(decoding: str) -> None:
    """Also such that are no multiple of the block, and a single one."""
    model = tiny_model()
    for length in (1, 5, 8):
        assert generate(model, words(2, 3), max_new_tokens=length, **DECODINGS[decoding]).shape == (2, 3 + length)


@pytest.mark.parametrize("variant", ["masked", "uniform", "block_causal"])
def test_text_without_a_prompt_starts_from_the_prior(variant: str) -> None:
    """`[B, 0]`, and no inputs at all; no BOS is forced at position 0."""
    model = tiny_model(variant, bos_token_id=0)
    decodings = [DIFFUSION] if variant in BLOCK_CAUSAL else [AR, DIFFUSION, ARPC]
    for settings in decodings:
        rows = generate(model, empty(3), max_new_tokens=6, **settings)
        assert rows.shape == (3, 6) and len({tuple(row) for row in rows.tolist()}) > 1
        single = generate(model, None, max_new_tokens=6, **settings)
        assert single.shape == (1, 6)
        assert torch.equal(single, generate(model, empty(1), max_new_tokens=6, **settings))
        assert torch.equal(single[0], rows[0])
    first = generate(model, empty(64), max_new_tokens=1, **decodings[0])
    assert len(first.unique()) > 3


def test_empty_prompt_with_an_empty_attention_mask() -> None:
    """What a tokenizer makes of the empty string."""
    model = tiny_model()
    for settings in (AR, DIFFUSION, ARPC):
        mask = torch.zeros(2, 0, dtype=torch.long)
        text = generate(model, None, input_ids=empty(2), attention_mask=mask, max_new_tokens=6, **settings)
        assert torch.equal(text, generate(model, empty(2), max_new_tokens=6, **settings))


def test_the_prompt_comes_back_unchanged() -> None:
    """Nothing but new tokens is written, whatever is re-noised."""
    model, prompt = tiny_model("uniform"), words(3, 7)
    for settings in (AR, DIFFUSION, {**ARPC, "corrector": "entropy", "denoising_steps": 8}):
        assert torch.equal(generate(model, prompt, max_new_tokens=9, **settings)[:, :7], prompt)


def test_text_may_fill_every_position() -> None:
    """`max_position_embeddings` counts prompt and new tokens; a last block may end beyond what is wanted."""
    model = tiny_model(max_position_embeddings=16)
    for settings in (AR, DIFFUSION, ARPC, {**DIFFUSION, "block_size": 7}):
        assert generate(model, words(1, 6), max_new_tokens=10, **settings).shape == (1, 16)
        assert generate(model, words(1, 6), max_length=16, **settings).shape == (1, 16)


def test_full_sequence_diffusion_is_one_block() -> None:
    """`block_diffusion` with the block as long as the text; T passes in all."""
    model = tiny_model()
    outputs = generate(
        model,
        empty(2),
        max_new_tokens=24,
        decoding="block_diffusion",
        block_size=24,
        denoising_steps=6,
        return_dict_in_generate=True,
    )
    assert outputs.sequences.shape == (2, 24)
    assert outputs.num_function_evaluations.tolist() == [6, 6]


def test_prefill_in_chunks_gives_the_same_text() -> None:
    """`prefill_chunk_size` bounds the memory of long prompts."""
    model, batch = tiny_model(), left_padded([words(11), words(6)])
    for settings in (AR, DIFFUSION, ARPC):
        expected = generate(model, None, max_new_tokens=6, **batch, **settings)
        assert torch.equal(
            generate(model, None, max_new_tokens=6, prefill_chunk_size=4, **batch, **settings), expected
        )


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_a_static_cache_has_room_for_every_text_without_a_prompt(num_return_sequences: int) -> None:
    """With `prefill_chunk_size` it is made before the empty prompts, which `generate` sees as one, are expanded."""
    model, nothing = tiny_model(), torch.zeros(2, 0, dtype=torch.long)
    settings = dict(decoding="block_diffusion", max_new_tokens=12, num_return_sequences=num_return_sequences)
    found = generate(model, nothing, **settings, cache_implementation="static", prefill_chunk_size=3)
    assert torch.equal(found, generate(model, nothing, **settings))


# ---- AR seeding
@pytest.mark.parametrize("variant", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
@pytest.mark.parametrize("k", [1, 3, 4, 7, 99])
def test_seeded_tokens_are_those_of_autoregressive_decoding(k: int, variant: str) -> None:
    """Sec. 4: the first k new tokens autoregressively, k being no multiple of the block."""
    model, prompt = tiny_model(variant), words(2, 3)
    autoregressive = new_tokens(model, prompt, **AR)
    seeded = new_tokens(model, prompt, **{**DIFFUSION, "ar_seed_tokens": k})
    assert torch.equal(seeded[:, :k], autoregressive[:, :k])
    assert torch.equal(seeded, autoregressive) == (k >= NEW_TOKENS)


# ---- caches
@pytest.mark.parametrize("variant, decoding", CASES)
def test_every_cache_gives_the_same_text(variant: str, decoding: str) -> None:
    """None at all, dynamic and static: exact to rounding, which no draw of this test is near enough to notice."""
    model, settings = tiny_model(variant), DECODINGS[decoding]
    batch = left_padded([words(5), words(2, seed=2)])
    expected = generate(model, None, max_new_tokens=NEW_TOKENS, use_cache=False, **batch, **settings)
    for cache in (None, "static"):
        text = generate(model, None, max_new_tokens=NEW_TOKENS, cache_implementation=cache, **batch, **settings)
        assert torch.equal(text, expected)


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_quantised_cache_generates(backend: str, decoding: str) -> None:
    """Within its rounding error: the prompt is kept, and with a prompt shorter than anything rounded, the text too."""
    skip_without_quantised_caches(backend)
    model, prompt = tiny_model(), words(2, 5)
    config = {"backend": backend} | ({"q_group_size": 8, "residual_length": 3} if backend == "quanto" else {})
    text = generate(
        model,
        prompt,
        max_new_tokens=NEW_TOKENS,
        cache_implementation="quantized",
        cache_config=config,
        **DECODINGS[decoding],
    )
    assert text.shape == (2, 5 + NEW_TOKENS)
    assert torch.equal(text[:, :5], prompt)
    exact = generate(model, prompt, max_new_tokens=NEW_TOKENS, **DECODINGS[decoding])
    assert (text == exact).float().mean() > 0.4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches copy on CUDA streams; no GPU here")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache_gives_the_same_text(cache: str) -> None:
    model, prompt = tiny_model().cuda(), words(2, 5).cuda()
    for settings in (AR, DIFFUSION, ARPC):
        expected = generate(model, prompt, max_new_tokens=NEW_TOKENS, **settings)
        text = generate(model, prompt, max_new_tokens=NEW_TOKENS, cache_implementation=cache, **settings)
        assert torch.equal(text, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("decoding", FEW)
def test_generation_under_gradient_checkpointing_goes_without_a_cache(decoding: str) -> None:
    """RL trainers sample in training mode: slower, and still right."""
    model, settings = tiny_model(), DECODINGS[decoding]
    expected = new_tokens(model, words(2, 5), **settings)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(new_tokens(model, words(2, 5), **settings), expected)
    assert model.training


# ---- cost
def test_the_prompt_is_computed_once() -> None:
    """The first pass commits it; the others hold the block only; the last block is never committed."""
    model = tiny_model()
    with record_forwards(model) as calls:
        generate(model, words(1, 9), max_new_tokens=8, denoising_steps=3, **DIFFUSION)
    assert sum(call["input_ids"].shape[1] for call in calls) == 9 + 4
    assert [call["input_ids"].shape[1] > 0 for call in calls].count(True) == 2
    assert all(num_rows(call) == 1 for call in calls)


def test_generate_builds_no_graph() -> None:
    """No gradient is recorded, without any context manager of the caller."""
    model = tiny_model()
    for settings in (AR, DIFFUSION, ARPC):
        assert not generate(model, words(1, 3), max_new_tokens=4, **settings).requires_grad
        with torch.enable_grad():
            generate(model, words(1, 3), max_new_tokens=4, **settings)
    assert all(parameter.grad is None for parameter in model.parameters())
