"""What `/metrics` tells, in Prometheus' format."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counters of one server; two servers of a process have counters of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        common: dict[str, Any] = {"namespace": "blockgen", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **common)
        self.cancelled = Counter("cancelled_requests", "Requests whose client went away.", **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **common)
        self.new_tokens = Counter("completion_tokens", "Generated tokens.", **common)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **common
        )
        self.duration = Histogram(
            "request_duration_seconds", "From a request to the end of its answer.", buckets=_SECONDS, **common
        )

    def add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A number that is asked for when it is read."""
        Gauge(name, description, namespace="blockgen", registry=self.registry).set_function(read)

    def add_counter(self, name: str, description: str, read: Callable[[], float]) -> None:
        """The same of a number that only grows."""
        self.registry.register(_ReadCounter(f"blockgen_{name}", description, read))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _ReadCounter(Collector):
    """A counter that somebody else counts."""

    def __init__(self, name: str, description: str, read: Callable[[], float]) -> None:
        self.name, self.description, self.read = name, description, read

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.description, self.read())


class CountRequests:
    """Counts the answers of an application by path and status. Paths that it does not have are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


__all__ = ["CountRequests", "Metrics"]
