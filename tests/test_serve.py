"""OpenAI's own client, and bare HTTP, against a server in a thread."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

import pytest
import torch


pytest.importorskip("fastapi", reason="the extra `serve` needs Python 3.11")

import openai
from serving import Running, chat_tokenizer, events, expected_text, running, served_model, wait_for
from tiny import EOS, MASK, NUM_WORDS

from blockgen_hf.cli import main
from blockgen_hf.generation.frames import frames
from blockgen_hf.serving.bodies import Limits


PROMPT = "abcab"
SETTINGS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4},
    "arpc": {"decoding": "arpc", "block_size": 8, "denoising_steps": 4},
    "speculative": {"decoding": "speculative", "block_size": 4},
}
# As many tokens as fit, none of which ends the text.
LONG: dict[str, Any] = {"max_tokens": 50, "logit_bias": {str(EOS): -100}, "extra_body": {"decoding": "ar"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(served_model(), chat_tokenizer(), max_batch_rows=4) as found:
        yield found


def complete(server: Running, prompt: Any = PROMPT, **arguments: Any) -> Any:
    """A completion; settings of ours in `extra_body`."""
    return server.client.completions.create(model="tiny", prompt=prompt, **{"seed": 7, **arguments})


# ---- texts
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_answer_is_the_text_of_generate_with_its_seed(server: Running, settings: dict[str, Any]) -> None:
    answer = complete(server, max_tokens=16, temperature=0.9, top_p=0.95, extra_body=settings)
    expected = expected_text(
        served_model(), chat_tokenizer(), PROMPT, 7, max_new_tokens=16, temperature=0.9, top_p=0.95, **settings
    )
    assert answer.choices[0].text == expected
    assert answer.model == "tiny" and answer.object == "text_completion"
    usage = answer.usage
    assert usage.prompt_tokens == len(PROMPT) and usage.total_tokens == len(PROMPT) + usage.completion_tokens
    assert answer.choices[0].finish_reason == ("length" if len(expected) == 16 else "stop")
    assert 0 < usage.function_evaluations <= 4 * usage.completion_tokens
    details = usage.completion_tokens_details
    drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert (drafted > 0) == (settings["decoding"] == "speculative")


def test_choice_i_is_what_seed_plus_i_gives_and_prompts_have_their_own(server: Running) -> None:
    both = complete(server, [PROMPT, [1, 2, 3]], n=3)
    assert [choice.index for choice in both.choices] == list(range(6))
    assert both.usage.prompt_tokens == len(PROMPT) + 3
    assert len({choice.text for choice in both.choices}) > 3
    for index, choice in enumerate(both.choices):
        alone = complete(server, [PROMPT, "bcd"][index // 3], seed=7 + index % 3)
        assert choice.text == alone.choices[0].text


def test_without_a_seed_texts_differ(server: Running) -> None:
    assert len({complete(server, seed=None).choices[0].text for _ in range(4)}) > 1


def test_temperature_zero_takes_the_most_likely_tokens(server: Running) -> None:
    greedy = expected_text(served_model(), chat_tokenizer(), PROMPT, 0, do_sample=False, decoding="ar")
    found = {
        complete(server, temperature=0, seed=seed, extra_body={"decoding": "ar"}).choices[0].text for seed in (1, 2)
    }
    assert found == {greedy}


def test_a_text_ends_before_its_first_stop_string(server: Running) -> None:
    whole = complete(server, **LONG).choices[0].text
    stops = [whole[9:12], whole[5:7], "zz"]
    first = min(whole.index(stop) for stop in stops[:2])
    for stream in (False, True):
        answer = complete(server, stop=stops, stream=stream, **LONG)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:first]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_biases_and_penalties_reach_the_model(server: Running) -> None:
    only = {str(token): -100 for token in range(NUM_WORDS) if token != 3} | {str(EOS): -100}
    assert complete(server, logit_bias=only, max_tokens=8).choices[0].text == "d" * 8
    often = {"temperature": 0, "max_tokens": 18, "logit_bias": {str(EOS): -100}, "extra_body": SETTINGS["ar"]}
    repeated = complete(server, **often).choices[0].text
    varied = complete(server, presence_penalty=2, frequency_penalty=2, **often).choices[0].text
    assert len(set(varied)) > 2 * len(set(repeated))


# ---- streams
def test_a_stream_is_server_sent_events_that_make_the_whole_answer(server: Running) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "seed": 7, "n": 2, "stream": True}
    status, text = server.post("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    found = events(text)
    assert status == 200 and found[-1] == (None, "[DONE]") and {name for name, _ in found} == {None}
    chunks = [json.loads(data) for _, data in found[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    *pieces, last = chunks
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in pieces)
    whole = complete(server, n=2)
    assert last["usage"] == whole.usage.to_dict()
    for index, choice in enumerate(whole.choices):
        mine = [chunk["choices"][0] for chunk in pieces if chunk["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice.text
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    assert "usage" not in events(server.post("/v1/completions", body)[1])[0][1]


def test_drafts_are_events_of_another_name_for_those_who_ask(server: Running) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "seed": 7, "stream": True, "stream_drafts": True}
    body |= {"decoding": "block_diffusion", "block_size": 4, "max_tokens": 8, "logit_bias": {str(EOS): -100}}
    found = events(server.post("/v1/completions", body)[1])
    drafts = [json.loads(data) for name, data in found if name == "blockgen.draft"]
    assert {draft["start"] for draft in drafts} == {0, 4}
    assert all(len(draft["tokens"]) == 4 and draft["choices"] == [] for draft in drafts)
    text = "".join(json.loads(data)["choices"][0]["text"] for name, data in found[:-1] if name is None)
    assert (
        text
        == complete(server, max_tokens=8, logit_bias={str(EOS): -100}, extra_body=SETTINGS["block_diffusion"])
        .choices[0]
        .text
    )
    status, refused = server.post("/v1/completions", {**body, "stream": False})
    assert status == 400 and json.loads(refused)["error"]["param"] == "stream_drafts"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frames_are_events_that_make_the_frames_of_generate(server: Running, settings: dict[str, Any]) -> None:
    fields = {"max_tokens": 8, **settings, "trajectory_top_k": 2}
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "seed": 7, "stream": True, **fields}
    found = events(server.post("/v1/completions", {**body, "n": 2, "stream_frames": True})[1])
    sent = [json.loads(data) for name, data in found if name == "blockgen.frame"]
    model = served_model()
    for index in range(2):
        positions: list[Any] = []
        whole = []
        for event in sent:
            if event["index"] == index:
                positions = positions[: event["frame"].pop("offset")] + event["frame"]["positions"]
                whole.append({**event["frame"], "positions": positions})
        torch.manual_seed(7 + index)
        outputs = model.generate(
            **chat_tokenizer()(PROMPT, return_tensors="pt"),
            max_new_tokens=8,
            trajectory_top_k=2,
            output_trajectory=True,
            return_dict_in_generate=True,
            **settings,
        )
        expected = frames(outputs, chat_tokenizer())[0]["frames"]
        assert [drawn(frame) for frame in whole] == [drawn(frame) for frame in expected]
        assert len(sent[-1]["frame"]["positions"]) < len(expected[-1]["positions"])
    assert refusal(server, body)[:2] == (400, "trajectory_top_k")


def drawn(frame: dict[str, Any]) -> Any:
    """A frame without its figures, which are rounded otherwise where rows share a pass."""
    cells = [
        {name: value for name, value in position.items() if name not in ("surprisal", "diffusion", "ar", "was")}
        for position in frame["positions"]
    ]
    assert any(len(position.get("ar", position.get("diffusion", []))) == 2 for position in frame["positions"]) or (
        frame["event"] in ("prompt", "noise")
    )
    return {**frame, "positions": cells}


def test_a_cancelled_stream_leaves_no_work_behind(server: Running) -> None:
    before = server.metric("blockgen_cancelled_requests_total")
    stream = complete(server, n=3, stream=True, **LONG)
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.metric("blockgen_running") == 0)
    assert server.metric("blockgen_cancelled_requests_total") == before + 1


def test_a_client_that_goes_away_before_its_answer_leaves_no_work_behind(server: Running) -> None:
    before = server.metric("blockgen_cancelled_requests_total")
    with pytest.raises(openai.APITimeoutError):
        server.client_with(timeout=0.2).completions.create(model="tiny", prompt=PROMPT, n=16, **LONG)
    wait_for(lambda: server.metric("blockgen_cancelled_requests_total") == before + 1)
    wait_for(lambda: server.metric("blockgen_running") + server.metric("blockgen_queued") == 0)


@pytest.mark.slow
def test_clients_at_once_get_the_answers_of_each_alone(server: Running) -> None:
    """Unlike prompts, lengths, seeds and decodings; more than there is room for at once."""
    requests: list[dict[str, Any]] = [
        {
            "prompt": "abcdefghij"[: number % 11],
            "seed": number,
            "max_tokens": 4 + 5 * (number % 7),
            "extra_body": list(SETTINGS.values())[number % len(SETTINGS)],
        }
        for number in range(64)
    ]
    alone = [complete(server, **request).choices[0].text for request in requests]
    with ThreadPoolExecutor(64) as threads:
        found = list(threads.map(lambda request: complete(server, **request).choices[0].text, requests * 2))
    assert found == alone * 2
    assert server.metric("blockgen_rows_in_passes") > 1.5 * server.metric("blockgen_passes") > 0
    assert server.metric("blockgen_cached_tokens") == 0


# ---- log-probabilities
def ar_log_probs(text: str) -> torch.Tensor:
    logits = served_model()(chat_tokenizer()(text, return_tensors="pt")["input_ids"]).logits[0, :-1]
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logprobs_are_those_of_the_autoregressive_model(server: Running, settings: dict[str, Any]) -> None:
    """The raw ones, whatever the temperature and the decoding; `echo` adds those of the prompt."""
    answer = complete(server, logprobs=2, echo=True, max_tokens=8, temperature=0.5, extra_body=settings)
    text, found = answer.choices[0].text, answer.choices[0].logprobs
    assert text.startswith(PROMPT) and "".join(found.tokens) == text
    assert found.text_offset == list(range(len(text)))
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    expected = ar_log_probs(text)
    chosen = expected.gather(1, chat_tokenizer()(text, return_tensors="pt")["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), chosen, atol=1e-4, rtol=1e-4)
    for top, row in zip(found.top_logprobs[1:], expected, strict=True):
        best = row.topk(2).values
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best.tolist(), abs=1e-4)


def test_only_the_engines_thread_uses_the_model() -> None:
    """Also to score an echoed prompt."""
    model, threads = served_model(), set()
    model.base_model.register_forward_hook(lambda *_: threads.add(threading.current_thread().name))
    with running(model, chat_tokenizer()) as server:
        complete(server, n=2, logprobs=1, echo=True, max_tokens=4)
    assert threads == {"blockgen-engine"}


def test_chat_logprobs_have_alternatives_and_bytes(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "cd"}]
    answer = server.client.chat.completions.create(
        model="tiny", messages=messages, seed=3, logprobs=True, top_logprobs=3, max_completion_tokens=6
    )
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.bytes == list(token.token.encode()) for token in content)
    stream = server.client.chat.completions.create(
        model="tiny", messages=messages, seed=3, logprobs=True, top_logprobs=3, max_completion_tokens=6, stream=True
    )
    streamed = [chunk.choices[0] for chunk in stream]
    found = [token for choice in streamed if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in found] == [token.token for token in content]


# ---- chat
def test_a_chat_goes_through_the_tokenizers_template(server: Running) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]}]
    answer = server.client.chat.completions.create(model="tiny", messages=messages, seed=7)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == complete(server, "cdba").choices[0].text
    stream = list(server.client.chat.completions.create(model="tiny", messages=messages, seed=7, stream=True))
    assert stream[0].choices[0].delta.role == "assistant" and stream[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content
    assert stream[-1].choices[0].finish_reason == choice.finish_reason
    with pytest.raises(openai.BadRequestError, match="no system"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "c"}])


# ---- what is refused
def refusal(server: Running, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, str | None, str]:
    """Status, field and message, in the form that clients expect."""
    status, text = server.post(path, body, **headers)
    error = json.loads(text)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return status, error["param"], error["message"]


BAD_FIELDS = {
    "unknown model": ({"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here: `model` must be 'tiny'"),
    "no model": ({"model": None}, 400, "model", "model"),
    "too long": (
        {"max_tokens": 60},
        400,
        "max_tokens",
        "has 64 positions. Your request has 65 tokens: 5 in the prompt",
    ),
    "prompt too long": ({"prompt": "a" * 70}, 400, "prompt", "70 tokens, but may have 63"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "must be at least 1, or 0 with `echo`"),
    "negative tokens": ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    "nested typo": ({"stream": True, "stream_options": {"model": 1}}, 400, "stream_options.model", "Unknown field"),
    "schema": ({"response_format": {"type": "json_schema"}}, 400, "response_format", "of type 'json_schema' is not"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "typo": ({"block_sise": 4}, 400, "block_sise", "Unknown field `block_sise`"),
    "decoding": ({"decoding": "quick"}, 400, "decoding", "must be one of ['ar'"),
    "contradiction": ({"denoising_steps": 4, "nfe_per_block": 4}, 400, "denoising_steps", "contradict"),
    "corrector": ({"decoding": "arpc", "corrector": "entropy"}, 400, "corrector", "not for masked models"),
    "ngrams of a block": ({"block_size": 65}, 400, "block_size", "64"),
    "type": ({"temperature": "hot"}, 400, "temperature", "'hot'"),
    "boolean": ({"n": True}, 400, "n", "integer"),
    "range": ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    "no temperature": ({"temperature": 1e-40}, 400, "temperature", "must be 0 or at least 1e-06"),
    "endless penalty": ({"repetition_penalty": 1e-40}, 400, "repetition_penalty", "0.01"),
    "many stops": ({"stop": list("abcde")}, 400, "stop", "at most 4"),
    "empty stop": ({"stop": ""}, 400, "stop", "at least 1"),
    "many choices": ({"n": 17}, 400, "n", "16 choices at most"),
    "bias": ({"logit_bias": {"23": 1}}, 400, "logit_bias", "from 0 to 22"),
    "long stop": ({"stop": ["a" * 257]}, 400, "stop.0", "at most 256"),
    "many stages": ({"revise_ratio": [0.5] * 17}, 400, "revise_ratio", "at most 16"),
    "negative bias": ({"logit_bias": {"-1": 1}}, 400, "logit_bias", "pattern"),
    "digits of another script": ({"logit_bias": {"\u0663": 1}}, 400, "logit_bias", "pattern"),
    "endless bias": ({"logit_bias": {"3": 101}}, 400, "logit_bias", "less than or equal to 100"),
    "no number": ({"n": -1}, 400, "n", "greater than or equal to 1"),
    "bias of a word": ({"logit_bias": {"a": 1}}, 400, "logit_bias", "pattern"),
    "mask": ({"prompt": [MASK]}, 400, "prompt", "`prompt` contain the mask token"),
    "outside of the vocabulary": ({"prompt": [23]}, 400, "prompt", "ids of the vocabulary"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs `stream`"),
}


@pytest.mark.parametrize(("fields", "status", "param", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_field_is_named(server: Running, fields: Any, status: int, param: str | None, message: str) -> None:
    found = refusal(server, {"model": "tiny", "prompt": PROMPT, **fields})
    assert found[:2] == (status, param)
    assert message in found[2]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[1]", 400, "JSON object"),
        (b"\xff", 400, "not valid JSON"),
        (b'{"model": "tiny", "temperature": NaN}', 400, "temperature"),
        (b'{"model": "\\ud800"}', 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        (b'{"model": "' + b"a" * (1 << 20) + b'"}', 413, "larger than 1,048,576 bytes"),
    ],
    ids=["cut", "list", "bytes", "nan", "surrogate", "deep", "large"],
)
def test_a_body_that_is_no_request_is_refused(server: Running, body: bytes, status: int, message: str) -> None:
    found = refusal(server, body)
    assert found[0] == status and message in found[2]


def raw(server: Running, *parts: bytes, reads: bool = True) -> bytes:
    """What is answered to bytes that no client sends; with `reads=False`, the connection is closed at once."""
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=30) as connection:
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        found = b""
        with suppress(ConnectionError):
            while reads and (read := connection.recv(1 << 16)):
                found += read
    return found


HEADERS = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [HEADERS + b"X: " + b"a" * 200_000 + b"\r\n\r\n"],
        [HEADERS + b"X: a\r\n" * 20_000 + b"\r\n"],
        [b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n"],
        [b"\x16\x03\x01\xff garbage\r\n\r\n"],
        [HEADERS + b"Content-Length: -5\r\n\r\n"],
        [HEADERS + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}"],
        [HEADERS + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"],
        [HEADERS + b"Authorization: Bearer \xff\r\nContent-Length: 2\r\n\r\n{}"],
    ],
    ids=["header", "headers", "path", "garbage", "negative", "two lengths", "chunk", "bytes"],
)
def test_what_is_no_http_gets_a_400_and_the_server_goes_on(server: Running, parts: list[bytes]) -> None:
    found = raw(server, *parts)
    assert found.startswith(b"HTTP/1.1 400 ") or not found  # closed before the answer was read
    assert server.get("/health")[0] == 200


def test_a_body_that_does_not_come_is_waited_for_so_long(caplog: pytest.LogCaptureFixture) -> None:
    with running(served_model(), chat_tokenizer(), limits=Limits(body_seconds=0.3)) as server:
        found = raw(server, HEADERS + b"Content-Length: 100\r\n\r\n{")
        assert found.startswith(b"HTTP/1.1 408 ") and b"within 0.3 seconds" in found
        raw(server, HEADERS + b"Content-Length: 100\r\n\r\n{", reads=False)  # a client that goes away
        wait_for(lambda: 'status="499"' in server.get("/metrics")[1])
        assert 'status="500"' not in server.get("/metrics")[1]
    assert caplog.records == []


def test_a_client_that_goes_away_while_its_prompt_is_read_stops_that() -> None:
    model, calls = served_model(), []
    model.base_model.register_forward_hook(lambda *_: calls.append(time.sleep(0.1)))
    with running(model, chat_tokenizer()) as server:
        server.service.engine._passes.prefill_chunk = 2  # 25 passes for the prompt
        body = json.dumps({"model": "tiny", "prompt": "ab" * 25, "max_tokens": 4}).encode()
        with socket.create_connection(("127.0.0.1", server.server.port)) as connection:
            connection.sendall(HEADERS + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: len(calls) > 1)
        wait_for(lambda: server.metric("blockgen_cancelled_requests_total") == 1)
        wait_for(lambda: server.metric("blockgen_running") == 0)
        assert len(calls) < 20


def test_refusals_reach_the_client_as_its_exceptions(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="must be 'tiny'"):
        server.client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="tools"):
        server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert refusal(server, {}, path="/v1/embeddings")[0] == 404
    assert refusal(server, {"model": "tiny", "messages": [{"role": "cook"}]}, path="/v1/chat/completions")[0] == 400


def test_a_model_without_a_chat_template_says_so_and_keys_are_checked() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    with running(served_model(), tokenizer, api_key="secret") as server:
        status, param, message = refusal(server, body, "/v1/chat/completions", Authorization="Bearer secret")
        assert (status, param) == (400, "messages") and "no chat template" in message
        assert refusal(server, body)[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()
        assert server.client_with(api_key="secret").models.list().data[0].id == "tiny"
        assert server.get("/health")[0] == 200


def test_a_server_that_stops_says_503_and_an_engine_that_fails_500(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(served_model(), chat_tokenizer()) as server:
        whole = complete(server).choices[0].text

        def fail(*args: Any) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(server.service.engine._passes, "run", fail)
            with pytest.raises(openai.InternalServerError, match="Its log says more"):
                complete(server)
            with pytest.raises(openai.APIError, match="Its log says more"):
                list(complete(server, stream=True))
        assert complete(server).choices[0].text == whole
        server.service.engine.shutdown()
        assert refusal(server, {"model": "tiny", "prompt": PROMPT})[0] == 503


# ---- for whoever runs it
def test_models_health_and_metrics(server: Running) -> None:
    [model] = server.client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 64
    assert server.client.models.retrieve("tiny").id == "tiny"
    assert server.get("/health") == (200, '{"status":"ok"}')
    before = server.metric("blockgen_completion_tokens_total")
    usage = complete(server).usage
    assert server.metric("blockgen_completion_tokens_total") == before + usage.completion_tokens
    assert server.metric("blockgen_queued") == server.metric("blockgen_running") == 0
    assert server.metric("blockgen_time_to_first_token_seconds_count") > 0
    assert 'blockgen_requests_total{path="/v1/completions",status="200"}' in server.get("/metrics")[1]


def test_pages_of_allowed_origins_may_call_it() -> None:
    with running(served_model(), chat_tokenizer(), allow_origins=("http://page",), api_key="secret") as server:
        for origin, allowed in (("http://page", "http://page"), ("http://other", None)):
            connection = HTTPConnection("127.0.0.1", server.server.port, timeout=60)
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            connection.request("OPTIONS", "/v1/completions", headers=asked)
            assert connection.getresponse().headers["Access-Control-Allow-Origin"] == allowed
            connection.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("served") / "letters"
    served_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "There is no folder no/such/folder"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--max-batch-rows", "0"], "at least 1"),
        (["--api-key", ""], "--api-key is empty"),
    ],
)
def test_the_command_refuses_what_it_cannot_serve(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(SystemExit):
        assert main(["serve", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_command_names_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("blockgen_hf.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 1
    assert "pip install 'blockgen-hf[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_what_was_begun_and_takes_nothing_more(checkpoint: str) -> None:
    """Streams that run, and answers that wait in the queue, are finished; then the process is gone."""
    command = [sys.executable, "-m", "blockgen_hf", "serve", checkpoint, "--port", "0", "--max-batch-rows", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving letters at http://127.0.0.1:")
        client = openai.OpenAI(base_url=line.split()[3], api_key="none", max_retries=0, timeout=120)
        arguments: dict[str, Any] = {"model": "letters", "prompt": PROMPT, "seed": 1, **LONG}
        with ThreadPoolExecutor(4) as threads:
            waiting = [threads.submit(client.completions.create, **arguments) for _ in range(3)]
            stream = client.completions.create(**arguments, stream=True)
            pieces = [next(iter(stream)).choices[0].text]
            process.send_signal(signal.SIGTERM)
            pieces += [chunk.choices[0].text for chunk in stream]
            texts = {answer.result().choices[0].text for answer in waiting}
        assert texts == {"".join(pieces)} and len(texts.pop()) == 50
        assert process.wait(60) == -signal.SIGTERM
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
