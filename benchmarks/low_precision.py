"""
Low precision on this CPU: milliseconds of a forward pass, and what it costs in likelihood.

    OMP_NUM_THREADS=1 python benchmarks/low_precision.py speed
    OMP_NUM_THREADS=1 python benchmarks/low_precision.py likelihood --file valid.txt

`speed` passes fully noised tokens through a model of the paper's size (12 x 768, V = 50,258) with random weights: all
kinds of weights in turn, CPU seconds of the process, medians. `likelihood` takes the shipped checkpoint and a file of
stories with a line <|endoftext|> between them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.evaluation.figures import LikelihoodFigure, likelihood_metrics, mixture_weights
from blockgen_hf.evaluation.likelihood import sequence_nll
from blockgen_hf.evaluation.rows import collated
from blockgen_hf.evaluation.throughput_contenders import random_model
from blockgen_hf.quantization import quantize_for_cpu
from blockgen_hf.training import DataArguments, load_datasets


def torchao(kind: str) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """As `TorchAoConfig(..., include_input_output_embeddings=True)`, but for the embedding."""

    def quantize(model: PreTrainedModel) -> PreTrainedModel:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, kind)())
        return model

    return quantize


def quanto(model: PreTrainedModel) -> PreTrainedModel:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)
    return model


KINDS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "quantize_for_cpu int8": quantize_for_cpu,
    "quantize_for_cpu float16": lambda model: quantize_for_cpu(model, "float16"),
    "quantize_for_cpu float32": lambda model: quantize_for_cpu(model, "float32"),
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto int8 weights": quanto,
}
PASSES = [(1, 2), (4, 2), (1, 16), (1, 32), (4, 16)]  # rows, tokens a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.set_defaults(run=speed)
    command.add_argument("--repeats", type=int, default=5)
    command = commands.add_parser("likelihood")
    command.set_defaults(run=likelihood)
    command.add_argument("--file", required=True)
    command.add_argument("--rows", type=int, default=200)
    command.add_argument("--draws", type=int, default=4)
    for command in commands.choices.values():
        command.add_argument("--kinds", default=",".join(KINDS), help="default: all")
    args = parser.parse_args()
    args.run(args)


def speed(args: argparse.Namespace) -> None:
    set_seed(0)
    whole = random_model("base", "masked")
    models = {kind: KINDS[kind](deepcopy(whole)) for kind in args.kinds.split(",")}
    print(f"| trunk + head, ms | {' | '.join(f'{rows} x {length}' for rows, length in PASSES)} |")
    print("|---|" + "---:|" * len(PASSES))
    seconds: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for rows, length in PASSES:
        for repeat in range(args.repeats + 1):
            for kind, model in models.items():
                measured = forward_seconds(model, rows, length)
                if repeat:
                    seconds.setdefault((kind, rows, length), []).append(measured)
    for kind in models:
        cells = []
        for rows, length in PASSES:
            parts = zip(*seconds[kind, rows, length], strict=True)
            cells.append(" + ".join(f"{1000 * statistics.median(part):.0f}" for part in parts))
        print(f"| {kind} | {' | '.join(cells)} |")


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, rows: int, length: int) -> tuple[float, float]:
    """Of trunk and head, with the modulations at hand, as in `generate`."""
    noise = model.diffusion.prior((rows, length), model.device)
    positions = torch.arange(length)[None]
    inputs: dict[str, Any] = dict(
        noisy_position_ids=positions, position_ids=positions[:, :0], block_size=length, is_full=True
    )
    modulations = model.model.constant_modulations(model.device)
    started = time.process_time()
    states = model.model(noise[:, :0], noise, **inputs, modulations=modulations).last_hidden_state
    between = time.process_time()
    model.lm_head(states)
    return between - started, time.process_time() - between


def likelihood(args: argparse.Namespace) -> None:
    folder = shipped_checkpoint()
    whole = BlockGenForDiffusionLM.from_pretrained(folder).eval()
    data = DataArguments(
        dataset=args.file, document_separator="<|endoftext|>", sequence_length=whole.config.max_position_embeddings
    )
    rows = load_datasets(data, AutoTokenizer.from_pretrained(folder))[0]
    rows = rows.select(range(min(args.rows, len(rows))))
    reference: dict[str, torch.Tensor] = {}
    for kind in args.kinds.split(","):
        figures = resampled(KINDS[kind](deepcopy(whole)), rows, args.draws)
        reference = reference or figures
        if kind == args.kinds.split(",")[0]:
            print(f"| nats a token, {len(rows)} rows | {' | '.join(figures)} |\n|---|" + "---:|" * len(figures))
            print(f"| {kind} | {' | '.join(f'{values[0]:.4f}' for values in figures.values())} |")
            continue
        changes = [values - reference[name] for name, values in figures.items()]
        cells = [f"{1000 * change[0]:+.2f} ± {1000 * change[1:].std():.2f}" for change in changes]
        print(f"| {kind}, change in 1/1000 | {' | '.join(cells)} |", flush=True)


def resampled(model: PreTrainedModel, rows: Any, draws: int, resamples: int = 200) -> dict[str, torch.Tensor]:
    """
    Figures of the rows and, behind them, of bootstrap resamples of the rows, the same for every model: the standard
    deviation of a difference over these is its standard error. Noise is the same for every model too.
    """
    sizes, config = model.config.block_sizes, model.config
    batches = [sequence_nll(model, batch, sizes, draws) for _, batch in collated(rows, 8, None)]
    nll = torch.cat(batches)
    num_tokens = torch.tensor([len(row["input_ids"]) for row in rows])
    gamma = mixture_weights(sizes, config.block_size_weights, sizes, None)
    choices = torch.randint(len(nll), (resamples, len(nll)), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    for chosen in [torch.arange(len(nll)), *choices]:
        result = likelihood_metrics(nll[chosen], num_tokens[chosen], sizes, gamma)
        named: dict[str, LikelihoodFigure | None] = {f"block {size}": result.block_sizes[size] for size in sizes}
        named["mixture"] = result.log_sum_exp_corrected
        for name, figure in named.items():
            if figure is not None:
                found.setdefault(name, []).append(figure.nll)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


if __name__ == "__main__":
    main()
