"""Models whose clean tokens see their whole block: blocks keep the grid of training (Fig. 5a)."""

from typing import Any

import pytest
import torch
from tiny import MASK, PAD, generate, left_padded, record_forwards, tiny_model, words
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList


DIFFUSION: dict[str, Any] = dict(decoding="block_diffusion")
ARPC: dict[str, Any] = dict(decoding="arpc", corrector="random", denoising_steps=3)
SETTINGS = {
    "block_diffusion": DIFFUSION,
    "few_steps": {**DIFFUSION, "denoising_steps": 2},
    "greedy": {**DIFFUSION, "do_sample": False},
    "arpc_random": ARPC,
    "two_blocks": {**DIFFUSION, "block_size": 8},
}
FEW = ("block_diffusion", "arpc_random")
every_setting = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[] if name in FEW else [pytest.mark.slow])
        for name, settings in SETTINGS.items()
    ],
)
every_variant = pytest.mark.parametrize(
    "variant", ["block_causal", pytest.param("uniform_block_causal", marks=pytest.mark.slow)]
)


@every_setting
@every_variant
@pytest.mark.parametrize("new_tokens", [3, 9])
def test_prompts_of_different_lengths_equal_one_by_one(
    variant: str, settings: dict[str, Any], new_tokens: int
) -> None:
    """Prompts at every place of the grid, an empty one too, and texts that end anywhere in a block."""
    model = tiny_model(variant)
    prompts = [words(length, seed=length) for length in (9, 8, 6, 3, 0)]
    together = generate(model, None, max_new_tokens=new_tokens, **left_padded(prompts), **settings)
    assert together.shape == (5, 9 + new_tokens)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], max_new_tokens=new_tokens, **settings)[0, len(prompt) :]
        assert together[row, 9:].tolist() == alone.tolist(), f"prompt of {len(prompt)}"


@every_setting
@every_variant
@pytest.mark.parametrize("length", [0, 4, 6])
def test_prompt_remainder_is_held_fixed(variant: str, settings: dict[str, Any], length: int) -> None:
    """Behind the last multiple of 4 the prompt stands inside the first block: in every state, and in the text."""
    model, prompts = tiny_model(variant), words(3, length)
    outputs = generate(
        model, prompts, max_new_tokens=7, return_dict_in_generate=True, output_trajectory=True, **settings
    )
    assert torch.equal(outputs.sequences[:, :length], prompts)
    assert outputs.sequences.shape == (3, length + 7)
    size = settings.get("block_size", 4)
    remainder = length % 4
    first = outputs.trajectory[0]
    for state in first:
        assert torch.equal(state[:, :remainder], prompts[:, length - remainder :])
    if variant == "block_causal":
        assert (first[0][:, remainder:] == MASK).all()
    expected = -(-(remainder + 7) // size)
    assert len(outputs.trajectory) == expected


class Echo(LogitsProcessor):
    """A processor of the caller's, which looks at the last token and at the length of the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.ne(PAD).sum(-1, keepdim=True)
        last = torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])
        return scores - 2 * last + torch.arange(scores.shape[1]) % length


@pytest.mark.parametrize(
    "processed",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5, "pad_token_id": PAD},
        {"logits_processor": LogitsProcessorList([Echo()])},
    ],
    ids=lambda processed: next(iter(processed)),
)
@every_variant
def test_processors_see_the_whole_text_of_rows_that_are_ahead(variant: str, processed: dict[str, Any]) -> None:
    """Behind prompts of 4, 3 and 6 tokens blocks begin after 4, 0 and 4: no row loses text for the sake of another."""
    model, prompts = tiny_model(variant, seed=1).double(), [words(4), words(3, seed=1), words(6, seed=2)]
    settings = {**DIFFUSION, "block_size": 4, "max_new_tokens": 14, **processed}
    for seed in range(3):
        texts = generate(model, None, seed, **left_padded(prompts), **settings)[:, 6:]
        for prompt, text in zip(prompts, texts, strict=True):
            alone = generate(model, prompt[None], seed, **settings)[0, len(prompt) :]
            assert text[: len(alone)].tolist() == alone.tolist()


@every_variant
def test_blocks_stand_on_the_grid(variant: str) -> None:
    """Only whole blocks are committed, together, and every noisy block starts at a multiple of 4."""
    model = tiny_model(variant)
    with record_forwards(model) as calls:
        generate(model, words(1, 6), max_new_tokens=10, **DIFFUSION)
    committed = [call["input_ids"].shape[1] for call in calls if call["input_ids"].shape[1]]
    assert committed == [4, 4, 4]
    assert {call["noisy_input_ids"].shape[1] for call in calls} == {4}


@every_setting
@every_variant
def test_every_cache_gives_the_same_text(variant: str, settings: dict[str, Any]) -> None:
    """None, dynamic, static, and one of the caller."""
    model, batch = tiny_model(variant), left_padded([words(7), words(2)])
    kwargs = dict(max_new_tokens=9, **batch, **settings)
    expected = generate(model, None, use_cache=False, **kwargs)
    assert torch.equal(generate(model, None, **kwargs), expected)
    assert torch.equal(generate(model, None, cache_implementation="static", **kwargs), expected)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, None, cache=cache, **kwargs), expected)


@every_variant
def test_a_second_turn_goes_on_from_the_returned_cache(variant: str) -> None:
    """Its length is a multiple of the grid, so that a longer text may follow at any place."""
    model = tiny_model(variant)
    first = generate(model, words(1, 5), max_new_tokens=8, return_dict_in_generate=True, **DIFFUSION)
    assert first.cache.get_seq_length() % 4 == 0
    second = torch.cat([first.sequences, words(1, 2, seed=4)], dim=1)
    expected = generate(model, second, max_new_tokens=6, **DIFFUSION)
    text = generate(model, second, max_new_tokens=6, cache=first.cache, **DIFFUSION)
    assert torch.equal(text, expected)


@every_variant
def test_rows_end_at_their_own_eos(variant: str) -> None:
    """Unequal prompts, unequal ends."""
    model = tiny_model(variant)
    batch = left_padded([words(9), words(6, seed=1), words(3, seed=2)])
    free = generate(model, None, max_new_tokens=10, **batch, **DIFFUSION)[:, 9:].tolist()
    end = free[1][4]
    text = generate(model, None, max_new_tokens=10, eos_token_id=end, **batch, **DIFFUSION)[:, 9:].tolist()
    for row, expected in zip(text, free, strict=True):
        length = expected.index(end) + 1 if end in expected else len(expected)
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {20}


@pytest.mark.parametrize(
    "settings",
    [
        dict(decoding="ar"),
        dict(decoding="block_diffusion", ar_seed_tokens=2),
        dict(decoding="arpc"),
        dict(decoding="arpc", corrector="ar_gap"),
        dict(decoding="arpc", corrector="ar_kl"),
    ],
    ids=str,
)
@every_variant
def test_what_needs_autoregressive_predictions_is_refused(variant: str, settings: dict[str, Any]) -> None:
    """Clean tokens of a block would reveal the answer; the error says which model can."""
    with pytest.raises(ValueError, match="`clean_attention='causal'`"):
        generate(tiny_model(variant), words(1, 4), max_new_tokens=4, **settings)


@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_other_block_sizes_are_refused(block_size: int) -> None:
    """But for multiples of the grid."""
    model = tiny_model("block_causal")
    with pytest.raises(ValueError, match="`block_size`"):
        generate(model, words(1, 4), max_new_tokens=4, decoding="block_diffusion", block_size=block_size)
    text = generate(model, words(1, 4), max_new_tokens=4, decoding="block_diffusion", block_size=12)
    assert text.shape == (1, 8)


def test_block_causal_model_of_block_size_1_is_causal() -> None:
    """A grid of one token: every decoding works."""
    model = tiny_model(clean_attention="block_causal", block_sizes=[1])
    same = tiny_model(block_sizes=[1])
    for settings in (dict(decoding="ar"), dict(decoding="block_diffusion", block_size=4), dict(decoding="arpc")):
        expected = generate(same, words(2, 3), max_new_tokens=6, **settings)
        assert torch.equal(generate(model, words(2, 3), max_new_tokens=6, **settings), expected)


def test_a_model_of_one_block_size_decodes_with_it_by_default() -> None:
    """Nothing has to be said."""
    model = tiny_model("block_causal", time_conditioning=True, diffusion_type="uniform")
    outputs = generate(model, words(1, 4), max_new_tokens=8, return_dict_in_generate=True)
    assert outputs.num_function_evaluations.tolist() == [8]
