"""`blockgen-hf bench` and benchmarks/generation.py, on tiny models."""

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import spaced_tokenizer, tiny_model

from blockgen_hf.cli import main


QUICK = ("--new-tokens", "6", "--block-size", "4", "--repeats", "1")

Command = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("uniform").save_pretrained(folder)
    spaced_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Command:
    def run_command(*arguments: str) -> str:
        assert main(["bench", *QUICK, *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run_command


@pytest.fixture
def fail(failing_line: Command) -> Command:
    """Runs `blockgen-hf bench`, which must fail with a single line; returns that line."""

    def run_command(*arguments: str) -> str:
        return failing_line("bench", *QUICK, *arguments)

    return run_command


def test_random_models(bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    options = ("--size", "tiny", "--decodings", "ar,block_diffusion:2,arpc:4", "--prefixes", "0,5")
    monkeypatch.setenv("COLUMNS", "100")
    out = bench(*options, "--batch-sizes", "1,2", "--json", str(file))
    assert re.findall("^random weights, (masked|uniform)", out, flags=re.MULTILINE) == ["masked", "uniform"]
    figures = json.loads(file.read_text())
    cases = [(case["diffusion_type"], case["prefix"], case["batch_size"]) for case in figures["cases"]]
    assert cases == [(kind, prefix, size) for kind in ("masked", "uniform") for prefix in (0, 5) for size in (1, 2)]
    for case in figures["cases"]:
        assert case["machine"]["gflops_per_second"] > 0
        rows = {(row["contender"], row["decoding"]): row for row in case["results"]}
        assert list(rows) == [
            ("blockgen", "ar"),
            ("blockgen", "block_diffusion:2"),
            ("blockgen", "arpc:4"),
            ("gpt2", "ar"),
        ]
        assert all(row["runs"][0]["generated"]["num_new_tokens"] == 6 * case["batch_size"] for row in rows.values())
        expected = rows["blockgen", "block_diffusion:2"]["expected_passes"]
        assert (expected is not None) is (case["diffusion_type"] == "masked")
    parts = 2  # of 14 columns, the labels in each
    assert len(re.findall(r"^(?:ar|arpc:4|block_diffusion:2) +(?:blockgen|gpt2) ", out, re.M)) == 8 * 4 * parts
    assert "|" not in out and max(map(len, out.splitlines())) <= 100
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_a_checkpoint(bench: Command, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it would stay for other tests
    file = tmp_path / "figures.json"
    options = ("--model", checkpoint, "--batch-sizes", "2", "--prefixes", "3", "--decodings", "arpc:4:temperature=0.5")
    out = bench(*options, "--dtype", "bfloat16", "--contenders", "blockgen", "--threads", "1", "--json", str(file))
    assert out.startswith(f"{checkpoint}, uniform: 2 x 16, V = 23, bfloat16")
    figures = json.loads(file.read_text())
    [case] = figures["cases"]
    assert case["machine"]["dtype"] == "bfloat16"
    [row] = case["results"]
    assert row["decoding"] == "arpc:4:temperature=0.5" and row["contender"] == "blockgen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prefixes", "0,-1"), "must be an integer of at least 0, but is '-1'"),
        (("--diffusion-types", "mask"), "must be of masked, uniform, but is 'mask'"),
        (("--decodings", "arpc:x"), "`arpc:x` is no decoding"),
        (("--size", "tiny", "--decodings", "arpc:2"), "`nfe_per_block=2` is too small"),
        (("--size", "tiny", "--contenders", "blockgen,plain"), "there are blockgen, gpt2, but not plain"),
        (("--model", "./missing"), "There is no folder ./missing"),
        (("--model", "x", "--size", "tiny"), "--size is for random weights"),
        (("--model", "x", "--diffusion-types", "masked"), "--diffusion-types is for random weights"),
        (("--revision", "main"), "are for a --model"),
        (("--json", "no/such/folder.json"), "its folder does not exist"),
    ],
)
def test_bad_arguments(fail: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in fail(*arguments)


def test_a_checkpoint_that_is_too_short(fail: Command, checkpoint: str) -> None:
    message = fail("--model", checkpoint, "--prefixes", "0,60")
    assert "--prefixes and --new-tokens make 66 tokens, but the model takes 64 at most" in message


def test_the_script_adds_the_plain_baseline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = import_module("generation")
    monkeypatch.setenv("COLUMNS", "100")
    options = ("--size", "tiny", "--diffusion-types", "masked", "--batch-sizes", "1", "--prefixes", "0", "--decodings")
    monkeypatch.setattr(sys, "argv", ["generation.py", *QUICK, *options, "ar,block_diffusion:8"])
    assert script.main() == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:2] for line in lines if re.match("ar|block_diffusion", line)]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]  # the second part of the columns
    assert rows[: len(rows) // 2] == [
        ["ar", "blockgen"],
        ["block_diffusion:8", "blockgen"],
        ["ar", "plain"],
        ["block_diffusion:8", "plain"],
        ["ar", "gpt2"],
    ]
    monkeypatch.setattr(sys, "argv", ["generation.py", *QUICK, *options, "no_such"])
    assert script.main() == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_speed_by_length_and_batch_has_a_line_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = import_module("generation_length")
    plot = tmp_path / "speed.svg"
    options = ("--size", "tiny", "--new-tokens", "96", "--stretch", "32", "--batch-sizes", "1", "3")
    options += ("--batch-tokens", "16", "--plot", str(plot))
    monkeypatch.setattr(sys, "argv", ["generation_length.py", *options])
    script.main()
    out = capsys.readouterr().out
    assert re.findall(r"^\| (\d+ to \d+) \| [\d.]+ \|$", out, re.M) == ["0 to 32", "32 to 64", "64 to 96"]
    (ratio,) = re.findall(r"Cache of 96 tokens: .*, ([\d.]+) x what they need", out)
    assert 1 <= float(ratio) < 2
    assert re.findall(r"^\| (\d+) \| [\d.]+ \|$", out, re.M) == ["1", "3"]
    assert "<svg" in plot.read_text()
