"""A server in a thread, with a tiny model, and clients for it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import torch
from openai import OpenAI
from tiny import EOS, MASK, PAD, tiny_model, tiny_tokenizer, wait_for
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockgen_hf.serving.app import create_app
from blockgen_hf.serving.server import Server
from blockgen_hf.serving.service import ServerOptions, Service


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message.content }}b{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def served_model(**overrides: Any) -> PreTrainedModel:
    """Its texts are letters, up to an end."""
    model = tiny_model(eos_token_id=EOS, **overrides)
    model.generation_config.update(suppress_tokens=[PAD], eos_token_id=EOS, max_new_tokens=12)
    return model


class Running:
    """A server that runs."""

    def __init__(self, server: Server, service: Service) -> None:
        self.server = server
        self.service = service
        self.client = self.client_with()

    def client_with(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=self.server.url, max_retries=0, **{"api_key": "none", "timeout": 60, **options})

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
        """Status and body of an answer, as they go over the wire."""
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        found = (answer.status, answer.read())
        connection.close()
        return found

    def get(self, path: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        found = (answer.status, answer.read().decode())
        connection.close()
        return found

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split()[0].split("{")[0] == name)


@contextmanager
def running(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Iterator[Running]:
    app = create_app(model, tokenizer, ServerOptions("tiny", **options))
    server = Server(app, "tiny", "127.0.0.1", 0, shutdown_timeout=10, log_level="warning")
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    try:
        yield Running(server, app.state.service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def events(stream: bytes) -> list[tuple[str | None, str]]:
    """Names and data of server-sent events."""
    found = []
    for block in stream.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines.get("event"), lines["data"]))
    return found


def expected_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int, **settings: Any
) -> str:
    """What `generate` gives alone."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else torch.zeros(1, 0, dtype=torch.long)
    torch.manual_seed(seed)
    output = model.generate(ids, tokenizer=tokenizer, **settings)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


__all__ = ["MASK", "Running", "chat_tokenizer", "events", "expected_text", "running", "served_model", "wait_for"]
