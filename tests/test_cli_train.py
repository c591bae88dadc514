"""`blockgen-hf train` in-process, offline, on tiny models and local data."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import TINY, sentences, stand_ins, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockgen_hf
from blockgen_hf.cli import main
from blockgen_hf.cli.training_log import evaluation_line, interval_line
from blockgen_hf.run_folders import LOCK
from blockgen_hf.training.recipe import bundled_recipes
from blockgen_hf.training.recipe_building import build_trainer


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


Command = Callable[..., str]


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Trains by a recipe on what stands in for its data, in `tmp_path / "run"`; returns what it prints."""

    def run_command(name: str, *arguments: str) -> str:
        overrides = [*TINY, *stand_ins(name, tmp_path / "data")]
        status = main(["train", name, *overrides, "--output-dir", str(tmp_path / "run"), *arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert printed.err == ""
        return printed.out

    return run_command


@pytest.fixture
def fail(tmp_path: Path, failing_line: Command) -> Command:
    """Runs `blockgen-hf train laptop`, which must fail with a single line; returns that line."""

    def run_command(*arguments: str, recipe: str = "laptop") -> str:
        overrides = [*TINY, *stand_ins("laptop", tmp_path / "data")] if recipe == "laptop" else []
        return failing_line("train", recipe, *overrides, "--output-dir", str(tmp_path / "run"), *arguments)

    return run_command


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# what a run gives


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_run(train: Command, tmp_path: Path, name: str) -> None:
    check_run(train(name), tmp_path / "run", name)


def test_uniform_models(train: Command, tmp_path: Path) -> None:
    check_run(train("owt", "model.diffusion_type=uniform"), tmp_path / "run", "owt")


def check_run(out: str, folder: Path, name: str) -> None:
    """Five steps, each with finite losses; a model that loads, and figures of it."""
    lines = out.splitlines()
    assert re.fullmatch(rf"{name}\.yaml: 0\.0M parameters, \d+ rows, \d+ for validation, begins", lines[0])
    losses = [float(value) for value in re.findall(r"^step \d/5  loss ([\d.]+)  \(", out, flags=re.MULTILINE)]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    assert f"Model: {folder}" in out
    found = results(folder)
    perplexity = found["eval_perplexity_jensen"]
    assert math.isfinite(perplexity) and math.isfinite(found["train_loss"])
    assert re.search(rf"^mixture, Jensen \(Eq. 7\) .* {perplexity:.2f}", out, flags=re.MULTILINE)
    for size in (1, 2, 4, 8, 16):
        assert re.search(rf"^block size {size} ", out, flags=re.MULTILINE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    if model.config.diffusion_type == "masked":
        assert model.config.mask_token_id == tokenizer.mask_token_id
    assert checkpoints(folder) == ["checkpoint-5"]


def test_a_folder_in_use(train: Command, fail: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    train("laptop", "--max-steps", "3", "training.save_steps=1", "training.save_total_limit=2")
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-3"]

    # Neither flag: refused, before data or tokenizer are looked for.
    with monkeypatch.context() as patch:
        patch.setattr("blockgen_hf.cli.training.build_trainer", None)
        message = fail()
        assert f"{folder} holds checkpoints up to checkpoint-3 and a model: go on from there with --resume" in message
        assert "another `model.hidden_size`: it was 16, and is 32 now" in fail("--resume", "model.hidden_size=32")
        assert "another `data.sequence_length`" in fail("--resume", "data.sequence_length=8")
        assert "not allowed with argument" in fail("--resume", "--overwrite")

    # Gone on from, longer than the first time, with the tokenizer of the first time.
    tokenizer = (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    out = train("laptop", "--resume", "--max-steps", "5")
    assert f"from {folder}/checkpoint-3" in out
    assert re.findall(r"^step (\d)/5  loss", out, flags=re.MULTILINE) == ["4", "5"]
    assert (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer

    # Replaced; what is not of a run stays.
    (folder / "notes.txt").write_text("mine")
    train("laptop", "--overwrite", "--max-steps", "1")
    assert checkpoints(folder) == ["checkpoint-1"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns > tokenizer

    # A model without a checkpoint.
    for name in checkpoints(folder):
        (folder / name).rename(tmp_path / name)
    assert "holds a model, but no checkpoint to resume from" in fail("--resume")


def test_resumed_runs_end_as_others(train: Command, tmp_path: Path) -> None:
    train("laptop", "training.save_steps=2", "training.save_total_limit=5")
    whole = results(tmp_path / "run")
    for name in ("checkpoint-5", "checkpoint-4"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    train("laptop", "--resume")
    resumed = results(tmp_path / "run")
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)


def test_resume_begins_where_there_is_nothing(train: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("not of a run")
    out = train("laptop", "--resume", "--max-steps", "1", "data.validation_documents=0")
    assert "begins" in out and "Validation" not in out


def test_what_is_kept_when_the_data_are_bad(train: Command, fail: Command, tmp_path: Path) -> None:
    train("laptop", "--max-steps", "1")
    (tmp_path / "bad.jsonl").write_text("{")
    message = fail("--overwrite", f"data.dataset={tmp_path / 'bad.jsonl'}", "data.document_separator=null")
    assert "bad.jsonl, line 1: not JSON" in message
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]


# dry runs


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.setattr("blockgen_hf.cli.training.build_trainer", None)
    monkeypatch.setattr("blockgen_hf.training.data.load_datasets", None)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", bundled_recipes())
def test_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blockgen_hf.cli.dry_run.measure_speed", lambda *args: 1e12)
    assert main(["train", name, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and list(tmp_path.iterdir()) == []
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in printed.out.splitlines() if line[0] != " ")
    assert lines["recipe"] == f"{name}.yaml"
    expected = {
        "laptop": ("2,737,536", "16 rows = 4 a process x 4", "2,048 tokens", "500 steps, 1,024,000"),
        "owt": ("169,627,218", "512 rows = 16 a process x 32", "524,288 tokens", "1,000,000 steps, 524,288,000,000"),
        "lm1b": ("139,292,986", "512 rows = 64 a process x 8", "at most 65,536", "1,000,000 steps, at most 65,536,"),
        "lm1b-wrapped": ("139,292,986", "512 rows = 64 a process x 8", "65,536", "1,000,000 steps, 65,536,000,000"),
        "tinygsm": ("167,928,833", "512 rows = 32 a process x 16", "at most 262,144", "250,000 steps"),
    }[name]
    for key, part in zip(("model", "batch", "a step", "in all"), expected, strict=True):
        assert part in lines[key], key
    assert "(of the Hub, split train)" in lines["data"]
    assert "about" in lines["memory"] and "about" in lines["time"]
    assert "nothing is overwritten" in lines["output"]


@pytest.mark.usefixtures("no_network")
def test_dry_run_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "laptop", "--dry-run", "training.max_steps=-1", "training.num_train_epochs=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^time +about .* a step, without evaluation .* at [\d,]+ GFLOP/s here\)$", out, flags=re.MULTILINE
    )
    assert "2 times the data, whose size is known once they are read" in out


def times_of_files(folder: Path) -> dict[Path, int]:
    """Without data caches, and without locks: some releases of filelock empty a lock's file, empty or not."""
    kept = (path for path in folder.rglob("*") if path.parent.name != "data" and path.name != LOCK)
    return {path: path.stat().st_mtime_ns for path in kept}


def test_dry_run_tells_of_a_folder_in_use(train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.cli.dry_run.measure_speed", lambda *args: 1e12)
    train("laptop", "--max-steps", "1")
    before = times_of_files(tmp_path)
    assert "refused: The output folder" in train("laptop", "--dry-run")
    assert "replaced: checkpoint-1 and a model" in train("laptop", "--dry-run", "--overwrite")
    assert "resumed from checkpoint-1" in train("laptop", "--dry-run", "--resume")
    assert times_of_files(tmp_path) == before


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-steps", "0"), "must be an integer of at least 1, but is '0'"),
        (("--max-stepz", "1"), "unrecognized arguments: --max-stepz"),
        (("max_steps=1",), "'max_steps=1' is no override: write section.key=value"),
        (("training.max_stepz=1",), "there is no key `max_stepz`. Did you mean `max_steps`?"),
        (("trainin.max_steps=1",), "there is no section `trainin`. Did you mean `training`?"),
        (("training.max_steps=ten",), "`training.max_steps` must be a whole number, but is 'ten'"),
        (("training.report_to=nonsense",), "nonsense is not supported"),
        (("model.block_sizes=[0]",), "laptop.yaml, `model`: `block_sizes` must be a non-empty list of positive"),
        (("training.global_batch_size=5",), "`training.global_batch_size` 5 is no multiple of the 2 rows"),
        (("data.dataset=missing.txt",), "there is no file 'missing.txt'"),
        (("data.document_separator=null",), "holds out 4 documents, and"),
        (("data.text_column=story",), "has no column `story`; its columns are `text`"),
        (("tokenizer.name_or_path=./missing", "tokenizer.train=null"), "There is no folder ./missing"),
        (("model.name_or_path=./missing",), "There is no folder ./missing"),
        (("data.sequence_length=4096",), "do not fill one row of `sequence_length` 4096"),
    ],
)
def test_bad_arguments(fail: Command, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in fail(*arguments)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_bad_recipes(fail: Command, tmp_path: Path) -> None:
    assert "There is no recipe 'nonsense': it is neither a file nor one of laptop, lm1b" in fail(recipe="nonsense")
    file = tmp_path / "mine.yaml"
    file.write_text("model: {\n")
    assert f"{file}, line 2, column 1: not YAML" in fail(recipe=str(file))
    file.write_text("model:\n  hidden_size: 8\n  hidden_size: 16\n")
    assert "the key `hidden_size` is there twice" in fail(recipe=str(file))
    file.write_text("[]")
    assert "a recipe is a mapping with sections, not a list" in fail(recipe=str(file))


def test_the_hub_does_not_answer(fail: Command) -> None:
    message = fail(recipe="owt")
    assert "The tokenizer openai-community/gpt2 cannot be loaded: " in message


def test_packages_that_are_missing(fail: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", None)
        patch.delitem(sys.modules, "blockgen_hf.cli.training")
        assert "Training needs more packages: pip install 'blockgen-hf[train]' (" in fail()
    monkeypatch.setattr("blockgen_hf.training.data.is_datasets_available", lambda: False)
    monkeypatch.setattr("blockgen_hf.training.recipe_building.training_texts", lambda *args: iter(sentences()))
    assert "Training data need the package datasets: pip install 'blockgen-hf[train]'" in fail()


def test_an_output_folder_that_cannot_be(fail: Command, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert "is a file" in fail()
    (tmp_path / "run").unlink()
    (tmp_path / "taken").write_text("a file")
    assert "taken" in fail("--output-dir", str(tmp_path / "taken" / "run"))


def test_a_loss_that_is_not_finite(fail: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: Any, **kwargs: Any) -> Any:
        trainer = build_trainer(*args, **kwargs)
        with torch.no_grad():
            trainer.model.lm_head.weight.fill_(float("nan"))
        return trainer

    monkeypatch.setattr("blockgen_hf.cli.training.build_trainer", spoiled)
    assert "The loss is not finite in step 1" in fail()


def test_no_memory(fail: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("blockgen_hf.training.trainer.BlockGenTrainer.train", exhaust)
    assert "smaller training.per_device_train_batch_size" in fail()


def test_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockgen_hf.cli.training.build_trainer", interrupt)
    arguments = [*TINY, *stand_ins("laptop", tmp_path / "data"), "--output-dir", str(tmp_path / "run")]
    assert main(["train", "laptop", *arguments]) == 130
    assert capsys.readouterr().err == f"\nInterrupted. {tmp_path / 'run'} holds no checkpoint.\n"


# the process


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(Path(blockgen_hf.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


@pytest.mark.slow
def test_two_processes_are_one_with_accumulation(train: Command, tmp_path: Path) -> None:
    out = train("laptop")
    single = results(tmp_path / "run")
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "blockgen_hf", "train", "laptop"]  # accelerate launches several processes for GPUs only
    command += [*TINY, *stand_ins("laptop", tmp_path / "data"), "--output-dir", str(folder)]

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment(), capture_output=True, text=True, timeout=200)

    run = launch()
    assert run.returncode == 0, run.stderr
    losses = [re.findall(r"^step (\d/5)  loss ([\d.]+)", text, flags=re.MULTILINE) for text in (out, run.stdout)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert run.stdout.count("begins") == run.stdout.count("Model: ") == 1
    assert results(folder)["eval_loss"] == pytest.approx(single["eval_loss"], abs=1e-5)
    # The second time, all find the folder in use, and one says so.
    again = launch()
    assert again.returncode != 0
    assert again.stderr.count("blockgen-hf: error: The output folder") == 1
    dry = launch("--resume", "--dry-run")
    assert dry.stdout.count("4 rows = 2 a process x 1 accumulation steps x 2 processes") == 1


def test_paths_with_spaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "my text.txt", sentences())
    overrides = [*TINY, *stand_ins("laptop", tmp_path / "data"), f"data.dataset={text}", "training.max_steps=1"]
    assert main(["train", "laptop", *overrides, "--output-dir", str(tmp_path / "my run: 1")]) == 0
    assert "Model: " in capsys.readouterr().out


# the log


def test_the_mixture_s_perplexity_is_jensen_s() -> None:
    """The log-sum-exp of two draws came out below its best component."""
    logs = {
        "eval_loss": 6.0,
        "eval_perplexity_block_size_1": 374.0,
        "eval_perplexity_block_size_4": 433.5,
        "eval_perplexity_log_sum_exp": 330.0,
        "eval_perplexity_jensen": 402.66,
    }
    assert evaluation_line(logs) == "validation perplexity  1: 374.00, 4: 433.50  mixture 402.66"


def test_chosen_noise_levels_have_a_line() -> None:
    logs = {"noise_level_low_block_size_16": 0.3, "noise_level_high_block_size_16": 0.8}
    logs |= {"noise_level_low_block_size_4": 0.001, "noise_level_high_block_size_4": 1.0}
    assert interval_line({**logs, "loss_variance_block_size_4": 2.0}) == "noise levels  4: 0.001 to 1, 16: 0.3 to 0.8"
    assert interval_line({"train_loss": 1.0}) is None
