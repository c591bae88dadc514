"""
Speculation against autoregressive decoding of the same model: tokens per CPU second, and what drafts are worth.

    python benchmarks/speculation.py --repeats 5 --json speculation.json

The contenders take turns (A B C A B C ...); figures are medians over the repeats, which have different seeds. On a CPU
seconds are those of the process, which other jobs on the machine disturb less than the clock on the wall. `random` is
a model of the same size with random weights: no draft predicts what is drawn from it.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.tables import Table


PROMPTS = (
    "Once upon a time",
    "One day, Tom and Lily went to the park",
    "The little dog was sad because",
    "Mia had a red ball",
    "In a big forest there lived",
    "Ben wanted to bake a cake",
    "It was raining, so",
    "Grandma told a story about",
)
SPECULATIVE = {"decoding": "speculative", "fused_drafts": False}
CONTENDERS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "speculative": {"decoding": "speculative", "block_size": 8},
    "speculative, block 4": {**SPECULATIVE, "block_size": 4},
    "speculative, block 8": {**SPECULATIVE, "block_size": 8},
    "rejection": {**SPECULATIVE, "block_size": 8, "acceptance": "rejection"},
    "speculative, block 8, fused": {**SPECULATIVE, "block_size": 8, "fused_drafts": True},
    "speculative, block 8, 2 steps": {**SPECULATIVE, "block_size": 8, "draft_steps": 2},
}


def random_like(model: BlockGenForDiffusionLM) -> BlockGenForDiffusionLM:
    torch.manual_seed(0)
    other = BlockGenForDiffusionLM(model.config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return other


def run(model: BlockGenForDiffusionLM, inputs: list[dict[str, torch.Tensor]], settings: dict[str, Any]) -> Any:
    """Seconds, new tokens, evaluations, drafted and accepted tokens, and the texts."""
    clock: Callable[[], float] = time.process_time if model.device.type == "cpu" else time.perf_counter
    seconds, counts, texts = 0.0, [0, 0, 0, 0], []
    for encoded in inputs:
        started = clock()
        outputs = model.generate(**encoded, return_dict_in_generate=True, **settings)
        texts.append(outputs.sequences.cpu())
        seconds += clock() - started
        drafted = outputs.num_drafted_tokens if settings["decoding"] == "speculative" else None
        counts[0] += int(outputs.num_new_tokens.sum())
        counts[1] += int(outputs.num_function_evaluations.sum())
        counts[2] += 0 if drafted is None else int(drafted.sum())
        counts[3] += 0 if drafted is None else int(outputs.num_accepted_tokens.sum())
    return {"seconds": seconds, "counts": counts, "texts": texts}


def measure(name: str, model: BlockGenForDiffusionLM, batch_size: int, sampled: bool, options: Any) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(shipped_checkpoint(), trust_remote_code=False, padding_side="left")
    chosen = [options.prompts[i : i + batch_size] for i in range(0, len(options.prompts), batch_size)]
    inputs = [dict(tokenizer(batch, return_tensors="pt", padding=True).to(model.device)) for batch in chosen]
    settings = {"max_new_tokens": options.new_tokens, "do_sample": sampled, "eos_token_id": None}
    runs: dict[str, list[Any]] = {contender: [] for contender in options.contenders}
    for repeat in range(options.repeats + 1):  # the first warms up
        for contender in runs:
            torch.manual_seed(repeat)
            runs[contender].append(run(model, inputs, {**settings, **CONTENDERS[contender]}))
    baseline = [found["counts"][0] / found["seconds"] for found in runs["ar"][1:]]
    rows = []
    for contender, found in runs.items():
        rates = [one["counts"][0] / one["seconds"] for one in found[1:]]
        new, evaluations, drafted, accepted = map(sum, zip(*(one["counts"] for one in found[1:]), strict=True))
        pairs = [
            (a, b)
            for one, two in zip(found, runs["ar"], strict=True)
            for a, b in zip(one["texts"], two["texts"], strict=True)
        ]
        same = sum(int((a == b).all(-1).sum()) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        rows.append(
            {
                "model": name,
                "rows": batch_size,
                "drawn": sampled,
                "decoding": contender,
                "tokens_per_evaluation": new / evaluations,
                "accepted_share": accepted / drafted if drafted else None,
                "tokens_per_second": statistics.median(rates),
                "times_ar": statistics.median(rate / ar for rate, ar in zip(rates, baseline, strict=True)),
                "same_texts": same,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--models", default="tinystories-masked,random")
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="`ar` and others, separated by semicolons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.prompts = PROMPTS[: options.num_prompts]
    options.contenders = options.contenders.split(";")
    torch.set_num_threads(1)
    trained = BlockGenForDiffusionLM.from_pretrained(shipped_checkpoint()).eval().to(options.device)
    models = {"tinystories-masked": trained, "random": random_like(trained).to(options.device)}
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    rows = []
    for name, size, sampled in itertools.product(options.models.split(","), sizes, (False, True)):
        rows += measure(name, models[name], size, sampled, options)
    columns = (
        "model",
        "rows",
        "drawn",
        "decoding",
        "tokens / evaluation",
        "accepted",
        "tokens / s",
        "times AR",
        "same",
    )
    cells = [
        [
            row["model"], str(row["rows"]), "yes" if row["drawn"] else "no", row["decoding"],
            f"{row['tokens_per_evaluation']:.2f}",
            "" if row["accepted_share"] is None else f"{row['accepted_share']:.2f}",
            f"{row['tokens_per_second']:.1f}", f"{row['times_ar']:.2f}", f"{row['same_texts']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    print(Table(columns, cells).markdown())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
