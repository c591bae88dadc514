"""`decoding="draft_revise"`: a draft of small blocks, and its least certain tokens denoised again in large ones."""

import itertools
from typing import Any

import pytest
import torch
from tiny import BLOCK_CAUSAL, MASK, PAD, generate, left_padded, record_forwards, tiny_model, tiny_tokenizer, words
from transformers import (
    DynamicCache,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from blockgen_hf import BlockGenForDiffusionLM, BlockGenGenerationConfig


PADDED = left_padded([words(3), words(6, seed=1), words(1, seed=2), words(4, seed=7)])
REVISED: dict[str, Any] = {"decoding": "draft_revise", "block_size": 2, "revise_block_size": 8, "revise_ratio": 0.5}


# ---- the draft
@pytest.mark.parametrize("how", [{}, {"draft_decoding": "arpc", "denoising_steps": 3}, {"ar_seed_tokens": 3}], ids=str)
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_without_a_revision_the_text_is_the_draft(variant: str, how: dict[str, Any]) -> None:
    """Ratio 0: token for token, at the same cost, and streamed block by block."""
    model = tiny_model(variant)
    common = dict(PADDED, block_size=4, max_new_tokens=13, eos_token_id=[3, 7], return_dict_in_generate=True, seed=3)
    how = dict(how)
    decoding = how.get("draft_decoding", "block_diffusion")
    expected = generate(model, None, decoding=decoding, **common, **how)
    found = generate(model, None, decoding="draft_revise", revise_ratio=[0, 0.0], **common, **how)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.num_function_evaluations, expected.num_function_evaluations)
    assert found.drafts == found.revised == ()


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_the_draft_is_that_of_block_diffusion(variant: str) -> None:
    """And a revision leaves alone what it does not put back to noise."""
    model = tiny_model(variant)
    common = dict(block_size=2, max_new_tokens=13, seed=3, return_dict_in_generate=True)
    draft = generate(model, words(3, 4), decoding="block_diffusion", **common).sequences[:, 4:]
    found = generate(model, words(3, 4), **{**REVISED, **common})
    assert torch.equal(found.drafts[0], draft)
    revised, text = found.revised[0], found.sequences[:, 4:]
    assert revised.sum(-1).tolist() == [7, 7, 7]  # half of 13
    assert torch.equal(text[~revised], draft[~revised])
    assert not torch.equal(text, draft)


def test_tokens_of_the_autoregressive_start_have_their_own_confidence() -> None:
    """They are revised like the others: of a text that is all autoregressive, the least likely."""
    model = tiny_model().double()
    found = generate(
        model, words(1, 4), **REVISED, ar_seed_tokens=8, max_new_tokens=8, seed=1, return_dict_in_generate=True
    )
    draft = found.drafts[0]
    with torch.no_grad():
        logits = model(torch.cat([words(1, 4), draft], dim=1)).logits[:, 3:-1]
    surprisal = -logits.log_softmax(-1).gather(-1, draft[..., None]).squeeze(-1)
    lowest = surprisal.topk(4).indices
    assert sorted(lowest[0].tolist()) == found.revised[0][0].nonzero().flatten().tolist()


# ---- rows
MANNERS: dict[str, dict[str, Any]] = {
    "snapshot": {},
    "ar_surprisal": {"revise_score": "ar_surprisal"},
    "posthoc": {"revise_score": "posthoc"},
    "random": {"revise_score": "random"},
    "stages": {"revise_block_size": [4, 64], "revise_ratio": [0.6, 0.3], "revise_steps": [3, 2]},
    "arpc": {"draft_decoding": "arpc", "denoising_steps": 2, "revise_steps": 4},
    "seeded": {"ar_seed_tokens": 3, "revise_block_size": 3},
    "processed": {"repetition_penalty": 1.4, "min_new_tokens": 5, "top_k": 8, "temperature": 0.8},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 2},
    "greedy": {"do_sample": False, "noise_removal": "greedy"},
    "confidence": {"sampler": "confidence", "confidence_threshold": 0.3},
    "window": {"cache_window": 4},
    "stop strings": {"stop_strings": ["kg", "gh", "jf", "qj"], "tokenizer": tiny_tokenizer()},
}
WAYS = [
    *(
        ("masked", manner)
        for manner in ("snapshot", "ar_surprisal", "stages", "processed", "static", "confidence", "stop strings")
    ),
    *(("uniform", manner) for manner in ("posthoc", "random", "arpc", "seeded", "no cache", "chunked", "greedy")),
    ("uniform_time_conditional", "arpc"),
    ("time_conditional", "posthoc"),
]


def assert_same_alone(model: BlockGenForDiffusionLM, **settings: Any) -> Any:
    """Texts and evaluations of a padded batch are those of each row alone."""
    settings = {
        **REVISED,
        "max_new_tokens": 13,
        "eos_token_id": [3, 7, 9, 14],
        "return_dict_in_generate": True,
        **settings,
    }
    batch = generate(model, None, seed=3, **PADDED, **settings)
    for row, mask in enumerate(PADDED["attention_mask"].bool()):
        alone = generate(model, PADDED["input_ids"][row : row + 1, mask], seed=3, **settings)
        length = int(batch.num_new_tokens[row])
        width = PADDED["input_ids"].shape[1]
        assert batch.sequences[row, width : width + length].tolist() == alone.sequences[0, mask.sum() :].tolist()
        assert (batch.sequences[row, width + length :] == PAD).all()
        assert batch.num_function_evaluations[row] == alone.num_function_evaluations[0]
        for name in ("drafts", "revised"):
            for together, single in zip(getattr(batch, name), getattr(alone, name), strict=True):
                assert torch.equal(together[row, : single.shape[1]], single[0])
    return batch


def test_rows_that_end_at_different_lengths_get_the_text_that_they_have_alone() -> None:
    assert assert_same_alone(tiny_model().double()).num_new_tokens.unique().numel() > 1


@pytest.mark.parametrize("variant, manner", WAYS)
def test_rows_get_the_text_that_they_have_alone(variant: str, manner: str) -> None:
    assert_same_alone(tiny_model(variant).double(), **MANNERS[manner])


ADAPTED_WAYS = [
    *(("masked", "block", manner) for manner in ("snapshot", "posthoc", "static", "stages", "window")),
    *(("masked", "causal", manner) for manner in ("no cache", "arpc", "chunked")),
    *(("uniform", "block", manner) for manner in ("no cache", "ar_surprisal")),
    *(("uniform", "causal", manner) for manner in ("posthoc", "window")),
]


@pytest.mark.parametrize("variant, noisy_attention, manner", ADAPTED_WAYS)
def test_rows_of_adapted_models_get_the_text_that_they_have_alone(
    variant: str, noisy_attention: str, manner: str
) -> None:
    """Also where the drafts of a batch end at different lengths: the anchor of a canvas is not among its noise."""
    model = tiny_model(variant, ar_prediction="clean", noisy_attention=noisy_attention).double()
    assert assert_same_alone(model, **MANNERS[manner]).num_new_tokens.unique().numel() > 1


def test_adapted_models_revise_texts_of_any_length_by_posthoc_confidence() -> None:
    """A text of a single block is scored as one of several is: under a pass that sees the rest of the block."""
    model, prompt = tiny_model(ar_prediction="clean").double(), words(1, 3)
    settings = dict(REVISED, revise_score="posthoc", revise_ratio=0.5, return_dict_in_generate=True)
    for size in (4, 8):
        found = generate(model, prompt, **{**settings, "revise_block_size": size}, max_new_tokens=8)
        draft, confidence = found.drafts[0], []
        for start in range(0, 8, size):
            text = torch.cat([prompt, draft], dim=1)[:, : 3 + start + size]
            canvas = text[:, 2 + start : -1]
            where = 2 + start + torch.arange(size)[None]
            logits = model(text[:, : 2 + start], canvas, noisy_position_ids=where).logits
            log_probs = logits.log_softmax(-1)
            confidence.append(log_probs.gather(-1, draft[:, start : start + size, None]).squeeze(-1))
        lowest = torch.cat(confidence, dim=1).topk(4, largest=False).indices
        assert sorted(lowest[0].tolist()) == found.revised[0][0].nonzero().flatten().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("variant", ["masked", "uniform", "time_conditional", "without_adaln"])
def test_rows_get_the_text_that_they_have_alone_in_every_manner(variant: str, manner: str) -> None:
    assert_same_alone(tiny_model(variant, seed=2).double(), **MANNERS[manner])


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_texts_begin_with_nothing(variant: str) -> None:
    """Without a prompt, and with several texts of one prompt, which differ."""
    model = tiny_model(variant)
    texts = generate(model, torch.zeros(3, 0, dtype=torch.long), **REVISED, max_new_tokens=9)
    assert texts.shape == (3, 9)
    assert len(texts.unique(dim=0)) == 3


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "quantized": lambda config: QuantizedCache("quanto", config, nbits=4, q_group_size=8, residual_length=3),
}


@pytest.mark.parametrize("num_cached", [0, 3])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_the_callers_holds_the_revised_text(name: str, num_cached: int) -> None:
    """So a conversation can go on from it. One that cannot be cropped to what it held is refused."""
    if name == "quantized":
        pytest.importorskip("optimum.quanto")
    model, prompt = tiny_model().double(), words(2, 5)
    model = model.float() if name == "quantized" else model
    settings = dict(REVISED, revise_block_size=4, max_new_tokens=12, seed=2, eos_token_id=[3])
    cache = CACHES[name](model.config)
    if num_cached:
        model(prompt[:, :num_cached], cache=cache, use_cache=True)
        if name == "quantized":
            with pytest.raises(ValueError, match="cannot be cropped"):
                generate(model, prompt, cache=cache, **settings)
            return
    text = generate(model, prompt, cache=cache, **settings)
    length = int(cache.get_seq_length())
    assert 5 <= length < text.shape[1]
    if name == "quantized":
        return
    assert torch.equal(text, generate(model, prompt, **settings))
    fresh = DynamicCache(config=model.config)
    model(text[:, :length], cache=fresh, use_cache=True)
    torch.testing.assert_close(cache.layers[1].keys[:, :, :length], fresh.layers[1].keys)


def test_a_cache_that_cannot_be_cropped_is_refused_before_anything_is_drafted() -> None:
    class Other(DynamicLayer):
        pass

    model, prompt = tiny_model(), words(2, 5)
    cache = DynamicCache(config=model.config)
    cache.layers = [Other() for _ in cache.layers]
    model(prompt[:, :3], cache=cache, use_cache=True)
    message = "`cache` holds 3 tokens, and a DynamicCache cannot be cropped"
    with record_forwards(model) as calls, pytest.raises(ValueError, match=message):
        generate(model, prompt, cache=cache, **REVISED, max_new_tokens=8)
    assert not calls


# ---- ends
def test_criteria_are_evaluated_on_the_revised_text() -> None:
    """A revision may end a text earlier, never later; the token that ended a draft stays, and pads are behind."""
    model = tiny_model()
    ends = torch.tensor([3, 7])
    found = generate(
        model,
        words(1, 4).repeat(40, 1),
        **{**REVISED, "revise_ratio": 0.8},
        max_new_tokens=12,
        eos_token_id=[3, 7],
        return_dict_in_generate=True,
    )
    text, draft = found.sequences[:, 4:], found.drafts[0]
    shorter = 0
    for row in range(40):
        length = int(found.num_new_tokens[row])
        is_end = torch.isin(text[row], ends)
        drafted_ends = torch.isin(draft[row], ends).nonzero()
        drafted = int(drafted_ends[0]) + 1 if len(drafted_ends) else 12
        assert not is_end[: length - 1].any()
        assert is_end[length - 1] or length == 12
        assert (text[row, length:] == PAD).all()
        assert length <= drafted
        assert drafted == 12 or not found.revised[0][row, drafted - 1 :].any()
        shorter += length < drafted
    assert shorter


STOP_STRINGS = ["ab", "ca", "ee", "kg", "gh", "jf", "mnc"]


class StopsBehind(StoppingCriteria):
    """A caller's own stop strings, looked for in the new text only."""

    def __init__(self, prompt_width: int) -> None:
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = tiny_tokenizer().batch_decode(input_ids[:, self.prompt_width :][:, -3:])
        return torch.tensor([tail.endswith(tuple(STOP_STRINGS)) for tail in tails])


@pytest.mark.parametrize("is_own", [False, True])
def test_a_stop_string_that_ended_a_draft_stays_whole(is_own: bool) -> None:
    """All of its tokens are held fixed, and no others: every text that ends early ends in a stop string."""
    tokenizer, prompts = tiny_tokenizer(), words(20, 4)
    stop: dict[str, Any] = {"stop_strings": STOP_STRINGS, "tokenizer": tokenizer}
    if is_own:
        stop = {"stopping_criteria": StoppingCriteriaList([StopsBehind(4)])}
    settings = dict(
        REVISED, revise_block_size=[8, 4], revise_ratio=[0.8, 1.0], max_new_tokens=40, suppress_tokens=[PAD]
    )
    found = generate(tiny_model(), prompts, **settings, **stop, return_dict_in_generate=True)
    early = (found.num_new_tokens < 40).nonzero().flatten().tolist()
    assert len(early) > 10
    for row in early:
        new = tokenizer.decode(found.sequences[row, 4 : 4 + int(found.num_new_tokens[row])])
        assert new.endswith(tuple(STOP_STRINGS)) or (len(new) == 1 and not is_own)  # it may begin in the prompt
        # The second stage revises all that it may.
        length = int((found.drafts[1][row] != PAD).sum())
        draft = tokenizer.decode(torch.cat([prompts[row], found.drafts[1][row, :length]]))
        size = 0 if length == 40 else next(len(string) for string in STOP_STRINGS if draft.endswith(string))
        size = min(size, length)
        assert found.revised[1][row, :length].tolist() == [True] * (length - size) + [False] * size


class StopsAt(StoppingCriteria):
    """Stops a row at a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_stopping_criteria_of_the_callers_stop_as_an_end_of_text_does() -> None:
    model, settings = tiny_model(), dict(REVISED, max_new_tokens=12, pad_token_id=PAD)
    expected = generate(model, words(4, 4), eos_token_id=16, **settings)
    assert torch.equal(
        generate(model, words(4, 4), stopping_criteria=StoppingCriteriaList([StopsAt(16)]), **settings), expected
    )


def test_time_that_is_up_leaves_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_time` ends the draft behind a block, and what was written is not lost for want of a revision."""
    from blockgen_hf.generation import revision_blockgen

    model = tiny_model()
    assert generate(model, words(2, 4), **REVISED, max_new_tokens=9, max_time=0.0).shape == (2, 6)
    calls = []

    def clock(decoder: Any) -> bool:
        calls.append(decoder)
        return len(calls) > 2  # before the second of two blocks

    monkeypatch.setattr(revision_blockgen.RevisionDecoder, "_is_time_up", clock)
    found = generate(
        model, words(2, 4), **{**REVISED, "revise_block_size": 5}, max_new_tokens=9, return_dict_in_generate=True
    )
    assert torch.equal(found.sequences[:, 9:], found.drafts[0][:, 5:])
    assert not torch.equal(found.sequences[:, 4:9], found.drafts[0][:, :5])


# ---- what else there is to see
class Recorder:
    """A streamer that takes tokens of drafts."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self.drafts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.texts.append(value.flatten().tolist())

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class MaskRecorder(Recorder):
    """One that is told where the masks are."""

    _takes_masks = True

    def put_draft(self, logits: torch.Tensor, is_mask: torch.Tensor | None) -> None:  # type: ignore[override]
        tokens = logits.argmax(-1)
        super().put_draft(tokens if is_mask is None else tokens.masked_fill(is_mask, MASK))


@pytest.mark.parametrize("recorder", [Recorder, MaskRecorder])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_drafts_are_shown_whole_and_final_tokens_once(variant: str, recorder: type[Recorder]) -> None:
    """Nothing is put that may still change; drafts have the text before and behind the block in work."""
    streamer = recorder()
    settings = dict(REVISED, block_size=4, revise_block_size=[12, 6], revise_ratio=[0.5, 0.4])
    found = generate(
        tiny_model(variant),
        words(1, 4),
        max_new_tokens=12,
        streamer=streamer,
        return_dict_in_generate=True,
        **settings,
    )
    prompt, *texts = streamer.texts
    assert prompt == words(1, 4)[0].tolist()
    assert [token for text in texts for token in text] == found.sequences[0, 4:].tolist()
    assert [len(text) for text in texts] == [6, 6]  # the blocks of the last revision
    assert streamer.ended
    lengths = [len(draft) for draft in streamer.drafts]
    # The growing draft, the first revision, the second, and what is left of it when its first block is final.
    assert [length for length, _ in itertools.groupby(lengths)] == [4, 8, 12, 6]
    assert found.num_function_evaluations.item() == len(lengths)
    draft, revised = found.drafts[0][0], found.revised[0][0]
    first = torch.tensor([text for text in streamer.drafts if len(text) == 12])
    assert (first[:, ~revised] == draft[~revised]).all(-1).any()
    if recorder is MaskRecorder and variant == "masked":
        assert any((text[revised] == MASK).all() for text in first)


def test_time_that_is_up_streams_the_draft() -> None:
    streamer = Recorder()
    text = generate(tiny_model(), words(1, 4), **REVISED, max_new_tokens=9, max_time=0.0, streamer=streamer)
    assert streamer.texts == [text[0, :4].tolist(), text[0, 4:].tolist()]


def test_evaluations_are_the_passes_that_predict() -> None:
    """Of a row alone, with a pass for the scores where they need one."""
    model = tiny_model()
    cost = {}
    for score in ("snapshot", "posthoc", "ar_surprisal"):
        with record_forwards(model) as calls:
            found = generate(
                model, words(1, 4), **REVISED, revise_score=score, max_new_tokens=9, return_dict_in_generate=True
            )
        assert found.num_function_evaluations.item() == len(calls)
        cost[score] = len(calls)
    assert min(cost.values()) == cost["snapshot"]


def test_the_trajectory_shows_what_was_revised() -> None:
    """The blocks of the draft, then the blocks of the revision: noise where tokens are revised, then each step."""
    model = tiny_model()
    found = generate(
        model,
        words(2, 4),
        **REVISED,
        revise_steps=3,
        max_new_tokens=8,
        output_trajectory=True,
        return_dict_in_generate=True,
    )
    assert len(found.trajectory) == 5
    states = found.trajectory[-1]
    assert len(states) == 4
    assert torch.equal(states[0], found.drafts[0].masked_fill(found.revised[0], MASK))
    assert torch.equal(states[-1], found.sequences[:, 4:])


def test_defaults_are_those_of_the_paper() -> None:
    """Draft with blocks of 4, or the next larger; revise with the largest, a quarter of the text."""
    model = tiny_model(block_sizes=[1, 2, 6, 16])
    given = dict(decoding="draft_revise", max_new_tokens=16, seed=1, return_dict_in_generate=True)
    found = generate(model, words(1, 4), **given)
    said = generate(model, words(1, 4), **given, block_size=6, revise_block_size=16, revise_ratio=0.25, revise_steps=4)
    assert torch.equal(found.sequences, said.sequences)
    assert found.revised[0].sum() == 4


# ---- settings
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"revise_ratio": 1.5}, "`revise_ratio` must be a number from 0 to 1, or a list"),
        ({"revise_ratio": [0.2, "much"]}, "`revise_ratio` must be a number from 0 to 1, or a list"),
        ({"revise_ratio": True}, "`revise_ratio` must be a number from 0 to 1, or a list"),
        ({"revise_ratio": float("nan")}, "`revise_ratio` must be a number from 0 to 1, or a list"),
        ({"revise_block_size": 0}, "`revise_block_size` must be an integer of at least 1, or a list"),
        ({"revise_block_size": [8, 2.5]}, "`revise_block_size` must be an integer of at least 1, or a list"),
        ({"revise_steps": 20_000}, "`revise_steps` must be an integer from 1 to 10,000, or a list"),
        ({"revise_block_size": [4, 8], "revise_ratio": [0.5]}, "one number for each stage.*revise_block_size"),
        ({"revise_ratio": []}, "one number for each stage.*revise_ratio"),
        ({"revise_score": "best"}, "`revise_score` must be one of"),
        ({"revise_block_size": [8, 65]}, "`revise_block_size` must be at most 64"),
        ({"draft_decoding": "arpc", "sampler": "confidence"}, "does not go with `draft_decoding='arpc'`"),
        ({"no_repeat_ngram_size": 2, "block_size": 1}, "NoRepeatNGram"),
        ({"num_beams": 2}, "does not go with"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), words(1, 4), decoding="draft_revise", max_new_tokens=8, **settings)


def test_settings_are_saved_with_a_model(tmp_path: Any) -> None:
    model = tiny_model()
    model.generation_config.update(**REVISED, revise_score="random", revise_steps=[2, 3], max_new_tokens=8)
    expected = generate(model, words(1, 4))
    model.save_pretrained(tmp_path)
    again = BlockGenForDiffusionLM.from_pretrained(tmp_path).eval()
    assert isinstance(again.generation_config, BlockGenGenerationConfig)
    assert again.generation_config.revise_steps == [2, 3]
    assert torch.equal(generate(again, words(1, 4)), expected)


@pytest.mark.parametrize("variant", BLOCK_CAUSAL)
def test_block_causal_models_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match="`decoding='draft_revise'` needs a model with `clean_attention='causal'`"):
        generate(tiny_model(variant), words(1, 4), decoding="draft_revise", max_new_tokens=8)


def test_models_that_predict_the_next_token_are_refused() -> None:
    model = tiny_model(next_token_prediction=True, block_sizes=[1])
    with pytest.raises(ValueError, match="`decoding='draft_revise'` needs a diffusion model"):
        generate(model, words(1, 4), decoding="draft_revise", max_new_tokens=8)
