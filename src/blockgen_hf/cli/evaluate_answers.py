"""Ask a model questions under several decodings, and report accuracy and cost."""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..places import data_place
from .finetune import known_settings
from .parsing import (
    DECODINGS_HELP,
    MODEL_HELP,
    CommandError,
    add_cpu_weights,
    add_decodings,
    add_hub_dataset_arguments,
    add_loading_arguments,
    integer,
    list_of,
    loading_options,
    model_name,
    unescaped,
)


if TYPE_CHECKING:
    from ..evaluation.accuracy import AnswerResult


EXAMPLE = "blockgen-hf evaluate-answers runs/gsm8k --dataset openai/gsm8k --decodings ar,arpc:8"
USAGE = "[model] --dataset NAME"
_DECODINGS = "ar:do_sample=False,block_diffusion:16,arpc:16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=model_name, help=f"{MODEL_HELP} (the default)")
    group = parser.add_argument_group("model")
    group.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT adapter to merge into the model")
    add_loading_arguments(group)
    add_cpu_weights(group)
    _add_data_arguments(parser.add_argument_group("questions"))
    _add_sample_arguments(parser.add_argument_group("answers"))
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/answers"),
        metavar="DIR",
        help="folder for generations.jsonl, results.json and table.md; existing generations are reused (default: "
        "runs/answers)",
    )
    group.add_argument("--overwrite", action="store_true", help="start again, and replace existing results")


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="a .jsonl or .json file, a folder, or a data set on the Hub (openai/gsm8k)",
    )
    add_hub_dataset_arguments(group)
    group.add_argument(
        "--split", default="test", metavar="NAME", help="split of a data set on the Hub (default: test)"
    )
    group.add_argument("--question-column", metavar="NAME", help="column of questions (default: question or prompt)")
    group.add_argument("--answer-column", metavar="NAME", help="column of answers (default: answer or completion)")
    group.add_argument("--limit", type=integer(1), metavar="N", help="ask the first N questions only")
    group.add_argument("--cache-dir", metavar="DIR", help="folder for downloaded data (default: that of datasets)")
    group.add_argument(
        "--prompt-separator",
        type=unescaped,
        metavar="TEXT",
        help="text after a question, as in training; \\n for a line break (default: nothing; openai/gsm8k: \\n)",
    )
    group.add_argument("--add-bos-token", action="store_true", help="begin questions with the BOS token")


def _add_sample_arguments(group: argparse._ArgumentGroup) -> None:
    add_decodings(group, _DECODINGS, DECODINGS_HELP, "arpc:8:block_size=8:temperature=0.5")
    group.add_argument(
        "--block-size", type=integer(1), metavar="N", help="tokens denoised together (default: the model's largest)"
    )
    group.add_argument(
        "--num-samples", type=integer(1), default=1, metavar="N", help="answers per question (default: 1)"
    )
    group.add_argument(
        "--k", type=list_of(integer(1)), default="1", metavar="N,...", help="values of k for pass@k (default: 1)"
    )
    group.add_argument(
        "--max-new-tokens", type=integer(1), default=256, metavar="N", help="longest answer (default: 256)"
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--last-number",
        action="store_true",
        help="read the last number of a text without #### (default if the reference answers have no ####)",
    )
    form.add_argument(
        "--programs", action="store_true", help="answers are Python programs, as in TinyGSM: run them in a sandbox"
    )
    group.add_argument(
        "--batch-size", type=integer(1), default=16, metavar="N", help="answers generated together (default: 16)"
    )
    group.add_argument(
        "--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="seed of the answers (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise CommandError(f"--output-dir {args.output_dir}: is a file.")
    if args.adapter is not None and not (args.adapter / "adapter_config.json").is_file():
        raise CommandError(f"--adapter {args.adapter}: is no folder with an adapter_config.json.")

    from .loading import (
        load,
        one_line_errors,
        pack_weights,
        quiet_transformers,
        resolve_device,
        show_bars_of_datasets,
    )

    with one_line_errors():
        from ..evaluation.processes import launched_process

        process = launched_process(resolve_device(args.device) == "cpu")
        is_main = process is None or process.is_main_process
        show_bars_of_datasets(is_main and sys.stderr.isatty())
        questions = list(islice(_read_rows(args), args.limit))
        with quiet_transformers():
            model, tokenizer = load(args.model, **loading_options(args))
            name = model.name_or_path
            if args.adapter is not None:
                model, name = _with_adapter(model, args.adapter), f"{name} with {args.adapter}"
            pack_weights(model, args.cpu_weights)

            from ..evaluation.accuracy import evaluate_answers
            from ..quantization import weights_format

            started = time.perf_counter()
            result = evaluate_answers(
                model,
                tokenizer,
                questions,
                args.decodings,
                num_samples=args.num_samples,
                k=args.k,
                max_new_tokens=args.max_new_tokens,
                block_size=args.block_size,
                prompt_separator=_prompt_separator(args),
                add_bos_token=args.add_bos_token,
                answer_form="program" if args.programs else "last_number" if args.last_number else None,
                question_column=args.question_column,
                answer_column=args.answer_column,
                batch_size=args.batch_size,
                seed=args.seed,
                output_dir=args.output_dir,
                overwrite=args.overwrite,
                accelerator=process,
                progress=sys.stderr.isatty(),
            )
        if is_main:
            _report(args, f"{name} ({weights_format(model)} weights)", result, time.perf_counter() - started)
    if process is not None:
        process.destroy_process_group()
    return 0


def _prompt_separator(args: argparse.Namespace) -> str:
    if args.prompt_separator is not None:
        return str(args.prompt_separator)
    return known_settings(args.dataset).get("prompt_separator", "")


def _read_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from ..text_files import json_rows

    path, place = Path(args.dataset).expanduser(), data_place(args.dataset)
    if path.is_file():
        return (row for _, row in json_rows(str(path)))
    if place == "files":
        raise CommandError(f"--dataset {args.dataset}: there is no such file or folder.")

    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    source = str(path) if place == "folder" else args.dataset
    config = args.dataset_config or known_settings(args.dataset).get("dataset_config")
    options = {"split": args.split, "revision": args.dataset_revision, "cache_dir": args.cache_dir}
    try:
        return iter(load_dataset(source, config, **options))
    except (DatasetNotFoundError, ConnectionError) as error:
        raise CommandError(f"--dataset {args.dataset}: no data set that the Hub gives: {error}") from error


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()


def _report(args: argparse.Namespace, name: str, result: "AnswerResult", seconds: float) -> None:
    from ..evaluation.answer_figures import answer_table

    figures = next(iter(result.figures.values()))
    print(f"Model: {name}")
    samples = "a sample each" if figures.num_samples == 1 else f"{figures.num_samples} samples each"
    print(
        f"Questions: {args.dataset}, {figures.num_questions:,}, {samples}, {args.max_new_tokens} new tokens at most, "
        f"seed {args.seed}"
    )
    form = {"marker": "the number behind ####", "last_number": "the last number", "program": "what a program returns"}
    print(f"Answer: {form[result.settings['answer_form']]}. {seconds:.0f} s\n")
    print(answer_table(result.figures).text())
    print(f"\nEvery generation: {args.output_dir / 'generations.jsonl'}")
