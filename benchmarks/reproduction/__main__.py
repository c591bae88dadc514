"""
The papers' claims at small scale: trains the models that a claim needs, evaluates them, prints its tables and draws
its figure. Models and results are reused, by other claims too, and an interrupted command goes on when it is repeated.

    python -m benchmarks.reproduction all
    python -m benchmarks.reproduction mixture correctors --output-dir runs/mine --steps 2000 --seeds 5
    python -m benchmarks.reproduction all --train-file stories.txt --validation-file more_stories.txt
"""

from pathlib import Path

import datasets
from transformers import HfArgumentParser

from .claims import CLAIMS
from .report import cells, draw, known, markdown
from .runs import Bench
from .settings import Settings


def main() -> None:
    parser = HfArgumentParser(Settings, prog="python -m benchmarks.reproduction", description=__doc__)
    parser.add_argument(
        "claims", nargs="+", choices=[*CLAIMS, "all"], metavar="CLAIM", help=f"{', '.join(CLAIMS)}, all"
    )
    parser.add_argument("--report", action="store_true", help="train nothing: report what has been measured")
    try:
        settings, chosen = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    datasets.disable_progress_bars()
    claims = list(CLAIMS.values()) if "all" in chosen.claims else [CLAIMS[name] for name in chosen.claims]
    bench = Bench(settings)
    for claim in claims:
        for seed in () if chosen.report else range(settings.seeds):
            for cell in cells(claim):
                bench.record(cell, seed)
        found = known(claim, bench)
        if not found.orderings:
            print(f"{claim.title}: nothing has been compared.")
            continue
        figure = Path(settings.figures or settings.output_dir) / f"reproduction_{claim.name}.svg"
        draw(found, bench, figure)
        print(f"\n{claim.title}: {figure}\n\n{markdown(found, bench)}")


if __name__ == "__main__":
    main()
