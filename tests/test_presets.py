"""Presets: the models of the papers, on top of a recipe, from the command line and in Python."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SEPARATOR, TINY, sentences, stand_ins, write_text
from transformers import AutoModelForCausalLM

from blockgen_hf import BlockGenConfig
from blockgen_hf.cli import main
from blockgen_hf.training import PRESETS, apply_preset
from blockgen_hf.training.recipe import load_recipe


FAST = ("ar", "mdlm")
POWERS = [1, 2, 4, 8, 16]
# diffusion, block sizes for rows of 64 tokens, weights, attention among clean tokens, objective, knows the time
EXPECTED = {
    "ar": ("uniform", [1], None, "causal", "cross_entropy", False),
    "ar-block-1": ("masked", [1], None, "causal", "cross_entropy", False),
    "mdlm": ("masked", [64], None, "block_causal", "elbo", False),
    "udlm": ("uniform", [64], None, "block_causal", "elbo", True),
    "bd3lm": ("masked", [16], None, "block_causal", "elbo", False),
    "blockgen-masked": ("masked", POWERS, None, "causal", "cross_entropy", False),
    "blockgen-uniform": ("uniform", POWERS, None, "causal", "elbo", False),
    "blockgen-mostly-ar": ("uniform", POWERS, [0.7, 0.05, 0.05, 0.05, 0.15], "causal", "elbo", False),
    "blockgen-5-percent-ar": ("masked", [1, 16], [0.05, 0.95], "causal", "cross_entropy", False),
    "mix-scale": ("masked", [4, 64], [0.9, 0.1], "causal", "elbo", False),
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


def facts(config: BlockGenConfig) -> tuple[Any, ...]:
    names = ("diffusion_type", "block_sizes", "block_size_weights", "clean_attention", "training_objective")
    return (*(getattr(config, name) for name in names), config.time_conditioning)


def test_the_papers_models() -> None:
    assert list(PRESETS) == list(EXPECTED)
    for name, expected in EXPECTED.items():
        model, training = apply_preset(name, 64, {"hidden_size": 32, "num_attention_heads": 2}, {"max_steps": 7})
        config = BlockGenConfig(**model)
        assert facts(config) == expected, name
        assert config.next_token_prediction == (name == "ar")
        assert config.noise_schedule == "linear" and config.hidden_size == 32
        assert training["max_steps"] == 7
        drawn = training["noise_level_sampling"], training["noise_interval_steps"]
        assert drawn == (("block", 5000) if name in ("bd3lm", "mix-scale") else ("sequence", 0))


def test_nothing_is_left_of_the_recipe_s_mixture_and_the_rest_stays() -> None:
    plain = load_recipe("laptop")
    for name, expected in EXPECTED.items():
        recipe = load_recipe("laptop", ["data.sequence_length=64"], preset=name)
        config = BlockGenConfig(**recipe.config_fields())
        assert facts(config) == expected
        assert config.hidden_size == 192 and config.max_position_embeddings == 256
        assert recipe.training["learning_rate"] == plain.training["learning_rate"]
        assert recipe.source == f"laptop.yaml (preset {name})"


def test_overrides_change_a_preset() -> None:
    recipe = load_recipe("laptop", ["model.block_sizes=[4]", "training.noise_level_sampling=sequence"], preset="bd3lm")
    assert recipe.model["block_sizes"] == [4]
    assert recipe.training["noise_level_sampling"] == "sequence"


def test_unknown_presets_are_refused(failing_line: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="`preset` must be one of ar, ar-block-1, .*, but is 'gpt'"):
        load_recipe("laptop", preset="gpt")
    assert "--preset: invalid choice: 'gpt'" in failing_line("train", "laptop", "--preset", "gpt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in EXPECTED]
)
def test_a_preset_trains_evaluates_saves_loads_and_generates(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """50 steps, from the command line; the run is resumed with the same preset only."""
    run, held_out = tmp_path / "run", write_text(tmp_path / "held_out.txt", sentences(12, seed=1))
    data = stand_ins("laptop", tmp_path / "data")

    def command(*words: str) -> str:
        status = main(list(words))
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    words = ("train", "laptop", *TINY, *data, "training.logging_steps=10", "--output-dir", str(run))
    if name in ("bd3lm", "mix-scale"):
        words += ("training.noise_interval_steps=25", "training.noise_interval_rows=3")
    out = command(*words, "--preset", name, "--max-steps", "50")
    assert out.startswith(f"laptop.yaml (preset {name}): ")
    assert ("noise levels" in out) == (name in ("bd3lm", "mix-scale"))
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]

    evaluate = ("evaluate", str(run), "--dataset", held_out, "--document-separator", SEPARATOR)
    figures = json.loads(command(*evaluate, "--monte-carlo-samples", "2", "--json", "-"))
    sizes = [16 if size == 64 else size for size in EXPECTED[name][1]]  # rows have 16 tokens
    assert list(figures["block_sizes"]) == [str(size) for size in sizes]
    assert math.isfinite(figures["jensen"]["perplexity"])

    model = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)
    assert model.config.block_sizes == sizes and model.config.next_token_prediction == (name == "ar")
    assert all(weight.isfinite().all() for weight in model.parameters())
    torch.manual_seed(0)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, eos_token_id=None).shape == (1, 10)
    assert command("generate", "--model", str(run), "a b", "--max-new-tokens", "8", "--seed", "0").strip()

    resumed = command(*words, "--preset", name, "--max-steps", "52", "--resume")
    assert "checkpoint-50" in resumed and "Changed: training.max_steps: 50 -> 52" in resumed
    assert main([*words, "--max-steps", "54", "--resume"]) != 0
    assert "cannot be resumed with another `model." in capsys.readouterr().err


def test_a_dry_run_tells_the_preset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.cli.dry_run.measure_speed", lambda *args: 1e12)
    assert main(["train", "laptop", "--preset", "mix-scale", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "laptop.yaml (preset mix-scale)" in out and "4 (0.9), 128 (0.1); stratified" in out
