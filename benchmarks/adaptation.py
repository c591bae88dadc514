"""
What an adapted model has learned against the tokens that it was trained on: the loss of every block size on validation
texts, and the accepted tokens of a draft, from the log that `blockgen-hf adapt` leaves. A Markdown table.

    blockgen-hf convert SOURCE --family causal-lm --output base
    blockgen-hf adapt base --dataset my.jsonl --output-dir runs/adapter training.eval_on_start=true
    python benchmarks/adaptation.py runs/adapter
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, each with the `tokens` trained on before it."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[1]))
    final = run / "trainer_state.json"
    if not final.is_file() and not states:
        raise SystemExit(f"{run} has no trainer_state.json: it is not the folder of a run.")
    log = json.loads((final if final.is_file() else states[-1]).read_text())["log_history"]
    tokens, found = 0, []
    for entry in log:
        tokens = int(entry.get("num_input_tokens_seen", tokens))
        if "eval_loss" in entry:
            found.append({**entry, "tokens": tokens})
    return found


def table(evaluations: list[dict[str, Any]]) -> str:
    """Nats per token and accepted tokens of a draft, a row for each evaluation."""
    losses = _sizes(evaluations, r"eval_nll_block_size_(\d+)")
    drafts = _sizes(evaluations, r"eval_accepted_block_size_(\d+)")
    head = ["step", "tokens", *(f"nats, block {size}" for size in losses), *(f"accepted of {size}" for size in drafts)]
    rows = [head, ["---:"] * len(head)]
    for entry in evaluations:
        values = [entry.get(f"eval_nll_block_size_{size}") for size in losses]
        values += [entry.get(f"eval_accepted_block_size_{size}") for size in drafts]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        rows.append([f"{entry['step']:,}", f"{entry['tokens']:,}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _sizes(evaluations: list[dict[str, Any]], pattern: str) -> list[int]:
    matches = (re.fullmatch(pattern, name) for entry in evaluations for name in entry)
    return sorted({int(match.group(1)) for match in matches if match})


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("run", type=Path, help="output folder of blockgen-hf adapt, also while it is running")
    print(table(read_evaluations(parser.parse_args().run)))


if __name__ == "__main__":
    main()
