"""
Training of the 170M model on one GPU: tokens per second, share of the card's matrix products, peak memory.

"plain" is the same model with a dense mask of [x0 ; z_t] in scaled_dot_product_attention and the logits of the whole
sequence. A step is forward, backward, clipping and AdamW, in bfloat16 autocast (on a GPU) with weights in float32;
every step has a block size of the mixture. FLOPs are six for each weight of the layers and token of either half, and
for each weight of the output layer and token of the noisy half; attention is left out.
"""

import argparse
import gc
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from report import append_row

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.evaluation.throughput import Machine, layer_weights, read_clocks
from blockgen_hf.evaluation.throughput_contenders import SIZES


# What is trained: attention, whether the layers are compiled, whether the plain way.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"attention": "sdpa", "is_plain": True},
    "sdpa": {"attention": "sdpa"},
    "flex_attention": {"attention": "flex_attention"},
    "flex_attention, compiled layers": {"attention": "flex_attention", "is_compiled": True},
}
WARM_UP, LARGEST = 3, 50  # steps


def make_model(args: argparse.Namespace, diffusion_type: str, attention: str) -> BlockGenForDiffusionLM:
    config = BlockGenConfig(
        **SIZES[args.size], diffusion_type=diffusion_type, max_position_embeddings=args.length, hidden_dropout=0.0
    )
    model = BlockGenForDiffusionLM(config).train()
    model.set_attn_implementation(attention)
    return model.to(args.device)


def make_step(model: BlockGenForDiffusionLM, args: argparse.Namespace, is_plain: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = torch.device(args.device)
    # Positions that are given may be any: they get the dense mask.
    more = {"position_ids": torch.arange(args.length, device=device)[None], "skip_logits": False} if is_plain else {}

    def step() -> None:
        tokens = torch.randint(model.config.vocab_size - 1, (args.batch_size, args.length), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tokens, labels=tokens, **more).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(args: argparse.Namespace, diffusion_type: str, name: str, seconds: float) -> dict[str, Any]:
    """Steps for so many seconds, behind a few that warm up."""
    variant, device = VARIANTS[name], torch.device(args.device)
    model = make_model(args, diffusion_type, variant["attention"])
    if variant.get("is_compiled"):
        for layer in model.model.layers:
            layer.compile()
    step = make_step(model, args, variant.get("is_plain", False))
    started = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    warm_up = read_clocks(device)[0] - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [read_clocks(device)[0]]
    while len(times) <= LARGEST and (len(times) < 3 or times[-1] - times[0] < seconds):
        step()
        times.append(read_clocks(device)[0])
    durations = sorted(after - before for before, after in pairwise(times))
    median = durations[len(durations) // 2]
    config, tokens = model.config, args.batch_size * args.length
    flops = 6 * tokens * (2 * layer_weights(config) + config.hidden_size * config.vocab_size)
    return {
        "tokens per second": tokens / median,
        "TFLOP/s": flops / median / 1e12,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "steps": len(durations),
        "seconds of the first steps": round(warm_up, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--seconds", type=float, default=130)
    parser.add_argument("--rows", type=Path, required=True, help="file of results, one line each")
    parser.add_argument("--batch-size", type=int)
    args = parser.parse_args()
    args.length = 1024 if args.size == "base" else 32
    args.batch_size = args.batch_size or (16 if args.size == "base" else 2)
    deadline = time.perf_counter() + args.seconds
    torch.manual_seed(0)
    small = (64, 4) if args.device == "cpu" else (8192, 256)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    machine = Machine(torch.device(args.device), dtype, *small)
    for _ in range(21):  # behind some that bring the card to its clock rate; the median counts
        machine.measure()
    name = f"matrix products of {machine.to_dict()['name']}"
    append_row(args.rows, {"noise": "", "variant": name, "TFLOP/s": machine.flops_per_second / 1e12})
    cases = [(noise, name) for noise in ("masked", "uniform") for name in VARIANTS]
    cases.sort(key=lambda case: "is_compiled" in VARIANTS[case[1]])  # what compiles long comes last
    for number, (noise, name) in enumerate(cases):
        left = deadline - time.perf_counter()
        row: dict[str, Any] = {"noise": noise, "variant": name}
        if left < 0:
            append_row(args.rows, {**row, "error": "no time was left"})
            continue
        try:
            row |= measure(args, noise, name, min(10.0, left / (len(cases) - number) / 2))
            row["share of matrix products"] = row["TFLOP/s"] * 1e12 / machine.flops_per_second
        except Exception as error:  # one variant that fails does not cost the others
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        append_row(args.rows, row)
        torch.compiler.reset()
        gc.collect()  # a compiled layer refers to itself
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
