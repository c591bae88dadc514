r"""
Writes arithmetic with worked answers, in the form of GSM8K, for `blockgen-hf finetune` and `evaluate-answers`.

The problems are `chain_sum` of reasoning-gym (`pip install reasoning-gym`). Its verifier checks every worked answer,
and the script stops if one is not accepted. No problem of the test file is in the training file.

    python examples/make_arithmetic.py arithmetic

    {"prompt": "4 - 2 + 9 - 9 =", "completion": "\n4 - 2 = 2\n2 + 9 = 11\n11 - 9 = 2\n#### 2"}
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path


PATIENCE = 10_000  # problems in a row that were there before


def worked_answer(expression: str) -> str:
    """Sums from left to right, a line each, and the result behind `####`."""
    total, *rest = expression.split()
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = int(total) + int(term) if sign == "+" else int(total) - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = str(result)
    return "\n".join(["", *lines, f"#### {total}"])


def problems(seed: int, args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Different problems, as long as there are any."""
    import reasoning_gym

    seen: set[str] = set()
    repeats = 0
    options = {"min_terms": 2, "max_terms": args.max_terms, "min_digits": 1, "max_digits": args.max_digits}
    dataset = reasoning_gym.create_dataset("chain_sum", size=2**31 - 1, seed=seed, **options)
    for entry in dataset:
        expression = entry["metadata"]["expression"]
        if expression in seen:
            repeats += 1
            if repeats == PATIENCE:
                raise SystemExit(f"There are about {len(seen):,} such problems: ask for fewer, or for larger ones.")
            continue
        seen.add(expression)
        repeats = 0
        answer = worked_answer(expression)
        if dataset.score_answer(answer.rpartition("#### ")[2], entry) != 1.0:
            raise RuntimeError(f"reasoning-gym does not accept {answer!r} for {expression!r}.")
        yield {"prompt": f"{expression} =", "completion": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=60_000, help="problems to train on")
    parser.add_argument("--test", type=int, default=500, help="problems to evaluate on")
    parser.add_argument("--max-terms", type=int, default=4)
    parser.add_argument("--max-digits", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    stream = problems(args.seed, args)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, number in (("test", args.test), ("train", args.train)):
        rows = [json.dumps(next(stream)) for _ in range(number)]
        (args.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{args.folder / name}.jsonl: {number:,} problems")


if __name__ == "__main__":
    main()
