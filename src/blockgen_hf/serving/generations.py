"""
A request while it is answered: `model.generate`, stopped at each of its forward passes.

Every generation runs in a greenlet, and the model that it calls hands the arguments of its passes out instead of
computing them. So there is one implementation of the decodings, which knows nothing of the others that are served.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
from greenlet import getcurrent, greenlet
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ..modeling.releases_blockgen import named_cache
from .cache_slots import RowCache
from .handles import RequestHandle
from .logprobs import score_prompt, token_logprobs
from .pass_costs import PassCosts, SharedRoundCosts
from .passes import Call, HeadCall, TrunkCall
from .requests import (
    DraftEvent,
    FailedEvent,
    FinishedEvent,
    FrameEvent,
    GenerationRequest,
    PromptEvent,
    TokenLogprob,
    TokensEvent,
    Usage,
)


# Settings that make `generate` return something else, keep a cache of its own, or leave the block loop.
_NOT_SERVED = {
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "max_time": (None,),
    "cache_window": (None,),
    "stop_strings": (None,),
    "prefill_chunk_size": (None,),
    "output_trajectory": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
}


class Cancelled(BaseException):
    """Ends a generation at the pass that it waits for."""


class _Checked(BaseException):
    """`generate` has arrived at its first pass: it accepts its arguments."""


def served_model(
    model: PreTrainedModel, seed: int, run_trunk: Callable[..., Any], run_head: Callable[[torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """The same weights, with other functions for the forward passes of trunk and output layer, and a fixed seed."""
    served = copy.copy(model)
    trunk, head = copy.copy(model.base_model), copy.copy(model.get_output_embeddings())
    served._modules = {**model._modules, model.base_model_prefix: trunk, "lm_head": head}
    trunk.forward, head.forward = run_trunk, run_head
    for part in (served, trunk, head):
        part._compiled_call_impl = None
    for part in (trunk, head):  # hooks belong to the passes that are computed
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    generator = torch.Generator().manual_seed(seed)
    served.draw_seed = lambda: int(torch.randint(2**62, (), generator=generator))
    return served


def with_kept_modulations(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which computes once what every `generate` computes of its weights: they do not change here."""
    kept, trunk = copy.copy(model), copy.copy(model.base_model)
    kept._modules = {**model._modules, model.base_model_prefix: trunk}
    trunk.constant_modulations = cache(trunk.constant_modulations)
    return kept


class Generation:
    """
    A request that is being answered.

    Args:
        model: the model; [`SharedPasses`] computes its passes.
        tokenizer: for stop strings.
        request: what is asked for.
        handle: is told the events.
        costs: of passes that it shares.
        prompt_chunk: tokens of the prompt that are scored in one pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        request: GenerationRequest,
        handle: RequestHandle,
        costs: PassCosts,
        prompt_chunk: int = 256,
    ) -> None:
        self.request = request
        self.handle = handle
        self.tokenizer = tokenizer
        self.prompt_chunk = prompt_chunk
        self.cache = RowCache()
        self.model = served_model(model, request.seed, self._run_trunk, self._run_head)
        self.model.measured_round_costs = partial(SharedRoundCosts, costs=costs, work_clock=self._seconds_of_work)
        self.config = resolved_settings(model, request)
        self.call: Call | None = None
        self.tokens: list[int] = []
        # What it has cost so far, and in the end; what ended it, and the event that says so. The engine tells it
        # after it has counted the rest, so that whoever hears of the end finds it counted.
        self.usage = Usage(len(request.input_ids))
        self.outcome: Literal["stop", "length", "cancelled", "failed"] = "failed"
        self.last_event: FinishedEvent | FailedEvent = FailedEvent(RuntimeError("It did not end."))
        self._clock = costs.clock
        self._worked = self._resumed = 0.0
        self._num_scored = 0  # passes for log-probabilities alone
        self._last_logits: torch.Tensor | None = None
        self._stops = StoppingCriteriaList()
        if request.stop and tokenizer is not None:
            self._stops.append(_StopsInAnswer(tokenizer, request))
        self._greenlet = greenlet(self._run)

    @property
    def is_finished(self) -> bool:
        return self._greenlet.dead

    # from outside of the greenlet

    def go_on(self, turn: int) -> None:
        """
        On to the next pass, from the result of the last; nowhere as long as that is not there.

        Args:
            turn: the age of the next pass.
        """
        result = None
        if self.call is not None:
            self.call.turn, result = turn, self.call.result
            if result is None:
                return
        self._resumed = self._clock()
        self.call = self._greenlet.switch(result)
        self._worked += self._clock() - self._resumed
        if self.call is not None:
            self.call.turn = turn

    def throw(self, error: BaseException) -> None:
        """Ends the text with an error, or with [`Cancelled`]."""
        self.call = None
        self._greenlet.throw(error)

    # inside of it

    def _seconds_of_work(self) -> float:
        """Between passes, until now."""
        return self._worked + self._clock() - self._resumed

    def _run(self, _: Any) -> None:
        try:
            if self.request.scores_prompt:
                self._score_prompt()
            if self.request.is_generated:
                self._finish(self._generate())
            else:
                self._end("length")
        except Cancelled:
            self._end("cancelled")
        except Exception as error:
            self.last_event = FailedEvent(error)

    def _generate(self) -> Any:
        settings = copy.deepcopy(self.request.generation_config)
        settings.return_dict_in_generate = True
        return start_generate(
            self.model, self.request, settings, self.cache, streamer=_Streamer(self), stopping_criteria=self._stops
        )

    def _score_prompt(self) -> None:
        prompt, num_top = self.request.input_ids, self.request.num_logprobs or 0
        scores = score_prompt(self.model, prompt, num_top, self.cache, self.prompt_chunk)
        self.cache.row.reset()  # `generate` reads the prompt itself
        self._num_scored = self.usage.function_evaluations
        self.handle.put(PromptEvent(tuple(scores)))

    def _run_trunk(self, *, cache: RowCache, **arguments: Any) -> Any:
        arguments["attention_mask"] = None  # a row alone has no padding
        call = TrunkCall(cache, arguments)
        if call.num_kept:  # a pass that predicts nothing only commits
            self.usage = replace(self.usage, function_evaluations=self.usage.function_evaluations + 1)
        return getcurrent().parent.switch(call)

    def _run_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = getcurrent().parent.switch(HeadCall(hidden_states))
        if self.request.num_logprobs is not None:
            self._last_logits = logits.clone()  # the caller may overwrite them
        return logits

    def put(self, token_ids: list[int]) -> None:
        """The next tokens of the text."""
        self.tokens += token_ids
        self.usage = replace(self.usage, completion_tokens=len(self.tokens))
        logprobs = None if self.request.num_logprobs is None else self._logprobs(len(token_ids))
        self.handle.put(TokensEvent(tuple(token_ids), logprobs))

    def put_draft(self, token_ids: list[int]) -> None:
        self.handle.put(DraftEvent(tuple(token_ids), start=len(self.tokens)))

    def _finish(self, output: Any) -> None:
        evaluations = int(output.num_function_evaluations[0])
        if output.num_drafted_tokens is not None:
            accepted = int(output.num_accepted_tokens[0])
            rejected = int(output.num_drafted_tokens[0]) - accepted
            self.usage = replace(self.usage, accepted_draft_tokens=accepted, rejected_draft_tokens=rejected)
        self.usage = replace(self.usage, function_evaluations=evaluations + self._num_scored)
        self._end("stop" if self._is_stopped(output.sequences) else "length")

    def _end(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        self.outcome = reason
        self.last_event = FinishedEvent(reason, self.usage)

    def _is_stopped(self, sequences: torch.Tensor) -> bool:
        if len(self.tokens) < (self.config.max_new_tokens or 0):
            return True
        ends = self.config.eos_token_id
        if self.tokens and self.tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            return True
        return bool(self._stops(sequences, None).all()) if self._stops else False

    # log-probabilities

    def _logprobs(self, count: int) -> tuple[TokenLogprob, ...]:
        """Of the last tokens of the text."""
        num_top = self.request.num_logprobs or 0
        return token_logprobs(self._ar_logits(count), self.tokens[-count:], num_top, self.model.config)

    def _ar_logits(self, count: int) -> torch.Tensor:
        """Logits of block size 1 at the last tokens of the text, `[count, V]`."""
        text = [*self.request.input_ids, *self.tokens]
        is_clean = self.model.config.predicts_from_clean
        # Passes of `decoding="ar"` have them; so has one that committed the clean token which predicts the first.
        is_known = self.config.decoding == "ar" or (is_clean and self.cache.length >= len(text) - count)
        if is_known and self._last_logits is not None:
            return self._last_logits.flatten(0, -2)[:count].float()
        self._num_scored += 1
        device = self.model.device
        modulations = self.model.base_model.constant_modulations(device)
        # CODEPATH: clean tokens of adapted models predict; elsewhere noised queries at the places of the tokens do.
        if is_clean:
            before = torch.tensor([text[self.cache.length : -1]], dtype=torch.long, device=device)
            arguments = dict(input_ids=before, use_cache=False, logits_to_keep=count)
            return self.model(**arguments, modulations=modulations, **named_cache(self.cache)).logits[0].float()
        positions = torch.arange(len(text) - count, len(text), device=device)[None]
        outputs = self.model(
            input_ids=torch.tensor([text[self.cache.length :]], dtype=torch.long, device=device),
            noisy_input_ids=self.model.fixed_queries(positions),
            noisy_position_ids=positions,
            block_size=1,
            noise_level=1.0,
            modulations=modulations,
            **named_cache(self.cache),
        )
        return outputs.logits[0].float()


class _Streamer(BaseStreamer):
    """Tells a generation its tokens, and what else its request asks for: `generate` looks for the methods."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.has_prompt = False
        if generation.request.stream_drafts:
            self.put_draft = self._put_draft
        if generation.request.stream_frames:
            self.put_frame = self._put_frame

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt and value.numel():
            self.generation.put(value.flatten().tolist())
        self.has_prompt = True

    def _put_draft(self, value: torch.Tensor) -> None:
        self.generation.put_draft(value.flatten().tolist())

    def _put_frame(self, row: int, frame: dict[str, Any]) -> None:
        self.generation.handle.put(FrameEvent(frame))

    def end(self) -> None:
        pass


class _StopsInAnswer(StoppingCriteria):
    """Stop strings, looked for behind the prompt only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, request: GenerationRequest) -> None:
        self.num_given = len(request.input_ids)
        self.criterion = StopStringCriteria(tokenizer, list(request.stop))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = self.criterion(input_ids[:, self.num_given :], scores)
        return found


def start_generate(
    model: PreTrainedModel, request: GenerationRequest, settings: GenerationConfig, cache: RowCache, **others: Any
) -> Any:
    input_ids = torch.tensor([request.input_ids], dtype=torch.long, device=model.device)
    return model.generate(
        input_ids, generation_config=settings, attention_mask=torch.ones_like(input_ids), cache=cache, **others
    )


def resolved_settings(model: PreTrainedModel, request: GenerationRequest) -> GenerationConfig:
    """The settings of a request, where they say nothing those of the model."""
    settings, _ = model._prepare_generation_config(copy.deepcopy(request.generation_config))
    return settings


def check_model(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the engine would refuse every request, because of the settings of the model's own.
    """
    if problem := _what_is_not_served(model.generation_config):
        raise ValueError(f"{problem}, but the model's generation config has it: unset it there.")


def _what_is_not_served(settings: GenerationConfig) -> str | None:
    for name, accepted in _NOT_SERVED.items():
        value = getattr(settings, name, None)
        if value not in accepted:
            return f"`{name}={value!r}` is not supported by the engine"
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value} is not supported by the engine, only sampling and greedy decoding are"
    return None


def check_request(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, request: GenerationRequest
) -> None:
    """
    Whether `generate` takes this request: everything that it checks before its first pass.

    Raises:
        ValueError: it does not; or it would not be served as it is.
    """
    if not -(2**63) <= request.seed < 2**64:
        raise ValueError(f"`seed` must be an integer of 64 bits, but is {request.seed}.")
    if not all(request.stop):
        raise ValueError(f"`stop` must hold strings that are not empty, but is {list(request.stop)}.")
    if request.stop and tokenizer is None:
        raise ValueError("`stop` needs an engine with a tokenizer.")
    if request.scores_prompt and request.num_logprobs is None:
        raise ValueError("`scores_prompt` needs `num_logprobs`.")
    if request.num_logprobs is not None:
        if not 0 <= request.num_logprobs <= model.config.vocab_size:
            raise ValueError(
                f"`num_logprobs` must be a number from 0 to {model.config.vocab_size}, but is {request.num_logprobs}."
            )
        if model.config.clean_attention != "causal":
            raise ValueError(
                "`num_logprobs` needs a model with `clean_attention='causal'`: one with 'block_causal' has no "
                "autoregressive law."
            )
    if request.generation_config.max_new_tokens is None:
        raise ValueError("`max_new_tokens` must be set: the engine has to know how long a text may become.")
    if problem := _what_is_not_served(resolved_settings(model, request)):
        raise ValueError(f"{problem}: leave it out.")

    def run(*args: Any, **kwargs: Any) -> Any:
        raise _Checked

    served = served_model(model, request.seed, run, run)
    with suppress(_Checked):
        start_generate(served, request, copy.deepcopy(request.generation_config), RowCache())


__all__ = ["Cancelled", "Generation", "check_model", "check_request", "with_kept_modulations"]
