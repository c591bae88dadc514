"""
Loads a server with OpenAI's client: throughput against one request at a time, time to first token, answers that are
compared with those of the same requests alone, killed clients, memory, and SIGTERM under load.

    python benchmarks/serving.py                        # all of it, with the checkpoint of the package
    python benchmarks/serving.py --model DIR --parts load --clients 64 --seconds 60

Throughput is told by the clock and by the server's CPU seconds, which other work on the machine disturbs less.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.request import urlopen

from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from blockgen_hf.checkpoints import SHIPPED


STORIES = (
    "Once upon a time",
    "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it",
    "Tom and Sam were friends.",
    "",
    "The big brown bear was very hungry. He walked through the forest and looked for honey. He saw a tree with a "
    "hole. In the hole there were many bees. The bear was not afraid of them, because he had thick fur. He put a paw",
    "Ben had a red ball. He liked to",
    "It was a sunny day. Mia and her mom went to the park. They saw ducks, a dog and",
)
DECODINGS: tuple[dict[str, Any], ...] = (
    {"decoding": "arpc", "block_size": 16, "nfe_per_block": 8, "corrector_period": 3},
    {"decoding": "block_diffusion", "block_size": 8, "denoising_steps": 4},
    {"decoding": "ar"},
    {"decoding": "speculative", "block_size": 8},
)
# No two of them are alike.
REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": STORIES[number % len(STORIES)],
        "seed": number,
        "max_tokens": 16 + 12 * (number % 5),
        "extra_body": DECODINGS[number % len(DECODINGS)],
    }
    for number in range(56)
]


@dataclass
class Answer:
    """What a stream gave."""

    text: str
    num_tokens: int
    first_token: float
    seconds: float


@dataclass
class Totals:
    """What was counted while requests were sent."""

    seconds: float
    cpu_seconds: float
    answers: list[Answer] = field(default_factory=list)

    def line(self, name: str) -> str:
        tokens = sum(answer.num_tokens for answer in self.answers)
        first = sorted(answer.first_token for answer in self.answers)
        whole = median(answer.seconds for answer in self.answers)
        return (
            f"{name:<22}{len(self.answers):>6} answers {tokens / self.seconds:>8.1f} tokens/s"
            f"{tokens / self.cpu_seconds:>8.1f} tokens/CPU s   first token: median {1e3 * median(first):.0f} ms, "
            f"95 % {1e3 * first[int(0.95 * len(first))]:.0f} ms   whole: median {whole:.2f} s"
        )

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second, and per CPU second of the server."""
        tokens = sum(answer.num_tokens for answer in self.answers)
        return tokens / self.seconds, tokens / self.cpu_seconds


class Server:
    """`blockgen-hf serve` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "blockgen_hf",
            "serve",
            model,
            "--port",
            "0",
            "--log-level",
            "warning",
            *options,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            sys.exit("The server does not start.")
        self.model, self.url = words[1], words[3]
        self.client = AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)

    def metric(self, name: str) -> float:
        with urlopen(self.url.removesuffix("v1") + "metrics") as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)

    async def answer(self, request: dict[str, Any]) -> Answer:
        started = time.perf_counter()
        first, pieces, num_tokens = None, [], 0
        stream = await self.client.completions.create(
            model=self.model, stream=True, stream_options={"include_usage": True}, **request
        )
        async for chunk in stream:
            first = first or time.perf_counter()
            if chunk.choices:
                pieces.append(chunk.choices[0].text)
            elif chunk.usage:
                num_tokens = chunk.usage.completion_tokens
        ended = time.perf_counter()
        return Answer("".join(pieces), num_tokens, (first or ended) - started, ended - started)

    async def measure(self, work: Coroutine[Any, Any, list[Answer]]) -> Totals:
        started, cpu = time.perf_counter(), self.metric("process_cpu_seconds_total")
        answers = await work
        return Totals(time.perf_counter() - started, self.metric("process_cpu_seconds_total") - cpu, answers)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(120)


@asynccontextmanager
async def running(model: str, *options: str) -> AsyncIterator[Server]:
    server = Server(model, *options)
    try:
        yield server
    finally:
        await server.client.close()
        server.stop()


async def one_after_the_other(server: Server, requests: list[dict[str, Any]]) -> list[Answer]:
    return [await server.answer(request) for request in requests]


async def at_once(server: Server, num_clients: int, seconds: float, alone: list[Answer]) -> tuple[list[Answer], int]:
    """Clients that ask again and again, and how many of their answers are not those of the request alone."""
    deadline = time.perf_counter() + seconds
    answers: list[Answer] = []
    wrong: list[int] = []

    async def client(number: int) -> None:
        while time.perf_counter() < deadline:
            number = (number * 5 + 1) % len(REQUESTS)
            answer = await server.answer(REQUESTS[number])
            answers.append(answer)
            if answer.text != alone[number].text:
                wrong.append(number)
                print(f"request {number} alone {alone[number].text!r}, now {answer.text!r}", file=sys.stderr)

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    return answers, len(wrong)


async def load(args: argparse.Namespace) -> None:
    async with running(args.model, "--max-batch-rows", str(args.max_batch_rows)) as server:
        await one_after_the_other(server, REQUESTS[:4])  # warm
        alone = await one_after_the_other(server, REQUESTS)
        single = await server.measure(one_after_the_other(server, REQUESTS))
        assert [answer.text for answer in single.answers] == [answer.text for answer in alone]
        found: list[int] = []

        async def clients() -> list[Answer]:
            answers, wrong = await at_once(server, args.clients, args.seconds, alone)
            found.append(wrong)
            return answers

        passes, rows = server.metric("blockgen_passes"), server.metric("blockgen_rows_in_passes")
        many = await server.measure(clients())
        passes, rows = server.metric("blockgen_passes") - passes, server.metric("blockgen_rows_in_passes") - rows
        print(single.line("one at a time"))
        print(many.line(f"{args.clients} clients"))
        by_clock, by_cpu = (many.rates[index] / single.rates[index] for index in (0, 1))
        print(f"throughput: {by_clock:.2f} times by the clock, {by_cpu:.2f} times by CPU seconds", end="; ")
        print(f"{rows / passes:.1f} rows per pass; answers unlike those alone: {found[0]}", flush=True)


async def killed(args: argparse.Namespace) -> None:
    async with running(args.model) as server:

        async def client(number: int) -> None:
            stream = await server.client.completions.create(
                model=server.model, stream=True, **{**REQUESTS[number % len(REQUESTS)], "max_tokens": 200}
            )
            async for _ in stream:
                break
            await stream.close()

        async def gone(number: int) -> None:
            """Goes before the first token."""
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client(number), 0.3)

        await asyncio.gather(*(gone(number) if number % 2 else client(number) for number in range(args.clients)))
        started = time.perf_counter()
        while server.metric("blockgen_running") + server.metric("blockgen_queued"):
            await asyncio.sleep(0.01)
        print(
            f"{args.clients} clients went away: no work is left after {1e3 * (time.perf_counter() - started):.0f} ms, "
            f"{server.metric('blockgen_cached_tokens'):.0f} tokens in the cache",
            flush=True,
        )


async def memory(args: argparse.Namespace) -> None:
    async with running(args.model) as server:
        num_done = 0
        request = {"extra_body": DECODINGS[1], "max_tokens": 8}

        async def client(number: int) -> None:
            nonlocal num_done
            for turn in range(args.requests // 20):
                await server.answer({**request, "prompt": STORIES[(number + turn) % len(STORIES)], "seed": turn})
                num_done += 1
                if num_done % (args.requests // 8) == 0:
                    rss = server.metric("process_resident_memory_bytes") / 2**20
                    print(f"{num_done:>6} requests: {rss:.1f} MiB", flush=True)

        await asyncio.gather(*(client(number) for number in range(20)))


async def sigterm(args: argparse.Namespace) -> None:
    server = Server(args.model)
    finished, refused, cut = 0, 0, 0

    async def client(number: int) -> None:
        nonlocal finished, refused, cut
        while True:
            try:
                stream = await server.client.completions.create(
                    model=server.model, stream=True, **REQUESTS[number % len(REQUESTS)]
                )
            except (APIConnectionError, APIStatusError):
                refused += 1
                return
            reason = None
            try:
                async for chunk in stream:
                    reason = chunk.choices[0].finish_reason
            except Exception:
                reason = None
            finished, cut = finished + (reason is not None), cut + (reason is None)

    clients = [asyncio.create_task(client(number)) for number in range(args.clients)]
    await asyncio.sleep(5)
    before = finished
    server.process.send_signal(signal.SIGTERM)
    started = time.perf_counter()
    await asyncio.gather(*clients)
    code = server.process.wait(120)
    print(
        f"SIGTERM with {args.clients} clients: {finished - before} answers finished, {cut} cut off, {refused} refused "
        f"afterwards; the process ended after {time.perf_counter() - started:.1f} s with {code}",
        flush=True,
    )


PARTS = {"load": load, "killed": killed, "memory": memory, "sigterm": sigterm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=2000, help="of the part memory")
    parser.add_argument("--max-batch-rows", type=int, default=64)
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {args.model}", flush=True)
    for name in args.parts:
        asyncio.run(PARTS[name](args))


if __name__ == "__main__":
    main()
