"""Generate texts with many settings, and tabulate quality against function evaluations and speed."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..whole_files import write_whole
from .parsing import (
    MODEL_HELP,
    CommandError,
    add_cpu_weights,
    add_decodings,
    add_loading_arguments,
    integer,
    list_of,
    loading_options,
    model_name,
    positive,
    read_texts,
)


if TYPE_CHECKING:
    from ..evaluation.samples import SampleCell, SampleResults, SampleScorer, SkippedCell


EXAMPLE = "blockgen-hf evaluate-samples runs/mine --nfe 4,8,16 --num-samples 8 --judge none"
USAGE = "[model]"
_JUDGE = "openai-community/gpt2-large"  # of the paper
_DECODINGS = "ar,block_diffusion,arpc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=model_name, help=f"{MODEL_HELP} (the default)")
    group = parser.add_argument_group("model")
    add_loading_arguments(group)
    add_cpu_weights(group)
    _add_grid_arguments(parser.add_argument_group("settings, of which every combination is a cell"))
    _add_text_arguments(parser.add_argument_group("texts"))
    _add_score_arguments(parser.add_argument_group("scores"))
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="folder for texts and results; existing texts and scores are reused (default: runs/samples)",
        default=Path("runs/samples"),
    )
    group.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    group.add_argument("--dry-run", action="store_true", help="list the cells and their cost, and generate nothing")


def _add_grid_arguments(group: argparse._ArgumentGroup) -> None:
    add_decodings(
        group, _DECODINGS, "ar, speculative, block_diffusion or arpc", "arpc:corrector=ar_kl:corrector_start=1"
    )
    group.add_argument(
        "--nfe",
        type=list_of(integer(1)),
        default="4,8,16,32,64",
        metavar="N,...",
        help="function evaluations per block, AR passes included (default: 4,8,16,32,64)",
    )
    group.add_argument(
        "--block-sizes",
        type=list_of(integer(1)),
        metavar="N,...",
        help="tokens denoised together (default: the model's largest)",
    )
    group.add_argument(
        "--ar-seed",
        type=list_of(integer(0)),
        default="0",
        metavar="N,...",
        help="number of first tokens generated autoregressively (default: 0)",
    )
    group.add_argument(
        "--temperatures",
        type=list_of(positive),
        default="1",
        metavar="X,...",
        help="temperatures of all draws (default: 1)",
    )
    group.add_argument(
        "--top-p", type=list_of(_share), default="1", metavar="X,...", help="top-p of all draws (default: 1)"
    )


def _add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-samples", type=integer(1), default=64, metavar="N", help="texts per cell (default: 64)")
    group.add_argument(
        "--max-new-tokens", type=integer(1), metavar="N", help="length of every text (default: what the model takes)"
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file with one prompt per line, or .jsonl with a `prompt` in each line",
    )
    group.add_argument(
        "--batch-size", type=integer(1), default=32, metavar="N", help="texts generated together (default: 32)"
    )
    group.add_argument("--seed", type=integer(0), default=0, metavar="N", help="seed of the texts (default: 0)")


def _add_score_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--judge",
        metavar="NAME",
        help=f"causal language model for generative perplexity, a folder or on the Hub, or none (default: {_JUDGE})",
    )
    group.add_argument("--judge-gguf", type=Path, metavar="FILE", help="GGUF file with the judge")
    group.add_argument(
        "--judge-start-token", metavar="TOKEN", help="token before each text (default: the judge's BOS, or its EOS)"
    )
    group.add_argument(
        "--judge-max-length", type=integer(1), metavar="N", help="longest text that the judge reads, in tokens"
    )
    group.add_argument(
        "--judge-batch-size", type=integer(1), default=8, metavar="N", help="texts scored together (default: 8)"
    )
    group.add_argument(
        "--references",
        type=Path,
        metavar="FILE",
        help="texts for MAUVE: text file with one per line, or .jsonl with a `text` in each line",
    )


def _share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, but is {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    _check(args)

    from .loading import load, one_line_errors, pack_weights, quiet_transformers, resolve_device

    with quiet_transformers(), one_line_errors():
        from ..evaluation.processes import launched_process
        from ..evaluation.samples import evaluate_samples, sample_cells

        process = launched_process(resolve_device(args.device) == "cpu")
        model, tokenizer = load(args.model, **loading_options(args))
        pack_weights(model, args.cpu_weights)
        prompts = [] if args.prompts is None else read_texts(args.prompts, "--prompts", "prompt")
        max_new_tokens = _length_of_texts(args, model, tokenizer, prompts)
        cells, skipped = sample_cells(
            model,
            args.decodings,
            max_new_tokens=max_new_tokens,
            nfe=args.nfe,
            block_sizes=args.block_sizes,
            ar_seed_tokens=args.ar_seed,
            temperatures=args.temperatures,
            top_p=args.top_p,
        )
        is_main = process is None or process.is_main_process
        if args.dry_run:
            if is_main:
                _list_cells(cells, skipped, args, max_new_tokens)
            return 0
        results = evaluate_samples(
            model,
            tokenizer,
            cells,
            args.output_dir,
            num_samples=args.num_samples,
            max_new_tokens=max_new_tokens,
            scorer=_scorer(args, tokenizer, max_new_tokens) if is_main else None,
            prompts=prompts,
            seed=args.seed,
            batch_size=args.batch_size,
            skipped=skipped,
            overwrite=args.overwrite,
            progress=_progress if is_main else None,
        )
        if results is not None:
            _report(results, args.output_dir)
    if process is not None:
        process.destroy_process_group()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses options that would be ignored, before anything is loaded."""
    if args.judge is not None and args.judge_gguf is not None:
        raise CommandError("--judge and --judge-gguf are two judges: give one of them.")
    if args.judge_gguf is not None and not args.judge_gguf.is_file():
        raise CommandError(f"--judge-gguf {args.judge_gguf}: there is no such file.")
    if args.judge == "none":
        for name in ("judge_start_token", "judge_max_length", "references"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} has no meaning with --judge none.")


def _length_of_texts(args: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[str]) -> int:
    """What was asked for, or what the model has room for behind the prompts."""
    if args.max_new_tokens is not None:
        return int(args.max_new_tokens)
    from ..prompts import PromptEncoder

    longest = max(map(len, map(PromptEncoder(tokenizer), prompts)), default=0)
    room = model.config.max_position_embeddings - longest
    if room < 1:
        raise CommandError(f"--prompts: one has {longest} tokens, which leave the model no room for a text.")
    return int(room)


def _scorer(args: argparse.Namespace, tokenizer: Any, max_new_tokens: int) -> "SampleScorer":
    """With the judge loaded: if it cannot be, nothing has been drawn in vain."""
    from ..evaluation.samples import SampleScorer, cut_texts

    try:
        from ..metrics.generative_perplexity.generative_perplexity import load_judge
    except ModuleNotFoundError as error:
        raise CommandError(
            f"Scores need {error.name}, which is not installed: pip install 'blockgen-hf[eval]'."
        ) from error
    from .loading import resolve_device

    judge = None
    if args.judge != "none":
        name, gguf = args.judge or _JUDGE, args.judge_gguf
        source = (name, None) if gguf is None else (str(gguf.parent), gguf.name)
        device = resolve_device(args.device)
        try:
            judge = load_judge(source[0], gguf_file=source[1], start_token=args.judge_start_token, device=device)
        except OSError as error:
            raise CommandError(
                f"The judge {name if gguf is None else gguf} cannot be loaded. Give another with --judge or "
                f"--judge-gguf, or --judge none. {error}"
            ) from error
    references = [] if args.references is None else read_texts(args.references, "--references", "text")
    return SampleScorer(
        tokenizer,
        judge,
        max_length=args.judge_max_length,
        batch_size=args.judge_batch_size,
        references=cut_texts(tokenizer, references, max_new_tokens) if references else (),
    )


def _list_cells(
    cells: "list[SampleCell]", skipped: "list[SkippedCell]", args: argparse.Namespace, max_new_tokens: int
) -> None:
    from ..tables import Table, number

    rows = [
        (cell.name, number(cell.nfe, "d"), f"{cell.max_evaluations:,}", f"{cell.max_evaluations / max_new_tokens:.2f}")
        for cell in cells
    ]
    print(Table(("cell", "NFE a block", "NFE a text, at most", "NFE a token, at most"), rows).text())
    each = sum(cell.max_evaluations for cell in cells)
    passes = -(-args.num_samples // args.batch_size) * each
    print(
        f"\n{len(cells)} cells of {args.num_samples:,} texts of {max_new_tokens:,} tokens: at most "
        f"{args.num_samples * each:,} function evaluations, in {passes:,} passes of up to {args.batch_size:,} texts."
    )
    for one in skipped:
        print(f"Skipped: {one.name}: {one.reason}")


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _report(results: "SampleResults", output_dir: Path) -> None:
    """Prints the tables, and writes them and the plot beside the figures."""
    from importlib.util import find_spec

    from ..evaluation.samples_tables import markdown, plain, plot

    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    write_whole(output_dir / "results.md", markdown(results))
    print(plain(results))
    written = ["results.json", "results.md"]
    if find_spec("matplotlib") is None:
        print("No plot: it needs matplotlib (pip install 'blockgen-hf[eval]').")
    else:
        write_whole(output_dir / "quality.svg", plot(results))
        written.append("quality.svg")
    print(f"In {output_dir}: {', '.join(written)}, and every text in texts/.")
