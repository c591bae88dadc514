"""The two ends of a request: the engine puts events, and another thread, or an event loop in it, takes them."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from .requests import DraftEvent, Event, FailedEvent, FinishedEvent, GenerationRequest


class RequestHandle:
    """
    A request that the engine has taken. Its events are for one reader, by [`events`] or by iteration.

    Args:
        request: what was submitted.
        wake_engine: tells the engine that something has changed.
    """

    def __init__(self, request: GenerationRequest, wake_engine: Callable[[], None]) -> None:
        self.request = request
        self._wake_engine = wake_engine
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> None:
        """Ends the text at the next step; what is finished stays so. Returns at once, in any thread."""
        self._is_cancelled = True
        self._wake_engine()

    def put(self, event: Event) -> None:
        """For the engine. Drafts that nobody has read yet give way to the next event."""
        with self._changed:
            if self._events and isinstance(self._events[-1], DraftEvent):
                self._events.pop()
            self._events.append(event)
            self._changed.notify_all()
            if self._reader is not None:
                loop, has_events = self._reader
                with suppress(RuntimeError):  # its loop is closed
                    loop.call_soon_threadsafe(has_events.set)

    async def events(self) -> AsyncIterator[Event]:
        """Events up to the last, a [`FinishedEvent`] or a [`FailedEvent`], in whatever event loop asks for them."""
        has_events = asyncio.Event()
        with self._changed:
            self._reader = (asyncio.get_running_loop(), has_events)
        while True:
            has_events.clear()
            while (event := self._take()) is not None:
                yield event
                if isinstance(event, (FinishedEvent, FailedEvent)):
                    return
            await has_events.wait()

    def __iter__(self) -> Iterator[Event]:
        """The same for a thread without an event loop: waits for each event."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield event
            if isinstance(event, (FinishedEvent, FailedEvent)):
                return

    def _take(self) -> Event | None:
        with self._changed:
            return self._events.popleft() if self._events else None


__all__ = ["RequestHandle"]
