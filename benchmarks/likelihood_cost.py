"""
What it saves to compute the clean half of an evaluation once: `evaluate_likelihood` against the same draws of noise
with both halves in every pass. Rows are random tokens; the two take turns, and their figures are compared.

    OMP_NUM_THREADS=1 python benchmarks/likelihood_cost.py
    OMP_NUM_THREADS=1 python benchmarks/likelihood_cost.py --models runs/mine --rows 4
"""

import argparse
import statistics
import time
from typing import Any

import torch

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.checkpoints import SHIPPED, shipped_checkpoint
from blockgen_hf.evaluation import evaluate_likelihood
from blockgen_hf.tables import Table


class BothHalves(BlockGenForDiffusionLM):
    """Keeps nothing of a pass for the next one."""

    def forward(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHIPPED), help="folders, or checkpoints of the package")
    parser.add_argument("--rows", type=int, default=8, help="as long as the positions of the model")
    parser.add_argument("--draws", type=int, default=8, help="Monte-Carlo draws of a row and block size")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def measure(folder: str, args: argparse.Namespace) -> list[str]:
    """A row of the table; medians of CPU seconds."""
    again, once = (
        kind.from_pretrained(folder, dtype=torch.float32).eval() for kind in (BothHalves, BlockGenForDiffusionLM)
    )
    shape = args.rows, once.config.max_position_embeddings
    rows = torch.randint(once.config.vocab_size - 1, shape, generator=torch.Generator().manual_seed(0))
    seconds: list[list[float]] = [[], []]
    for repeat in range(args.repeats + 1):
        found = []
        for model, times in zip((again, once), seconds, strict=True):
            started = time.process_time()
            found.append(evaluate_likelihood(model, rows, monte_carlo_samples=args.draws))
            if repeat > 0:  # the first warms up
                times.append(time.process_time() - started)
        for size, one in found[0].block_sizes.items():
            if abs(one.nll - found[1].block_sizes[size].nll) > 1e-4 * one.nll:
                raise SystemExit(f"block size {size}: {one.nll} and {found[1].block_sizes[size].nll} nats differ")
    before, after = map(statistics.median, seconds)
    return [once.config.diffusion_type, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}"]


def main() -> None:
    args = make_parser().parse_args()
    folders = [str(shipped_checkpoint(name)) if name in SHIPPED else name for name in args.models]
    columns = ["noise", "CPU s, both halves in every pass", "CPU s", "times as fast"]
    print(Table(columns, [measure(folder, args) for folder in folders]).markdown())


if __name__ == "__main__":
    main()
