"""
The engine of a server: continuous batching, a scheduler over the forward passes of many generations.

One thread owns the model. In a loop it admits new requests where there is room, joins the passes that generations wait
for into one (`passes.py`), and resumes those generations up to their next pass (`generations.py`). Between any two
passes a request can be admitted, finish, or be cancelled.
"""

import copy
import logging
import threading
from collections import Counter, deque
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generations import Cancelled, Generation, check_model, check_request, with_kept_modulations
from .handles import RequestHandle
from .passes import SharedPasses
from .requests import Event, FailedEvent, FinishedEvent, GenerationRequest, Usage


logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many requests are in work or wait as may."""


class EngineClosedError(RuntimeError):
    """The engine takes no requests: it was not started, or is shut down."""


@dataclass(frozen=True)
class EngineStatistics:
    """
    What an engine does, and what it has done since it started.

    Args:
        queued: requests that wait for a place in the batch.
        running: rows in the batch: requests that are being answered.
        cached_tokens: tokens in the cache.
        prompt_tokens, completion_tokens: of the requests that were answered.
        function_evaluations: of the same, each row counted.
        accepted_draft_tokens, rejected_draft_tokens: of the same, by speculation.
        passes, rows_in_passes: forward passes of the trunk, and the rows that took part in them.
        tokens_in_passes, padding_in_passes: tokens that they computed, and padding beside them.
        finished: requests by what ended them: `"stop"`, `"length"`, `"cancelled"`, `"failed"`.
    """

    queued: int
    running: int
    cached_tokens: int
    prompt_tokens: int
    completion_tokens: int
    function_evaluations: int
    accepted_draft_tokens: int
    rejected_draft_tokens: int
    passes: int
    rows_in_passes: int
    tokens_in_passes: int
    padding_in_passes: int
    finished: dict[str, int]


class GenerationEngine:
    """
    Answers requests with a model, many at a time. An answer is the one that its request gets alone, up to the rounding
    of the model's numbers, which depends on the shape of a batch as in every `generate`.

    Args:
        model: a BlockGen model, in evaluation mode. The engine's thread is the only one that may use it.
        tokenizer: for stop strings; not used by any other thread.
        max_batch_rows: how many requests are answered at the same time.
        max_queue: how many more wait for it. Rows of the batch that are free are places too.
        prefill_chunk: longer prompts are read in passes of so many tokens, between which other requests go on. Models
            with `clean_attention="block_causal"` round it up to whole blocks.
        max_cached_tokens: bounds the memory of the cache: the rows of the batch times the length that the longest of
            them may reach. Requests wait as long as it would be exceeded. Default: no bound.

    Raises:
        ValueError: a limit is below 1, or the model's own generation config has a setting that is not served.

    ```python
    >>> from blockgen_hf.serving.engine import GenerationEngine  # doctest: +SKIP

    >>> engine = GenerationEngine(model, tokenizer)  # doctest: +SKIP
    >>> engine.start()  # doctest: +SKIP
    >>> for event in engine.submit(request):  # doctest: +SKIP
    ...     print(event)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch_rows: int = 16,
        max_queue: int = 128,
        prefill_chunk: int = 256,
        max_cached_tokens: int | None = None,
    ) -> None:
        limits = dict(max_batch_rows=max_batch_rows, max_queue=max_queue, prefill_chunk=prefill_chunk)
        if max_cached_tokens is not None:
            limits["max_cached_tokens"] = max_cached_tokens
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")
        check_model(model)
        self.model = with_kept_modulations(model)
        self.tokenizer = tokenizer
        self.max_batch_rows = max_batch_rows
        self.max_queue = max_queue
        self.max_cached_tokens = max_cached_tokens
        # For checks in the threads of callers: `generate` writes to the model that it is called on.
        self._model_of_checks = copy.copy(self.model)
        self._passes = SharedPasses(model, prefill_chunk)
        self._queue: deque[RequestHandle] = deque()
        self._running: list[Generation] = []
        self._changed = threading.Condition()
        self._is_open = False
        self._num_open = 0  # requests that were taken and have not ended
        self._turn = 0
        self._finished: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._thread: threading.Thread | None = None

    # in any thread

    @property
    def num_places(self) -> int:
        """For requests: rows of the batch, and the queue."""
        return self.max_batch_rows + self.max_queue

    @property
    def num_open(self) -> int:
        """Requests in the batch and in the queue."""
        return self._num_open

    def start(self) -> None:
        """Starts the thread."""
        with self._changed:
            if self._thread is not None:
                raise EngineClosedError("An engine starts once.")
            self._is_open = True
            self._thread = threading.Thread(target=self._work, name="blockgen-engine", daemon=True)
            self._thread.start()

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """
        Queues a request. Its settings are checked before, in the thread of the caller: some milliseconds.

        Raises:
            ValueError: `generate` would not take the request, or it needs more cache than there is.
            QueueFullError: there are `num_places` requests already.
            EngineClosedError: the engine is shut down, or not started.
        """
        check_request(self._model_of_checks, self.tokenizer, request)
        if self.max_cached_tokens is not None and reserved(request) > self.max_cached_tokens:
            raise ValueError(
                f"The request may have {reserved(request)} tokens, prompt and `max_new_tokens`, but the cache has "
                f"room for {self.max_cached_tokens}."
            )
        handle = RequestHandle(request, self._wake)
        with self._changed:
            if not self._is_open:
                raise EngineClosedError("The engine takes no requests: it is shut down, or was not started.")
            if self._num_open >= self.num_places:
                raise QueueFullError(f"{self.max_queue} requests wait already.")
            self._num_open += 1
            self._queue.append(handle)
            self._changed.notify_all()
        return handle

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """
        Takes no more requests, and returns when the thread has ended.

        Args:
            drain: whether to answer what was submitted, the queue too; otherwise all of it is cancelled.
            timeout: wait so many seconds at most.
        """
        with self._changed:
            self._is_open = False
            handles = [] if drain else [*self._queue, *(generation.handle for generation in self._running)]
            self._changed.notify_all()
        for handle in handles:
            handle.cancel()
        if self._thread is not None:
            self._thread.join(timeout)

    def statistics(self) -> EngineStatistics:
        with self._changed:
            counts, totals = self._passes.counts, self._totals
            return EngineStatistics(
                queued=len(self._queue),
                running=len(self._running),
                cached_tokens=sum(generation.cache.length for generation in self._running),
                prompt_tokens=totals["prompt_tokens"],
                completion_tokens=totals["completion_tokens"],
                function_evaluations=totals["function_evaluations"],
                accepted_draft_tokens=totals["accepted_draft_tokens"],
                rejected_draft_tokens=totals["rejected_draft_tokens"],
                passes=counts.passes,
                rows_in_passes=counts.rows,
                tokens_in_passes=counts.tokens,
                padding_in_passes=counts.padding,
                finished=dict(self._finished),
            )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # in the engine's thread

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._running or not self._is_open)
                if not (self._queue or self._running):
                    return
            try:
                self._step()
            except Exception as error:  # a defect of the engine's own: the server goes on, without these requests
                logger.exception("The engine failed.")
                for generation in list(self._running):
                    self._end(generation, error)

    def _step(self) -> None:
        """One pass, and what it lets go on."""
        for generation in [each for each in self._running if each.handle.is_cancelled]:
            self._end(generation, Cancelled())
        self._drop_cancelled()
        self._admit()
        by_call = {id(each.call): each for each in self._running}
        chosen = self._passes.choose([each.call for each in self._running if each.call is not None])
        generations = [by_call[id(call)] for call in chosen]
        self._turn += 1
        try:
            self._passes.run(chosen)
        except Exception as error:
            logger.exception("A forward pass failed.")
            for generation in generations:
                self._end(generation, error)
            return
        for generation in generations:
            self._go_on(generation)

    def _admit(self) -> None:
        """Starts requests in the order in which they came, as long as there is room."""
        while True:
            with self._changed:
                if not self._queue or not self._has_room(self._queue[0].request):
                    return
                handle = self._queue.popleft()
            try:
                chunk = self._passes.prefill_chunk
                costs = self._passes.costs
                generation = Generation(self.model, self.tokenizer, handle.request, handle, costs, chunk)
            except Exception as error:  # what was checked when it was submitted
                self._close(handle, "failed", FailedEvent(error))
                continue
            self._running.append(generation)
            self._passes.slots.add(generation.cache)
            self._go_on(generation)

    def _has_room(self, request: GenerationRequest) -> bool:
        if len(self._running) >= self.max_batch_rows:
            return False
        longest = max(reserved(request), *(reserved(each.request) for each in self._running), 0)
        return self.max_cached_tokens is None or (len(self._running) + 1) * longest <= self.max_cached_tokens

    def _drop_cancelled(self) -> None:
        """Requests that were cancelled before they were started, so that others can have their places."""
        with self._changed:
            cancelled = [handle for handle in self._queue if handle.is_cancelled]
            for handle in cancelled:
                self._queue.remove(handle)
        for handle in cancelled:
            self._close(handle, "cancelled", FinishedEvent("cancelled", Usage(len(handle.request.input_ids))))

    def _go_on(self, generation: Generation) -> None:
        generation.go_on(self._turn)
        if generation.is_finished:
            self._leave(generation)

    def _end(self, generation: Generation, error: BaseException) -> None:
        if not generation.is_finished:
            generation.throw(error)
        self._leave(generation)

    def _leave(self, generation: Generation) -> None:
        self._running.remove(generation)
        self._passes.slots.remove(generation.cache)
        with self._changed:
            self._totals.update(vars(generation.usage))
        self._close(generation.handle, generation.outcome, generation.last_event)

    def _close(self, handle: RequestHandle, outcome: str, event: Event) -> None:
        """The end of a request: counted, then told."""
        with self._changed:
            self._num_open -= 1
            self._finished[outcome] += 1
        handle.put(event)


def reserved(request: GenerationRequest) -> int:
    """How many tokens a request may have in the cache."""
    return len(request.input_ids) + (request.generation_config.max_new_tokens or 0)


__all__ = ["EngineClosedError", "EngineStatistics", "GenerationEngine", "QueueFullError", "RequestHandle"]
