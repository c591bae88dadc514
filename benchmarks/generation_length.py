"""
Speed and memory of one generation as its text grows: tokens a CPU second in every stretch of it, and the cache.

    OMP_NUM_THREADS=1 python benchmarks/generation_length.py --new-tokens 4096 --cpu-weights int8
"""

import argparse
import time
from itertools import pairwise

import torch
from transformers.generation.streamers import BaseStreamer

from blockgen_hf.evaluation.throughput_contenders import Decoding, random_model
from blockgen_hf.quantization import quantize_for_cpu


class Clock(BaseStreamer):
    """CPU seconds of the process after every block, by the number of new tokens; it is never given a batch's text."""

    def __init__(self) -> None:
        self.num_tokens = -1  # the prompt comes first
        self.seconds: dict[int, float] = {}

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens = 0 if self.num_tokens < 0 else self.num_tokens + value.shape[-1]
        self.seconds[self.num_tokens] = time.process_time()

    def end(self) -> None:
        pass


def table(clock: Clock, stretch: int, batch_size: int) -> list[str]:
    """Tokens of all rows in a CPU second, for each stretch of so many new tokens."""
    ends = [0]
    for count in clock.seconds:
        if count >= ends[-1] + stretch:
            ends.append(count)
    rows = ["| new tokens | tokens/CPU s |", "|---|---:|"]
    for start, end in pairwise(ends):
        speed = batch_size * (end - start) / (clock.seconds[end] - clock.seconds[start])
        rows.append(f"| {start:,} to {end:,} | {speed:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--diffusion-type", choices=("masked", "uniform"), default="masked")
    parser.add_argument("--decoding", default="block_diffusion:4")
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument("--stretch", type=int, default=512, help="new tokens of a line of the table")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--cpu-weights", choices=("int8", "float16", "float32"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(args.size, args.diffusion_type, max_position_embeddings=args.new_tokens + 16)
    if args.cpu_weights is not None:
        quantize_for_cpu(model, args.cpu_weights)
    prompt = torch.randint(model.config.vocab_size - 1, (args.batch_size, 16))
    settings = Decoding.parse(args.decoding, block_size=16).settings
    clock = Clock()
    outputs = model.generate(
        prompt, max_new_tokens=args.new_tokens, streamer=clock, return_dict_in_generate=True, **settings
    )
    print("\n".join(table(clock, args.stretch, args.batch_size)))
    config, cache = model.config, outputs.past_key_values
    length = cache.get_seq_length()
    arithmetic = 2 * config.num_hidden_layers * config.hidden_size * 4 * length * args.batch_size
    taken = sum(layer.keys.untyped_storage().nbytes() * 2 for layer in cache.layers)
    print(f"\nCache of {length:,} tokens: {taken / 2**20:.1f} MiB, {taken / arithmetic:.2f} x what they need.")


if __name__ == "__main__":
    main()
