"""
Speed of generation: BlockGen's decodings, a plain implementation of the same, and GPT-2 of the same size.

    python benchmarks/generation.py --threads 2                  # 12 layers x 768, V = 50,258: many hours
    python benchmarks/generation.py --batch-sizes 1 --prefixes 0 --diffusion-types masked --decodings arpc:8

It is `blockgen-hf bench` with the plain implementation of plain_generation.py as one more contender. docs/speed.md
tells how to read the tables.
"""

import argparse
import sys

from plain_generation import plain_contenders

from blockgen_hf.cli import bench
from blockgen_hf.cli.parsing import CommandError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_arguments(parser)
    try:
        return bench.run(parser.parse_args(), plain_contenders)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
