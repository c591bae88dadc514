"""Accuracy by decoding: figures by hand, samples that depend on nothing else, runs that are killed and go on."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EOS, spaced_tokenizer, tiny_model, tiny_tokenizer

from blockgen_hf.evaluation import answer_generation
from blockgen_hf.evaluation.accuracy import AnswerResult, evaluate_answers
from blockgen_hf.evaluation.answer_figures import answer_figures, bootstrap_estimates, majority_answer, pass_at_k
from blockgen_hf.evaluation.answer_questions import read_questions
from blockgen_hf.evaluation.generation_log import GenerationLog
from blockgen_hf.evaluation.processes import Processes
from blockgen_hf.prompts import PromptEncoder, encode_texts


QUESTIONS = [
    {"question": text, "answer": f"so #### {n}"} for n, text in enumerate(["abc", "d", "abc", "efghij", "kl"])
]
DECODINGS = ["ar:do_sample=False", "block_diffusion:2:block_size=4", "arpc:4:block_size=4"]


def evaluate(folder: Path | None = None, decodings: list[str] = DECODINGS, **settings: Any) -> AnswerResult:
    options = {"max_new_tokens": 9, "output_dir": folder, **settings}
    questions = options.pop("questions", QUESTIONS)
    return evaluate_answers(tiny_model(), tiny_tokenizer(), questions, decodings, **options)


def texts(result: AnswerResult) -> dict[tuple[str, int, int], str]:
    return {(row["decoding"], row["question"], row["sample"]): row["text"] for row in result.generations}


# Figures


def test_pass_at_k_is_the_mean_over_subsets() -> None:
    for total, correct, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if correct <= total and k <= total:
            outcomes = [1] * correct + [0] * (total - correct)
            hits = [any(subset) for subset in itertools.combinations(outcomes, k)]
            assert pass_at_k(total, correct, k) == pytest.approx(sum(hits) / len(hits))
    for bad in ((3, 1, 4), (3, 1, 0), (3, 4, 1)):
        with pytest.raises(ValueError, match="must be from"):
            pass_at_k(*bad)


def test_majority() -> None:
    assert majority_answer(["1", "2", "2"]) == "2"
    assert majority_answer(["2", "1", "1", "2"]) == "2"  # a tie: the earliest
    assert majority_answer([None, None, "3"]) == "3"
    assert majority_answer([None]) is None


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(0).random((2, 40))
    for estimate, row in zip(bootstrap_estimates(scores), scores, strict=True):
        expected = stats.bootstrap((row,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
        assert estimate.value == row.mean()
        assert [estimate.low, estimate.high] == pytest.approx([expected.low, expected.high], abs=0.02)
    assert bootstrap_estimates(scores) == bootstrap_estimates(scores)
    assert bootstrap_estimates(scores) != bootstrap_estimates(scores, seed=1)


def test_without_spread_the_interval_is_binomial() -> None:
    stats = pytest.importorskip("scipy.stats")
    zeros, ones, same = bootstrap_estimates(np.array([[0.0] * 20, [1.0] * 20, [0.0] * 20]), num_differences=1)
    for estimate, right in ((zeros, 0), (ones, 20)):
        exact = stats.binomtest(right, 20).proportion_ci(0.95, method="exact")
        assert [estimate.low, estimate.high] == pytest.approx([exact.low, exact.high])
    assert same.high == zeros.high and same.low == -zeros.high
    rows = np.array([[0.5] * 20, [1.0] * 20, [-1.0] * 20, [0.25] * 20])
    half, better, worse, quarter = bootstrap_estimates(rows, num_differences=3)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, ones.low / 2, 1 - ones.low / 2))
    assert (better.low, better.high) == pytest.approx((2 * ones.low - 1, 1))
    assert (worse.value, worse.low, worse.high) == pytest.approx((-1, -1, 1 - 2 * ones.low))
    assert quarter.low == pytest.approx(ones.low / 4 - zeros.high)


def test_figures_by_hand() -> None:
    answers = {"first": ["1", "1", "3", None], "second": ["1", "2", "2", "2"]}  # questions 0 0 1 1
    samples = {
        name: [
            {
                "question": place // 2,
                "sample": place % 2,
                "answer": answer,
                "correct": answer == ["1", "2"][place // 2],
                "truncated": answer is None,
                "num_new_tokens": 10,
                "num_function_evaluations": 4,
                "seconds": 0.5,
            }
            for place, answer in enumerate(found)
        ]
        for name, found in answers.items()
    }
    costs: dict[str, tuple[int | None, int | None]] = {"first": (None, None), "second": (16, 8)}
    figures = answer_figures(samples, ["1", "2"], [1, 2], costs)
    first, second = figures["first"], figures["second"]
    assert first.accuracy.value == 0.5 and first.pass_at_k[2].value == 0.5 and first.majority_vote.value == 0.5
    assert second.accuracy.value == 0.75 and second.pass_at_k[2].value == 1 and second.majority_vote.value == 1
    assert first.difference is None and second.difference is not None
    assert second.difference.value == 0.25 and second.difference.low == -0.5 and second.difference.high == 1
    assert (first.num_truncated, first.num_without_answer, second.num_truncated) == (1, 1, 0)
    assert (first.num_questions, first.num_samples, first.num_new_tokens) == (2, 2, 40)
    assert first.function_evaluations_per_token == 0.4 and first.tokens_per_second == 20
    assert (second.block_size, second.function_evaluations_per_block) == (16, 8)


# Questions and prompts


def test_questions() -> None:
    rows = [{"question": "a", "answer": "1 + 1\n#### 2.0"}, {"question": "b", "answer": "1,000"}]
    found = read_questions(rows)
    assert [(question.answer, question.is_marked) for question in found] == [("2", True), ("1000", False)]
    numbers = [3, 0, 2.50, 1e-7, 1e16]
    found = read_questions([{"prompt": "a", "completion": number} for number in numbers])
    assert [question.answer for question in found] == ["3", "0", "2.5", "0.0000001", "1" + 16 * "0"]
    assert read_questions([{"q": "a", "a": "it is 4"}], "q", "a")[0].answer == "4"
    messages = [{"role": "assistant", "content": "#### 1/3"}]
    assert read_questions([{"prompt": [{"role": "user", "content": "a"}], "completion": messages}])[0].answer == "1/3"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "There are no questions"),
        ([{"text": "a"}], "The questions have the columns ['text']"),
        ([{"question": "a", "answer": "1"}, {"question": "a"}], "Row 1 of the questions"),
        ([{"question": "a", "answer": "none"}], "Row 0 of the questions has no number"),
        ([{"question": "a", "answer": True}], "Row 0 of the questions has no number"),
        ([{"question": "a", "answer": float("inf")}], "Row 0 of the questions has no number"),
        ([{"question": "a", "answer": "5 #### none"}], "Row 0 of the questions has no number"),
    ],
)
def test_bad_questions(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", "\\[")):
        read_questions(rows)


def test_prompts_have_the_tokens_of_training() -> None:
    pytest.importorskip("datasets")
    from blockgen_hf.training.documents import RowForm
    from blockgen_hf.training.tokenization import DocumentTokenizer

    tokenizer = spaced_tokenizer()
    form = RowForm("prompt", ("question", "answer"))
    trained = DocumentTokenizer(tokenizer, form, "here", prompt_separator=" q")
    for prompt in ("a b c", "d", "a <mask> b"):
        batch = trained({"question": [prompt], "answer": [" e f"]}, [0])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert PromptEncoder(tokenizer, " q")(prompt) == ids[labels == -100].tolist()
    texts = ["a b c", "a <mask> b", "d"]
    assert encode_texts(tokenizer, texts) == [PromptEncoder(tokenizer)(text) for text in texts]
    with pytest.raises(ValueError, match="no BOS token"):
        PromptEncoder(tokenizer, add_bos_token=True)


def test_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}t{% endif %}"
    )
    assert tokenizer.decode(PromptEncoder(tokenizer)([{"role": "user", "content": "abc"}])) == "abct"


# Samples


def test_rows_are_those_of_generate() -> None:
    result = evaluate(decodings=["ar:do_sample=false"])
    tokenizer, model = tiny_tokenizer(), tiny_model()
    for row in result.generations:
        prompt = torch.tensor([tokenizer(QUESTIONS[row["question"]]["question"])["input_ids"]])
        outputs = model.generate(
            prompt, decoding="ar", do_sample=False, max_new_tokens=9, eos_token_id=EOS, return_dict_in_generate=True
        )
        new = outputs.sequences[0, prompt.shape[1] :].tolist()
        assert row["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert row["num_new_tokens"] == len(new) == int(outputs.num_new_tokens)
        assert row["num_function_evaluations"] == int(outputs.num_function_evaluations)
        assert row["truncated"] == (new[-1] != EOS)
        assert row["prompt"] == QUESTIONS[row["question"]]["question"]
        assert (row["answer"], row["expected"], row["correct"]) == (None, str(row["question"]), False)


def test_truncated_goes_by_the_end_of_the_decoding() -> None:
    tokenizer = tiny_tokenizer()
    for sign in "cq":
        rows = evaluate(decodings=[f"ar:eos_token_id={tokenizer.convert_tokens_to_ids(sign)}"]).generations
        assert not all(row["truncated"] for row in rows)
        for row in rows:
            assert row["truncated"] != row["text"].endswith(sign)


@pytest.mark.parametrize("variant", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def test_samples_depend_on_seed_prompt_and_number_alone(variant: str) -> None:
    model = tiny_model(variant)
    decodings = [*DECODINGS, "ar:do_sample=True"]

    def run(**settings: Any) -> AnswerResult:
        options = {"max_new_tokens": 6, "num_samples": 2, **settings}
        questions = options.pop("questions", QUESTIONS)
        return evaluate_answers(model, tiny_tokenizer(), questions, decodings, **options)

    state = torch.random.get_rng_state()
    whole = texts(run())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts(run(batch_size=1)) == texts(run(batch_size=3)) == whole
    for name in decodings[1:]:
        drawn = [whole[name, question, sample] for question in (0, 2) for sample in range(2)]
        assert len(set(drawn)) >= 3  # the same prompt twice, and two samples of it; two may be empty
    fewer = texts(run(questions=QUESTIONS[:2], num_samples=1))
    assert fewer == {key: whole[key] for key in fewer}
    assert texts(run(seed=1)) != whole


def test_batches_hold_a_prompt_once_and_like_lengths() -> None:
    prompts = [[1], [2, 3], [1], [4] * 5, [1]]
    tasks = answer_generation.make_tasks(prompts, num_samples=2, max_new_tokens=4, positions=8)
    assert [task.room for task in tasks if task.sample == 0] == [4, 4, 4, 3, 4]
    batches = answer_generation.make_batches(tasks, 8)
    assert sorted(task.question for batch in batches for task in batch) == sorted([0, 1, 2, 3, 4] * 2)
    for batch in batches:
        assert len({task.token_ids for task in batch}) == len(batch)
        assert len({(task.sample, task.room) for task in batch}) == 1


def test_prompts_without_room() -> None:
    long = [{"question": "a" * length, "answer": 1} for length in (60, 64, 70, 1)]
    rows = evaluate(questions=long, decodings=["ar"]).generations
    assert [row["num_new_tokens"] <= room for row, room in zip(rows, (4, 0, 0, 9), strict=True)] == [True] * 4
    assert rows[1]["truncated"] and rows[1]["text"] == "" and rows[1]["num_new_tokens"] == 0
    assert rows[0]["num_new_tokens"] > 0


def test_answers_are_found_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of the tiny model has no digits: what it decodes is replaced."""
    written = iter(["#### 0", "1 is last", "#### 2.00", "#### 7", "4"])
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "decode", lambda *args, **kwargs: next(written))
    result = evaluate_answers(tiny_model(), tokenizer, QUESTIONS, ["ar"], max_new_tokens=4, batch_size=1)
    rows = {row["text"]: row for row in result.generations}
    assert result.settings["answer_form"] == "marker"
    assert [rows[text]["answer"] for text in ("1 is last", "4", "#### 2.00")] == [None, None, "2"]
    assert result.figures["ar"].num_without_answer == 2
    correct = sum(rows[text]["answer"] == rows[text]["expected"] for text in rows)
    assert result.figures["ar"].accuracy.value == correct / 5


def test_speculation_gives_the_answers_of_ar_and_has_evaluations_per_token_only() -> None:
    decodings = ["ar:do_sample=false", "speculative:do_sample=false", "ar", "speculative", "arpc:8"]
    result = evaluate(decodings=decodings, block_size=8)
    by_decoding = {name: [row["text"] for row in result.generations if row["decoding"] == name] for name in decodings}
    assert by_decoding["speculative:do_sample=false"] == by_decoding["ar:do_sample=false"]
    assert by_decoding["speculative"] == by_decoding["ar"]
    figures = result.figures["speculative"]
    assert (figures.block_size, figures.function_evaluations_per_block) == (8, None)
    assert figures.function_evaluations_per_token == figures.num_function_evaluations / figures.num_new_tokens
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in result.table().splitlines()]
    per_block = {row[1].strip("`"): row[head.index("evaluations a block")] for row in rows}
    assert per_block == {**dict.fromkeys(decodings, ""), "arpc:8": "8 of 8 tokens"}


def test_drafts_have_the_block_size_of_generate_unless_one_is_asked_for() -> None:
    decodings = ["draft_revise", "block_diffusion:2", "draft_revise:block_size=2"]
    assert [figures.block_size for figures in evaluate(decodings=decodings).figures.values()] == [4, 8, 2]
    assert evaluate(decodings=["draft_revise"], block_size=8).figures["draft_revise"].block_size == 8


# On disk


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(tmp_path / "whole", num_samples=2, batch_size=2)
    generate, calls = answer_generation.AnswerSampler.generate, []

    def interrupted(self: Any, batch: Any, decoding: Any) -> Any:
        calls.append(len(batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, batch, decoding)

    monkeypatch.setattr(answer_generation.AnswerSampler, "generate", interrupted)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, num_samples=2, batch_size=2)
    done = sum(calls[:3])
    part = folder / "generations.0.part.jsonl"
    assert len(part.read_text().splitlines()) == 1 + done
    with part.open("a") as file:
        file.write('{"decoding": "ar", "quest')  # cut in writing
    assert not (folder / "results.json").exists()
    calls.clear()
    calls += [0] * 4
    resumed = evaluate(folder, num_samples=2, batch_size=3)
    assert sum(calls) == 2 * 5 * 3 - done
    assert texts(resumed) == texts(whole)
    assert not list(folder.glob("*part*")) and not list(folder.glob("*unfinished*"))
    calls.clear()
    again = evaluate(folder, num_samples=2)
    assert not calls and again.generations == resumed.generations


def test_files(tmp_path: Path) -> None:
    result = evaluate(tmp_path, num_samples=2, k=[1, 2])
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["num_questions"] == 5 and lines[1:] == result.generations
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["figures"][DECODINGS[0]]["pass_at_k"]["2"]["value"] == 0
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0].startswith("| decoding | accuracy, % [95%] | pass@2 | majority of 2 | minus the first |")
    assert len(table) == 2 + len(DECODINGS) and len({line.count("|") for line in table}) == 1


def test_samples_and_decodings_may_be_added(tmp_path: Path) -> None:
    evaluate(tmp_path, decodings=DECODINGS[:1])
    before = (tmp_path / "generations.jsonl").read_text().splitlines()[1:]
    more = evaluate(tmp_path, decodings=DECODINGS[1:], num_samples=2)
    assert list(more.figures) == DECODINGS[1:]
    assert set(before) < set((tmp_path / "generations.jsonl").read_text().splitlines())
    assert texts(more) == texts(evaluate(decodings=DECODINGS[1:], num_samples=2))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    evaluate(tmp_path, decodings=["ar"])
    for name, settings in {
        "seed": {"seed": 1},
        "max_new_tokens": {"max_new_tokens": 4},
        "prompt_separator": {"prompt_separator": "a"},
        "num_questions": {"questions": QUESTIONS[:3]},
        "questions": {"questions": [*QUESTIONS[:4], {"question": "kl", "answer": 9}]},
    }.items():
        with pytest.raises(ValueError, match=f"made with other settings \\(`{name}` was .* overwrite"):
            evaluate(tmp_path, decodings=["ar"], **settings)
    with pytest.raises(ValueError, match="`weights` was"):
        evaluate_answers(
            tiny_model(seed=1), tiny_tokenizer(), QUESTIONS, ["ar"], max_new_tokens=9, output_dir=tmp_path
        )
    result = evaluate(tmp_path, decodings=["ar"], seed=1, overwrite=True)
    assert result.generations == evaluate(tmp_path, decodings=["ar"], seed=1).generations


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    evaluate(tmp_path, decodings=["ar"])
    file = tmp_path / "generations.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match="generations.jsonl is damaged .*line 3: not JSON"):
        evaluate(tmp_path, decodings=["ar"])
    file.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: a list instead of an object"):
        evaluate(tmp_path, decodings=["ar"])


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_that_was_cut_anywhere_keeps_its_whole_lines(tmp_path: Path, cut: int) -> None:
    rows = [{"decoding": "ar", "question": number, "sample": 0, "text": "é\u2028\r\n\udc80"} for number in range(3)]
    part = GenerationLog(tmp_path, {}, {"ar": {}}).open_part(2)
    part.append(rows)
    part.close()
    file = tmp_path / "generations.2.part.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[:-cut])
    kept = data[:-cut].count(b"\n") - 1
    assert kept < 3
    assert GenerationLog(tmp_path, {}, {"ar": {}}).merge() == rows[:kept]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be a positive integer"),
        ({"batch_size": True}, "`batch_size` must be a positive integer"),
        ({"k": [2]}, "`k` must be from 1 to `num_samples`, 1"),
        ({"answer_form": "guess"}, "`answer_form` must be one of"),
        ({"decodings": []}, "`decodings` must be at least one"),
        ({"decodings": ["ar", "ar"]}, "`decodings` must be at least one, each once"),
        ({"decodings": ["ar:num_beams=2"]}, "beam search counts no function evaluations"),
        ({"decodings": ["ar:temprature=1"]}, "settings that `generate` does not know"),
        ({"decodings": ["beam"]}, "`decoding`"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(**settings)


def test_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    monkeypatch.setattr(
        "blockgen_hf.evaluation.answer_generation.AnswerSampler._row",
        lambda self, task, decoding, tokens, evaluations, seconds: {
            "decoding": decoding.name,
            "question": task.question,
            "sample": task.sample,
            "text": ["def f(): return 0", "no", "def f():\n  return 2 / 1", "def f(): return 1 / 0", "#### 4"][
                task.question
            ],
            "truncated": False,
            "num_new_tokens": len(tokens),
            "num_function_evaluations": evaluations,
            "seconds": seconds,
        },
    )
    result = evaluate(decodings=["ar"], answer_form="program")
    assert [row["correct"] for row in result.generations] == [True, False, True, False, False]
    assert [row["answer"] for row in result.generations] == ["0", None, "2", None, None]
    assert "ZeroDivisionError" in result.generations[3]["error"] and result.generations[0]["error"] is None


# Several processes


@pytest.mark.slow
def test_two_processes_give_the_samples_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    alone = evaluate(tmp_path / "alone", num_samples=2, batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "together")], check=True, timeout=240, env=environment)
    found = [json.loads((tmp_path / "together" / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] == [list(item) for item in sorted(map(_flat, texts(alone).items()))]
    assert not list((tmp_path / "together").glob("*part*"))


def _flat(item: tuple[tuple[str, int, int], str]) -> list[Any]:
    return [*item[0], item[1]]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = evaluate(folder, num_samples=2, batch_size=2)
    processes = Processes(on_cpu=True)
    assert processes.count == 2
    (folder / f"{processes.rank}.json").write_text(json.dumps(sorted(map(_flat, texts(found).items()))))
