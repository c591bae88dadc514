"""What OpenAI's clients may send, and what is made of it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest


pytest.importorskip("fastapi", reason="the extra `serve` needs Python 3.11")

from serving import Running, chat_tokenizer, expected_text, running, served_model


PROMPT = "abcab"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(served_model(), chat_tokenizer(), max_batch_rows=4) as found:
        yield found


def complete(server: Running, prompt: Any = PROMPT, **arguments: Any) -> Any:
    return server.client.completions.create(model="tiny", prompt=prompt, **arguments)


def answer(server: Running, path: str = "completions", **fields: Any) -> tuple[int, Any]:
    status, text = server.post(f"/v1/{path}", {"model": "tiny", **fields})
    return status, json.loads(text)


# ---- sampling
def test_a_request_that_asks_for_sampling_samples_from_a_model_whose_own_default_is_greedy() -> None:
    model = served_model()
    model.generation_config.do_sample = False
    settings = {"decoding": "ar"}
    greedy = expected_text(model, chat_tokenizer(), PROMPT, 0, do_sample=False, **settings)
    with running(model, chat_tokenizer()) as server:
        for fields in ({}, {"temperature": 0, "seed": 3}):
            assert complete(server, extra_body=settings, **fields).choices[0].text == greedy
        for fields in ({"temperature": 1.5}, {"top_p": 0.95}, {}):
            drawn = expected_text(model, chat_tokenizer(), PROMPT, 3, do_sample=True, **settings, **fields)
            found = complete(server, seed=3, extra_body=settings, **fields).choices[0].text
            assert found == drawn != greedy
        assert len({choice.text for choice in complete(server, n=4, extra_body=settings).choices}) > 1
