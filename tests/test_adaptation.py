"""Adapting a causal language model: small blocks first, drafts that are counted, and an original that stays."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from causal_models import adopted, converted, original, texts
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training import make_trainer

import blockgen_hf
from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.cli import main
from blockgen_hf.evaluation.acceptance import accepted_draft_tokens, greedy_texts
from blockgen_hf.hub import convert_checkpoint, model_card
from blockgen_hf.training.recipe_adapter import adapter_settings, add_adapter


def test_accepted_tokens_are_those_of_speculative_decoding() -> None:
    model = adopted(original(), diffusion_type="uniform")
    prompts = texts(3, 4)
    written = greedy_texts(model, prompts, 9)
    assert torch.equal(written, model.generate(prompts, max_new_tokens=9))
    found = accepted_draft_tokens(model, written, 4, [1, 4])
    # By hand: a draft behind every prefix that ends where a block begins.
    noise = model.fixed_queries(torch.arange(13)[None]).expand_as(written)
    kept = []
    for start in (4, 8):
        canvas = torch.cat([written[:, start : start + 1], noise[:, start + 1 : start + 4]], dim=1)
        with torch.no_grad():
            cache = model(written[:, :start]).cache
            draft = model(noisy_input_ids=canvas, cache=cache, block_size=4).logits.argmax(-1)
        kept.append((draft == written[:, start + 1 : start + 5]).long().cumprod(-1).sum(-1))
    assert found[4] == pytest.approx(torch.cat(kept).double().mean().item())
    assert found[4] >= found[1] == 1
    query = tiny_model(scale=3.0)
    assert 0 <= accepted_draft_tokens(query, greedy_texts(query, texts(2, 4).clamp(max=19), 8), 4, [4])[4] <= 4


def test_small_blocks_join_the_mixture_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, block_size_curriculum=0.5, max_steps=12)
    seen = []
    for step in range(12):
        trainer.state.global_step, trainer.state.max_steps = step, 12
        seen.append(trainer._drawn_block_sizes()[0])
    assert seen[:6] == [[1, 2], [1, 2], [1, 2, 4], [1, 2, 4], [1, 2, 4, 8], [1, 2, 4, 8]]
    assert seen[6:] == [[1, 2, 4, 8]] * 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with a tokenizer, and data beside it."""
    folder = tmp_path_factory.mktemp("base")
    converted(folder, original(), name="model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": "".join("abcdefghij"[i * j % 10] for j in range(1, 40))} for i in range(1, 50)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def adapt(base: Path, output: Path, *options: str) -> None:
    command = ["adapt", str(base / "model"), "--dataset", str(base / "data.jsonl"), "--output-dir", str(output)]
    short = ["--batch-size", "4", "--sequence-length", "32", "--validation-documents", "20"]
    assert main([*command, *short, *options, "training.eval_accepted_rows=2", "training.logging_steps=1"]) == 0


def test_an_adapter_is_trained_and_loaded_over_the_base_whose_text_stays(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path / "run", "--max-steps", "4", "--learning-rate", "0.05")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("loss_block_size_2" in entry for entry in log)
    accepted = [entry["eval_accepted_block_size_4"] for entry in log if "eval_accepted_block_size_4" in entry]
    assert accepted and all(1 <= mean <= 4 for mean in accepted)
    plain = BlockGenForDiffusionLM.from_pretrained(base / "model").eval()
    model = BlockGenForDiffusionLM.from_pretrained(base / "model").eval()
    model.load_adapter(str(tmp_path / "run"))
    ids = texts(1, 8)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    noise = torch.full_like(ids, model.config.mask_token_id)
    assert not torch.equal(model(ids, noise, block_size=4).logits, plain(ids, noise, block_size=4).logits)


def test_all_weights_are_trained_with_the_autoregressive_loss(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path / "run", "--max-steps", "2", "--mode", "full", "--self-data", "24", "--prompt-tokens", "6")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any({"loss_block_size_1", "loss_block_size_2"} <= set(entry) for entry in log)
    (file,) = tmp_path.glob("run-self-data-*.jsonl")
    rows = file.read_text().splitlines()
    assert len(rows) == 24 and all(json.loads(row)["text"] for row in rows)
    assert BlockGenForDiffusionLM.from_pretrained(tmp_path / "run").config.is_anchored


def test_other_models_are_sent_to_finetune(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    assert main(["adapt", str(tmp_path / "model"), "--dataset", "data.jsonl"]) != 0
    assert "blockgen-hf finetune" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        'adapter.target_modules=["q_proj","lm_head"]',
        'adapter.modules_to_save=["noise_embedding","lm_head"]',
        'adapter.modules_to_save=["norm"]',
        "adapter.bias=all",
    ],
)
def test_an_adapter_that_would_change_the_autoregressive_model_is_refused(setting: str) -> None:
    pytest.importorskip("peft")
    name, value = setting.removeprefix("adapter.").split("=")
    given = {"r": 2, name: yaml.safe_load(value)}
    model = adopted(original(family="llama", tie_word_embeddings=False))  # with biases
    with pytest.raises(ValueError, match="acts on clean tokens too"):
        add_adapter(model, adapter_settings(given, {}, "test"), "org/base")
    model = adopted(original(family="llama", tie_word_embeddings=False))
    model.config.adapter_rows = "all"
    add_adapter(model, adapter_settings(given, {}, "test"), "org/base")


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_adapter_that_begins_by_changing_the_weights_is_refused(way: str) -> None:
    pytest.importorskip("peft")
    settings = adapter_settings({"r": 2, "init_lora_weights": way}, {}, "test")
    with pytest.raises(ValueError, match=f"`adapter.init_lora_weights` is '{way}', which changes the weights"):
        add_adapter(adopted(original(family="llama")), settings, "org/base")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--block-sizes", "1"], "`--block-sizes` [1]"),
        (["--block-size-weights", "1,0,0,0"], "`--block-size-weights` [1.0, 0.0, 0.0, 0.0]"),
        (["model.block_sizes=[1]"], "`model.block_sizes` [1]"),
    ],
)
def test_an_adapter_that_nothing_would_train_is_refused(
    base: Path, options: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    command = ["adapt", str(base / "model"), "--dataset", str(base / "data.jsonl"), "--output-dir", str(base / "no")]
    assert main([*command, "--sequence-length", "32", "--validation-documents", "20", *options]) != 0
    assert named in capsys.readouterr().err


def test_a_model_whose_weights_were_all_trained_knows_its_origin(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "model", tmp_path / "model")
    file = tmp_path / "model" / "conversion.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "source": "hf:org/original", "revision": "0" * 40}))
    shutil.copy(base / "data.jsonl", tmp_path)
    adapt(tmp_path, tmp_path / "run", "--max-steps", "1", "--mode", "full", "training.eval_strategy=no")
    kept = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert "files" not in kept
    convert_checkpoint(tmp_path / "run", tmp_path / "back", to="causal-lm")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == values["source_config"]
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == values["generation_config"]
    card = model_card(tmp_path / "run", repo_id="me/mine", license="mit")
    assert card.data.base_model == "org/original"
    assert "trained further from weights that were converted from `hf:org/original`" in " ".join(str(card).split())


RESUMABLE = ("training.eval_steps=4", "training.save_steps=2")
UNINTERRUPTED = ("--max-steps", "4", "--learning-rate", "0.05", *RESUMABLE)


def figures(run: Path) -> list[dict[str, float]]:
    """What was logged of steps and evaluations, without what time it took."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    kept = ("loss", "eval_nll", "eval_accepted", "grad_norm")
    found = [{name: value for name, value in entry.items() if name.startswith(kept)} for entry in log]
    return [entry for entry in found if entry]


def assert_same_run(run: Path, expected: Path, mode: str) -> None:
    weights = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}[mode]
    found, wanted = load_file(run / weights), load_file(expected / weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    steps, expected_steps = figures(run), figures(expected)
    assert [entry.keys() for entry in steps] == [entry.keys() for entry in expected_steps]
    for entry, other in zip(steps, expected_steps, strict=True):
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_a_resumed_adaptation_ends_as_one_without_interruption(base: Path, tmp_path: Path, mode: str) -> None:
    adapt(base, tmp_path / "whole", *UNINTERRUPTED, "--mode", mode)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # as it was after two steps
    for name in ("adapter_model.safetensors", "model.safetensors", "trainer_state.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    adapt(base, tmp_path / "run", *UNINTERRUPTED, "--mode", mode, "--resume")
    assert_same_run(tmp_path / "run", tmp_path / "whole", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_two_processes_adapt_as_one(base: Path, tmp_path: Path, mode: str) -> None:
    short = ["--batch-size", "4", "--sequence-length", "32", "--validation-documents", "20", *UNINTERRUPTED]
    settings = [*short, "--mode", mode, "training.eval_accepted_rows=2", "training.logging_steps=1"]
    adapt(base, tmp_path / "one", *UNINTERRUPTED, "--mode", mode)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = Path(__file__).parents[1] / "examples" / "accelerate" / "ddp_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", port, "-m", "blockgen_hf", "adapt", str(base / "model")]
    command += ["--dataset", str(base / "data.jsonl"), "--output-dir", str(tmp_path / "two"), *settings]
    path = os.pathsep.join([str(Path(blockgen_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    states = {path.name for path in (tmp_path / "two" / "checkpoint-4").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert_same_run(tmp_path / "two", tmp_path / "one", mode)


@pytest.mark.parametrize(
    ("options", "passed"), [([], ["--max-steps", "500"]), (["--epochs", "1"], ["--epochs", "1.0"])]
)
def test_the_example_trains_for_steps_or_epochs(
    options: list[str], passed: list[str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import adapt_smollm2

    calls: list[list[str]] = []
    monkeypatch.setattr(adapt_smollm2, "blockgen_hf", lambda arguments: calls.append(arguments) or 0)
    arguments = ["--dataset", "my.jsonl", "--base", str(base / "model"), *options, "--mode", "full"]
    monkeypatch.setattr(sys, "argv", ["adapt_smollm2.py", *arguments])
    assert adapt_smollm2.main() == 0
    assert [option for option in calls[0] if option in ("--max-steps", "--epochs")] == passed[:1]
    assert passed[1] in calls[0] and calls[0][-2:] == ["--mode", "full"]


def test_the_page_has_the_committed_results_of_the_small_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is what benchmarks/adaptation_small.py prints from its results."""
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.adaptation_small import tables

    page = (root / "docs" / "adaptation.md").read_text()
    found = json.loads((root / "benchmarks" / "adaptation_small.json").read_text())
    for table in tables(found).split("\n\n"):
        assert table in page, "paste what --report prints"
