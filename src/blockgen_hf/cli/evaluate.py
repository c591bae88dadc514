"""Measure the likelihood of a data set: perplexity of each block size and of the mixture."""

import argparse
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..places import data_place
from ..whole_files import json_text, write_json
from .parsing import (
    MODEL_HELP,
    CommandError,
    add_hub_dataset_arguments,
    add_loading_arguments,
    integer,
    list_of,
    loading_options,
    model_name,
    output_file,
    unescaped,
)


if TYPE_CHECKING:
    from ..evaluation import LengthResult, LikelihoodResult
    from ..training.data_arguments import DataArguments


EXAMPLE = "blockgen-hf evaluate runs/mine --dataset another.txt"
USAGE = "[model] --dataset NAME"
# Options that are fields of `DataArguments`.
_DATA_FIELDS = (
    "dataset",
    "dataset_config",
    "dataset_revision",
    "text_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "prompt_separator",
    "document_separator",
    "max_documents",
    "packing",
    "isolate_documents",
    "add_bos_token",
    "streaming",
    "num_proc",
    "cache_dir",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=model_name, help=f"{MODEL_HELP} (the default)")
    add_loading_arguments(parser.add_argument_group("model"))
    _add_data_arguments(parser.add_argument_group("data"))
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--block-sizes",
        type=list_of(integer(1)),
        metavar="N,N,...",
        help="block sizes, such as 1,4,16 (default: those of training)",
    )
    group.add_argument(
        "--monte-carlo-samples", type=integer(1), default=8, metavar="K", help="draws of noise per row (default: 8)"
    )
    group.add_argument("--batch-size", type=integer(1), default=8, metavar="N", help="rows at a time (default: 8)")
    group.add_argument(
        "--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="seed of the noise (default: 0)"
    )
    group.add_argument(
        "--lengths",
        type=list_of(integer(1)),
        metavar="N,N,...",
        help="by length of the text, in multiples of the model's positions, such as 1,2,4,8",
    )
    group.add_argument(
        "--cache-window", type=integer(1), metavar="N", help="with --lengths: sliding window of N tokens"
    )
    group.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write all results to a JSON file; '-' prints them instead of the table",
    )


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="a file, a glob or a folder (.txt, .jsonl, .parquet ...), or a data set on the Hub",
    )
    add_hub_dataset_arguments(group)
    group.add_argument("--split", metavar="NAME", help="split of a data set on the Hub (default: validation)")
    group.add_argument("--text-column", metavar="NAME", help="column of plain text (default: text)")
    group.add_argument("--prompt-column", metavar="NAME", help="column of prompts, which are not scored")
    group.add_argument("--completion-column", metavar="NAME", help="column of completions, which are scored")
    group.add_argument("--messages-column", metavar="NAME", help="column of conversations (default: messages)")
    group.add_argument(
        "--prompt-separator",
        type=unescaped,
        metavar="TEXT",
        help="text between prompt and completion, \\n for a line break (default: nothing)",
    )
    group.add_argument("--score-prompts", action="store_true", help="score prompts too")
    group.add_argument(
        "--document-separator",
        metavar="TEXT",
        help=r"text between the documents of a .txt file: '<|endoftext|>', '\n' ...",
    )
    group.add_argument(
        "--sequence-length", type=integer(1), metavar="N", help="tokens per row (default: what the model takes)"
    )
    group.add_argument(
        "--packing",
        choices=("packed", "none"),
        help="join documents and cut them into rows (default), or one document per row",
    )
    group.add_argument(
        "--isolate-documents", action="store_true", help="keep packed documents from seeing one another"
    )
    group.add_argument("--add-bos-token", action="store_true", help="begin documents with the BOS token")
    group.add_argument("--max-documents", type=integer(1), metavar="N", help="use the first N documents only")
    group.add_argument("--max-rows", type=integer(1), metavar="N", help="use the first N rows only")
    group.add_argument("--streaming", action="store_true", help="read only what is needed, and keep nothing on disk")
    group.add_argument("--num-proc", type=integer(1), metavar="N", help="number of processes that prepare the data")
    group.add_argument("--cache-dir", metavar="DIR", help="folder for prepared data (default: that of datasets)")


def run(args: argparse.Namespace) -> int:
    if args.cache_window is not None and args.lengths is None:
        raise CommandError("--cache-window has no meaning without --lengths.")
    if args.lengths is not None and args.sequence_length is not None:
        raise CommandError("--sequence-length has no meaning with --lengths, which makes rows of the longest of them.")
    from .loading import load, one_line_errors, quiet_transformers, resolve_device, show_bars_of_datasets

    with one_line_errors():
        from ..evaluation.processes import launched_process

        process = launched_process(resolve_device(args.device) == "cpu")
        is_main = process is None or process.is_main_process
        is_shown = is_main and sys.stderr.isatty()
        data = _data_arguments(args)
        with quiet_transformers():
            model, tokenizer = load(args.model, **loading_options(args))
            data.sequence_length = _sequence_length(args, model.config.max_position_embeddings)
            _check_sizes(model.config, args.block_sizes)
        show_bars_of_datasets(is_shown)
        with nullcontext() if process is None else process.local_main_process_first():
            rows = _load_rows(data, tokenizer, args.max_rows)

        started = time.perf_counter()
        result = _evaluate(args, model, rows, is_shown)
        seconds = time.perf_counter() - started
        if is_main:
            _report(args, model, data, result, seconds)
    if process is not None:
        process.destroy_process_group()
    return 0


def _data_arguments(args: argparse.Namespace) -> "DataArguments":
    from ..training.data_arguments import DataArguments

    given = {name: getattr(args, name) for name in _DATA_FIELDS if getattr(args, name) is not None}
    split = args.split or ("train" if data_place(args.dataset) == "files" else "validation")
    return DataArguments(**given, dataset_split=split, train_on_prompt=args.score_prompts)


def _sequence_length(args: argparse.Namespace, positions: int) -> int:
    if args.lengths is not None:
        return max(args.lengths) * positions
    given: int | None = args.sequence_length
    if given is not None and given > positions:
        raise CommandError(f"--sequence-length {given}: the model takes {positions} tokens at most.")
    return positions if given is None else given


def _check_sizes(config: Any, sizes: list[int] | None) -> None:
    """Refused before the data are prepared."""
    from ..evaluation.likelihood import checked_block_sizes

    checked_block_sizes(config, sizes)


def _evaluate(args: argparse.Namespace, model: Any, rows: Any, is_shown: bool) -> "LikelihoodResult | LengthResult":
    from ..evaluation.lengths import evaluate_lengths
    from ..evaluation.likelihood import evaluate_likelihood

    common = dict(batch_size=args.batch_size, seed=args.seed, progress=is_shown)
    if args.lengths is None:
        return evaluate_likelihood(model, rows, args.block_sizes, args.monte_carlo_samples, **common)
    return evaluate_lengths(
        model,
        rows,
        args.lengths,
        args.block_sizes,
        args.monte_carlo_samples,
        cache_window=args.cache_window,
        **common,
    )


def _load_rows(data: "DataArguments", tokenizer: Any, max_rows: int | None) -> Any:
    from ..training.data import load_datasets

    rows, _ = load_datasets(data, tokenizer)
    if max_rows is None:
        return rows
    return rows.select(range(min(max_rows, len(rows)))) if hasattr(rows, "__len__") else rows.take(max_rows)


def _report(
    args: argparse.Namespace,
    model: Any,
    data: "DataArguments",
    result: "LikelihoodResult | LengthResult",
    seconds: float,
) -> None:
    from dataclasses import asdict

    from ..evaluation import LengthResult
    from .figures import length_tables, likelihood_table, noise_name

    everything = {
        "model": model.name_or_path,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": asdict(data),
        "seed": args.seed,
        "seconds": round(seconds, 3),
        **result.to_dict(),
    }
    if str(args.json) == "-":
        print(json_text(everything), end="")
        return
    if args.json is not None:
        write_json(args.json, everything)
    kind = f"{noise_name(model.config)}, {model.num_parameters() / 1e6:.1f}M parameters"
    print(f"Model: {model.name_or_path} ({kind})")
    num_skipped = 0 if isinstance(result, LengthResult) else result.num_skipped
    skipped = f", {num_skipped:,} rows skipped" if num_skipped else ""
    print(f"Data: {args.dataset}, {result.num_sequences:,} rows, {result.num_tokens:,} tokens scored{skipped}")
    print(f"{result.num_draws} Monte-Carlo draws a row, seed {args.seed}, {seconds:.1f} s\n")
    if isinstance(result, LengthResult):
        window = "no window" if result.cache_window is None else f"a window of {result.cache_window} tokens"
        by_position, up_to_end = length_tables(result)
        print(f"nll by position, {window}\n{by_position.text()}\n\nPerplexity of texts by length\n{up_to_end.text()}")
        return
    print(likelihood_table(result.metrics()).text())
    if result.weights:
        weights = ", ".join(f"{size}: {weight:.3g}" for size, weight in result.weights.items())
        print(f"\nMixture weights: {weights}. Standard errors are over the draws, on these data.")
