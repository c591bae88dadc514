"""
Seconds and peak memory of a training step, against the plain implementation in the same run.

    python benchmarks/training.py                    # 12 layers x 768, V = 50,258, L = 1,024: about 15 minutes
    python benchmarks/training.py --layers 2 --length 256 --rounds 1    # a quick look

"plain" is the same model with a dense mask of [x0 ; z_t] in scaled_dot_product_attention and the logits [B, L, V] of
the whole sequence; "ours" is what `model(input_ids, labels)` does in training mode; "ours, checkpointed" recomputes
the activations of the layers in the backward pass. Every measurement is a process of its own; the variants take turns,
so that a change of the machine's speed meets all of them. A step is forward, backward, clipping and AdamW. The speed
is the ratio of CPU seconds, which other jobs on the machine disturb less than the clock on the wall.

Memory is the largest resident set of the process. "Above the state" leaves out what was resident before the step with
weights, gradients and optimizer state in place: it is what grows with batch and length.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.modeling.objective_blockgen import draw_training_noise
from blockgen_hf.whole_files import write_json


VARIANTS = ("plain", "ours", "ours, checkpointed")
OBJECTIVES = {"masked, cross entropy": "masked", "uniform, ELBO": "uniform"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=50258)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="processes a variant and objective")
    parser.add_argument("--steps", type=int, default=2, help="counted steps a process, behind one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "DIFFUSION"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--profile", action="store_true", help="one step of `ours` under torch's profiler, by operator"
    )
    return parser


def make_model(args: argparse.Namespace, variant: str, diffusion_type: str) -> BlockGenForDiffusionLM:
    config = BlockGenConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=args.length,
        diffusion_type=diffusion_type,
        hidden_dropout=0.1,
    )
    model = BlockGenForDiffusionLM(config).train()
    if variant == "ours, checkpointed":
        model.gradient_checkpointing_enable()
    return model


class Step:
    """A training step on random tokens."""

    def __init__(self, args: argparse.Namespace, variant: str, diffusion_type: str) -> None:
        self.model = make_model(args, variant, diffusion_type)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True
        )  # Trainer's default
        tokens = torch.randint(args.vocab_size - 1, (args.batch_size, args.length))
        scored = torch.ones_like(tokens, dtype=torch.bool)
        draw = draw_training_noise(
            self.model.diffusion, self.model.config, tokens, scored, block_size=args.block_size, noise_level=0.5
        )
        self.inputs = {
            "input_ids": tokens,
            "labels": tokens,
            "noisy_input_ids": draw.noisy_input_ids,
            "noise_level": draw.noise_level,
            "block_size": args.block_size,
        }
        if variant == "plain":  # positions that are given may be any: they get the dense mask
            self.inputs |= {"position_ids": torch.arange(args.length)[None], "skip_logits": False}
        for parameter in self.model.parameters():  # gradients and the optimizer's state are there from the start
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def __call__(self) -> None:
        self.model(**self.inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


class PeakMemory:
    """The largest resident set within the block, in MB, sampled every 2 ms: the kernel's record cannot be reset."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = resident()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def work(args: argparse.Namespace, variant: str, diffusion_type: str) -> None:
    """Measures one variant in this process and prints the figures as JSON."""
    torch.manual_seed(0)
    step = Step(args, variant, diffusion_type)
    with PeakMemory() as memory:
        step()
    seconds, cpu_seconds = [], []
    for _ in range(args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": memory.peak}
    print(json.dumps(figures | {"above_state_mb": memory.peak - memory.before}))


def measure(args: argparse.Namespace, variant: str, diffusion_type: str) -> dict[str, list[float] | float]:
    options = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("layers", "hidden_size", "vocab_size", "length", "batch_size", "block_size", "steps", "threads")
    ]
    command = [sys.executable, __file__, *options, "--worker", variant, diffusion_type]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, list[float] | float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def report(objective: str, measurements: dict[str, list[dict]]) -> None:
    print(f"\n{objective}")
    print(f"| {'':20} | seconds (min to max) | CPU seconds | speed by CPU | peak MB | above the state, MB | memory |")
    print(f"|{'-' * 22}|---:|---:|---:|---:|---:|---:|")
    rows = {}
    for variant, runs in measurements.items():
        seconds = [value for run in runs for value in run["seconds"]]
        cpu = statistics.median(value for run in runs for value in run["cpu_seconds"])
        peak = statistics.median(run["peak_mb"] for run in runs)
        above = statistics.median(run["above_state_mb"] for run in runs)
        rows[variant] = (statistics.median(seconds), min(seconds), max(seconds), cpu, peak, above)
    plain = rows["plain"]
    for variant, (median, low, high, cpu, peak, above) in rows.items():
        print(
            f"| {variant:20} | {median:.2f} ({low:.2f} to {high:.2f}) | {cpu:.2f} | {plain[3] / cpu:.2f} x "
            f"| {peak:,.0f} | {above:,.0f} | {above / plain[5]:.2f} x |"
        )


def profile(args: argparse.Namespace) -> None:
    for objective, diffusion_type in OBJECTIVES.items():
        step = Step(args, "ours", diffusion_type)
        step()
        with torch.profiler.profile() as profiler:
            step()
        print(f"\n{objective}")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        work(args, *args.worker)
        return
    if args.profile:
        profile(args)
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args}", flush=True)
    results = {}
    for objective, diffusion_type in OBJECTIVES.items():
        measurements: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
        for _ in range(args.rounds):
            for variant in VARIANTS:
                measurements[variant].append(measure(args, variant, diffusion_type))
        report(objective, measurements)
        results[objective] = measurements
    if args.json:
        write_json(args.json, {"settings": vars(args) | {"json": None}, "results": results})


if __name__ == "__main__":
    main()
