"""What a server takes at once, and what one request may ask for."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest


pytest.importorskip("fastapi", reason="the extra `serve` needs Python 3.11")

from serving import Running, chat_tokenizer, running, served_model, wait_for
from tiny import EOS

from blockgen_hf.serving.app import create_app
from blockgen_hf.serving.bodies import Limits
from blockgen_hf.serving.service import ServerOptions


PROMPT = "abcab"
# As many tokens as fit, none of which ends the text.
LONG: dict[str, Any] = {"max_tokens": 50, "logit_bias": {str(EOS): -100}, "decoding": "ar"}


def answer(server: Running, path: str = "completions", **fields: Any) -> tuple[int, Any]:
    status, text = server.post(f"/v1/{path}", {"model": "tiny", "prompt": PROMPT, **fields})
    return status, json.loads(text)


def refusal(server: Running, **fields: Any) -> tuple[int, str | None, str]:
    status, body = answer(server, **fields)
    return status, body["error"]["param"], body["error"]["message"]


# ---- places
@contextmanager
def held(**options: Any) -> Iterator[tuple[Running, threading.Event]]:
    """A server whose passes wait for the event."""
    model, go_on = served_model(), threading.Event()
    model.base_model.register_forward_pre_hook(lambda *_: go_on.wait(60) and None)
    with running(model, chat_tokenizer(), **options) as server:
        try:
            yield server, go_on
        finally:
            go_on.set()


@pytest.mark.parametrize("num_clients", [5, 8])
def test_an_idle_server_takes_as_many_requests_as_it_has_rows_and_places_in_the_queue(num_clients: int) -> None:
    with held(max_batch_rows=3, max_queue=2) as (server, go_on), ThreadPoolExecutor(num_clients) as threads:
        calls = [threads.submit(answer, server, max_tokens=2) for _ in range(num_clients)]
        wait_for(lambda: server.metric("blockgen_running") + server.metric("blockgen_queued") == 5)
        wait_for(lambda: sum(call.done() for call in calls) == num_clients - 5)
        go_on.set()
        assert Counter(call.result()[0] for call in calls) == Counter({200: 5, 429: num_clients - 5})


def test_prompts_that_are_read_take_no_more_places_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockgen_hf.serving import service

    go_on, encode = threading.Event(), service.encode_prompts
    monkeypatch.setattr(service, "encode_prompts", lambda *args: go_on.wait(60) and encode(*args))
    options = {"max_batch_rows": 2, "max_queue": 1}
    with running(served_model(), chat_tokenizer(), **options) as server, ThreadPoolExecutor(5) as threads:
        calls = [threads.submit(answer, server, max_tokens=2) for _ in range(5)]
        wait_for(lambda: sum(call.done() for call in calls) == 2)
        go_on.set()
        assert Counter(call.result()[0] for call in calls) == Counter({200: 3, 429: 2})


def test_a_request_with_more_choices_than_the_server_has_places_is_wrong_and_not_early() -> None:
    with running(served_model(), chat_tokenizer(), max_batch_rows=1, max_queue=2) as server:
        status, param, message = refusal(server, n=4)
        assert (status, param) == (400, "n") and "3 choices at most, but has `n` = 4" in message
        assert answer(server, n=3, max_tokens=2)[0] == 200


def test_a_request_that_is_cancelled_in_the_queue_leaves_its_place() -> None:
    with held(max_batch_rows=1, max_queue=2) as (server, go_on), ThreadPoolExecutor(1) as threads:
        first = threads.submit(answer, server, max_tokens=2)
        wait_for(lambda: server.metric("blockgen_running") == 1)
        waiting = [server.client.completions.create(model="tiny", prompt=PROMPT, stream=True) for _ in range(2)]
        assert answer(server)[0] == 429
        waiting[1].close()
        wait_for(lambda: server.metric("blockgen_cancelled_requests_total") == 1)
        go_on.set()
        assert first.result()[0] == 200
        assert list(waiting[0])
        assert server.service.engine.num_open == 0


# ---- steps and tokens
@pytest.mark.parametrize("name", ["denoising_steps", "nfe_per_block", "draft_steps", "revise_steps"])
def test_steps_of_a_block_have_a_limit(name: str) -> None:
    with running(served_model(), chat_tokenizer(), limits=Limits(steps_per_block=8)) as server:
        value = [1, 9] if name == "revise_steps" else 9
        found = refusal(server, **{name: value})
        assert found == (400, name, f"`{name}` must be 8 at most on this server, but is 9.")
        assert answer(server, **{name: 8}, max_tokens=2)[0] == 200


def test_a_request_may_ask_for_the_steps_of_the_models_own_settings() -> None:
    model = served_model()
    model.generation_config.denoising_steps = 12
    with running(model, chat_tokenizer(), limits=Limits(steps_per_block=8)) as server:
        assert answer(server, denoising_steps=12, max_tokens=2)[0] == 200
        assert refusal(server, denoising_steps=13)[:2] == (400, "denoising_steps")


def test_an_answer_without_a_length_gets_as_many_tokens_as_the_cache_has_room_for() -> None:
    model = served_model()
    model.generation_config.max_new_tokens = None
    with running(model, chat_tokenizer(), max_cached_tokens=20) as server:
        status, body = answer(server, logit_bias={str(EOS): -100})
        assert status == 200 and body["usage"]["total_tokens"] == 20
        status, param, message = refusal(server, max_tokens=16)
        assert (status, param) == (400, "max_tokens")
        assert "room for 20 tokens. Your request has 21 tokens: 5 in the prompt, `max_tokens` = 16" in message
        assert refusal(server, prompt="a" * 20)[:2] == (400, "prompt")


# ---- what it has cost
def test_cancelled_answers_count_in_the_function_evaluations() -> None:
    with running(served_model(), chat_tokenizer()) as server:
        stream = server.client.completions.create(
            model="tiny", prompt=PROMPT, stream=True, max_tokens=50, logit_bias={str(EOS): -100}
        )
        next(iter(stream))
        stream.close()
        wait_for(lambda: server.service.engine.num_open == 0)
        cancelled = server.metric("blockgen_function_evaluations_total")
        assert cancelled > 0
        usage = answer(server, max_tokens=4)[1]["usage"]["function_evaluations"]
        assert server.metric("blockgen_function_evaluations_total") == cancelled + usage


# ---- models
@pytest.mark.parametrize("name, value", [("cache_window", 8), ("num_beams", 2), ("num_return_sequences", 2)])
def test_a_model_whose_own_settings_are_not_served_is_refused_at_the_start(name: str, value: int) -> None:
    model = served_model()
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="is not supported by the engine.* the model's generation config has it"):
        create_app(model, chat_tokenizer(), ServerOptions("tiny"))
