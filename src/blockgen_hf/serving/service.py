"""What happens to the body of a request until its answer goes out, apart from HTTP's paths and headers."""

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.frames import FrameTexts
from .answers import Answers, ChoiceDraft, ChoiceFrame, ChoicePiece
from .bodies import Limits, ModelFacts, encode_prompts, make_requests
from .connections import ClientGone, EventStream, read_body, sse, while_connected
from .engine import EngineClosedError, GenerationEngine, QueueFullError
from .errors import ApiError, bad_request, invalid_body, shutting_down
from .formats import AnswerFormat, to_json
from .handles import RequestHandle
from .metrics import Metrics
from .protocol import FIELDS, GenerationBody
from .requests import GenerationRequest
from .text import AnswerText, Piece


DRAFT_EVENT, FRAME_EVENT = "blockgen.draft", "blockgen.frame"
_CLIENT_GONE = 499  # nginx's; nobody reads it but the metrics
Body = TypeVar("Body", bound=GenerationBody)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServerOptions:
    """
    Everything about a server but its model.

    Args:
        model_name: what clients call the model.
        api_key: what they must send; None: nothing.
        allow_origins: origins of web pages that may call the server, `*` for all.
        max_batch_rows: answers that are generated at the same time.
        max_queue: answers that wait for that; what is beyond both gets a 429.
        max_cached_tokens: bounds the memory of the cache, see `GenerationEngine`.
        limits: of one request.
    """

    model_name: str
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    max_batch_rows: int = 64
    max_queue: int = 128
    max_cached_tokens: int | None = None
    limits: Limits = field(default_factory=Limits)


class Service:
    """Answers requests with a model. Lives in one event loop."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ServerOptions) -> None:
        self.options = options
        self.is_ready = False
        self.facts = ModelFacts(model.config, model.generation_config)
        # Tokenizers change while they encode: the engine, the thread of the prompts and the event loop have their own.
        self.tokenizer, self._prompt_tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
        self._frame_texts = FrameTexts(self.tokenizer)
        self.engine = GenerationEngine(
            model,
            tokenizer,
            options.max_batch_rows,
            options.max_queue,
            max_cached_tokens=options.max_cached_tokens,
        )
        # What can never fit is an error of the request, not of the moment.
        self.limits = replace(
            options.limits,
            choices=min(options.limits.choices, self.engine.num_places),
            cached_tokens=options.max_cached_tokens,
        )
        # Reads prompts, checks settings and submits requests, which takes milliseconds.
        self._prompt_thread = ThreadPoolExecutor(1, thread_name_prefix="blockgen-prompts")
        self._num_prepared = 0  # bodies on their way to the engine
        self.metrics = Metrics()
        for name, description in (
            ("queued", "Answers that wait for a place in the batch."),
            ("running", "Answers in the batch."),
            ("cached_tokens", "Tokens in the cache."),
            ("passes", "Forward passes so far."),
            ("rows_in_passes", "Rows in the forward passes so far."),
        ):
            self.metrics.add_gauge(name, description, partial(self._statistic, name))
        for name, description in (  # counted by the engine, as nobody reads the last event of a cancelled answer
            ("function_evaluations", "Denoising and AR passes, each row counted."),
            ("accepted_draft_tokens", "Drafted tokens that speculation kept."),
            ("rejected_draft_tokens", "Drafted tokens that speculation dropped."),
        ):
            self.metrics.add_counter(name, description, partial(self._statistic, name))

    def start(self) -> None:
        self.engine.start()
        self.is_ready = True

    async def shutdown(self) -> None:
        """Takes no more requests. Those that somebody waits for have ended before, or were given up."""
        self.is_ready = False
        await asyncio.get_running_loop().run_in_executor(None, partial(self.engine.shutdown, drain=False))
        self._prompt_thread.shutdown()

    def _statistic(self, name: str) -> float:
        return float(getattr(self.engine.statistics(), name))

    def check_model(self, name: str) -> None:
        """
        Raises:
            ApiError: 404, it is not the name of the model.
        """
        if name != self.options.model_name:
            message = f"The model {name!r} is not served here: `model` must be {self.options.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def answer(self, request: Request, body_type: type[Body], format_type: type[AnswerFormat]) -> Response:
        """
        The answer to a request, whole or as a stream.

        Raises:
            ApiError: it cannot be answered.
        """
        started = time.perf_counter()
        try:
            body = await self._read(request, body_type)
        except ClientGone:
            return Response(status_code=_CLIENT_GONE)
        answers = await self._start(body, started)
        answer_format = format_type(self.options.model_name, body.num_logprobs is not None, body.includes_usage)
        if body.stream:
            return EventStream(self._events(answers, answer_format, body.includes_usage))
        try:
            whole = await while_connected(request.receive, self._collect(answers, answer_format))
        except ClientGone:
            return Response(status_code=_CLIENT_GONE)
        return Response(whole, media_type="application/json")

    async def _read(self, request: Request, body_type: type[Body]) -> Body:
        text = await read_body(request, self.limits.body_bytes, self.limits.body_seconds)
        try:
            body = body_type.model_validate_json(text)
        except ValidationError as error:
            raise invalid_body(error, FIELDS) from error
        body.check_extra_fields()
        self.check_model(body.model)
        return body

    async def _start(self, body: GenerationBody, started: float) -> Answers:
        """
        Hands the choices of a body to the engine.

        Raises:
            ApiError: it does not take them.
        """
        with self._place():
            prompts = await self._in_prompt_thread(encode_prompts, body, self._prompt_tokenizer, self.limits)
            requests = make_requests(body, prompts, self.facts, self.limits)
            texts = [AnswerText(self.tokenizer, request.input_ids, request.stop) for request in requests]
            for text, request in zip(texts, requests, strict=True):
                if body.is_echoed and not request.scores_prompt:  # otherwise with the scores, when they are there
                    text.echo(request.input_ids, None)
            try:
                handles = await self._in_prompt_thread(submit_all, self.engine, requests)
            except QueueFullError as error:
                raise self._queue_full() from error
            except EngineClosedError as error:
                raise shutting_down() from error
            except ValueError as error:
                raise bad_request(error, body.prompt_field) from error
        return Answers(handles, texts, self._frame_texts, sum(map(len, prompts)), started, self.metrics)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """
        For a body that is prepared for the engine: no more of them than the engine has room for.

        Raises:
            ApiError: 429, there is none.
        """
        if self._num_prepared + self.engine.num_open >= self.engine.num_places:
            raise self._queue_full()
        self._num_prepared += 1
        try:
            yield
        finally:
            self._num_prepared -= 1

    def _queue_full(self) -> ApiError:
        message = (
            f"The server is busy: it takes {self.engine.num_places} answers at once, {self.options.max_batch_rows} in "
            f"work and {self.options.max_queue} waiting. Try again later."
        )
        return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})

    async def _in_prompt_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Work before the queue, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._prompt_thread, function, *args)

    async def _collect(self, answers: Answers, answer_format: AnswerFormat) -> str:
        """The whole answer, as JSON."""
        choices = [(Piece(), "length") for _ in answers.texts]
        async with aclosing(answers.pieces()) as pieces:
            async for found in pieces:
                if isinstance(found, ChoicePiece):
                    before, _ = choices[found.index]
                    choices[found.index] = (before + found.piece, found.finish_reason or "length")
        return to_json(answer_format.whole(choices, answers.cost))

    async def _events(
        self, answers: Answers, answer_format: AnswerFormat, includes_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        try:
            for chunk in answer_format.openings(len(answers.texts)):
                yield sse(to_json(chunk))
            async with aclosing(answers.pieces()) as pieces:
                async for found in pieces:
                    if isinstance(found, ChoiceDraft):
                        yield sse(answer_format.draft(found.index, found.start, found.tokens), DRAFT_EVENT)
                    elif isinstance(found, ChoiceFrame):
                        yield sse(answer_format.frame(found.index, found.frame), FRAME_EVENT)
                    else:
                        yield sse(to_json(answer_format.chunk(found.index, found.piece, found.finish_reason)))
        except ApiError as error:  # too late for a status
            yield sse(error.body())
            return
        finally:
            answers.cancel()
        if includes_usage:
            yield sse(to_json(answer_format.usage_chunk(answers.cost)))
        yield sse("[DONE]")


def submit_all(engine: GenerationEngine, requests: Sequence[GenerationRequest]) -> list[RequestHandle]:
    """All of them, or none."""
    handles: list[RequestHandle] = []
    try:
        for request in requests:
            handles.append(engine.submit(request))
    except Exception:
        for handle in handles:
            handle.cancel()
        raise
    return handles


__all__ = ["DRAFT_EVENT", "FRAME_EVENT", "ServerOptions", "Service"]
