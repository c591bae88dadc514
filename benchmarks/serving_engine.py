"""
Many requests at once against one at a time: `python benchmarks/serving_engine.py [--requests 64] [--rows 64]`.

Every request has a prompt and a seed of its own. CPU seconds of the process, on one thread, for each decoding: of
`generate` with one request after the other, and of the engine with all of them at once. The answers are compared too.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockgen_hf import BlockGenGenerationConfig
from blockgen_hf.checkpoints import find_checkpoint
from blockgen_hf.serving.engine import GenerationEngine
from blockgen_hf.serving.requests import FailedEvent, GenerationRequest, TokensEvent


DECODINGS: dict[str, dict[str, Any]] = {
    "ar": dict(decoding="ar"),
    "block_diffusion, 4": dict(decoding="block_diffusion", block_size=4),
    "block_diffusion, 16": dict(decoding="block_diffusion", block_size=16),
    "arpc, 16, 8 evaluations": dict(decoding="arpc", block_size=16, nfe_per_block=8),
    "speculative, 8": dict(decoding="speculative", block_size=8),
}
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the garden with her dog. One day, she "
    "found a big red ball under a tree. She was very happy and ran to show it to her mom. "
)


def make_requests(tokenizer: Any, num_requests: int, num_tokens: int, settings: list[dict[str, Any]]) -> list[Any]:
    """Prompts of 4 to 100 tokens, the first tokens of a story."""
    story = tokenizer(STORY * 4, add_special_tokens=False).input_ids
    requests = []
    for number in range(num_requests):
        config = BlockGenGenerationConfig(max_new_tokens=num_tokens, **settings[number % len(settings)])
        prompt = story[number % 7 : number % 7 + 4 + (number * 37) % 97]
        requests.append(GenerationRequest(tuple(prompt), config, seed=number))
    return requests


def one_at_a_time(model: Any, requests: list[GenerationRequest]) -> list[list[int]]:
    texts = []
    for request in requests:
        torch.manual_seed(request.seed)
        input_ids = torch.tensor([request.input_ids])
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=request.generation_config
        )
        texts.append(output[0, len(request.input_ids) :].tolist())
    return texts


def all_at_once(model: Any, requests: list[GenerationRequest], num_rows: int) -> tuple[list[list[int]], Any]:
    engine = GenerationEngine(model, max_batch_rows=num_rows, max_queue=len(requests))
    engine.start()
    texts = []
    for handle in [engine.submit(request) for request in requests]:
        events = list(handle)
        if isinstance(events[-1], FailedEvent):
            raise events[-1].error
        texts.append([token for event in events if isinstance(event, TokensEvent) for token in event.token_ids])
    engine.shutdown()
    return texts, engine.statistics()


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.process_time()
    result = function(*arguments)
    return time.process_time() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="requests that are answered at the same time")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", default="tinystories-masked", help="a shipped one, a folder or a Hub id")
    parser.add_argument("--only", help="a decoding, or `all of them`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = find_checkpoint(arguments.checkpoint)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    cases = {name: [settings] for name, settings in DECODINGS.items()} | {"all of them": list(DECODINGS.values())}
    print("| decoding | one at a time, CPU s | at once, CPU s | ratio | rows a pass | padding | same texts |")
    print("|---|---|---|---|---|---|---|")
    for name, settings in cases.items():
        if arguments.only not in (None, name):
            continue
        requests = make_requests(tokenizer, arguments.requests, arguments.tokens, settings)
        apart, together = [], []
        for _ in range(arguments.rounds):
            seconds, expected = timed(one_at_a_time, model, requests)
            apart.append(seconds)
            seconds, (texts, counts) = timed(all_at_once, model, requests, arguments.rows)
            together.append(seconds)
        ratio = statistics.median(a / b for a, b in zip(apart, together, strict=True))
        same = sum(text == other for text, other in zip(texts, expected, strict=True))
        padding = counts.padding_in_passes / (counts.padding_in_passes + counts.tokens_in_passes)
        print(
            f"| {name} | {statistics.median(apart):.1f} | {statistics.median(together):.1f} | {ratio:.2f} "
            f"| {counts.rows_in_passes / counts.passes:.1f} | {padding:.0%} | {same} of {len(texts)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
