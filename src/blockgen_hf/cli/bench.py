"""Measure how fast a model generates, next to GPT-2 of the same size."""

import argparse
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..whole_files import write_json
from .parsing import (
    DECODINGS_HELP,
    MODEL_HELP,
    CommandError,
    add_decodings,
    add_loading_arguments,
    cpu_weights,
    integer,
    list_of,
    loading_options,
    model_name,
    output_file,
)


if TYPE_CHECKING:
    from ..evaluation.throughput import Case, Contender, Machine, Measurement
    from ..evaluation.throughput_contenders import Decoding


# Makes further contenders of a model and the decodings.
MoreContenders = Callable[[Any, "list[Decoding]"], "list[Contender]"]

EXAMPLE = "blockgen-hf bench --model runs/mine --prefixes 0,64 --decodings ar,arpc:8"
USAGE = ""
_BLOCK_SIZE = 16
_DECODINGS = "ar,block_diffusion:4,block_diffusion:16,block_diffusion:64,arpc:8,arpc:16"
_DIFFUSION_TYPES = ("masked", "uniform")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=model_name, help=f"{MODEL_HELP} (default: random weights)")
    group.add_argument(
        "--size",
        choices=("base", "tiny"),
        help="size of a model with random weights: that of the paper (default), or tiny",
    )
    group.add_argument(
        "--diffusion-types",
        type=list_of(_diffusion_type),
        metavar="NAME,...",
        help="noise of models with random weights (default: masked,uniform)",
    )
    add_loading_arguments(group)
    group.add_argument(
        "--cpu-weights",
        type=list_of(cpu_weights),
        default=[],
        metavar="NAME,...",
        help="int8, float16, float32: also measure the model with packed weights, as blockgen-int8 ...",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="also measure the model with compiled layers and a static cache, as blockgen-compiled",
    )
    group = parser.add_argument_group("cases")
    add_decodings(group, _DECODINGS, DECODINGS_HELP, "block_diffusion:16:top_k=50")
    group.add_argument(
        "--block-size",
        type=integer(1),
        metavar="N",
        help=f"tokens denoised together (default: {_BLOCK_SIZE}; of a draft that is revised, that of generate)",
    )
    group.add_argument(
        "--prefixes",
        type=list_of(integer(0)),
        default="0,512",
        metavar="N,...",
        help="lengths of the prompts, in tokens (default: 0,512)",
    )
    group.add_argument(
        "--batch-sizes",
        type=list_of(integer(1)),
        default="1,4,16",
        metavar="N,...",
        help="rows of a batch (default: 1,4,16)",
    )
    group.add_argument(
        "--new-tokens", type=integer(1), default=64, metavar="N", help="new tokens per row (default: 64)"
    )
    group = parser.add_argument_group("measurement")
    group.add_argument("--contenders", type=list_of(str), metavar="NAME,...", help="what is measured (default: all)")
    group.add_argument("--repeats", type=integer(1), default=3, metavar="N", help="number of rounds (default: 3)")
    group.add_argument("--threads", type=integer(1), metavar="N", help="CPU threads (default: torch's)")
    group.add_argument("--json", type=output_file, metavar="FILE", help="write all results to a JSON file")


def _diffusion_type(text: str) -> str:
    if text not in _DIFFUSION_TYPES:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_DIFFUSION_TYPES)}, but is {text!r}")
    return text


def run(args: argparse.Namespace, more_contenders: MoreContenders | None = None) -> int:
    _check(args)

    from .loading import one_line_errors, quiet_transformers

    with quiet_transformers(), one_line_errors():
        from ..evaluation.throughput_contenders import Decoding

        decodings = [Decoding.parse(text, args.block_size, default=_BLOCK_SIZE) for text in args.decodings]
        report = Report(args)
        for model in _models(args):
            _benchmark(args, model, decodings, more_contenders, report)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses options that would be ignored."""
    if args.model is not None:
        for name in ("size", "diffusion_types"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} is for random weights: leave it out with --model.")
    elif args.revision is not None or args.trust_remote_code:
        raise CommandError("--revision and --trust-remote-code are for a --model.")


def _models(args: argparse.Namespace) -> Iterator[Any]:
    """The models, one after the other."""
    import torch
    from transformers import set_seed

    from ..evaluation.throughput_contenders import random_model
    from .loading import load, resolve_device

    length = max(args.prefixes) + args.new_tokens
    if args.model is not None:
        model, _ = load(args.model, **loading_options(args))
        positions = model.config.max_position_embeddings
        if length > positions:
            raise CommandError(
                f"--prefixes and --new-tokens make {length} tokens, but the model takes {positions} at most."
            )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.model is not None:
        yield model
        return
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    for diffusion_type in args.diffusion_types or _DIFFUSION_TYPES:
        set_seed(0)
        model = random_model(args.size or "base", diffusion_type, max(1024, length))
        if args.attn_implementation is not None:
            model.set_attn_implementation(args.attn_implementation)
        yield model.to(device=resolve_device(args.device), dtype=dtype)


def _benchmark(
    args: argparse.Namespace,
    model: Any,
    decodings: "list[Decoding]",
    more_contenders: MoreContenders | None,
    report: "Report",
) -> None:
    from ..evaluation.throughput import Case, Machine, measure
    from ..evaluation.throughput_contenders import (
        blockgen_contenders,
        compiled_contenders,
        gpt2_contender,
        gpt2_like,
    )
    from ..quantization import quantize_for_cpu

    contenders = blockgen_contenders(model, decodings)
    for weights in args.cpu_weights:
        quantized = quantize_for_cpu(deepcopy(model), weights)
        contenders += blockgen_contenders(quantized, decodings, f"blockgen-{weights}")
    if args.compile:
        contenders += compiled_contenders(model, decodings)
    if more_contenders is not None:
        contenders += more_contenders(model, decodings)
    contenders.append(gpt2_contender(gpt2_like(model)))
    names = [contender.name for contender in contenders]
    unknown = [name for name in args.contenders or () if name not in names]
    if unknown:
        raise CommandError(f"--contenders: there are {', '.join(dict.fromkeys(names))}, but not {', '.join(unknown)}.")
    contenders = [contender for contender in contenders if contender.name in (args.contenders or names)]
    report.add_model(model)
    for prefix in args.prefixes:
        for batch_size in args.batch_sizes:
            case = Case(model.config.diffusion_type, prefix, batch_size, args.new_tokens)
            machine = Machine(model.device, model.dtype, *((256, 16) if args.size == "tiny" else ()))
            found = measure(case, contenders, machine, args.repeats, args.block_size or _BLOCK_SIZE, _progress(case))
            report.add_case(case, found, machine)


def _progress(case: "Case") -> Callable[[str], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(what: str) -> None:
        where = f"{case.diffusion_type}, prefix {case.prefix}, batch {case.batch_size}"
        print(f"\r\033[K{where}: {what}", end="", file=sys.stderr, flush=True)

    return show


class Report:
    """Prints a table a case, and keeps the file of figures complete up to it: a long run may be stopped."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.file: Path | None = args.json
        settings = {name: value for name, value in vars(args).items() if name not in ("run", "parser", "json")}
        self.figures: dict[str, Any] = {"settings": settings, "models": [], "cases": []}

    def add_model(self, model: Any) -> None:
        from ..evaluation.throughput_contenders import denoiser_entropy

        config = model.config
        facts = {
            "model": model.name_or_path or "random weights",
            "diffusion_type": config.diffusion_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "denoiser_entropy": denoiser_entropy(model),
        }
        self.figures["models"].append(facts)
        print(
            "{model}, {diffusion_type}: {layers} x {hidden_size}, V = {vocab_size:,}, {dtype}, x_hat of "
            "{denoiser_entropy:.1f} nats".format(**facts),
            flush=True,
        )

    def add_case(self, case: "Case", measurements: "list[Measurement]", machine: "Machine") -> None:
        from dataclasses import asdict

        from ..evaluation.throughput import table

        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        results = [measurement.to_dict() for measurement in measurements]
        self.figures["cases"].append({**asdict(case), "machine": machine.to_dict(), "results": results})
        print(f"\nPrefix {case.prefix}, batch {case.batch_size}, {case.new_tokens} new tokens a row\n")
        print(table(measurements).text())
        speed = "{gflops_per_second:,.0f} GFLOP/s, {gigabytes_per_second:.1f} GB/s"
        where = "{name}, threads: {threads}, torch {torch}: "
        print(f"\n{(where + speed).format(**machine.to_dict())}\n", flush=True)
        for found in measurements:
            if found.contender.is_compiled:
                print(f"{found.contender.decoding} compiled in a first call of {found.warm_up_seconds:.0f} s.\n")
        self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        write_json(self.file, self.figures)
