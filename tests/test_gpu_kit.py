"""The GPU kit of benchmarks/gpu, tried out on the CPU: rows, tables, limits of time, failures that cost no others."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


KIT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files as modules, as its command finds them."""
    monkeypatch.syspath_prepend(str(KIT))
    monkeypatch.syspath_prepend(str(KIT.parent))


def run(module: ModuleType, rows: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict]:
    words = [module.__name__, "--device", "cpu", "--size", "tiny", "--rows", str(rows), *options]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    return [json.loads(line) for line in rows.read_text().splitlines()]


def test_training(kit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that this device cannot run is a row that says so."""
    import measure_training

    monkeypatch.setattr(measure_training, "VARIANTS", dict([*measure_training.VARIANTS.items()][:3]))
    monkeypatch.setattr(measure_training, "WARM_UP", 1)
    machine, *rows = run(measure_training, tmp_path / "rows", monkeypatch)
    assert machine["TFLOP/s"] > 0
    assert [row["variant"] for row in rows] == ["plain", "sdpa", "flex_attention"] * 2
    for row in rows:
        assert (
            ("needs kernels that CPUs do not have" in row["error"]) if "flex" in row["variant"] else row["steps"] >= 2
        )


def test_generation(kit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import measure_generation

    monkeypatch.setattr(measure_generation, "DECODINGS", ("ar", "block_diffusion:4:sampler=first_hitting"))
    rows = run(measure_generation, tmp_path / "rows", monkeypatch)
    assert len(rows) == 2 * (4 + 4) and {row["by"] for row in rows} == {"blockgen", "plain", "gpt2"}
    # Uniform models have no first hitting; everything else is measured.
    assert all(("error" in row) == (row["noise"] == "uniform" and "hitting" in row["decoding"]) for row in rows)
    rows = run(measure_generation, tmp_path / "late", monkeypatch, "--seconds", "0")
    assert all(row["error"].startswith("no time was left") for row in rows)


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_rows(kit: None, tmp_path: Path) -> None:
    """The whole command, with a test that is skipped, and training without the time to begin."""
    options = ["--device", "cpu", "--size", "tiny", "--tests", "no_such_test", "--output-dir", str(tmp_path)]
    words = [sys.executable, str(KIT), *options, "--parts", "correctness,training", "--seconds", "0.2"]
    assert subprocess.run(words, capture_output=True, timeout=250).returncode == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert {part: each["status"] for part, each in found.items() if part != "versions"} == dict.fromkeys(
        ("correctness", "training"), "stopped, its time was up"
    )


@pytest.mark.slow
def test_correctness(kit: None, tmp_path: Path) -> None:
    """The tests for GPUs, on the CPU, as the kit runs them: none fails, and every one is a row."""
    options = ["--device", "cpu", "--tests", "not compiled and not autocast", "--output-dir", str(tmp_path)]
    words = [sys.executable, str(KIT), *options, "--parts", "correctness", "--seconds", "250"]
    assert subprocess.run(words, capture_output=True, timeout=280).returncode == 0
    found = json.loads((tmp_path / "results.json").read_text())
    outcomes = [row["outcome"] for row in found["correctness"]["rows"]]
    assert set(outcomes) == {"passed", "skipped"} and outcomes.count("passed") > 35
    assert found["versions"]["status"] == "0" and "torch" in found["versions"]["rows"][0]


def test_tables(kit: None, tmp_path: Path) -> None:
    from report import append_row, markdown, read_rows

    file = tmp_path / "rows"
    assert read_rows(file) == []
    append_row(file, {"test": "a", "outcome": "passed", "seconds": 1.0})
    append_row(file, {"test": "b", "outcome": "failed", "message": "x | y\nz"})
    with file.open("a") as stream:
        stream.write('{"test": ')  # half a line of a process that was stopped
    parts = {"correctness": {"status": "1", "seconds": 2.0, "rows": read_rows(file)}}
    parts["training"] = {"status": "0", "seconds": 1.0, "rows": [{"variant": "sdpa", "tokens per second": 12345.6}]}
    text = markdown(parts)
    assert "1 passed, 1 failed, 0 skipped." in text and "| b | failed | x \\| y z |" in text
    assert "| sdpa | 12,346 |" in text
