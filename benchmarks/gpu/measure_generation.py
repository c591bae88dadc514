"""
Generation on one GPU, in bfloat16: the cases of benchmarks/generation.py for batches of 1, 16 and 128 rows, against
the plain loop and transformers' GPT-2 of the same size. Each contender of each case is a row.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import append_row
from transformers import set_seed

from blockgen_hf.evaluation.throughput import Case, Contender, Machine, measure
from blockgen_hf.evaluation.throughput_contenders import (
    SIZES,
    Decoding,
    blockgen_contenders,
    compiled_contenders,
    gpt2_contender,
    gpt2_like,
    random_model,
)


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plain_generation import plain_contenders


DECODINGS = ("ar", "block_diffusion:4", "block_diffusion:16", "block_diffusion:64", "arpc:8")
COMPILED = ("ar", "block_diffusion:16")
BATCH_SIZES = (1, 16, 128)
REPEATS = 2


def measure_one(contender: Contender, case: Case, machine: Machine) -> dict[str, Any]:
    row: dict[str, Any] = {
        "noise": case.diffusion_type,
        "batch": case.batch_size,
        "decoding": contender.decoding,
        "by": contender.name,
    }
    try:
        found = measure(case, [contender], machine, REPEATS)[0]
        figures = found.figures()
    except Exception as error:  # one contender that fails does not cost the others
        return row | {"error": f"{type(error).__name__}: {error}"[:200]}
    return row | {
        "tokens per second": figures["tokens_per_second"],
        "evaluations": figures["num_function_evaluations"],
        "ms per forward": figures["milliseconds_per_forward"],
        "outside the network": figures["share_outside_network"],
        "of matrix products": figures["fraction_of_matrix_products"],
        "of bandwidth": figures["fraction_of_bandwidth"],
        "first call, s": round(found.warm_up_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--rows", type=Path, required=True, help="file of results, one line each")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.seconds
    is_tiny, device = args.size == "tiny", torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    machine = Machine(device, dtype, *((64, 4) if args.device == "cpu" else (8192, 1024)))
    decodings = [Decoding.parse(text, block_size=16) for text in DECODINGS]
    models = {}
    for noise in ("masked", "uniform"):
        set_seed(0)
        models[noise] = random_model(args.size, noise).to(device=device, dtype=dtype)
    gpt2 = gpt2_contender(gpt2_like(models["masked"]))
    cases = []
    for batch_size in (1, 2) if is_tiny else BATCH_SIZES:
        for noise, model in models.items():
            contenders = blockgen_contenders(model, decodings) + plain_contenders(model, decodings)
            case = Case(noise, 0, batch_size, 16 if is_tiny else 64)
            cases += [(case, contender) for contender in [gpt2, *contenders]]
    if not is_tiny:  # last, because compiling takes long
        compiled = compiled_contenders(models["masked"], [Decoding.parse(text, 16) for text in COMPILED])
        cases += [(Case("masked", 0, 1, 64), contender) for contender in compiled]
    for case, contender in cases:
        if time.perf_counter() > deadline:
            append_row(args.rows, {"error": f"no time was left for {contender.name}, {contender.decoding}, {case}"})
            continue
        append_row(args.rows, measure_one(contender, case, machine))


if __name__ == "__main__":
    main()
