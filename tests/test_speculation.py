"""`decoding="speculative"`: the text, or the law, of `decoding="ar"`, by drafts that are verified."""

import itertools
import time
from typing import Any

import pytest
import torch
from enumeration import Process
from hypothesis import given
from hypothesis import strategies as st
from test_generate_law import LENGTH, SIGNIFICANCE, law_model, oracle_of, p_value
from tiny import EOS, MASK, PAD, generate, left_padded, record_forwards, tiny_model, words
from transformers import DynamicCache, LogitsProcessor, QuantizedCache, StaticCache, TextStreamer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.generation import speculation_blockgen
from blockgen_hf.generation.draft_lengths_blockgen import DraftLength, MeasuredRoundCosts, RoundCosts


PADDED = left_padded([words(3), words(6, seed=1), words(1, seed=2), words(4, seed=7)])


HOW = {
    "greedy": {"do_sample": False},
    "drawn": {"do_sample": True},
    "warped": {"do_sample": True, "temperature": 0.4, "top_k": 6, "top_p": 0.9},
    "processed": {
        "do_sample": True,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.5,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "eos_token_id": EOS,
    },
    "ended": {"do_sample": True, "eos_token_id": [3, 7]},
}
DRAFTS: dict[str, dict[str, Any]] = {
    "apart": {"block_size": 4, "fused_drafts": False},
    "fused": {"block_size": 8, "fused_drafts": True},
    "of one token": {"block_size": 1},
    "in steps": {"block_size": 4, "draft_steps": 3},
    "arpc": {"block_size": 4, "draft_steps": 4, "draft_decoding": "arpc"},
    "static cache": {"block_size": 4, "cache_implementation": "static"},
    "no cache": {"block_size": 4, "use_cache": False, "fused_drafts": True},
    "seeded": {"block_size": 4, "ar_seed_tokens": 3},
}
# Every way to draft, every way to draw and every kind of model, in pairs.
PAIRS = [
    ("masked", "greedy", "apart"),
    ("masked", "drawn", "fused"),
    ("masked", "processed", "static cache"),
    ("masked", "ended", "in steps"),
    ("masked", "warped", "no cache"),
    ("masked", "drawn", "arpc"),
    ("uniform", "drawn", "apart"),
    ("uniform", "greedy", "fused"),
    ("uniform", "processed", "no cache"),
    ("uniform", "ended", "seeded"),
    ("uniform", "warped", "in steps"),
    ("uniform", "drawn", "of one token"),
    ("time_conditional", "ended", "fused"),
    ("uniform_time_conditional", "processed", "apart"),
    ("without_adaln", "ended", "static cache"),
]


def as_autoregressive(
    model: BlockGenForDiffusionLM, inputs: dict[str, torch.Tensor], draft: dict[str, Any], **settings: Any
) -> Any:
    """Generates speculatively, and compares the text with that of `decoding="ar"`."""
    common = {"seed": 3, "max_new_tokens": 24, "attention_mask": inputs.get("attention_mask"), **settings}
    expected = generate(model, inputs["input_ids"], decoding="ar", **common)
    found = generate(
        model, inputs["input_ids"], decoding="speculative", return_dict_in_generate=True, **common, **draft
    )
    assert torch.equal(found.sequences, expected)
    return found


@pytest.mark.parametrize("variant, how, draft", PAIRS)
def test_the_text_is_that_of_autoregressive_decoding(variant: str, how: str, draft: str) -> None:
    """In float64, where nothing is rounded to another token; batches whose rows accept different numbers, and one."""
    model = tiny_model(variant).double()
    found = as_autoregressive(model, PADDED, DRAFTS[draft], **HOW[how])
    assert (found.num_accepted_tokens <= found.num_drafted_tokens).all()
    assert (found.num_new_tokens >= found.num_accepted_tokens).all()
    as_autoregressive(model, {"input_ids": words(1, 5)}, DRAFTS[draft], **HOW[how])


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_the_text_is_that_of_autoregressive_decoding_everywhere(variant: str, draft: str, how: str) -> None:
    model = tiny_model(variant, seed=4).double()
    for inputs in (PADDED, {"input_ids": words(3, 4)}, {"input_ids": torch.zeros(2, 0, dtype=torch.long)}):
        as_autoregressive(model, inputs, DRAFTS[draft], **HOW[how])
        if how != "greedy":
            as_autoregressive(model, inputs, DRAFTS[draft], num_return_sequences=2, **HOW[how])


@pytest.mark.parametrize("fused", [False, True])
def test_rows_go_at_their_own_pace(fused: bool) -> None:
    """Rows that accept much need fewer passes than rows that accept little, and the gaps in the cache are closed."""
    model = tiny_model().double()
    prompts = {"input_ids": words(6, 3)}
    with record_forwards(model) as calls:
        found = as_autoregressive(
            model,
            prompts,
            {"block_size": 8, "fused_drafts": fused},
            do_sample=True,
            temperature=0.2,
            max_new_tokens=55,
        )
    assert found.num_function_evaluations.unique().numel() > 1
    cached = [call["attention_mask"].shape[1] for call in calls if call.get("attention_mask") is not None]
    assert max(cached) < 3 + 55 + 64 + 16  # tokens, a quarter or 64 of gaps, and a draft


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "quantized": lambda config: QuantizedCache("quanto", config, nbits=4, q_group_size=8, residual_length=3),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_no_rejected_token_reaches_a_cache_of_the_callers(name: str, num_rows: int) -> None:
    """It holds what it would hold after autoregressive decoding, so that a conversation can go on."""
    if name == "quantized":
        pytest.importorskip("optimum.quanto")
    model, prompt = tiny_model().double(), words(num_rows, 5)
    if name == "quantized":
        model = model.float()
    cache = CACHES[name](model.config)
    settings = {"max_new_tokens": 16, "do_sample": True}
    found = generate(model, prompt, seed=2, decoding="speculative", block_size=4, cache=cache, **settings)
    if name != "quantized":  # which computes with other numbers than those that it stores, in another order
        assert torch.equal(found, generate(model, prompt, seed=2, decoding="ar", **settings))
    length = int(cache.get_seq_length())
    assert 5 <= length < found.shape[1]
    if name == "quantized":
        return
    with torch.no_grad():
        fresh = model(found[:, :length], use_cache=True).cache
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :length], expected.keys)


def test_float32_parts_from_autoregressive_decoding_only_by_rounding() -> None:
    """Greedy, in float32, on logits that are far apart."""
    for variant in ("masked", "uniform"):
        as_autoregressive(tiny_model(variant, scale=6.0), PADDED, {"block_size": 4}, do_sample=False)


def test_transformers_assisted_decoding_gives_the_same_text() -> None:
    """Another loop that verifies drafts, those of an assistant: a second judge, greedy and without a batch."""
    model, assistant = tiny_model().double(), tiny_model(seed=1).double()
    prompt, settings = words(1, 4), {"do_sample": False, "max_new_tokens": 20}
    assisted = generate(model, prompt, decoding="ar", assistant_model=assistant, **settings)
    assert torch.equal(generate(model, prompt, decoding="speculative", block_size=4, **settings), assisted)


# ---- the law of rejection sampling


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_rejection_sampling_has_the_autoregressive_law(process: Process, fused: bool) -> None:
    model = law_model(process)
    law = oracle_of(model).ar_law(LENGTH)
    settings = {"acceptance": "rejection", "block_size": 4, "fused_drafts": fused}
    assert p_value(model, law, decoding="speculative", **settings) > SIGNIFICANCE


def test_a_wrong_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacements from p instead of (p - q)+."""
    model = law_model("masked")
    right = speculation_blockgen.sample_categorical

    def wrong(masses: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return right((masses > 0).double(), uniform)

    monkeypatch.setattr(speculation_blockgen, "sample_categorical", wrong)
    settings = {"acceptance": "rejection", "block_size": 4, "fused_drafts": False}
    assert p_value(model, oracle_of(model).ar_law(LENGTH), decoding="speculative", **settings) < SIGNIFICANCE


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_a_row_has_the_same_text_alone_and_in_a_batch(variant: str, fused: bool) -> None:
    """With rejection the text depends on what is proposed, which must not depend on the other rows."""
    model = tiny_model(variant).double()
    settings = {"decoding": "speculative", "acceptance": "rejection", "block_size": 4, "fused_drafts": fused}
    settings |= {"do_sample": True, "temperature": 0.7, "max_new_tokens": 40, "eos_token_id": 3, "pad_token_id": PAD}
    together = generate(model, PADDED["input_ids"], attention_mask=PADDED["attention_mask"], **settings)
    for row, mask in enumerate(PADDED["attention_mask"].bool()):
        alone = generate(model, PADDED["input_ids"][row][mask][None], **settings)
        found = together[row, len(mask) :]
        assert torch.equal(found[: alone.shape[1] - int(mask.sum())], alone[0, int(mask.sum()) :])


def test_rejection_keeps_more_than_matching_draws() -> None:
    """Of the same model, one token at a time, where the draws of two passes do not always agree."""
    model, prompts = tiny_model(scale=2.0), words(16, 3)
    kept = {}
    for acceptance in ("match", "rejection"):
        found = generate(
            model,
            prompts,
            decoding="speculative",
            acceptance=acceptance,
            block_size=2,
            do_sample=True,
            max_new_tokens=40,
            return_dict_in_generate=True,
        )
        kept[acceptance] = found.num_accepted_tokens.sum() / found.num_drafted_tokens.sum()
    assert kept["rejection"] > kept["match"]


# ---- what is told


def test_function_evaluations_are_the_forward_passes_that_predict() -> None:
    for fused in (False, True):
        model = tiny_model()
        with record_forwards(model) as calls:
            found = generate(
                model,
                words(1, 4),
                decoding="speculative",
                block_size=4,
                fused_drafts=fused,
                max_new_tokens=20,
                return_dict_in_generate=True,
            )
        assert found.num_function_evaluations.item() == len(calls)
        assert found.tokens_per_forward.item() == pytest.approx(20 / len(calls))


def test_the_trajectory_shows_what_was_drafted_and_what_was_kept() -> None:
    model = tiny_model()
    found = generate(
        model,
        words(1, 4),
        decoding="speculative",
        block_size=4,
        max_new_tokens=20,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    text: list[int] = []
    accepted = 0
    for drafted, kept in found.trajectory:
        tokens = [token for token in kept[0].tolist() if token != PAD]
        accepted += sum(a == b for a, b in zip(drafted[0, :-1].tolist(), tokens, strict=False))
        text += tokens
    assert text == found.sequences[0, 4:].tolist()
    assert accepted == found.num_accepted_tokens.item()


class Recorder(TextStreamer):
    def __init__(self) -> None:
        self.put_tokens: list[int] = []
        self.drafts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.put_tokens += value.flatten().tolist()

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        self.drafts.append(value[0].tolist())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("fused", [False, True])
def test_a_streamer_gets_accepted_tokens_and_drafts(fused: bool) -> None:
    model, streamer = tiny_model(), Recorder()
    settings = {"decoding": "speculative", "block_size": 4, "fused_drafts": fused, "max_new_tokens": 20}
    text = generate(model, words(1, 4), streamer=streamer, **settings)
    assert streamer.put_tokens == text[0].tolist()
    assert streamer.drafts and all(MASK not in draft for draft in streamer.drafts)


@pytest.mark.parametrize("draft", ["apart", "in steps"])
def test_a_streamer_gets_every_draft_once(draft: str) -> None:
    streamer, settings = Recorder(), {**DRAFTS[draft], "max_new_tokens": 20}
    output = {"return_dict_in_generate": True, "output_trajectory": True}
    found = generate(tiny_model(), words(1, 4), streamer=streamer, decoding="speculative", **settings, **output)
    verified = [drafted[0, :-1].tolist() for drafted, _ in found.trajectory if drafted.shape[1] > 1]
    assert streamer.drafts == verified


# ---- how much is drafted


def passes(model: BlockGenForDiffusionLM, **settings: Any) -> float:
    found = generate(
        model, words(1, 3), decoding="speculative", max_new_tokens=60, return_dict_in_generate=True, **settings
    )
    return found.num_function_evaluations.item() / 60


def test_worthless_drafts_cost_a_few_passes_only() -> None:
    """Of a uniform law over 20 words, whose draws differ with the query: no draft is right for long."""
    model = tiny_model("uniform", scale=1.0)
    for fused in (False, True):
        assert passes(model, block_size=8, do_sample=True, fused_drafts=fused, acceptance="match") <= 1


def test_rows_that_do_not_draft_are_decoded_as_autoregressively(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose drafts do not pay: most rounds are those of `decoding="ar"`, a token and a query of each row."""
    monkeypatch.setattr(MeasuredRoundCosts, "of_token", lambda self: 1.0)
    model, prompts = tiny_model().double(), words(3, 4)
    with record_forwards(model) as calls:
        as_autoregressive(model, {"input_ids": prompts}, {"block_size": 8}, do_sample=True, max_new_tokens=60)
    speculative = calls[60:]
    assert sum(call.get("query_input_ids") is not None for call in speculative) > 0.6 * len(speculative)


@pytest.mark.parametrize("is_fused", [False, True])
@given(accepted=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_drafts_are_as_long_as_they_may_be_and_stop_where_they_do_not_pay(is_fused: bool, accepted: list[int]) -> None:
    length = DraftLength(4, RoundCosts(torch.device("cpu")), (is_fused,))

    def draft(accepted: int) -> int:
        drafted, fused = length.best()
        assert 0 <= drafted <= 4 and fused in (is_fused, False)
        if drafted:
            length.record([drafted], [min(accepted, drafted)], is_fused)
        else:
            length.wait()
        return drafted

    for kept in accepted:
        draft(kept)
    for _ in range(100):
        draft(0)
    assert sum(draft(0) > 0 for _ in range(1000)) <= 8  # after 16, 32, 64, 128, 256, 256, ... tokens


def test_drafts_that_give_no_more_than_they_cost_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundCosts, "of_draft", lambda *args: 0.98)
    length = DraftLength(1, RoundCosts(torch.device("cpu")), (False,))
    drafts = 0
    for _ in range(500):
        if length.best()[0]:
            length.record([1], [1], False)
            drafts += 1
        else:
            length.wait()
    assert drafts < 100


def test_drafts_are_longer_where_more_is_accepted() -> None:
    lengths = {}
    for accepted in (0, 1, 7):
        length = DraftLength(7, RoundCosts(torch.device("cpu")), (False, True))
        for _ in range(20):
            if drafted := length.best()[0]:
                length.record([drafted], [min(accepted, drafted)], False)
        lengths[accepted] = length.best()[0]
    assert lengths[0] == 0 < lengths[1] < lengths[7] == 7


def test_what_a_token_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds without a draft, by a round of ten tokens more; the first is not looked at."""
    monkeypatch.undo()
    costs, now = MeasuredRoundCosts(torch.device("cpu")), iter([0.0, 2.0, 10.0, 90.0, 100.0, 103.0])
    monkeypatch.setattr(costs, "_clock", lambda: next(now))
    unmeasured = costs.of_token()
    for tokens in (0, 10, 10):
        assert costs.of_token() == unmeasured
        costs.start()
        costs.stop(0, tokens)
    assert costs.of_token() == pytest.approx((3 / 2 - 1) / 10)
    costs.forget()
    assert costs.of_token() == pytest.approx((3 / 2 - 1) / 10) and not costs.is_ready


class ShiftedScores(LogitsProcessor):
    """Drafts, which no such processor sees, are hardly ever right."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(input_ids.shape[-1] % 7, -1)


def test_no_clock_has_a_say_where_the_text_depends_on_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rejection, when rows whose drafts failed have decoded autoregressively for a while."""
    monkeypatch.undo()
    model, texts = tiny_model(), []
    for power in (1, 3):
        ticks = itertools.count()
        monkeypatch.setattr(time, "process_time", lambda ticks=ticks, power=power: float(next(ticks)) ** power)
        settings = dict(do_sample=True, temperature=0.1, max_new_tokens=60, logits_processor=[ShiftedScores()])
        texts.append(
            generate(model, words(1, 3), decoding="speculative", acceptance="rejection", block_size=4, **settings)
        )
    assert torch.equal(*texts)


# ---- the forward pass


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["masked", "uniform", "time_conditional"])
def test_blocks_that_overlap_are_read_as_if_each_were_alone(variant: str, implementation: str) -> None:
    model = tiny_model(variant).double()
    model.set_attn_implementation(implementation)
    clean, noisy = words(2, 6), words(2, 7, seed=1)
    starts, sizes = [2, 6, 4], [3, 1, 3]
    positions = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
    ids = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor(sizes))
    with torch.no_grad():
        together = model(
            clean, noisy, noisy_position_ids=positions[None], noisy_block_ids=ids[None], noise_level=0.5
        ).logits
        for block, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            alone = model(
                clean[:, :start],
                noisy[:, ids == block],
                noisy_position_ids=torch.arange(start, start + size)[None],
                block_size=8,
                noise_level=0.5,
            ).logits
            torch.testing.assert_close(together[:, ids == block], alone)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_a_query_that_is_isolated_predicts_autoregressively_and_begins_a_block(
    variant: str, implementation: str
) -> None:
    model = tiny_model(variant).double()
    model.set_attn_implementation(implementation)
    clean, noisy, other = words(2, 4), words(2, 3, seed=1), words(2, 3, seed=2)
    where = {"noisy_position_ids": torch.tensor([[4, 5, 6]]), "noisy_block_ids": torch.zeros(1, 3, dtype=torch.long)}

    def predicted(tokens: torch.Tensor, isolate_first: bool = True) -> torch.Tensor:
        return model(clean, tokens, **where, isolate_first=isolate_first, noise_level=1.0).logits

    with torch.no_grad():
        query = model(clean, query_input_ids=noisy[:, :1]).logits
        if variant == "masked":  # which forward makes impossible in the causal language model only
            query[..., MASK] = predicted(noisy)[:, :1, MASK]
        torch.testing.assert_close(predicted(noisy)[:, :1], query)
        for place in range(3):  # the others see all of the block
            changed = noisy.clone()
            changed[:, place] = other[:, place]
            assert not torch.allclose(predicted(noisy)[:, 1:], predicted(changed)[:, 1:])
        assert not torch.allclose(predicted(noisy, False)[:, :1], query)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_part_of_the_clean_tokens_can_be_committed(kind: str) -> None:
    model, text = tiny_model().double(), words(2, 9)
    query = torch.full((2, 1), MASK)
    cache = CACHES[kind](model.config)
    with torch.no_grad():
        part = model(
            text[:, :7], query, noisy_position_ids=torch.tensor([[7]]), cache=cache, use_cache=True, num_committed=4
        )
        assert int(cache.get_seq_length()) == 4
        rest = model(text[:, 4:], query, noisy_position_ids=torch.tensor([[9]]), cache=cache, use_cache=True)
        whole = [model(text[:, :n], query, noisy_position_ids=torch.tensor([[n]])) for n in (7, 9)]
    torch.testing.assert_close(part.logits, whole[0].logits)
    torch.testing.assert_close(rest.logits, whole[1].logits)


# ---- refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"acceptance": "rejection", "draft_steps": 2}, "`acceptance='rejection'` needs drafts of one step"),
        ({"fused_drafts": True, "draft_steps": 2}, "`fused_drafts=True` needs drafts of one step"),
        ({"acceptance": "often"}, "`acceptance` must be one of"),
        ({"draft_steps": 0}, "`draft_steps` must be an integer of at least 1"),
        ({"sampler": "confidence"}, "does not go with `decoding='speculative'`"),
        ({"num_beams": 2}, "does not go with"),
        ({"output_scores": True, "return_dict_in_generate": True}, "needs `decoding='ar'`"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(words(1, 3), decoding="speculative", max_new_tokens=4, **settings)


@pytest.mark.parametrize(
    "overrides", [{"clean_attention": "block_causal", "block_sizes": [4]}, {"next_token_prediction": True}]
)
def test_models_without_an_exact_verification_are_refused(overrides: dict[str, Any]) -> None:
    if "next_token_prediction" in overrides:
        overrides = {**overrides, "block_sizes": [1], "diffusion_type": "uniform"}
    with pytest.raises(ValueError, match="speculative"):
        tiny_model(**overrides).generate(words(1, 3), decoding="speculative", max_new_tokens=4)


def test_parts_of_a_forward_pass_that_contradict_one_another_are_refused() -> None:
    model, text = tiny_model(), words(1, 4)
    with pytest.raises(ValueError, match="`noisy_block_ids` must give a block for each"):
        model(text, text, noisy_block_ids=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="`isolate_first=True` needs `noisy_block_ids`"):
        model(text, text, isolate_first=True)
    with pytest.raises(ValueError, match="`num_committed` must be a number of the 4 clean tokens"):
        model(text, text[:, :0], use_cache=True, num_committed=5)
