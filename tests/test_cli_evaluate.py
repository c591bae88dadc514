"""`blockgen-hf evaluate` in-process, offline, on a tiny model and local data."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import sentences, write_rows, write_text
from tiny import spaced_tokenizer, tiny_model

from blockgen_hf.cli import main, make_parser
from blockgen_hf.evaluation import evaluate_likelihood


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    spaced_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and the cache of `datasets`."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "texts.jsonl", [{"text": text, "story": text} for text in sentences(12)])
    write_rows(folder / "problems.jsonl", [{"question": text, "answer": text[:5]} for text in sentences(12)])
    write_text(folder / "stories.txt", sentences(12))
    return folder


Command = Callable[..., str]


@pytest.fixture
def evaluate(checkpoint: str, data: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `blockgen-hf evaluate` on texts.jsonl, unless told otherwise, and returns what it prints."""

    def run_command(*arguments: str) -> str:
        dataset = () if "--dataset" in arguments else ("--dataset", str(data / "texts.jsonl"))
        cache = ("--cache-dir", str(data / "cache"))
        status = main(["evaluate", checkpoint, *dataset, *cache, "--monte-carlo-samples", "2", *arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert printed.err == ""
        return printed.out

    return run_command


@pytest.fixture
def fail(checkpoint: str, data: Path, failing_line: Command) -> Command:
    """Runs `blockgen-hf evaluate`, which must fail with a single line; returns that line."""

    def run_command(*arguments: str, model: str = checkpoint) -> str:
        dataset = () if "--dataset" in arguments else ("--dataset", str(data / "texts.jsonl"))
        return failing_line("evaluate", model, *dataset, "--cache-dir", str(data / "cache"), *arguments)

    return run_command


def as_json(evaluate: Command, *arguments: str) -> dict[str, Any]:
    return json.loads(evaluate("--json", "-", *arguments))


def test_table(evaluate: Command, checkpoint: str, data: Path) -> None:
    out = evaluate("--sequence-length", "16").splitlines()
    assert out[0] == f"Model: {checkpoint} (masked, 0.0M parameters)"
    assert re.fullmatch(rf"Data: {data}/texts.jsonl, \d+ rows, \d+ tokens scored", out[1])
    assert re.fullmatch(r"2 Monte-Carlo draws a row, seed 0, [\d.]+ s", out[2])
    cells = [re.split(" {2,}", line) for line in out[5:-2]]
    rows = {name: figures for name, *figures in cells}
    assert list(rows)[:4] == ["block size 1", "block size 2", "block size 4", "block size 8"]
    assert {"mixture, log-sum-exp (Eq. 20)", "mixture, Jensen (Eq. 7)"} < set(rows)
    for name, (nll, perplexity, *error) in rows.items():
        assert float(perplexity) == pytest.approx(math.exp(float(nll)), rel=1e-3)
        assert (error == ["± 0"]) is (name == "block size 1")  # exact
    assert out[-1].startswith("Mixture weights: 1: 0.25, 2: 0.25, 4: 0.25, 8: 0.25.")


def test_figures_are_those_of_python(evaluate: Command, data: Path) -> None:
    """A text a row: nothing but its tokens and the end."""
    tokenizer = spaced_tokenizer()
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in sentences(12)]
    expected = evaluate_likelihood(tiny_model(), rows, monte_carlo_samples=3, batch_size=5, seed=7)
    found = as_json(evaluate, "--packing", "none", "--monte-carlo-samples", "3", "--seed", "7", "--batch-size", "2")
    assert found["num_sequences"] == 12 and found["num_tokens"] == sum(map(len, rows)) and found["num_draws"] == 3
    for size, figure in expected.block_sizes.items():
        assert found["block_sizes"][str(size)]["nll"] == pytest.approx(figure.nll, rel=1e-5)
    assert found["log_sum_exp"]["nll"] == pytest.approx(expected.log_sum_exp.nll, rel=1e-5)
    assert found["jensen"]["perplexity"] == pytest.approx(expected.jensen.perplexity, rel=1e-5)


def test_json_file(evaluate: Command, checkpoint: str, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    out = evaluate("--json", str(file), "--sequence-length", "16", "--dtype", "bfloat16", "--device", "cpu")
    found = json.loads(file.read_text())
    assert found["model"] == checkpoint and found["dtype"] == "bfloat16" and found["device"] == "cpu"
    assert found["data"]["dataset"] == str(data / "texts.jsonl") and found["data"]["sequence_length"] == 16
    assert f"{found['jensen']['perplexity']:.2f}" in out


def test_lengths(evaluate: Command, fail: Command, tmp_path: Path) -> None:
    """Rows of the longest length, in multiples of 64 positions."""
    write_rows(tmp_path / "long.jsonl", [{"text": text} for text in sentences(40)])
    arguments = (
        "--dataset",
        str(tmp_path / "long.jsonl"),
        "--lengths",
        "1,2",
        "--cache-window",
        "16",
        "--block-sizes",
        "1,4",
    )
    out = evaluate(*arguments).splitlines()
    found = as_json(evaluate, *arguments)
    assert found["data"]["sequence_length"] == 128 and found["cache_window"] == 16
    first, second = found["lengths"]
    assert (first["start"], first["end"], second["end"]) == (0, 64, 128)
    assert out[4] == "nll by position, a window of 16 tokens"
    assert re.split(" {2,}", out[8])[0] == "64 to 127" and f"{second['at_positions']['4']['nll']:.4f}" in out[8]
    assert re.split(" {2,}", out[-1]) == [
        "128", *(f"{second['up_to_end'][size]['perplexity']:.2f}" for size in ("1", "4"))
    ]  # fmt: skip
    assert "without --lengths" in fail("--cache-window", "16")
    assert "--sequence-length has no meaning with --lengths" in fail("--lengths", "1", "--sequence-length", "8")


def test_block_sizes(evaluate: Command) -> None:
    found = as_json(evaluate, "--block-sizes", "1,4")
    assert set(found["block_sizes"]) == set(found["weights"]) == {"1", "4"}
    found = as_json(evaluate, "--block-sizes", "4,16")
    assert set(found["block_sizes"]) == {"4", "16"} and set(found["weights"]) == {"4"}


def test_data_options(evaluate: Command, data: Path) -> None:
    stories = ("--dataset", str(data / "stories.txt"), "--document-separator", "<|endoftext|>", "--packing", "none")
    assert as_json(evaluate, *stories)["num_sequences"] == 12
    assert as_json(evaluate, *stories, "--max-documents", "3")["num_sequences"] == 3
    assert as_json(evaluate, *stories, "--max-rows", "5")["num_sequences"] == 5
    assert as_json(evaluate, *stories, "--max-rows", "5", "--streaming")["num_sequences"] == 5
    assert as_json(evaluate, "--text-column", "story", "--packing", "none")["num_sequences"] == 12
    problems = ("--dataset", str(data / "problems.jsonl"), "--packing", "none")
    problems += ("--prompt-column", "question", "--completion-column", "answer")
    answers = as_json(evaluate, *problems)
    assert answers["num_tokens"] == 12 * (3 + 1)  # three letters and the end
    assert as_json(evaluate, *problems, "--score-prompts")["num_tokens"] > answers["num_tokens"]


def test_splits_of_a_folder(evaluate: Command, fail: Command, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": text} for text in sentences(4)])
    write_rows(tmp_path / "test.jsonl", [{"text": text} for text in sentences(5)])
    options = ("--dataset", str(tmp_path), "--packing", "none")
    assert as_json(evaluate, *options, "--split", "test")["num_sequences"] == 5
    assert "there is no split `validation` in this folder, only test, train" in fail(*options)


def test_the_shipped_checkpoint_is_the_default(
    checkpoint: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blockgen_hf.cli.loading.shipped_checkpoint", lambda: Path(checkpoint))
    arguments = ["--dataset", str(data / "texts.jsonl"), "--cache-dir", str(data / "cache"), "--json", "-"]
    assert main(["evaluate", *arguments, "--monte-carlo-samples", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == checkpoint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blok-sizes", "1"), "unrecognized arguments: --blok-sizes"),
        (("--block-sizes", "1,x"), "must be an integer of at least 1, but is 'x'"),
        (("--block-sizes", "4,4"), "each once, but are [4, 4]"),
        (("--batch-size", "0"), "must be an integer of at least 1"),
        (("--dataset", "missing.jsonl"), "there is no file 'missing.jsonl'"),
        (("--dataset", "nobody/nothing"), "neither a file nor a folder here, nor a data set that the Hub gives"),
        (("--split", "test"), "files have no splits, but `test` is asked for"),
        (("--text-column", "body"), "has no column `body`; its columns are `text`, `story`"),
        (("--sequence-length", "65"), "--sequence-length 65: the model takes 64 tokens at most"),
        (("--packing", "none", "--isolate-documents"), "`isolate_documents` is for packed rows"),
        (("--json", "no/such/folder.json"), "its folder does not exist"),
        (("--streaming", "--num-proc", "2"), "with `streaming` there are none"),
        (("--attn-implementation", "none_such"), "cannot be loaded"),
    ],
)
def test_bad_arguments(fail: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in fail(*arguments)


def test_bad_data(fail: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "holds no documents" in fail("--dataset", str(empty))
    (tmp_path / "bad.txt").write_bytes(b"a \xff b")
    assert "bad.txt, line 1: byte 2 (0xff) is not UTF-8" in fail("--dataset", str(tmp_path / "bad.txt"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert "not parquet, or damaged" in fail("--dataset", str(tmp_path / "bad.parquet"))


def test_models_that_are_none(fail: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no folder ./missing" in fail(model="./missing")
    assert "it has no config.json" in fail(model=str(tmp_path))
    with pytest.raises(SystemExit):
        main(["evaluate"])
    assert "the following arguments are required: --dataset" in capsys.readouterr().err


def test_interruption(
    checkpoint: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockgen_hf.evaluation.likelihood.evaluate_likelihood", interrupt)
    arguments = ["--dataset", str(data / "texts.jsonl"), "--cache-dir", str(data / "cache")]
    assert main(["evaluate", checkpoint, *arguments]) == 130
    assert capsys.readouterr().err == "\n"


@pytest.mark.parametrize("command", [("evaluate",), ("evaluate-answers",), ("finetune", "tinystories-masked")])
def test_a_separator_may_be_a_line_end(command: tuple[str, ...]) -> None:
    args = make_parser().parse_args([*command, "--dataset", "a", "--prompt-separator", "\\n"])
    assert args.prompt_separator == "\n"
