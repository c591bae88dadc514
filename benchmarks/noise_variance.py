"""
How much the loss of a model, and its gradient, vary with the noise levels of training (Block Diffusion).

    python benchmarks/noise_variance.py --dataset stories.txt
    python benchmarks/noise_variance.py runs/bd3lm --dataset stories.txt --block-sizes 4 --gradient

Prints, for each block size and each interval of noise levels, the mean loss of a token, the variance of the loss of a
row and, with `--gradient`, that of the gradient of a batch. The interval with the least variance of loss is marked.
Documents of the text file are separated by <|endoftext|>. The loss is the ELBO; `--objective` takes another.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.checkpoints import find_checkpoint
from blockgen_hf.evaluation.rows import iterate_rows
from blockgen_hf.tables import Table
from blockgen_hf.training import DataArguments, load_datasets
from blockgen_hf.training.draws import WHOLE_INTERVAL
from blockgen_hf.training.noise_intervals import INTERVAL_GRID, noise_variance
from blockgen_hf.whole_files import write_json


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tinystories-masked", help="folder, or name of a checkpoint")
    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--draws", type=int, default=4, help="draws of noise for each row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch; gradients vary less in larger ones")
    parser.add_argument("--block-sizes", type=int, nargs="+", help="default: those of the model above 1")
    parser.add_argument("--objective", choices=("elbo", "cross_entropy"), default="elbo")
    parser.add_argument("--noise-level-sampling", choices=("block", "sequence"), default="block")
    parser.add_argument("--gradient", action="store_true", help="measure the variance of the gradient too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def load_rows(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as cache:
        data = DataArguments(
            dataset=args.dataset,
            document_separator="<|endoftext|>",
            sequence_length=args.length,
            cache_dir=cache,
        )
        train, _ = load_datasets(data, tokenizer)
        return list(islice(iterate_rows(train), args.rows))


def main() -> None:
    args = make_parser().parse_args()
    folder = find_checkpoint(args.model)
    model = BlockGenForDiffusionLM.from_pretrained(folder)
    model.config.training_objective = args.objective
    rows = load_rows(args, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    found = []
    for size in args.block_sizes or [size for size in model.config.block_sizes if size > 1]:
        of_size = []
        for interval in dict.fromkeys((WHOLE_INTERVAL, *INTERVAL_GRID)):
            variance = noise_variance(
                model,
                rows,
                size,
                interval,
                noise_level_sampling=args.noise_level_sampling,
                draws=args.draws,
                batch_size=args.batch_size,
                gradient=args.gradient,
                seed=args.seed,
            )
            of_size.append({"block_size": size, "low": interval[0], "high": interval[1], **vars(variance)})
        least = min(of_size, key=lambda entry: entry["loss"])
        found += [{**entry, "least": entry is least} for entry in of_size]
    columns = ("block size", "noise levels", "mean loss", "variance of the loss", "of the gradient", "")
    print(Table(columns, [_cells(entry) for entry in found]).text())
    if args.json:
        write_json(args.json, {"settings": {**vars(args), "json": str(args.json)}, "results": found})


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    gradient = "" if entry["gradient"] is None else f"{entry['gradient']:.4g}"
    return (
        str(entry["block_size"]),
        f"{entry['low']:g} to {entry['high']:g}",
        f"{entry['mean']:.4f}",
        f"{entry['loss']:.4g}",
        gradient,
        "least" if entry["least"] else "",
    )


if __name__ == "__main__":
    main()
