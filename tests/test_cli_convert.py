"""`blockgen-hf convert` in-process, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
from published_reference import LENGTH, ROWS, settings, weights, write
from safetensors.torch import load_file
from test_conversion_round_trip import assert_same_bits
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from blockgen_hf.cli import main
from blockgen_hf.hub.layouts import CAUSAL_LM, FAMILIES


def convert(*words: Any) -> int:
    return main(["convert", *(str(word) for word in words)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", settings("block-dit"), weights("block-dit"))


def test_a_published_checkpoint_becomes_a_model_that_generates(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The command, what it says, and `generate` with what it wrote."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    mixture = ["--diffusion-type", "masked", "--block-sizes", "1,16", "--block-size-weights", "0.05,0.95"]
    assert convert(source, "--output", out, *mixture, "--tokenizer", tmp_path / "tokenizer") == 0
    said = capsys.readouterr().out.splitlines()
    count = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert said == [
        f"{out}: block-dit, masked, {count:,} parameters in float32",
        f"block sizes 1, 16, clean attention causal, {ROWS} rows, with a tokenizer",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["block_sizes"] == [1, 16] and config["block_size_weights"] == [0.05, 0.95]
    assert main(["generate", "abc", "--model", str(out), "--max-new-tokens", "4", "--seed", "0"]) == 0
    assert "abc" in capsys.readouterr().out


def test_the_way_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--diffusion-type", "uniform", "--block-sizes", "1,4"]
    assert convert(source, "--output", tmp_path / "ours", *sizes, "--max-shard-size", "20KB") == 0
    assert "No tokenizer was written" in capsys.readouterr().out
    assert convert(tmp_path / "ours", "--output", tmp_path / "back", "--to", "published") == 0
    assert "diffusion_type='uniform', block_sizes=[1, 4]" in capsys.readouterr().out
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), weights("block-dit"))


def test_options_of_the_other_families(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dense = write(tmp_path / "dense", settings("dense-dit"), weights("dense-dit"))
    words = ["--diffusion-type", "uniform", "--family", "dense-dit", "--no-time-conditioning", "--dtype", "bfloat16"]
    assert convert(dense, "--output", tmp_path / "out", *words) == 0
    said = capsys.readouterr().out
    assert "dense-dit, uniform" in said and "bfloat16" in said and f"block sizes {LENGTH}," in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_conditioning"] is False
    model = write(tmp_path / "ar", settings("ar"), weights("ar"))
    assert convert(model, "--output", tmp_path / "out") == 1
    assert convert(model, "--output", tmp_path / "out", "--overwrite") == 0
    assert "ar, autoregressive" in capsys.readouterr().out


def test_a_source_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The repository is asked for at its revision; the place in the release tells noise and block sizes."""
    asked: list[Any] = []

    def snapshot_download(repo: str, revision: str | None, **options: Any) -> str:
        asked.append((repo, revision))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("blockgen_hf.hub.sources.snapshot_download", snapshot_download)
    place = "blockgen/multi_block_size/16/owt/uniform/uniform"
    write(tmp_path / "snapshot" / place, settings("block-dit"), weights("block-dit"))
    assert convert(f"hf:someone/blockgen/{place}", "--revision", "v1", "--output", tmp_path / "out") == 0
    assert asked == [("someone/blockgen", "v1")]
    assert "block sizes 1, 2, 4, 8, 16, clean attention causal" in capsys.readouterr().out


def test_what_cannot_be_converted_ends_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert convert(source, "--output", tmp_path / "out") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("blockgen-hf: error: `diffusion_type` (--diffusion-type) must be")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--output", "out", "--block-sizes", "1,x"],
        ["--output", "out", "--block-size-weights", "half"],
        ["--output", "out", "--family", "gpt"],
        ["--output", "out", "--diffusion-type", "absorb"],
    ],
)
def test_options_that_make_no_sense_are_refused(source: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        convert(source, *words)
    assert error.value.code == 2


def test_every_family_can_be_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        convert("--help")
    assert "{" + ",".join((*FAMILIES, CAUSAL_LM)) + "}" in capsys.readouterr().out
