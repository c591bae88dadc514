"""The same with a server that does the work: `blockgen-hf serve`."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
from writing import LIKELY, Fields, ModelFacts, Writer


_SECONDS = httpx.Timeout(10, read=300)  # a busy server may let a text wait


class ServerWriter(Writer):
    """
    Continues prompts on a server.

    Args:
        url (`str`): of its API, such as `http://127.0.0.1:8000/v1`.
        model (`str`, *optional*): the name of the model there. Default: the first that it lists.
        api_key (`str`, *optional*): what it asks for.

    Raises:
        ValueError: there is no such server, or not this model.
    """

    at_once = 16

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self.client = httpx.Client(base_url=self.url, headers=headers, timeout=_SECONDS)
            answer = self.client.get("/models")
            cards = _checked(answer)["data"]
        except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError) as error:
            raise ValueError(f"{self.url} does not answer as a server of models does: {error!r}.") from error
        names = [card["id"] for card in cards]
        card = next((card for card in cards if model in (None, card["id"])), None)
        if card is None:
            raise ValueError(f"The server has no model {model!r}, but {names}.")
        if "blockgen" not in card:
            raise ValueError(f"{card['id']!r} at {self.url} is not served by `blockgen-hf serve`.")
        self.model: str = card["id"]
        found = card["blockgen"]
        self.facts = ModelFacts(
            block_sizes=found["block_sizes"],
            positions=card["max_model_len"],
            diffusion_type=found["diffusion_type"],
            mask_token=found["mask_token"],
            settings=found["generation_config"],
        )

    def produce(
        self, prompt: str, fields: Fields, put: Callable[[dict[str, Any]], None], stopped: threading.Event
    ) -> None:
        try:
            with self.client.stream("POST", "/completions", json=self._body(prompt, fields)) as answer:
                if answer.status_code != 200:
                    answer.read()
                    _checked(answer)
                positions: list[dict[str, Any]] = []
                for event in events(answer.iter_lines()):
                    if stopped.is_set():
                        return  # the connection is closed, and with it the server's work ends
                    if "error" in event:
                        raise ValueError(event["error"]["message"])
                    if "frame" in event:
                        frame = event["frame"]
                        positions = positions[: frame.pop("offset")] + frame["positions"]
                        put({**frame, "positions": positions})
        except httpx.HTTPError as error:
            raise ValueError(f"The connection to {self.url} broke: {error!r}.") from error

    def _body(self, prompt: str, fields: Fields) -> dict[str, Any]:
        settings = fields.settings()
        settings["max_tokens"] = settings.pop("max_new_tokens")
        if not settings.pop("do_sample"):
            settings["temperature"] = 0
        ours = {"stream": True, "stream_frames": True, "trajectory_top_k": LIKELY}
        return {"model": self.model, "prompt": prompt, "seed": int(fields.seed), **settings, **ours}


def events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, each a JSON object on one line."""
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _checked(answer: httpx.Response) -> Any:
    """
    Raises:
        ValueError: it is an error, or no JSON.
    """
    try:
        body = answer.json()
    except ValueError:
        raise ValueError(f"{answer.url} answers with status {answer.status_code} and no JSON.") from None
    if answer.status_code != 200:
        error = body.get("error") if isinstance(body, dict) else None
        raise ValueError(
            error["message"] if isinstance(error, dict) else f"{answer.url}: status {answer.status_code}."
        )
    return body
