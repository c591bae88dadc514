"""The application on replicas of Ray Serve: `examples/serve_ray.py`, on one machine."""

import json
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("ray", reason="pip install 'ray[serve]'")

import ray
from ray import serve


pytestmark = pytest.mark.slow
MODEL = "tinystories-masked"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Two replicas, each of which takes two requests at once."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from serve_ray import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    options = {"replicas": 2, "cpus": 0.5, "max_batch_rows": 1, "max_queue": 1, "api_key": "secret"}
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"model": MODEL, "allow_origin": ["http://page"], **options}), name="blockgen")
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def post(port: int, **fields: Any) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"model": MODEL, "prompt": "One day", "max_tokens": 8, "seed": 1, **fields}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret", "Origin": "http://page"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.headers["Access-Control-Allow-Origin"] == "http://page"
    found = (answer.status, json.loads(answer.read()))
    connection.close()
    return found


def test_keys_are_checked_and_what_is_too_much_gets_a_429(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 401
    connection.close()
    assert post(port, denoising_steps=257)[0] == 400
    alone = post(port, decoding="ar")
    assert alone[0] == 200 and post(port, decoding="ar")[1]["choices"] == alone[1]["choices"]
    with ThreadPoolExecutor(12) as threads:
        long = {"max_tokens": 200, "denoising_steps": 64, "block_size": 16, "decoding": "block_diffusion"}
        statuses = Counter(status for status, _ in threads.map(lambda _: post(port, **long), range(12)))
    assert statuses.keys() == {200, 429} and statuses[200] >= 2
