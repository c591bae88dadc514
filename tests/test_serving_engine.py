"""The generation engine: an answer is the one that its request gets alone, and no request disturbs another."""

import asyncio
import copy
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from causal_models import adopted, original
from tiny import BLOCK_CAUSAL, EOS, PAD, assert_near, tiny_model, tiny_tokenizer, words

from blockgen_hf import BlockGenForDiffusionLM, BlockGenGenerationConfig
from blockgen_hf.serving.cache_slots import RowCache
from blockgen_hf.serving.engine import EngineClosedError, GenerationEngine, QueueFullError
from blockgen_hf.serving.generations import Generation
from blockgen_hf.serving.handles import RequestHandle
from blockgen_hf.serving.pass_costs import PassCosts, SharedRoundCosts
from blockgen_hf.serving.passes import SharedPasses, TrunkCall, choose_together
from blockgen_hf.serving.requests import (
    DraftEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    PromptEvent,
    TokensEvent,
    Usage,
)


ENDS = [3, 4, EOS]
DIFFUSION: list[dict[str, Any]] = [
    dict(decoding="block_diffusion", block_size=4),
    dict(decoding="block_diffusion", block_size=8, temperature=0.7, top_k=5),
    dict(decoding="block_diffusion", block_size=4, sampler="confidence", confidence_threshold=0.3),
]
EVERY: list[dict[str, Any]] = [
    *DIFFUSION,
    dict(decoding="ar"),
    dict(decoding="ar", do_sample=False, repetition_penalty=1.5),
    dict(decoding="arpc", block_size=4, denoising_steps=3),
    dict(decoding="block_diffusion", block_size=4, ar_seed_tokens=3),
    dict(decoding="speculative", block_size=4),
    dict(decoding="speculative", block_size=4, fused_drafts=True, acceptance="rejection", do_sample=True),
    dict(decoding="draft_revise", block_size=4, revise_block_size=8),
]
DENSE: dict[str, Any] = dict(block_sizes=[1], next_token_prediction=True)


@contextmanager
def running(model: BlockGenForDiffusionLM, **limits: Any) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(model, **limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown(drain=False, timeout=60)


def request(number: int = 0, prompt: int = 4, num_tokens: int = 8, **settings: Any) -> GenerationRequest:
    config = BlockGenGenerationConfig(max_new_tokens=num_tokens, eos_token_id=ENDS, **settings)
    return GenerationRequest(tuple(words(prompt, seed=number).tolist()), config, seed=number)


def text(events: list[Event]) -> list[int]:
    assert not isinstance(events[-1], FailedEvent), repr(events[-1].error)
    return [token for event in events if isinstance(event, TokensEvent) for token in event.token_ids]


def alone(model: BlockGenForDiffusionLM, asked: GenerationRequest) -> Any:
    torch.manual_seed(asked.seed)
    input_ids = torch.tensor([asked.input_ids], dtype=torch.long)
    settings = copy.deepcopy(asked.generation_config)
    settings.return_dict_in_generate = True
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings)


def assert_answered_as_alone(model: BlockGenForDiffusionLM, handle: RequestHandle) -> None:
    asked, events = handle.request, list(handle)
    expected = alone(model, asked)
    assert text(events) == expected.sequences[0, len(asked.input_ids) :].tolist()
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert finished.usage.completion_tokens == int(expected.num_new_tokens)
    assert finished.reason == ("stop" if text(events)[-1] in ENDS else "length")
    assert finished.usage.function_evaluations == int(expected.num_function_evaluations)


@pytest.mark.parametrize(
    "variant", ["masked", "uniform", "time_conditional", "block_causal", "adopted masked", "adopted uniform"]
)
def test_answers_are_those_of_generate_alone(variant: str) -> None:
    """Decodings, settings, lengths and seeds in one batch, admitted at odd times, prompts read in parts."""
    is_adopted = variant.startswith("adopted")
    model = adopted(original(), diffusion_type=variant.split()[1]) if is_adopted else tiny_model(variant)
    model, schedule = model.double(), random.Random(0)
    decodings = DIFFUSION[:1] if variant in BLOCK_CAUSAL else EVERY
    with running(model, prefill_chunk=8, max_batch_rows=6) as engine:
        waiting: list[RequestHandle] = []
        for number in range(14):
            settings = decodings[number % len(decodings)]
            asked = request(number, schedule.randrange(is_adopted, 30), schedule.randrange(1, 13), **settings)
            waiting.append(engine.submit(asked))
            while schedule.random() < 0.4 and waiting:
                assert_answered_as_alone(model, waiting.pop(0))
        for handle in waiting:
            assert_answered_as_alone(model, handle)
        statistics = engine.statistics()
    assert statistics.rows_in_passes > 1.5 * statistics.passes
    assert statistics.queued == statistics.running == statistics.cached_tokens == 0


def test_prompts_of_rows_that_leave_and_come_do_not_mix() -> None:
    """Slots of the cache are taken over by other rows, and rows of one row only are passes of their own."""
    model = tiny_model().double()
    with running(model, max_batch_rows=3, prefill_chunk=4) as engine:
        lengths = [(30, 3), (2, 12), (17, 5), (0, 9), (9, 2), (25, 8), (1, 1)]
        for round_ in (0, 1):
            handles = [engine.submit(request(n + 10 * round_, *pair, decoding="ar")) for n, pair in enumerate(lengths)]
            for handle in handles:
                assert_answered_as_alone(model, handle)


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "speculative"])
def test_stop_strings_end_a_text_at_the_token_that_completes_them(decoding: str) -> None:
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    settings: dict[str, Any] = dict(num_tokens=12, decoding=decoding, suppress_tokens=[*ENDS, PAD])
    with running(model, tokenizer=tokenizer) as engine:
        free = text(list(engine.submit(request(3, **settings))))
        for last in (3, 11):  # of the last token only the string tells that it stops the text
            pair = free[last - 1 : last + 1]
            first = next(i for i in range(1, len(free)) if free[i - 1 : i + 1] == pair)
            stops = ("zz", "".join(tokenizer.convert_ids_to_tokens(pair)))
            events = list(engine.submit(replace(request(3, **settings), stop=stops)))
            assert text(events) == free[: first + 1]
            assert isinstance(events[-1], FinishedEvent) and events[-1].reason == "stop"


def test_a_stop_string_that_begins_in_the_prompt_stops_nothing() -> None:
    """As in OpenAI's API. `stop_strings` of `generate` match it."""
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    asked = request(3, num_tokens=12, decoding="ar", suppress_tokens=[*ENDS, PAD])
    free = alone(model, asked).sequences[0].tolist()
    across = "".join(tokenizer.convert_ids_to_tokens(free[2:6]))
    config = copy.deepcopy(asked.generation_config)
    config.stop_strings = [across]
    torch.manual_seed(asked.seed)
    stopped = model.generate(torch.tensor([asked.input_ids]), generation_config=config, tokenizer=tokenizer)
    assert stopped[0].tolist() == free[:6]
    with running(model, tokenizer=tokenizer) as engine:
        events = list(engine.submit(replace(asked, stop=(across,))))
    assert text(events) == free[4:]
    assert isinstance(events[-1], FinishedEvent) and events[-1].reason == "length"


def test_a_row_of_a_dense_model_is_served_too() -> None:
    model = tiny_model(**DENSE).double()
    with running(model, prefill_chunk=4) as engine:
        handles = [engine.submit(request(n, prompt=3 + 5 * n, decoding="ar")) for n in range(4)]
        for handle in handles:
            assert_answered_as_alone(model, handle)


# log-probabilities and drafts


@pytest.mark.parametrize(
    ("kind", "decoding"),
    [
        *(("masked", decoding) for decoding in ("ar", "block_diffusion", "speculative", "draft_revise")),
        *(("adopted", decoding) for decoding in ("ar", "block_diffusion", "speculative", "fused", "arpc")),
        ("dense", "ar"),
    ],
)
def test_logprobs_are_those_of_the_ar_pass_and_change_no_text(kind: str, decoding: str) -> None:
    model = adopted(original()) if kind == "adopted" else tiny_model(**DENSE if kind == "dense" else {})
    model = model.double()
    settings: dict[str, Any] = dict(decoding=decoding, block_size=1 if kind == "dense" else 4)
    if decoding == "fused":
        settings |= dict(decoding="speculative", fused_drafts=True)
    asked = request(5, num_tokens=10, **settings)
    with running(model) as engine:
        others = [engine.submit(request(n, **settings)) for n in range(2)]
        events = list(engine.submit(replace(asked, num_logprobs=2)))
        assert all(text(list(handle)) for handle in others)
    tokens = text(events)
    assert tokens == alone(model, asked).sequences[0, 4:].tolist()
    with torch.no_grad():
        expected = model(torch.tensor([[*asked.input_ids, *tokens]])).logits[0, 3:-1].log_softmax(-1)
    found = [each for event in events if isinstance(event, TokensEvent) for each in event.logprobs or ()]
    assert [each.token_id for each in found] == tokens
    of_tokens = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert_near(torch.tensor([each.logprob for each in found], dtype=torch.float64), of_tokens)
    for each, best in zip(found, expected.topk(2).indices.tolist(), strict=True):
        assert [token for token, _ in each.top] == best


@pytest.mark.parametrize("kind", ["masked", "adopted", "dense"])
def test_prompts_are_scored_in_passes_that_are_shared(kind: str) -> None:
    model = adopted(original()) if kind == "adopted" else tiny_model(**DENSE if kind == "dense" else {})
    model = model.double()
    requests = [
        replace(request(n, prompt=length, decoding="ar"), num_logprobs=2, scores_prompt=True)
        for n, length in enumerate((1, 9, 6, 13))
    ]
    with running(model, prefill_chunk=4) as engine:
        answers = [list(handle) for handle in [engine.submit(asked) for asked in requests]]
        statistics = engine.statistics()
    assert statistics.rows_in_passes > 1.5 * statistics.passes
    for asked, (first, *others) in zip(requests, answers, strict=True):
        expected = alone(model, asked)
        assert text(others) == expected.sequences[0, len(asked.input_ids) :].tolist()
        with torch.no_grad():
            log_probs = model(torch.tensor([asked.input_ids])).logits[0, :-1].log_softmax(-1)
        assert isinstance(first, PromptEvent)
        assert [each.token_id for each in first.logprobs] == list(asked.input_ids[1:])
        found = torch.tensor([each.logprob for each in first.logprobs], dtype=torch.float64)
        assert_near(found, log_probs.gather(1, torch.tensor(asked.input_ids[1:])[:, None])[:, 0])
        num_chunks = -(-(len(asked.input_ids) - 1) // 4)
        assert others[-1].usage.function_evaluations == int(expected.num_function_evaluations) + num_chunks


def test_drafts_are_told_where_they_are_asked_for() -> None:
    """They stand behind the tokens that came before, and give way to what is said later."""
    model = tiny_model().double()
    asked = request(2, num_tokens=12, decoding="block_diffusion", block_size=4)
    generation_events: list[Event] = []
    handle = RequestHandle(replace(asked, stream_drafts=True), lambda: None)
    handle.put = generation_events.append  # type: ignore[method-assign]
    passes = SharedPasses(model, 64)
    generation = Generation(model, None, handle.request, handle, passes.costs)
    passes.slots.add(generation.cache)
    with torch.no_grad():
        generation.go_on(0)
        while not generation.is_finished:
            assert generation.call is not None
            passes.run(passes.choose([generation.call]))
            generation.go_on(0)
    assert text(generation_events) == alone(model, asked).sequences[0, 4:].tolist()
    count = 0
    for event in generation_events:
        if isinstance(event, DraftEvent):
            assert event.start == count and len(event.token_ids) == 4
        elif isinstance(event, TokensEvent):
            count += len(event.token_ids)
    assert sum(isinstance(event, DraftEvent) for event in generation_events) >= 3


def test_a_draft_that_nobody_has_read_gives_way() -> None:
    handle = RequestHandle(request(), lambda: None)
    for event in (TokensEvent((1,)), DraftEvent((2,), 1), DraftEvent((3,), 1), FinishedEvent("length", Usage(4))):
        handle.put(event)
    assert list(handle) == [TokensEvent((1,)), FinishedEvent("length", Usage(4))]


# what drafts cost


def test_what_a_token_costs_depends_on_how_many_rows_share_a_pass() -> None:
    """A pass of 4 s + 0.1 s a column, logits of 0.1 s a position, 0.2 s of work a row, or 0.5 s for a draft."""
    for rows in (1, 10):
        costs = PassCosts(torch.device("cpu"))
        shared = SharedRoundCosts(torch.device("cpu"), 0, costs, lambda: 0.0)
        assert not shared.is_ready and costs.of_token() is None
        for columns in (rows, 4 * rows, 9 * rows):
            costs.add_pass(rows, columns, 4 + 0.1 * columns)
            costs.add_projection(rows, 0.1 * rows)
        costs.add_work(has_draft=False, seconds=0.2)
        assert shared.is_ready and costs.of_draft_work() == 0
        costs.add_work(has_draft=True, seconds=0.5)
        seconds_of_a_round = 4 / rows + 0.1 + 0.1 + 0.2
        assert costs.of_token() == pytest.approx((0.1 + 0.1) / seconds_of_a_round)
        assert costs.of_draft_work() == pytest.approx((0.5 - 0.2) / seconds_of_a_round)


def test_passes_that_are_all_alike_do_not_tell_what_a_token_costs() -> None:
    costs = PassCosts(torch.device("cpu"))
    for _ in range(5):
        costs.add_pass(2, 2, 1.0)
        costs.add_projection(2, 0.1)
        costs.add_work(has_draft=False, seconds=0.1)
    assert costs.of_token() is None


def test_rows_do_not_draft_where_a_token_costs_as_much_as_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same; few rounds have a draft."""
    monkeypatch.undo()
    model = tiny_model().double()
    asked = request(2, num_tokens=40, decoding="speculative", block_size=4, do_sample=False)
    drafted = []
    for cost in (0.0, 1.0):
        monkeypatch.setattr(SharedRoundCosts, "of_token", lambda self, cost=cost: cost)
        with running(model) as engine:
            events = list(engine.submit(asked))
        assert text(events) == alone(model, asked).sequences[0, 4:].tolist()
        usage = events[-1].usage
        drafted.append(usage.accepted_draft_tokens + usage.rejected_draft_tokens)
    assert drafted[1] < drafted[0] / 2


# what requests may do to one another


def test_cancelled_requests_leave_and_the_others_stay_as_they_are() -> None:
    model = tiny_model().double()
    with running(model, max_batch_rows=4) as engine:
        handles = [engine.submit(request(n, num_tokens=20, decoding="ar")) for n in range(8)]
        first = next(iter(handles[1]))
        for handle in (handles[1], handles[7]):  # one in the batch, one in the queue
            handle.cancel()
        for number, handle in enumerate(handles):
            if number not in (1, 7):
                assert_answered_as_alone(model, handle)
        cancelled, never_started = list(handles[1])[-1], list(handles[7])
        statistics = engine.statistics()
    assert isinstance(first, TokensEvent)
    assert isinstance(cancelled, FinishedEvent) and cancelled.reason == "cancelled"
    assert cancelled.usage.function_evaluations > 0
    assert never_started == [FinishedEvent("cancelled", Usage(4))]
    assert statistics.finished["cancelled"] == 2 and statistics.running == 0


def test_an_error_of_a_pass_fails_its_requests_and_not_the_engine() -> None:
    model = tiny_model().double()
    broken = tiny_model().double()
    forward, calls = broken.model.forward, iter(range(1000))

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    broken.model.forward = fails_once
    with running(broken) as engine:
        failed = [list(engine.submit(request(n, decoding="ar")))[-1] for n in range(1)]
        assert_answered_as_alone(model, engine.submit(request(7, decoding="ar")))
        assert engine.statistics().finished["failed"] == 1
    assert isinstance(failed[0], FailedEvent) and "out of memory" in str(failed[0].error)


def test_an_error_of_one_row_is_its_own() -> None:
    """Everything suppressed for one token: a request whose distribution is empty, beside others."""
    model = tiny_model().double()
    nothing = request(1, decoding="ar", suppress_tokens=list(range(23)))
    with running(model) as engine:
        handles = [engine.submit(each) for each in (request(0, decoding="ar"), nothing, request(2, decoding="ar"))]
        assert_answered_as_alone(model, handles[0])
        assert isinstance(list(handles[1])[-1], FailedEvent)
        assert_answered_as_alone(model, handles[2])


@contextmanager
def recorded_passes(model: BlockGenForDiffusionLM) -> Iterator[list[dict[str, Any]]]:
    """The arguments of the passes of the trunk."""
    passes: list[dict[str, Any]] = []
    hook = model.model.register_forward_pre_hook(lambda _, __, kwargs: passes.append(kwargs), with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def test_a_long_prompt_is_read_in_parts_between_which_others_go_on() -> None:
    engine = GenerationEngine(tiny_model().double(), prefill_chunk=4)
    long, short = (
        RequestHandle(request(n, prompt, 14, decoding="ar", suppress_tokens=ENDS), lambda: None)
        for n, prompt in enumerate((40, 2))
    )
    engine._queue.extend([long, short])
    with recorded_passes(engine.model) as passes, torch.no_grad():
        while not long._events:
            engine._step()
    assert len(short._events) >= 9
    assert max(each["input_ids"].shape[1] for each in passes) == 4


def test_memory_of_the_cache_is_bounded() -> None:
    model = tiny_model().double()
    with running(model, max_cached_tokens=40) as engine, recorded_passes(model) as passes:
        handles = [engine.submit(request(n, prompt=4, num_tokens=8, decoding="ar")) for n in range(9)]
        texts = [text(list(handle)) for handle in handles]
        with pytest.raises(ValueError, match="may have 41 tokens, .* room for 40"):
            engine.submit(request(prompt=20, num_tokens=21))
    assert all(texts)
    assert max(len(each["input_ids"]) for each in passes) == 3  # of 12 tokens each
    assert engine._passes.slots.num_tokens == 0


@contextmanager
def held_model() -> Iterator[tuple[BlockGenForDiffusionLM, threading.Event]]:
    """A model whose passes wait for the event."""
    model, go_on = tiny_model().double(), threading.Event()
    model.model.register_forward_pre_hook(lambda *_: go_on.wait(60) and None)
    try:
        yield model, go_on
    finally:
        go_on.set()


def submit_one_in_work_and_two_waiting(engine: GenerationEngine) -> list[RequestHandle]:
    first = engine.submit(request(0, decoding="ar"))
    while not engine.statistics().running:
        time.sleep(0.001)
    return [first, *(engine.submit(request(number, decoding="ar")) for number in (1, 2))]


def test_a_full_queue_refuses_and_draining_answers_what_was_taken() -> None:
    with held_model() as (model, go_on):
        engine = GenerationEngine(model, max_batch_rows=1, max_queue=2)
        with pytest.raises(EngineClosedError):
            engine.submit(request())
        engine.start()
        handles = submit_one_in_work_and_two_waiting(engine)
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            engine.submit(request(3))
        assert engine.statistics().queued == 2
        threading.Timer(0.05, go_on.set).start()
        engine.shutdown(drain=True, timeout=60)
        with pytest.raises(EngineClosedError):
            engine.submit(request(4))
        for handle in handles:
            assert_answered_as_alone(model, handle)


def test_shutting_down_without_draining_cancels_everything() -> None:
    with held_model() as (model, go_on):
        engine = GenerationEngine(model, max_batch_rows=1)
        engine.start()
        handles = submit_one_in_work_and_two_waiting(engine)
        threading.Timer(0.05, go_on.set).start()
        engine.shutdown(drain=False, timeout=60)
        for handle in handles:
            assert isinstance(last := list(handle)[-1], FinishedEvent) and last.reason == "cancelled"


def test_an_event_loop_in_another_thread_reads_events() -> None:
    model = tiny_model().double()

    async def read(handle: RequestHandle) -> list[Event]:
        return [event async for event in handle.events()]

    async def read_all(handles: list[RequestHandle]) -> list[list[Event]]:
        return await asyncio.gather(*map(read, handles))

    with running(model) as engine:
        handles = [engine.submit(request(number, decoding="ar")) for number in range(3)]
        answers = asyncio.run(read_all(handles))
    for handle, events in zip(handles, answers, strict=True):
        assert text(events) == alone(model, handle.request).sequences[0, 4:].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(settings=dict(num_beams=2)), "beam_sample is not supported"),
        (dict(settings=dict(num_return_sequences=2)), "`num_return_sequences=2` is not supported"),
        (dict(settings=dict(cache_window=8)), "`cache_window=8` is not supported"),
        (dict(settings=dict(top_p=-0.5)), "top_p"),
        (dict(settings=dict(sampler="first_hitting", decoding="arpc")), "sampler"),
        (dict(settings=dict(nfe_per_block=1, decoding="arpc")), "nfe_per_block"),
        (dict(settings=dict(max_new_tokens=None)), "`max_new_tokens` must be set"),
        (dict(settings=dict(max_new_tokens=61)), "`max_new_tokens` must be at most 60"),
        (dict(input_ids=(1, 23)), "ids of the vocabulary"),
        (dict(input_ids=(1, 22)), "mask token"),
        (dict(num_logprobs=-1), "`num_logprobs` must be a number from 0 to 23"),
        (dict(stop=("a",)), "`stop` needs an engine with a tokenizer"),
        (dict(stop=("",)), "not empty"),
        (dict(seed=2**64), "`seed` must be an integer of 64 bits"),
    ],
    ids=lambda value: str(value),
)
def test_requests_that_generate_would_refuse_are_refused_before_they_wait(
    changes: dict[str, Any], message: str
) -> None:
    with running(tiny_model()) as engine:
        with pytest.raises(ValueError, match=message):
            settings = dict(max_new_tokens=8) | changes.get("settings", {})
            others = {name: value for name, value in changes.items() if name != "settings"}
            asked = replace(request(), generation_config=BlockGenGenerationConfig(**settings), **others)
            engine.submit(asked)
        assert engine.statistics().queued == engine.statistics().running == 0


def call(num_clean: int, num_noisy: int, num_cached: int = 10) -> TrunkCall:
    cache = RowCache()
    cache.row.length = num_cached
    clean, noisy = (torch.zeros(1, length, dtype=torch.long) for length in (num_clean, num_noisy))
    return TrunkCall(cache, dict(input_ids=clean, noisy_input_ids=noisy, anchor_rows=None))


@pytest.mark.parametrize(
    ("waiting", "joined"),
    [
        ([call(1, 1)] * 2 + [call(16, 16)], range(3)),  # a few tokens of padding
        ([call(1, 1)] * 40 + [call(16, 16)] * 40, range(40)),
        ([call(0, 16)] * 20 + [call(0, 16, 4000)] + [call(0, 16)] * 20, [*range(20), *range(21, 41)]),  # a long text
    ],
)
def test_passes_are_joined_where_padding_costs_little(waiting: list[TrunkCall], joined: Iterable[int]) -> None:
    calls = [replace(each) for each in waiting]
    chosen = choose_together(calls, calls, hidden_size=64)
    assert {id(each) for each in chosen} == {id(calls[index]) for index in joined}
