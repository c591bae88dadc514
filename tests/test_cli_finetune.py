"""`blockgen-hf finetune` in-process, offline, on tiny models and local data."""

import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import write_rows
from tiny import EOS, LETTERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockgen_hf
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.cli import finetune, main
from blockgen_hf.training.recipe import Recipe, load_recipe


EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_gsm8k.py"
ANSWERS = [{"prompt": LETTERS[n : n + 4], "completion": LETTERS[n + 4 : n + 7 + n % 3]} for n in range(10)]
# In the form of GSM8K.
PROBLEMS = [
    {
        "question": f"Ann has {n} hens and buys {n + 3} more. How many hens has Ann?",
        "answer": f"Ann has {n}+{n + 3}=<<{n}+{n + 3}={2 * n + 3}>>{2 * n + 3} hens.\n#### {2 * n + 3}",
    }
    for n in range(1, 25)
]
FAST = (
    "--max-steps", "3", "--batch-size", "4", "--validation-documents", "2", "training.logging_steps=1",
    "training.eval_strategy=no",
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


Command = Callable[..., str]


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    tiny_model(eos_token_id=EOS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def words(tmp_path: Path, base: str) -> list[str]:
    """A command line but for what a test is about."""
    data = write_rows(tmp_path / "answers.jsonl", ANSWERS)
    return ["finetune", base, "--dataset", data, "--output-dir", str(tmp_path / "run"),
            f"data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip


@pytest.fixture
def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> Command:
    def run_command(*arguments: str) -> str:
        assert main([*words, *FAST, *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run_command


def test_a_run(run: Command, tmp_path: Path) -> None:
    """Finite losses, figures of what was held out, a model that loads and generates, and the recipe of the run."""
    out = run("--train-on-padding", "2", "--learning-rate", "1e-3")
    lines = out.splitlines()
    assert lines[0] == "finetune: 0.0M parameters, 8 rows, 2 for validation, begins"
    assert len(re.findall(r"^step \d/3  loss [\d.]+", out, flags=re.MULTILINE)) == 3
    assert "Trained in" in out and f"Model: {tmp_path / 'run'}" in out and "Validation, 2 Monte-Carlo draws" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tokenizer("abcd", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert model.generate(prompt, decoding="arpc", max_new_tokens=4).shape[1] <= 8
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["data"]["train_on_padding"] == 2 and recipe["training"]["learning_rate"] == 1e-3
    assert recipe["model"]["name_or_path"] == str(tmp_path / "base")


def test_an_adapter_and_a_folder_in_use(run: Command, words: list[str], tmp_path: Path, failing_line: Command) -> None:
    peft = pytest.importorskip("peft")
    adapter = ("--lora-rank", "2", "--dora")
    out = run(*adapter)
    trained = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 2 * (5 * 16 + 32)  # DoRA: a magnitude an output
    assert re.search(rf"parameters, of which {trained:,} \([\d.]+%\) are trained, 8 rows", out)
    assert f"Adapter: {tmp_path / 'run'}" in out
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.peft_config["default"].use_dora and model.peft_config["default"].lora_alpha == 4

    assert "holds checkpoints up to checkpoint-3 and a model" in failing_line(*words, *FAST, *adapter)
    other = failing_line(*words, *FAST, "--resume", "--lora-rank", "4", "--dora")
    assert "cannot be resumed with another `adapter.lora_alpha`: it was 4, and is 8 now" in other
    assert "another `adapter.lora_alpha`" in failing_line(*words, *FAST, "--resume")
    assert re.search(r"^step 4/4  loss", run(*adapter, "--resume", "--max-steps", "4"), flags=re.MULTILINE)
    assert "0.0M parameters, 8 rows" in run("--overwrite", "--full")
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("base")
def test_a_dry_run(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.setattr("blockgen_hf.cli.training.build_trainer", None)
    monkeypatch.setattr("blockgen_hf.cli.dry_run.measure_speed", lambda *args: 1e12)
    before = set(tmp_path.rglob("*"))
    whole, adapter = run("--dry-run"), run("--dry-run", "--lora-rank", "2")
    assert set(tmp_path.rglob("*")) == before
    lines = [dict(re.split(" {2,}", line, maxsplit=1) for line in out.splitlines() if line[0] != " ")
             for out in (whole, adapter)]  # fmt: skip
    assert lines[0]["trained"] == "all parameters"
    assert re.fullmatch(r"an adapter \(LoRA\), 896 parameters, [\d.]+% of all", lines[1]["trained"])
    assert "goes on from" in lines[0]["model"] and "the last 2 documents" in lines[0]["validation"]
    assert "at most 256 tokens" in lines[0]["a step"] and "4 rows = 4 a process x 1" in lines[0]["batch"]


# options


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """What a command line makes of the recipe."""
    recipes: list[Recipe] = []

    def record(name: str, overrides: list[str], *flags: bool, source: str) -> int:
        recipes.append(load_recipe(name, overrides, source))
        return 0

    def parse(*words: str) -> Recipe:
        monkeypatch.setattr(finetune, "run_recipe", record)
        assert main(["finetune", *words]) == 0
        return recipes[-1]

    return parse


def test_gsm8k_is_known(recipe: Callable[..., Recipe], base: str) -> None:
    data = recipe(base, "--dataset", "openai/gsm8k").data
    assert (data.dataset, data.dataset_config, data.dataset_split) == ("openai/gsm8k", "main", "train")
    assert (data.prompt_column, data.completion_column, data.prompt_separator) == ("question", "answer", "\n")
    assert data.packing == "none" and data.validation_documents == 100 and not data.train_on_prompt
    data = recipe(base, "--dataset", "openai/gsm8k", "--dataset-config", "socratic", "--prompt-separator", " ").data
    assert (data.dataset_config, data.prompt_column, data.prompt_separator) == ("socratic", "question", " ")
    data = recipe(base, "--dataset", "me/other", "--validation-split", "test").data
    assert (data.prompt_column, data.prompt_separator, data.validation_documents) == (None, "", 0)


def test_rows_are_as_long_as_the_model_takes(recipe: Callable[..., Recipe], base: str) -> None:
    assert recipe(base, "--dataset", "me/data").data.sequence_length == 64
    data = recipe(base, "--dataset", "me/data", "--train-on-padding", "yes").data
    assert (data.sequence_length, data.train_on_padding) == (64, 64)
    data = recipe(base, "--dataset", "me/data", "--train-on-padding", "yes", "--sequence-length", "32").data
    assert (data.sequence_length, data.train_on_padding) == (32, 32)
    assert recipe(base, "--dataset", "me/data", "--train-on-padding", "no").data.train_on_padding == 0
    assert recipe("me/model-that-is-not-here", "--dataset", "me/data", "--dry-run").data.sequence_length == 512
    name = shipped_checkpoint().name
    shipped = recipe(name, "--dataset", "me/data")
    assert shipped.checkpoint == str(shipped_checkpoint()) and shipped.data.sequence_length == 256


@pytest.mark.parametrize(
    ("rows", "processes", "expected"),
    [(32, 1, (16, 2)), (8, 1, (8, 1)), (24, 1, (12, 2)), (17, 1, (1, 17)), (32, 4, (8, 1)), (3, 8, (3, 1))],
)
def test_the_batch_is_split(
    recipe: Callable[..., Recipe],
    base: str,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    processes: int,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found = recipe(base, "--dataset", "me/data", "--batch-size", str(rows))
    size = found.training["per_device_train_batch_size"]
    assert found.global_batch_size == rows and size == expected[0]
    if rows % processes == 0:
        assert found.accumulation_steps(size, processes) == expected[1]


def test_settings(recipe: Callable[..., Recipe], base: str) -> None:
    pytest.importorskip("peft")
    full = recipe(base, "--dataset", "me/data", "--epochs", "1.5", "--validation-documents", "0")
    assert full.training["num_train_epochs"] == 1.5 and full.training["learning_rate"] == 1e-4
    assert full.training["eval_strategy"] == "no" and full.adapter == {}
    mixture = recipe(base, "--dataset", "d/d", "--block-sizes", "1,16", "--block-size-weights", "0.25,0.75")
    assert mixture.config_fields() == {"block_sizes": [1, 16], "block_size_weights": [0.25, 0.75]}
    assert recipe(base, "--dataset", "d/d", "--diffusion-type", "uniform").model["diffusion_type"] == "uniform"

    adapter = recipe(base, "--dataset", "d/d", "--lora-rank", "4", "adapter.lora_dropout=0.1")
    assert adapter.adapter["r"] == 4 and adapter.adapter["lora_alpha"] == 8 and adapter.adapter["lora_dropout"] == 0.1
    assert adapter.training["learning_rate"] == 5e-4 and not adapter.adapter["use_dora"]
    options = ("--lora-rank", "4", "--lora-alpha", "5", "--lora-target", "q_proj,v_proj", "--dora")
    chosen = recipe(base, "--dataset", "d/d", *options, "--learning-rate", "0.1")
    assert chosen.adapter["target_modules"] == ["q_proj", "v_proj"] and chosen.adapter["lora_alpha"] == 5
    assert chosen.training["learning_rate"] == 0.1 and chosen.adapter["use_dora"]
    everything = recipe(base, "--dataset", "d/d", "--lora-rank", "4", "--lora-target", "all-linear")
    assert everything.adapter["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora-alpha", "2"), "--lora-alpha is for an adapter: give its --lora-rank"),
        (("--dora",), "--dora is for an adapter: give its --lora-rank"),
        (("--full", "--lora-rank", "2"), "not allowed with argument --full"),
        (("--epochs", "0"), "must be a positive number, but is '0'"),
        (("--block-sizes", "1;2"), "must be numbers between commas, but is '1;2'"),
        (("--train-on-padding", "maybe"), "must be an integer of at least 0, but is 'maybe'"),
        (("--sequence-length", "65"), "finetune: `--sequence-length` 65 is more than the 64 positions"),
        (("--prompt-column", "question"), "has no column `question` with `completion`"),
        (("--lora-rank", "2", "--lora-target", "nothing"), "not found in the base model"),
        (("--block-sizes", "0"), "`block_sizes` must be a non-empty list of positive"),
        (("--validation-documents", "10"), "none is left"),
        (("nonsense",), "'nonsense' is no override"),
        (("training.max_stepz=1",), "Did you mean `max_steps`?"),
    ],
)
def test_bad_arguments(
    words: list[str], failing_line: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("peft")
    assert message in failing_line(*words, *[word for word in FAST if "=" not in word], *arguments)
    assert not (tmp_path / "run").exists()


def test_models_that_are_not_there(failing_line: Command, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "answers.jsonl", ANSWERS)
    assert "There is no folder ./missing" in failing_line("finetune", "./missing", "--dataset", data)
    assert "is not a model folder: it has no config.json" in failing_line("finetune", str(tmp_path), "--dataset", data)
    assert "are required: --dataset" in failing_line("finetune", "tinystories-masked")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(blockgen_hf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


# GSM8K's form, on the model of the package


@pytest.mark.slow
def test_the_shipped_checkpoint_learns_the_form_of_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss falls, and the mark of an answer is written."""
    data = write_rows(tmp_path / "problems.jsonl", PROBLEMS)
    words = [
        *("finetune", shipped_checkpoint().name, "--dataset", data, "--output-dir", str(tmp_path / "run")),
        *("--prompt-column", "question", "--completion-column", "answer", "--prompt-separator", "\\n"),
        *("--train-on-padding", "15", "--max-steps", "60", "--batch-size", "8", "--learning-rate", "2e-3"),
        *("--validation-documents", "0", "training.ema_decay=0", f"data.cache_dir={tmp_path / 'cache'}"),
    ]
    assert main(words) == 0
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)  \(", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tokenizer(PROBLEMS[4]["question"] + "\n", return_tensors="pt", add_special_tokens=False)
    output = model.generate(**prompt, decoding="ar", do_sample=False, max_new_tokens=64)
    written = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "####" in written and tokenizer.eos_token in written


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, "folder"])
def test_the_example(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Any
) -> None:
    data = write_rows(tmp_path / "problems.jsonl", PROBLEMS)
    words = ["--train-file", data, "--output-dir", str(tmp_path / "run"), "--max-steps", "2", "--padding", "1"]
    if model is not None:
        words += ["--model", str(shipped_checkpoint())]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *words])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "24 problems; 0 of more than 256 tokens are left out" in out and "2 steps in" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.block_sizes == [1, 2, 4, 8, 16]


@pytest.mark.slow
def test_arithmetic_is_written_without_repeats_and_as_far_as_there_is_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    script = str(EXAMPLE.with_name("make_arithmetic.py"))
    words = [str(tmp_path), "--max-terms", "2", "--max-digits", "1", "--test", "30"]
    monkeypatch.setattr("sys.argv", [script, *words, "--train", "90"])
    runpy.run_path(script, run_name="__main__")
    rows = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("test", "train")]
    assert [len(rows[0]), len(rows[1]), len({*rows[0], *rows[1]})] == [30, 90, 120]
    monkeypatch.setattr("sys.argv", [script, *words, "--train", "1000"])
    with pytest.raises(SystemExit, match="There are about 200 such problems: ask for fewer"):
        runpy.run_path(script, run_name="__main__")


def test_the_rows_of_the_example() -> None:
    """A question is not scored, an answer and the ends behind it are; padding is not seen."""
    example = runpy.run_path(str(EXAMPLE))
    tokenizer = tiny_tokenizer()
    rows = [example["tokenize"]({"question": question, "answer": "cd"}, tokenizer, 1) for question in ("ab", "abab")]
    assert rows[0]["labels"] == [-100] * 3 + [2, 3, EOS, EOS] and rows[0]["input_ids"][3:] == [2, 3, EOS, EOS]
    batch = example["collate"](rows, tokenizer.pad_token_id)
    assert batch["labels"][0].tolist() == [*rows[0]["labels"], -100, -100]
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0, 0], [1] * 9]
    assert batch["input_ids"][0, 7:].tolist() == [tokenizer.pad_token_id] * 2
