"""The answers to one body: a request to the engine for each choice, and the pieces of their texts as they come."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ..generation.frames import FrameTexts, since
from .errors import ApiError, shutting_down
from .formats import Cost
from .handles import RequestHandle
from .metrics import Metrics
from .requests import DraftEvent, Event, FailedEvent, FrameEvent, PromptEvent, TokensEvent
from .text import AnswerText, Piece


@dataclass(frozen=True)
class ChoicePiece:
    """A piece of a choice; one with a finish reason is empty, and the last."""

    index: int
    piece: Piece
    finish_reason: str | None = None


@dataclass(frozen=True)
class ChoiceDraft:
    """The draft of a choice's block in work: the texts of its tokens, and the place of the first in the answer."""

    index: int
    start: int
    tokens: list[str]


@dataclass(frozen=True)
class ChoiceFrame:
    """The next frame of a choice, as `since` sends it: without the positions that have not changed."""

    index: int
    frame: dict[str, Any]


Found = ChoicePiece | ChoiceDraft | ChoiceFrame


class Answers:
    """
    Choices that are being generated.

    Args:
        handles: one for each choice.
        texts: of the choices, with what is echoed.
        frame_texts: gives frames their texts.
        num_prompt_tokens: of all prompts.
        started: when the request came, by `time.perf_counter`.
        metrics: of the server.
    """

    def __init__(
        self,
        handles: Sequence[RequestHandle],
        texts: Sequence[AnswerText],
        frame_texts: FrameTexts,
        num_prompt_tokens: int,
        started: float,
        metrics: Metrics,
    ) -> None:
        self.texts = texts
        self.cost = Cost(num_prompt_tokens)
        self._handles = handles
        self._frame_texts = frame_texts
        self._frames: list[dict[str, Any] | None] = [None] * len(handles)  # the last of each choice
        self._num_left = len(handles)
        self._metrics = metrics
        self._started = started
        self._has_tokens = False
        metrics.prompt_tokens.inc(num_prompt_tokens)

    def cancel(self) -> None:
        """Those that are finished stay so."""
        for handle in self._handles:
            handle.cancel()

    async def pieces(self) -> AsyncGenerator[Found, None]:
        """
        What all choices give, as it comes. If nobody listens any more, they are cancelled.

        Raises:
            ApiError: the engine could not go on.
        """
        try:
            async with aclosing(merged([handle.events() for handle in self._handles])) as events:
                async for index, event in events:
                    for found in self._read(index, event):
                        yield found
        finally:
            if self._num_left:
                self.cancel()
                self._metrics.cancelled.inc()
            else:
                self._metrics.duration.observe(time.perf_counter() - self._started)

    def _read(self, index: int, event: Event) -> list[Found]:
        text = self.texts[index]
        if isinstance(event, FailedEvent):
            raise ApiError(500, "The server could not go on with this text. Its log says more.") from event.error
        if isinstance(event, DraftEvent):
            return [ChoiceDraft(index, event.start, [text.token_text(token) for token in event.token_ids])]
        if isinstance(event, FrameEvent):
            frame, before = self._frame_texts.add(event.frame), self._frames[index]
            self._frames[index] = frame
            return [ChoiceFrame(index, since(frame, before))]
        if isinstance(event, PromptEvent):
            text.echo(self._handles[index].request.input_ids, event.logprobs)
            return []
        if isinstance(event, TokensEvent):
            self._observe_tokens(event)
            self._add(text, event)
            piece = text.take()
            return [ChoicePiece(index, piece)] if piece else []
        self._num_left -= 1
        self.cost.add(event.usage)
        if event.reason == "cancelled":  # by a server that stops, not by a client
            raise shutting_down()
        rest = text.end()
        reason = "stop" if text.is_stopped else event.reason
        return [*([ChoicePiece(index, rest)] if rest else []), ChoicePiece(index, Piece(), reason)]

    def _add(self, text: AnswerText, event: TokensEvent) -> None:
        if event.logprobs is None:
            text.add(event.token_ids)
            return
        for token in event.logprobs:
            text.add_scored(token.token_id, token.logprob, token.top)

    def _observe_tokens(self, event: TokensEvent) -> None:
        self._metrics.new_tokens.inc(len(event.token_ids))
        if not self._has_tokens:
            self._has_tokens = True
            self._metrics.first_token.observe(time.perf_counter() - self._started)


async def merged(streams: Sequence[AsyncIterator[Event]]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several streams with the stream's number, as they come."""
    events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in stream:
                events.put_nowait((index, event))
        finally:
            events.put_nowait(None)

    readers = [asyncio.create_task(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        for _ in readers:
            while (found := await events.get()) is not None:
                yield found
        await asyncio.gather(*readers)  # raises what one of them raised
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


__all__ = ["Answers", "ChoiceDraft", "ChoiceFrame", "ChoicePiece"]
