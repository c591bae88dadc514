"""
Speed and memory of one generation as its text grows, tokens a CPU second in every stretch of it, and speed by batch.

    OMP_NUM_THREADS=1 python benchmarks/generation_length.py --cpu-weights int8 --plot docs/figures/speed.svg
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from blockgen_hf.evaluation.throughput_contenders import Decoding, random_model
from blockgen_hf.quantization import FORMATS, quantize_for_cpu


PROMPT = 16


class Clock(StoppingCriteria):
    """CPU seconds of the process by the number of new tokens a row; it stops nothing."""

    def __init__(self) -> None:
        self.seconds = {0: time.process_time()}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        self.seconds[input_ids.shape[1] - PROMPT] = time.process_time()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run(model: PreTrainedModel, decoding: str, batch_size: int, new_tokens: int) -> tuple[Clock, object]:
    prompt = torch.randint(model.config.vocab_size - 1, (batch_size, PROMPT))
    clock = Clock()
    outputs: GenerateDecoderOnlyOutput = model.generate(
        prompt,
        max_new_tokens=new_tokens,
        stopping_criteria=[clock],
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **Decoding.parse(decoding, block_size=16).settings,
    )
    return clock, outputs.cache


def stretches(clock: Clock, stretch: int) -> list[tuple[int, int, float]]:
    """(start, end, tokens of a row in a CPU second) for stretches of so many new tokens."""
    ends = [0]
    for count in clock.seconds:
        if count >= ends[-1] + stretch:
            ends.append(count)
    seconds = clock.seconds
    return [(start, end, (end - start) / (seconds[end] - seconds[start])) for start, end in pairwise(ends)]


def print_cache(model: PreTrainedModel, cache: object) -> None:
    length = cache.get_seq_length()
    arithmetic = 2 * model.config.num_hidden_layers * model.config.hidden_size * 4 * length
    taken = sum(layer.keys.untyped_storage().nbytes() * 2 for layer in cache.layers)
    print(f"\nCache of {length:,} tokens: {taken / 2**20:.1f} MiB, {taken / arithmetic:.2f} x what they need.\n")


def plot(by_length: list[tuple[int, int, float]], by_batch: dict[int, float], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([(start + end) / 2 for start, end, _ in by_length], [speed for *_, speed in by_length], "o-")
    left.set(xlabel="length of the text, tokens", ylabel="tokens / CPU s", ylim=(0, None), title="one text")
    right.plot(list(by_batch), list(by_batch.values()), "o-")
    right.set(xlabel="rows of the batch", ylim=(0, None), title="all rows of a batch")
    right.set_xscale("log", base=2)
    right.set_xticks(list(by_batch), list(map(str, by_batch)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--diffusion-type", choices=("masked", "uniform"), default="masked")
    parser.add_argument("--decoding", default="block_diffusion:4")
    parser.add_argument("--new-tokens", type=int, default=4096, help="of the one text")
    parser.add_argument("--stretch", type=int, default=512, help="new tokens of a line of the table")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch-tokens", type=int, default=64, help="new tokens of a row in batches")
    parser.add_argument("--cpu-weights", choices=tuple(FORMATS))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw both there (needs matplotlib)")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(args.size, args.diffusion_type, max_position_embeddings=args.new_tokens + PROMPT)
    if args.cpu_weights is not None:
        quantize_for_cpu(model, args.cpu_weights)

    clock, cache = run(model, args.decoding, 1, args.new_tokens)
    by_length = stretches(clock, args.stretch)
    print("| new tokens | tokens/CPU s |\n|---|---:|")
    for start, end, speed in by_length:
        print(f"| {start:,} to {end:,} | {speed:.2f} |")
    print_cache(model, cache)

    by_batch = {}
    print("| rows | tokens/CPU s of all rows |\n|---|---:|")
    for batch_size in args.batch_sizes:
        clock, _ = run(model, args.decoding, batch_size, args.batch_tokens)
        [(_, _, speed)] = stretches(clock, args.batch_tokens)
        by_batch[batch_size] = batch_size * speed
        print(f"| {batch_size} | {by_batch[batch_size]:.2f} |", flush=True)
    if args.plot is not None:
        plot(by_length, by_batch, args.plot)


if __name__ == "__main__":
    main()
