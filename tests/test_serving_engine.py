"""The generation engine: an answer is the one that its request gets alone, and no request disturbs another."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import BLOCK_CAUSAL, EOS, tiny_model, words

from blockgen_hf import BlockGenForDiffusionLM, BlockGenGenerationConfig
from blockgen_hf.serving.engine import GenerationEngine
from blockgen_hf.serving.handles import RequestHandle
from blockgen_hf.serving.requests import Event, FailedEvent, FinishedEvent, GenerationRequest, TokensEvent


ENDS = [3, 4, EOS]
DIFFUSION: list[dict[str, Any]] = [
    dict(decoding="block_diffusion", block_size=4),
    dict(decoding="block_diffusion", block_size=8, temperature=0.7, top_k=5),
    dict(decoding="block_diffusion", block_size=4, sampler="confidence", confidence_threshold=0.3),
]
EVERY: list[dict[str, Any]] = [
    *DIFFUSION,
    dict(decoding="ar"),
    dict(decoding="ar", do_sample=False, repetition_penalty=1.5),
    dict(decoding="arpc", block_size=4, denoising_steps=3),
    dict(decoding="block_diffusion", block_size=4, ar_seed_tokens=3),
    dict(decoding="speculative", block_size=4),
    dict(decoding="speculative", block_size=4, fused_drafts=True, acceptance="rejection"),
    dict(decoding="draft_revise", block_size=4, revise_block_size=8),
]


@contextmanager
def running(model: BlockGenForDiffusionLM, **limits: Any) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(model, **limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown(drain=False, timeout=60)


def request(number: int = 0, prompt: int = 4, num_tokens: int = 8, **settings: Any) -> GenerationRequest:
    config = BlockGenGenerationConfig(max_new_tokens=num_tokens, eos_token_id=ENDS, **settings)
    return GenerationRequest(tuple(words(prompt, seed=number).tolist()), config, seed=number)


def text(events: list[Event]) -> list[int]:
    assert not isinstance(events[-1], FailedEvent), repr(events[-1].error)
    return [token for event in events if isinstance(event, TokensEvent) for token in event.token_ids]


def alone(model: BlockGenForDiffusionLM, asked: GenerationRequest) -> Any:
    torch.manual_seed(asked.seed)
    input_ids = torch.tensor([asked.input_ids], dtype=torch.long)
    return model.generate(input_ids, generation_config=asked.generation_config, return_dict_in_generate=True)


def assert_answered_as_alone(model: BlockGenForDiffusionLM, handle: RequestHandle) -> None:
    asked, events = handle.request, list(handle)
    expected = alone(model, asked)
    assert text(events) == expected.sequences[0, len(asked.input_ids) :].tolist()
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert finished.usage.completion_tokens == int(expected.num_new_tokens)
    assert finished.reason == ("stop" if text(events)[-1] in ENDS else "length")
    if asked.generation_config.acceptance != "match":  # whose drafts depend on a clock
        assert finished.usage.function_evaluations == int(expected.num_function_evaluations)


@pytest.mark.parametrize("variant", ["masked", "uniform", "time_conditional", "block_causal"])
def test_answers_are_those_of_generate_alone(variant: str) -> None:
    """Decodings, settings, lengths and seeds in one batch, admitted at odd times, prompts read in parts."""
    model, schedule = tiny_model(variant).double(), random.Random(0)
    decodings = DIFFUSION[:1] if variant in BLOCK_CAUSAL else EVERY
    with running(model, prefill_chunk=8, max_batch_rows=6) as engine:
        waiting: list[RequestHandle] = []
        for number in range(14):
            settings = decodings[number % len(decodings)]
            asked = request(number, schedule.randrange(30), schedule.randrange(1, 13), **settings)
            waiting.append(engine.submit(asked))
            while schedule.random() < 0.4 and waiting:
                assert_answered_as_alone(model, waiting.pop(0))
        for handle in waiting:
            assert_answered_as_alone(model, handle)
        statistics = engine.statistics()
    assert statistics.rows_in_passes > 1.5 * statistics.passes
    assert statistics.queued == statistics.running == statistics.cached_tokens == 0
