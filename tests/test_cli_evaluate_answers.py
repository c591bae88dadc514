"""`blockgen-hf evaluate-answers` in-process, offline, on a tiny model and local questions."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import write_rows
from tiny import tiny_model

from blockgen_hf.cli import evaluate_answers, main
from blockgen_hf.run_folders import lock_folder


Command = Callable[..., str]
ROWS = [{"question": text, "answer": f"#### {n}"} for n, text in enumerate(["abc", "d", "efgh", "ij"])]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    write_rows(tmp_path / "questions.jsonl", ROWS)
    return str(tmp_path / "questions.jsonl")


@pytest.fixture
def evaluate(saved: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command on the questions, into the folder `out`, and returns what it prints."""

    def run_command(*words: str) -> str:
        dataset = () if "--dataset" in words else ("--dataset", questions)
        options = ("--output-dir", str(tmp_path / "out"), "--max-new-tokens", "6", "--device", "cpu")
        status = main(["evaluate-answers", str(saved), *dataset, *options, *words])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert printed.err == ""
        return printed.out

    return run_command


@pytest.fixture
def fail(saved: Path, questions: str, tmp_path: Path, failing_line: Command) -> Command:
    def run_command(*words: str) -> str:
        dataset = () if "--dataset" in words else ("--dataset", questions)
        output = () if "--output-dir" in words else ("--output-dir", str(tmp_path / "out"))
        return failing_line("evaluate-answers", str(saved), *dataset, *output, "--max-new-tokens", "6", *words)

    return run_command


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def test_table_and_files(
    evaluate: Command, saved: Path, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = evaluate("--decodings", "ar:do_sample=False,arpc:4:block_size=4", "--num-samples", "2", "--k", "1,2")
    lines = out.splitlines()
    assert lines[0] == f"Model: {saved} (float32 weights)"
    assert lines[1] == f"Questions: {questions}, 4, 2 samples each, 6 new tokens at most, seed 0"
    assert lines[2].startswith("Answer: the number behind ####. ")
    table = [line for line in lines[4:] if str(tmp_path) not in line]  # the last line names the folder
    assert max(map(len, table)) <= 100 and "|" not in out
    assert any(re.match(r"ar:do_sample=False +0\.0 \[0\.0, 60\.2\] ", line) for line in lines)
    page = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(page) == 4 and page[2].startswith("| `ar:do_sample=False` | 0.0 [0.0, 60.2] |")
    found = results(tmp_path)
    assert found["figures"]["arpc:4:block_size=4"]["function_evaluations_per_block"] == 4
    assert found["settings"]["decodings"]["ar:do_sample=False"]["do_sample"] is False
    assert len((tmp_path / "out" / "generations.jsonl").read_text().splitlines()) == 1 + 2 * 2 * 4


def test_options_arrive(evaluate: Command, tmp_path: Path) -> None:
    evaluate("--decodings", "ar", "--limit", "2", "--seed", "5", "--prompt-separator", "q\\n", "--last-number")
    settings = results(tmp_path)["settings"]
    assert settings["num_questions"] == 2 and settings["seed"] == 5 and settings["answer_form"] == "last_number"
    assert settings["prompt_separator"] == "q\n" and settings["max_new_tokens"] == 6
    evaluate("--decodings", "block_diffusion:3", "--block-size", "4", "--overwrite")
    found = results(tmp_path)
    assert found["settings"]["num_questions"] == 4
    assert found["figures"]["block_diffusion:3"]["block_size"] == 4


def test_goes_on(evaluate: Command, fail: Command, tmp_path: Path) -> None:
    evaluate("--decodings", "ar")
    before = (tmp_path / "out" / "generations.jsonl").read_bytes()
    evaluate("--decodings", "ar", "--batch-size", "1")
    assert (tmp_path / "out" / "generations.jsonl").read_bytes() == before  # seconds too: nothing was generated
    assert "was made with other settings (`seed` was 0, and is 1 now)" in fail("--decodings", "ar", "--seed", "1")


def test_one_process_at_a_time_writes_answers(evaluate: Command, fail: Command, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"):
        assert f"Another process is writing to the folder {tmp_path / 'out'}" in fail("--decodings", "ar")
    evaluate("--decodings", "ar")


def test_other_columns_and_forms(evaluate: Command, tmp_path: Path) -> None:
    file = tmp_path / "sums.json"
    file.write_text(json.dumps([{"prompt": "ab", "completion": "2"}, {"prompt": "c", "completion": 3}]))
    evaluate("--dataset", str(file), "--decodings", "ar")
    assert results(tmp_path)["settings"]["answer_form"] == "last_number"
    file.write_text(json.dumps([{"q": "ab", "a": "2"}]))
    evaluate(
        *("--dataset", str(file), "--decodings", "ar", "--question-column", "q", "--answer-column", "a"),
        *("--programs", "--overwrite"),
    )
    assert results(tmp_path)["settings"]["answer_form"] == "program"
    row = json.loads((tmp_path / "out" / "generations.jsonl").read_text().splitlines()[1])
    assert row["error"].startswith("refused: no ")


def test_a_folder_with_splits(evaluate: Command, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "test.jsonl", ROWS[:3])
    write_rows(tmp_path / "data" / "train.jsonl", ROWS[:1])
    cache = ("--cache-dir", str(tmp_path / "cache"))
    evaluate("--dataset", str(tmp_path / "data"), "--decodings", "ar", *cache)
    assert results(tmp_path)["settings"]["num_questions"] == 3
    evaluate("--dataset", str(tmp_path / "data"), "--split", "train", "--decodings", "ar", "--overwrite", *cache)
    assert results(tmp_path)["settings"]["num_questions"] == 1


def test_known_datasets_have_their_separator() -> None:
    from blockgen_hf.cli import make_parser

    for name, separator in (("openai/gsm8k", "\n"), ("other.jsonl", "")):
        args = make_parser().parse_args(["evaluate-answers", "--dataset", name])
        assert evaluate_answers._prompt_separator(args) == separator
    args = make_parser().parse_args(["evaluate-answers", "--dataset", "openai/gsm8k", "--prompt-separator", ""])
    assert evaluate_answers._prompt_separator(args) == ""


def test_adapter(evaluate: Command, fail: Command, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    evaluate("--decodings", "ar:do_sample=False")
    plain = (tmp_path / "out" / "generations.jsonl").read_text()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(tiny_model(), config).save_pretrained(str(tmp_path / "adapter"))
    adapter = ("--adapter", str(tmp_path / "adapter"))
    assert "`weights` was" in fail("--decodings", "ar:do_sample=False", *adapter)
    out = evaluate("--decodings", "ar:do_sample=False", *adapter, "--overwrite")
    assert out.splitlines()[0].endswith(f" with {tmp_path / 'adapter'} (float32 weights)")
    adapted = (tmp_path / "out" / "generations.jsonl").read_text()
    texts = [[json.loads(line)["text"] for line in file.splitlines()[1:]] for file in (plain, adapted)]
    assert texts[0] != texts[1]
    assert "is no folder with an adapter_config.json" in fail("--adapter", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--decodings", "ar:temprature=1"), "settings that `generate` does not know"),
        (("--decodings", "arpc:0"), "is no decoding"),
        (("--k", "2"), "`k` must be from 1 to `num_samples`, 1"),
        (("--programs", "--last-number"), "not allowed with argument"),
        (("--dataset", "nowhere.jsonl"), "there is no such file or folder"),
        (("--question-column", "text"), "name others with `question_column`"),
        (("--output-dir", __file__), "is a file"),
        (("--add-bos-token",), "the tokenizer has no BOS token"),
    ],
)
def test_mistakes(fail: Command, words: tuple[str, ...], message: str) -> None:
    assert message in fail(*words)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(saved: Path, questions: str, tmp_path: Path, evaluate: Command) -> None:
    pytest.importorskip("accelerate")
    evaluate("--num-samples", "2", "--batch-size", "1", "--decodings", "ar,arpc:4")
    alone = (tmp_path / "out" / "generations.jsonl").read_text().splitlines()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "blockgen_hf"]
    command += ["evaluate-answers", str(saved), "--dataset", questions, "--output-dir", str(tmp_path / "two")]
    command += ["--max-new-tokens", "6", "--num-samples", "2", "--batch-size", "1", "--decodings", "ar,arpc:4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, timeout=240, env=environment, capture_output=True, text=True)
    assert done.stdout.count("Every generation:") == 1
    together = (tmp_path / "two" / "generations.jsonl").read_text().splitlines()
    for one, other in zip(alone[1:], together[1:], strict=True):
        assert {**json.loads(one), "seconds": 0} == {**json.loads(other), "seconds": 0}
