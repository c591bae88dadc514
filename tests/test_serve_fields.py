"""What OpenAI's clients may send, and what is made of it."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
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


# ---- prompts
def test_a_prompt_that_is_null_is_one_that_is_not_given(server: Running) -> None:
    given, null = answer(server, seed=3), answer(server, seed=3, prompt=None)
    assert given[0] == null[0] == 200
    assert given[1]["choices"] == null[1]["choices"]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_echo_begins_with_the_prompt_with_its_special_tokens(server: Running, logprobs: int | None) -> None:
    choice = complete(server, "ab<end>cd", echo=True, max_tokens=3, logprobs=logprobs).choices[0]
    assert choice.text.startswith("ab<end>cd")
    if logprobs is not None:
        assert choice.logprobs.tokens[:5] == ["a", "b", "<end>", "c", "d"]
        assert choice.logprobs.text_offset[:5] == [0, 1, 2, 7, 8]


@pytest.mark.parametrize("prompt", ["", "a", PROMPT])
def test_a_prompt_is_scored_without_an_answer(server: Running, prompt: str) -> None:
    """What programs that compare the likelihoods of texts ask for."""
    whole = complete(server, prompt, echo=True, logprobs=2, max_tokens=2, seed=1)
    for stream in (False, True):
        found = complete(server, prompt, echo=True, logprobs=2, max_tokens=0, stream=stream)
        pieces = [chunk.choices[0] for chunk in (found if stream else [found])]
        assert "".join(piece.text for piece in pieces) == prompt and pieces[-1].finish_reason == "length"
        logprobs = [value for piece in pieces if piece.logprobs for value in piece.logprobs.token_logprobs]
        assert logprobs == whole.choices[0].logprobs.token_logprobs[: len(prompt)]
        if not stream:
            assert found.usage.completion_tokens == 0
            assert found.usage.function_evaluations == (len(prompt) > 1)
    assert complete(server, prompt, echo=True, max_tokens=0).choices[0].text == prompt


# ---- messages
def test_messages_come_back_as_clients_got_them(server: Running) -> None:
    first: Any = {"role": "user", "content": "a", "name": "ada"}
    reply = server.client.chat.completions.create(model="tiny", messages=[first], max_tokens=2).choices[0].message
    nulls = {"refusal": None, "audio": None, "function_call": None, "tool_calls": [], "annotations": []}
    for message in (reply, reply.model_dump(), {"role": "assistant", "content": "b", **nulls}):
        messages: Any = [first, message, {"role": "user", "content": "c"}]
        assert server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices


def test_special_tokens_that_a_message_spells_are_letters(server: Running) -> None:
    lengths = []
    for content in ("<mask>b<end>", "xxxxxxbxxxxx"):
        status, body = answer(server, "chat/completions", messages=[{"role": "user", "content": content}])
        assert status == 200
        lengths.append(body["usage"]["prompt_tokens"])
    assert lengths[0] == lengths[1] == len("<mask>b<end>") + 2


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_MESSAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "tool calls": ({"content": None, "tool_calls": [CALL]}, "messages.0.tool_calls", "is not supported"),
    "refusal": ({"content": "a", "refusal": "No."}, "messages.0.refusal", "is not supported"),
    "typo": ({"content": "a", "contents": "b"}, "messages.0.contents", "Unknown field"),
    "tool calls alone": ({"tool_calls": [CALL]}, "messages.0.tool_calls", "is not supported"),
    "nothing": ({}, "messages.0.content", "null or missing"),
    "null": ({"content": None}, "messages.0.content", "must be a text"),
    "part": ({"content": [{"type": "text", "text": "a", "txt": "b"}]}, "messages.0.content.0.txt", "Unknown field"),
    "image": ({"content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0.type", "'text'"),
}


@pytest.mark.parametrize(("message", "param", "says"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_field_of_a_message_is_named(server: Running, message: Any, param: str, says: str) -> None:
    status, body = answer(server, "chat/completions", messages=[{"role": "assistant", **message}])
    assert (status, body["error"]["param"]) == (400, param)
    assert says in body["error"]["message"]


def test_options_of_a_stream_are_checked(server: Running) -> None:
    options: dict[str, Any] = {"include_usage": True, "include_obfuscation": False}
    assert server.post("/v1/completions", {"model": "tiny", "stream": True, "stream_options": options})[0] == 200
    status, body = answer(server, stream=True, stream_options={"include_usag": True})
    assert (status, body["error"]["param"]) == (400, "stream_options.include_usag")


# ---- paths
def test_every_reference_of_the_description_resolves(server: Running) -> None:
    description = json.loads(server.get("/openapi.json")[1])

    def references(value: Any) -> Iterator[str]:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            yield from references(inner)
        if isinstance(value, dict) and isinstance(value.get("$ref"), str):
            yield value["$ref"]

    found = set(references(description))
    assert {"#/components/schemas/CompletionBody", "#/components/schemas/ChatMessage"} <= found
    for reference in found:
        place = description
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_what_can_be_got_can_be_asked_for_its_head(server: Running, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", server.server.port, timeout=60)
    connection.request("HEAD", path)
    found = connection.getresponse()
    assert (found.status, found.read()) == (200, b"")
    connection.close()
