"""How many questions a model answers rightly, by decoding: exact match, pass@k, majority vote, and what they cost."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import unwrap_model

from ..prompts import PromptEncoder
from ..quantization import readable_weights
from ..run_folders import digest, weights_digest
from ..whole_files import write_json, write_whole
from .answer_figures import AnswerFigures, answer_figures, answer_table
from .answer_generation import AnswerSampler, generate_missing, make_tasks
from .answer_questions import Question, read_questions
from .answers import find_answer, number_text
from .generation_log import GenerationLog, Row
from .processes import Processes
from .throughput_contenders import Decoding


ANSWER_FORMS = ("marker", "last_number", "program")
# Of a generation config, what says nothing of a text.
_NO_SETTINGS = ("transformers_version", "max_new_tokens", "max_length", "_from_model_config")


@dataclass(frozen=True)
class AnswerResult:
    """
    What [`evaluate_answers`] finds.

    Args:
        settings (`dict`): what everything was made with.
        figures (`dict[str, AnswerFigures]`): by decoding.
        generations (`list[dict]`): every sample: `decoding`, `question` (its number), `sample`, `prompt`, `text`,
            `answer` (the number found, None if none), `expected`, `correct`, `truncated`, `num_new_tokens`,
            `num_function_evaluations`, `seconds` (its share of its batch), and for programs `error`.
    """

    settings: dict[str, Any]
    figures: dict[str, AnswerFigures]
    generations: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the generations, as JSON has it, but for the keys of `pass_at_k`, which are integers."""
        return {"settings": self.settings, "figures": {name: f.to_dict() for name, f in self.figures.items()}}

    def table(self) -> str:
        """The figures as a Markdown table."""
        return answer_table(self.figures).markdown()


def evaluate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[Mapping[str, Any]],
    decodings: Sequence[str] = ("ar:do_sample=false",),
    *,
    num_samples: int = 1,
    k: Sequence[int] = (1,),
    max_new_tokens: int = 256,
    block_size: int | None = None,
    prompt_separator: str = "",
    add_bos_token: bool = False,
    answer_form: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    accelerator: Any = None,
    progress: bool = False,
) -> AnswerResult:
    r"""
    Asks a model questions under several decodings, and measures accuracy and cost.

    A sample depends only on the seed, its prompt and its number. Except for rounding, it does not depend on the batch
    size, the other questions or the number of processes. All decodings share their random numbers. With `output_dir`,
    batches are written to disk as they are generated, and a call with the same settings continues an interrupted one.

    Args:
        model ([`BlockGenForDiffusionLM`]): the model on its device. It is put into evaluation mode.
        tokenizer: the tokenizer of the model.
        questions: rows of a data set, see [`read_questions`].
        decodings (`Sequence[str]`): such as `"ar"`, `"ar:do_sample=false"`, `"speculative"`, `"block_diffusion:8"`
            (denoising steps), `"arpc:8"` (function evaluations per block); settings of `generate` may follow, as in
            `"arpc:8:block_size=4:temperature=0.5"`.
        num_samples (`int`): samples per question.
        k (`Sequence[int]`): values of k for pass@k, each at most `num_samples`.
        max_new_tokens (`int`): longest sample. It is reduced if prompt and answer exceed the model's positions;
            prompts that leave no room count as not answered.
        block_size (`int`, *optional*): block size of decodings that do not set it. Default: the largest trained; for
            the drafts of `"draft_revise"`, that of `generate`.
        prompt_separator (`str`): text after a prompt that is a text, as in training.
        add_bos_token (`bool`): whether to begin prompts that are texts with the BOS token, as in training.
        answer_form (`str`, *optional*): how to read the answer of a sample. `"marker"`: the number after the last
            `####`. `"last_number"`: the last number if there is no `####`. `"program"`: what a Python program returns,
            as in TinyGSM, see [`run_programs`]. Default: `"marker"` if all reference answers have a `####`, otherwise
            `"last_number"`.
        question_column, answer_column (`str`, *optional*): columns of `questions`.
        batch_size (`int`): rows per call of `generate`.
        seed (`int`): seed of samples and intervals.
        output_dir (*optional*): folder for `generations.jsonl`, `results.json` and `table.md`. Required with several
            processes, on a file system that they share.
        overwrite (`bool`): whether to start again. Otherwise existing generations in `output_dir` are reused, if they
            have the same settings, model and questions; samples and decodings may be added.
        accelerator (`accelerate.Accelerator` or `PartialState`, *optional*): shares the samples among its processes,
            which all get the result. Default: created if several processes were launched.
        progress (`bool`): whether the main process shows a progress bar.

    Returns:
        [`AnswerResult`].

    Raises:
        ValueError: an argument is invalid, questions have no answers, or `output_dir` has other settings or is in use
            by another process.
    """
    unwrapped: PreTrainedModel = unwrap_model(model).eval()
    _check_arguments(num_samples, k, max_new_tokens, batch_size, answer_form)
    parsed = _parse_decodings(unwrapped, decodings, block_size)
    asked = read_questions(questions, question_column, answer_column)
    form = answer_form or ("marker" if all(question.is_marked for question in asked) else "last_number")
    encoder = PromptEncoder(tokenizer, prompt_separator, add_bos_token)
    prompts = [encoder(question.prompt) for question in asked]
    settings = {
        **_fingerprints(unwrapped, prompts, asked),
        "num_questions": len(asked),
        "prompt_separator": prompt_separator,
        "add_bos_token": add_bos_token,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    processes = Processes(accelerator, on_cpu=unwrapped.device.type == "cpu")
    if output_dir is None and processes.count > 1:
        raise ValueError("`output_dir` must be given where several processes generate: they meet there.")
    with ExitStack() as stack:
        if output_dir is None:
            folder: Any = stack.enter_context(tempfile.TemporaryDirectory())
        else:
            folder = output_dir
            stack.enter_context(processes.locking(folder))
        log = GenerationLog(Path(folder), settings, {d.name: _settings_in_effect(unwrapped, d) for d in parsed})
        if processes.is_main:
            if overwrite:
                log.clear()
            log.merge()
        processes.wait()
        tasks = make_tasks(prompts, num_samples, max_new_tokens, unwrapped.config.max_position_embeddings)
        sampler = AnswerSampler(unwrapped, tokenizer, seed)
        generate_missing(log, sampler, parsed, tasks, batch_size, processes, progress and processes.is_main)
        processes.wait()
        if processes.is_main:
            log.replace(_scored(log.merge(), asked, form))
        processes.wait()
        names = [decoding.name for decoding in parsed]
        rows = [row for row in log.rows() if row["decoding"] in names and row["sample"] < num_samples]
        result = AnswerResult(
            {"model": unwrapped.name_or_path, **settings, "answer_form": form, "decodings": log.decodings},
            _figures(unwrapped, rows, asked, parsed, k, seed),
            rows,
        )
        if processes.is_main and output_dir is not None:
            write_json(Path(folder) / "results.json", result.to_dict())
            write_whole(Path(folder) / "table.md", result.table() + "\n")
        processes.wait()
    return result


def _check_arguments(
    num_samples: int, k: Sequence[int], max_new_tokens: int, batch_size: int, answer_form: str | None
) -> None:
    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {value!r}.")
    if any(not 1 <= size <= num_samples for size in k) or len(set(k)) < len(k):
        raise ValueError(f"`k` must be from 1 to `num_samples`, {num_samples}, each once, but is {list(k)!r}.")
    if answer_form is not None and answer_form not in ANSWER_FORMS:
        raise ValueError(f"`answer_form` must be one of {list(ANSWER_FORMS)}, but is {answer_form!r}.")


def _parse_decodings(model: PreTrainedModel, decodings: Sequence[str], block_size: int | None) -> list[Decoding]:
    parsed = [Decoding.parse(text, block_size, default=max(model.config.block_sizes)) for text in decodings]
    names = [decoding.name for decoding in parsed]
    if not parsed or len(set(names)) < len(names):
        raise ValueError(f"`decodings` must be at least one, each once, but are {names!r}.")
    for decoding in parsed:
        if (decoding.in_effect(model).num_beams or 1) > 1:
            raise ValueError(f"`{decoding.name}`: beam search counts no function evaluations; leave `num_beams` out.")
    return parsed


def _settings_in_effect(model: PreTrainedModel, decoding: Decoding) -> dict[str, Any]:
    """What `generate` makes of a decoding and of the model's own settings."""
    settings = decoding.in_effect(model).to_dict()
    return {name: value for name, value in settings.items() if value is not None and name not in _NO_SETTINGS}


def _fingerprints(model: PreTrainedModel, prompts: list[list[int]], questions: list[Question]) -> dict[str, str]:
    """What tells the model and the questions from others: a folder's model may have been trained on."""
    config = model.config.to_dict()
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    answers = [question.answer for question in questions]
    texts = {"config": json.dumps(config, sort_keys=True, default=str), "questions": json.dumps([prompts, answers])}
    return {
        "weights": weights_digest(readable_weights(model)),
        **{name: digest([text], is_long=True) for name, text in texts.items()},
    }


def _scored(rows: Sequence[Row], questions: Sequence[Question], form: str) -> list[Row]:
    """The rows with the answers that are found in their texts. Whatever was found before is found anew."""
    if form == "program":
        from .programs import run_programs

        results = run_programs([row["text"] for row in rows])
        found = [(result.value, {"error": result.error}) for result in results]
    else:
        found = [(find_answer(row["text"], last_number=form == "last_number"), {}) for row in rows]
    scored = []
    for row, (number, more) in zip(rows, found, strict=True):
        question = questions[row["question"]]
        answer = None if number is None else number_text(number)
        kept = {name: value for name, value in row.items() if name != "error"}
        right = {"answer": answer, "expected": question.answer, "correct": answer == question.answer}
        scored.append({**kept, "prompt": question.prompt, **right, **more})
    return scored


def _figures(
    model: PreTrainedModel,
    rows: Sequence[Row],
    questions: Sequence[Question],
    decodings: Sequence[Decoding],
    k: Sequence[int],
    seed: int,
) -> dict[str, AnswerFigures]:
    samples: dict[str, list[Row]] = {decoding.name: [] for decoding in decodings}
    for row in rows:
        samples[row["decoding"]].append(row)
    costs: dict[str, tuple[int | None, int | None]] = {}
    for decoding in decodings:
        config = decoding.in_effect(model)
        has_budget = config.decoding not in ("ar", "speculative", "draft_revise")
        costs[decoding.name] = (
            None if config.decoding == "ar" else config.block_size,
            config.function_evaluations(config.num_denoising_steps()) if has_budget else None,
        )
    return answer_figures(samples, [question.answer for question in questions], k, costs, seed)


__all__ = ["AnswerResult", "evaluate_answers"]
