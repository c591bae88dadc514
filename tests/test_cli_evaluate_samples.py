"""`blockgen-hf evaluate-samples` on a tiny model and a tiny judge, offline."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from blockgen_hf.cli import main


pytest.importorskip("evaluate")

Command = Callable[..., str]

SMALL = ("--num-samples", "4", "--max-new-tokens", "16", "--nfe", "4", "--batch-size", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("folder") / "tiny-judge"
    config = GPT2Config(vocab_size=23, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def evaluate(checkpoint: str, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `blockgen-hf evaluate-samples` and returns what it prints."""

    def run_command(*arguments: str, folder: str = "samples") -> str:
        judged = () if "--judge" in arguments else ("--judge", judge)
        status = main(["evaluate-samples", checkpoint, "--output-dir", str(tmp_path / folder), *judged, *arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run_command


def figures(folder: Path) -> dict[str, Any]:
    """What results.json says, without what a clock says."""
    found = json.loads((folder / "results.json").read_text())
    for cell in found["cells"]:
        for name in ("seconds", "cpu_seconds", "tokens_per_second", "tokens_per_cpu_second"):
            del cell[name]
    return found


def test_a_run_writes_tables_texts_and_figures(
    evaluate: Command, tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = evaluate(*SMALL, "--ar-seed", "0,4")
    folder = tmp_path / "samples"
    found = json.loads((folder / "results.json").read_text())
    assert [cell["cell"]["decoding"] for cell in found["cells"]] == [
        "ar", "block_diffusion:4", "block_diffusion:4", "arpc:4", "arpc:4"
    ]  # fmt: skip
    assert found["settings"]["model"] == Path(checkpoint).name and found["settings"]["judge"] == "tiny-judge"
    page = (folder / "results.md").read_text()
    assert "gen. PPL (tiny-judge)" in page and str(tmp_path) not in page
    assert "| `ar` |" in page and "|" not in out and max(map(len, out.splitlines()[:-1])) <= 100
    assert len(list((folder / "texts").glob("*.jsonl"))) == 5
    rows = [json.loads(line) for line in (folder / "texts" / "ar.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3] and {len(row["token_ids"]) for row in rows} == {16}
    assert not list(folder.rglob("*.unfinished"))
    expected_again = figures(folder)
    evaluate(*SMALL, "--ar-seed", "0,4")
    assert figures(folder) == expected_again


def test_the_plot_needs_matplotlib(evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "No plot: it needs matplotlib" in evaluate(*SMALL, "--decodings", "ar", "--judge", "none")
    assert not (tmp_path / "samples" / "quality.svg").exists()


def test_a_dry_run_lists_cells_and_costs(evaluate: Command, tmp_path: Path) -> None:
    out = evaluate(*SMALL, "--ar-seed", "0,4,12", "--dry-run", "--num-samples", "10")
    lines = [re.split(" {2,}", line) for line in out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[0] == "ar")
    assert lines[start : start + 5] == [
        ["ar", "–", "16", "1.00"],
        ["block_diffusion-4-L8-k0", "4", "8", "0.50"],
        ["block_diffusion-4-L8-k4", "4", "12", "0.75"],
        ["arpc-4-L8-k0", "4", "8", "0.50"],
        ["arpc-4-L8-k4", "4", "12", "0.75"],
    ]
    assert "5 cells of 10 texts of 16 tokens: at most 560 function evaluations, in 224 passes of up to 3 texts." in out
    assert "Skipped: arpc-4-L8-k12: A block has 8 tokens" in out
    assert not (tmp_path / "samples").exists()


def test_texts_are_as_long_as_the_model_takes(evaluate: Command, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abcdefgh"}\n')
    out = evaluate("--decodings", "ar", "--dry-run", "--prompts", str(prompts))
    assert f"texts of {64 - 8} tokens" in out


def test_prompts_and_settings(evaluate: Command, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n\nde\n")
    evaluate(*SMALL, "--prompts", str(prompts), "--temperatures", "1,0.5", "--top-p", "0.9", "--decodings", "ar")
    found = figures(tmp_path / "samples")
    assert found["settings"]["num_prompts"] == 2
    assert [cell["cell"]["name"] for cell in found["cells"]] == ["ar-T0.5-p0.9", "ar-p0.9"]
    assert "| T | top-p |" in (tmp_path / "samples" / "results.md").read_text()


def test_without_a_judge(evaluate: Command, tmp_path: Path) -> None:
    evaluate(*SMALL, "--decodings", "ar", "--judge", "none")
    scores = figures(tmp_path / "samples")["cells"][0]["scores"]
    assert "perplexity" not in scores and scores["entropy"] > 0


def test_judge_options(evaluate: Command, tmp_path: Path) -> None:
    evaluate(*SMALL, "--decodings", "ar", "--judge-start-token", "a", "--judge-max-length", "8")
    scores = figures(tmp_path / "samples")["cells"][0]["scores"]
    assert scores["judge_start_token"] == "a" and scores["judge_max_length"] == 8
    assert scores["num_judge_tokens"] == 4 * 8 and scores["num_truncated_tokens"] == 4 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "none", "--judge-max-length", "8"], "--judge-max-length has no meaning with --judge none"),
        (["--judge", "x", "--judge-gguf", "y"], "are two judges"),
        (["--judge-gguf", "nowhere.gguf"], "there is no such file"),
        (["--judge", "./nowhere"], "The judge ./nowhere cannot be loaded. Give another with --judge"),
        (["--judge", "none", "--decodings", "arp"], "arp"),
        (["--judge", "none", "--decodings", "arpc", "--nfe", "1"], "too small for a single informed step"),
        (["--judge", "none", "--nfe", "0"], "must be an integer of at least 1"),
        (["--judge", "none", "--temperatures", "-1"], "must be a positive number"),
        (["--judge", "none", "--top-p", "1.5"], "must be a number from 0 to 1"),
        (["--judge", "none", "--max-new-tokens", "99"], "the model has 64 positions"),
        (["--judge", "none", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: there is no such file"),
    ],
)
def test_mistakes_end_in_one_line(
    failing_line: Command, checkpoint: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder = tmp_path / "samples"
    assert message in failing_line("evaluate-samples", checkpoint, "--output-dir", str(folder), *arguments)
    assert not folder.exists()


def test_other_settings_are_refused(
    evaluate: Command, failing_line: Command, checkpoint: str, judge: str, tmp_path: Path
) -> None:
    evaluate(*SMALL, "--decodings", "ar")
    options = ("--output-dir", str(tmp_path / "samples"), "--judge", judge, "--decodings", "ar", *SMALL)
    assert "was made with other settings (`seed` was 0, and is 1 now)" in failing_line(
        "evaluate-samples", checkpoint, *options, "--seed", "1"
    )
    evaluate(*SMALL, "--decodings", "ar", "--seed", "1", "--overwrite")
    assert figures(tmp_path / "samples")["settings"]["seed"] == 1


@pytest.mark.slow
def test_a_killed_run_goes_on(evaluate: Command, checkpoint: str, tmp_path: Path) -> None:
    """SIGKILL as soon as a cell is there; what is found afterwards is what an uninterrupted run finds."""
    options = ("--nfe", "4,8", "--num-samples", "4", "--max-new-tokens", "56", "--batch-size", "2")
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "blockgen_hf", "evaluate-samples", checkpoint, "--judge", "none", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--output-dir", str(folder)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(folder.glob("cells/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = len(list(folder.glob("cells/*.json")))
    assert 0 < left < 5 and not (folder / "results.json").exists()
    evaluate("--judge", "none", *options, folder="killed")
    evaluate("--judge", "none", *options, folder="whole")
    assert figures(folder)["cells"] == figures(tmp_path / "whole")["cells"]
    for file in (tmp_path / "whole" / "texts").iterdir():
        assert file.read_text() == (folder / "texts" / file.name).read_text()
