"""Work for as long as somebody waits for it, and streams of server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError


Result = TypeVar("Result")
_DRAINED = 8  # so many times the limit of a body is read and dropped, so that a client reads why it is refused


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """
    The result of work that is cancelled when the client goes away. The body has been read.

    Raises:
        ClientGone: it has gone.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            if not each.done():
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """
    The body of a request.

    Raises:
        ApiError: 413, it has more bytes than `limit`; 408, it has not come within `seconds`.
        ClientGone: nor will it come.
    """
    try:
        chunks, size = await asyncio.wait_for(_read_chunks(request, limit), seconds)
    except ClientDisconnect:
        raise ClientGone from None
    except asyncio.TimeoutError:
        message = f"The body has not come within {seconds:g} seconds."
        raise ApiError(408, message, code="body_too_slow", headers={"Connection": "close"}) from None
    if size > limit:
        raise ApiError(413, f"The body is larger than {limit:,} bytes.", code="body_too_large")
    return b"".join(chunks)


async def _read_chunks(request: Request, limit: int) -> tuple[list[bytes], int]:
    """Up to so many bytes, and how many came."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > _DRAINED * limit:
            break
    return chunks, size


class EventStream(Response):
    """
    Server-sent events, for as long as the client listens.

    Args:
        events: of the stream, as [`sse`] writes them.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def sse(data: str | dict[str, Any], event: str | None = None) -> str:
    """An event: a JSON value on one line, and a name if it is not what every client takes."""
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"


__all__ = ["ClientGone", "EventStream", "read_body", "sse", "while_connected"]
