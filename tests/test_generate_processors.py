"""Logits processors act on autoregressive and diffusion predictions alike, and the mask token is never text."""

import itertools
from typing import Any

import pytest
import torch
from tiny import EOS, MASK, NUM_WORDS, PAD, VOCAB_SIZE, generate, left_padded, tiny_model, words
from transformers import LogitsProcessor, WatermarkingConfig

from blockgen_hf import BlockGenForDiffusionLM


AR: dict[str, Any] = dict(decoding="ar")
DIFFUSION: dict[str, Any] = dict(decoding="block_diffusion", block_size=4)
ARPC: dict[str, Any] = dict(decoding="arpc", block_size=4, denoising_steps=3)
DECODINGS = {"ar": AR, "block_diffusion": DIFFUSION, "arpc": ARPC, "seeded": {**DIFFUSION, "ar_seed_tokens": 2}}
every_decoding = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name == "seeded" else [])
        for name, settings in DECODINGS.items()
    ],
)
# Verification reads what is left of the logits too, so that a cut changes which tokens are re-noised.
without_verification = pytest.mark.parametrize(
    "settings",
    [DECODINGS[name] for name in ("ar", "block_diffusion", "seeded")],
    ids=["ar", "block_diffusion", "seeded"],
)
NEW_TOKENS = 9


def new_tokens(model: BlockGenForDiffusionLM, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    settings.setdefault("max_new_tokens", NEW_TOKENS)
    return generate(model, prompt, **settings)[:, prompt.shape[1] :]


# ---- temperature, top-k, top-p
@without_verification
@pytest.mark.parametrize("cut", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6), dict(min_p=1.0)], ids=str)
def test_the_sharpest_cut_leaves_the_arg_max(cut: dict[str, Any], settings: dict[str, Any]) -> None:
    """One token is left of every prediction: sampling is then what `do_sample=False` gives."""
    model, prompts = tiny_model(), words(3, 4)
    expected = new_tokens(model, prompts, do_sample=False, **settings)
    assert torch.equal(new_tokens(model, prompts, **cut, **settings), expected)


@without_verification
def test_temperature_spreads_the_text(settings: dict[str, Any]) -> None:
    """High: near uniform over all but the mask token. It divides raw logits, before the masked parameterisation."""
    hot = new_tokens(tiny_model(), words(64, 2), temperature=1e6, **settings)
    counts = torch.bincount(hot.flatten(), minlength=VOCAB_SIZE)
    assert counts[MASK] == 0
    expected = hot.numel() / MASK
    assert ((counts[:MASK] - expected).abs() < 5 * expected**0.5).all()
    cold = new_tokens(tiny_model(), words(64, 2), temperature=0.3, **settings)
    assert len(cold.unique()) < len(hot.unique())


@every_decoding
def test_top_k_counts_tokens_that_can_be_text(settings: dict[str, Any]) -> None:
    """A model that likes its mask token best still has k words to choose from."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(-torch.arange(VOCAB_SIZE).float())
        model.lm_head.bias[MASK] = 50.0
    text = new_tokens(model, words(32, 2), top_k=3, temperature=5.0, **settings)
    assert sorted(text.unique().tolist()) == [0, 1, 2]
    nucleus = new_tokens(model, words(32, 2), top_p=0.7, **settings)  # 0.63 + 0.23
    assert sorted(nucleus.unique().tolist()) == [0, 1]


# ---- what a text may hold
@pytest.mark.parametrize("settings", [AR, DIFFUSION, ARPC, {**DIFFUSION, "noise_removal": "greedy"}], ids=str)
@pytest.mark.parametrize("more", [{}, dict(do_sample=False), dict(temperature=100.0), dict(top_k=1)], ids=str)
def test_the_mask_token_is_never_generated(more: dict[str, Any], settings: dict[str, Any]) -> None:
    """SUBS: its probability is zero, however much the raw logits favour it."""
    model = tiny_model(mask_token_id=7)
    with torch.no_grad():
        model.lm_head.bias[7] += 100.0
    prompt = torch.full((8, 2), 3)
    text = generate(model, prompt, max_new_tokens=NEW_TOKENS, **{**settings, **more})
    assert not (text == 7).any()


@every_decoding
@pytest.mark.parametrize("variant", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def test_suppressed_tokens_are_not_generated(variant: str, settings: dict[str, Any]) -> None:
    """`suppress_tokens`, and `bad_words_ids` of a single token. Uniform noise is made of them, the text is not."""
    model, banned = tiny_model(variant), [0, 2, 4, 9, 14, 16]
    for how in (dict(suppress_tokens=banned), dict(bad_words_ids=[[token] for token in banned])):
        text = new_tokens(model, words(16, 2), **how, **settings)
        assert not torch.isin(text, torch.tensor(banned)).any()


@every_decoding
def test_begin_suppress_tokens_concern_the_first_new_token_only(settings: dict[str, Any]) -> None:
    """A processor that looks at the length: each position of a block has its own."""
    model, prompts = tiny_model(), words(24, 2)
    liked = int(new_tokens(model, prompts, **settings).flatten().mode().values)
    text = new_tokens(model, prompts, begin_suppress_tokens=[liked], **settings)
    assert not (text[:, 0] == liked).any()
    assert (text[:, 1:] == liked).any(0).sum() >= 5


@every_decoding
def test_no_end_before_the_minimum(settings: dict[str, Any]) -> None:
    """`min_new_tokens` and `min_length`, also inside of a block; unequal prompts have their own lengths."""
    model = tiny_model(eos_token_id=EOS)
    with torch.no_grad():
        model.lm_head.bias[EOS] += 100.0
    assert new_tokens(model, words(2, 3), **settings).tolist() == [[EOS], [EOS]]
    for minimum in (dict(min_new_tokens=6), dict(min_length=9)):
        text = new_tokens(model, words(2, 3), **minimum, **settings)
        assert text.shape == (2, 7)
        assert not (text[:, :6] == EOS).any() and (text[:, 6] == EOS).all()
    batch = left_padded([words(5), words(2)])
    text = generate(model, None, max_new_tokens=NEW_TOKENS, min_new_tokens=3, **batch, **settings)
    assert text[:, 5:].tolist()[1][3] == EOS and not (text[:, 5:8] == EOS).any()


@every_decoding
def test_the_end_can_be_forced_at_the_last_token(settings: dict[str, Any]) -> None:
    """`forced_eos_token_id` at `max_length`, and nowhere before."""
    text = new_tokens(tiny_model(), words(3, 2), forced_eos_token_id=EOS, suppress_tokens=[PAD], **settings)
    assert (text[:, -1] == EOS).all()
    free = new_tokens(tiny_model(), words(3, 2), suppress_tokens=[PAD], **settings)
    assert torch.equal(text[:, :4], free[:, :4])


@every_decoding
def test_an_end_grows_more_likely_with_the_length(settings: dict[str, Any]) -> None:
    """`exponential_decay_length_penalty`: from its start on EOS gains more and more, at each position of a block."""
    model = tiny_model(eos_token_id=EOS)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0.0
        model.lm_head.bias[EOS] = -3.0
    free = new_tokens(model, words(8, 2), min_new_tokens=1, **settings)
    text = new_tokens(model, words(8, 2), exponential_decay_length_penalty=(3, 50.0), **settings)
    assert free.shape[1] == NEW_TOKENS
    assert text.shape[1] <= 6


# ---- what has been said
@every_decoding
def test_repetition_penalty_is_for_the_text_before_the_block(settings: dict[str, Any]) -> None:
    """Tokens that a strong penalty makes impossible: none of the prompt and of earlier blocks comes again."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(-1 - torch.linspace(0, 1, VOCAB_SIZE))
    prompts = torch.stack([torch.arange(3), torch.arange(3, 6)])
    text = new_tokens(model, prompts, repetition_penalty=1e4, **settings)
    width = settings.get("block_size", 1)
    for row, prompt in zip(text.tolist(), prompts.tolist(), strict=True):
        starts = [*range(0, 2), *range(2, NEW_TOKENS, width)] if settings.get("ar_seed_tokens") else None
        for start in starts or range(0, NEW_TOKENS, width):
            stop = start + 1 if starts and start < 2 else start + width
            assert not set(row[start:stop]) & {*prompt, *row[:start]}


@pytest.mark.parametrize("settings", [{"decoding": "ar"}, {"decoding": "block_diffusion", "block_size": 4}])
def test_repetition_penalty_counts_no_padding_and_follows_rows_that_stay(settings: dict[str, Any]) -> None:
    """Prompts of different lengths, of which some end early, give what they give alone."""
    model, prompts = tiny_model(), [words(length, seed=length) for length in (3, 5, 2, 4)]
    more = {"repetition_penalty": 1.3, "eos_token_id": [3, 4, 5], **settings}
    together = generate(model, None, max_new_tokens=NEW_TOKENS, **left_padded(prompts), **more)[:, 5:]
    alone = [generate(model, prompt[None], max_new_tokens=NEW_TOKENS, **more)[0, len(prompt) :] for prompt in prompts]
    for row, text in zip(together, alone, strict=True):
        assert row[: len(text)].tolist() == text.tolist()
    assert len({len(text) for text in alone}) > 1  # some did end early


def test_presence_and_frequency_penalties_are_those_of_openai() -> None:
    """From the logits of the generated text's tokens, those of the prompt left alone; greedy, so that a sum shows."""
    model, prompt, penalties = tiny_model(), words(1, 4), (0.7, 0.4)
    text = prompt
    for _ in range(NEW_TOKENS):
        counts = torch.bincount(text[0, 4:], minlength=VOCAB_SIZE)
        logits = model(text).logits[0, -1] - penalties[0] * (counts > 0) - penalties[1] * counts
        logits[MASK] = -torch.inf
        text = torch.cat([text, logits.argmax()[None, None]], dim=1)
    given = dict(presence_penalty=penalties[0], frequency_penalty=penalties[1], do_sample=False)
    assert torch.equal(new_tokens(model, prompt, **given, **AR), text[:, 4:])
    assert not torch.equal(new_tokens(model, prompt, do_sample=False, **AR), text[:, 4:])
    with pytest.raises(ValueError, match="`presence_penalty` must be a number from -2 to 2, but is 3"):
        new_tokens(model, prompt, presence_penalty=3.0, **AR)


def right_or_refused(model: BlockGenForDiffusionLM, prompts: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What looks at the token just before cannot be had inside of a block: then the setting is refused, not wrong."""
    try:
        return new_tokens(model, prompts, max_new_tokens=16, **settings)
    except ValueError as error:
        assert settings.get("block_size", 1) > 1 and "decoding='ar'" in str(error)
        pytest.skip(f"refused: {error}")


@pytest.mark.parametrize(
    "settings", [AR, {**DIFFUSION, "block_size": 1}, {**ARPC, "block_size": 1}, DIFFUSION, ARPC], ids=str
)
def test_no_ngram_is_repeated(settings: dict[str, Any]) -> None:
    """`no_repeat_ngram_size`: no pair of neighbouring tokens twice, across blocks and inside of them."""
    model, prompts = tiny_model(scale=3.0), words(4, 4)
    free = new_tokens(model, prompts, max_new_tokens=16, **settings)
    text = right_or_refused(model, prompts, no_repeat_ngram_size=2, **settings)

    def repeats(row: list[int]) -> bool:
        pairs = [*itertools.pairwise(row)]
        return len(set(pairs)) < len(pairs)

    assert any(repeats(row) for row in torch.cat([prompts, free], dim=1).tolist())
    assert not any(repeats(row) for row in torch.cat([prompts, text], dim=1).tolist())


@pytest.mark.parametrize("settings", [AR, {**DIFFUSION, "block_size": 1}, DIFFUSION, ARPC], ids=str)
def test_bad_words_of_two_tokens_are_not_generated(settings: dict[str, Any]) -> None:
    """`bad_words_ids` with a pair, whose tokens are fine on their own."""
    model, prompts = tiny_model(scale=3.0), words(8, 4)
    free = new_tokens(model, prompts, max_new_tokens=16, **settings)
    pairs = [pair for row in free.tolist() for pair in itertools.pairwise(row)]
    pair = max(set(pairs), key=pairs.count)
    text = right_or_refused(model, prompts, bad_words_ids=[[*pair]], **settings)
    assert not any(pair in [*itertools.pairwise(row)] for row in text.tolist())


# ---- one's own
class Only(LogitsProcessor):
    """Leaves a set of tokens, and notes what it was given."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.shapes.append((input_ids.shape, scores.shape))
        assert scores.dtype == torch.float32
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


@every_decoding
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_own_processor_gets_rows_of_logits_with_their_text(variant: str, settings: dict[str, Any]) -> None:
    """`[rows, vocabulary]` and the clean text before, as everywhere in transformers."""
    model, processor = tiny_model(variant), Only([1, 5, 6])
    text = new_tokens(model, words(3, 4), logits_processor=[processor], **settings)
    assert set(text.flatten().tolist()) <= {1, 5, 6}
    assert all(ids[0] == scores[0] and scores[1] == VOCAB_SIZE for ids, scores in processor.shapes)
    assert all(4 <= ids[1] < 4 + NEW_TOKENS for ids, _ in processor.shapes)


def test_prefix_constraints_work_token_by_token_only() -> None:
    """`prefix_allowed_tokens_fn` in AR; a block at a time it would see the wrong prefix, and is refused."""
    model, prompts = tiny_model(), words(2, 3)

    def successor(batch: int, text: torch.Tensor) -> list[int]:
        return [(int(text[-1]) + 1) % NUM_WORDS]

    text = new_tokens(model, prompts, prefix_allowed_tokens_fn=successor, **AR)
    assert torch.equal(text, (prompts[:, -1:] + 1 + torch.arange(NEW_TOKENS)) % NUM_WORDS)
    for settings in (DIFFUSION, ARPC):
        with pytest.raises(ValueError, match="`decoding='ar'`"):
            new_tokens(model, prompts, prefix_allowed_tokens_fn=successor, **settings)


@pytest.mark.parametrize("settings", [DIFFUSION, ARPC], ids=str)
@pytest.mark.parametrize(
    "setting", [dict(guidance_scale=1.5), dict(watermarking_config=WatermarkingConfig())], ids=str
)
def test_what_runs_a_model_or_hashes_its_prefix_is_refused(setting: dict[str, Any], settings: dict[str, Any]) -> None:
    """Classifier-free guidance is refused; a watermark hashes the token before, which a block does not know."""
    with pytest.raises(ValueError, match="`decoding='ar'`"):
        new_tokens(tiny_model(), words(2, 3), **setting, **settings)


def test_guidance_and_watermarks_work_in_autoregressive_decoding() -> None:
    for setting in (dict(guidance_scale=1.5), dict(watermarking_config=WatermarkingConfig())):
        assert new_tokens(tiny_model(), words(2, 3), **setting, **AR).shape == (2, NEW_TOKENS)
