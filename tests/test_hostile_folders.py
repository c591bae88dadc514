"""Model folders that are damaged or hostile end in a sentence that names the folder, the file and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MASK, VOCAB_SIZE, tiny_config
from transformers import AutoTokenizer

from blockgen_hf.cli import main
from blockgen_hf.hub.model_checks import check_model_folder
from blockgen_hf.hub.push import plan_push
from blockgen_hf.prompts import PromptEncoder
from blockgen_hf.training.documents import RowForm
from blockgen_hf.training.tokenization import DocumentTokenizer


Change = Callable[[Path], None]
DEEP = "[" * 100_000 + "]" * 100_000


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


def settings(name: str, **changed: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def tensors(changed: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        found = load_file(file)
        changed(found)
        save_file(found, file, metadata={"format": "pt"})

    return change


def value(number: float) -> Change:
    return tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(number))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return change


ALL = list(range(VOCAB_SIZE))
# What is wrong, and words of the sentence.
CASES: dict[str, tuple[Change, str]] = {
    "more layers": (settings("config.json", num_hidden_layers=10**5), "have 2 layers, but its config.json says"),
    "fewer layers": (settings("config.json", num_hidden_layers=1), "have 2 layers, but its config.json says"),
    "wider": (settings("config.json", intermediate_size=48), "of another shape: model.layers.0.mlp.up_proj.weight"),
    "beyond all memory": (settings("config.json", vocab_size=10**30), "describes no model that can be built"),
    "a tensor too many": (tensors(lambda found: found.update(x=torch.ones(1))), "unknown: x"),
    "a tensor too few": (tensors(lambda found: found.pop("lm_head.weight")), "missing: lm_head.weight"),
    "no rotary embedding": (settings("config.json", rope_parameters=5), ""),
    "a base that is none": (
        settings("config.json", rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        "config.json gives ",
    ),
    "config list": (write("config.json", "[]"), "must hold a JSON object, but holds a list"),
    "config deep": (write("config.json", DEEP), "nested too deep"),
    "NaN": (value(float("nan")), "model.safetensors gives model.layers.1.mlp.up_proj.weight values that are NaN"),
    "infinite": (value(float("-inf")), "values that are NaN or infinite in float32"),
    "huge": (value(-3e6), "model.layers.1.mlp.up_proj.weight the value -3e+06"),
    "truncated": (truncated, "model.safetensors is no safetensors file, or damaged"),
    **{f"index {text[:20]}": (index(text), "index.json must hold a JSON object") for text in ("5", "[1]", "null")},
    "index deep": (index(DEEP), "nested too deep"),
    **{
        f"map {text}": (index(f'{{"weight_map": {text}}}'), "it has no `weight_map`")
        for text in ("null", "[1]", '{"a": 5}')
    },
    "generation list": (write("generation_config.json", "[1]"), "generation_config.json must hold a JSON object"),
    "generation deep": (write("generation_config.json", DEEP), "generation_config.json cannot be read as JSON"),
    "generation bytes": (lambda folder: (folder / "generation_config.json").write_bytes(b"\xff{}") and None, "utf-8"),
    **{
        f"{file} {text[:5]}": (write(file, text), f"{file} ")
        for file in ("tokenizer.json", "tokenizer_config.json")
        for text in ("[1]", DEEP, "null")
    },
    "adapter": (write("adapter_config.json", "{}"), "holds a model and an adapter, adapter_config.json"),
    "end beyond": (settings("generation_config.json", eos_token_id=[1, VOCAB_SIZE]), f"0 to {VOCAB_SIZE - 1}"),
    "pad beyond": (settings("config.json", pad_token_id=10**9), "config.json: `pad_token_id` must be of token ids"),
    "end is a word": (settings("generation_config.json", eos_token_id="<end>"), "but has '<end>'"),
    "negative": (settings("generation_config.json", suppress_tokens=[-1]), "`suppress_tokens`"),
    "words beyond": (settings("generation_config.json", bad_words_ids=[[1, 2], [3, 99]]), "but has 99"),
    "all suppressed": (
        settings("generation_config.json", suppress_tokens=[token for token in ALL if token != MASK]),
        "`suppress_tokens` suppress every token of the vocabulary",
    ),
    "all bad words": (
        settings("generation_config.json", bad_words_ids=[[token] for token in ALL]),
        "`bad_words_ids` suppress every token of the vocabulary",
    ),
}
FEW = (
    "adapter",
    "fewer layers",
    "config deep",
    "NaN",
    "truncated",
    "index null",
    "generation list",
    "end beyond",
    "all suppressed",
)


def check(case: str, folder: Path, line: str) -> None:
    assert CASES[case][1] in line
    assert str(folder) in line


@pytest.mark.parametrize("case", FEW)
def test_generate_ends_in_a_sentence(case: str, saved: Path, failing_line: Callable[..., str]) -> None:
    CASES[case][0](saved)
    check(case, saved, failing_line("generate", "a", "--model", str(saved), "--greedy"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "evaluate", "evaluate-answers", "finetune", "push"])
@pytest.mark.parametrize("case", CASES)
def test_every_command_ends_in_a_sentence(
    command: str, case: str, saved: Path, tmp_path: Path, failing_line: Callable[..., str]
) -> None:
    CASES[case][0](saved)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "abc", "question": "a", "answer": "#### 1"}\n' * 8)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "abc"}\n' * 200)
    words: dict[str, list[str]] = {
        "generate": ["a", "--model", str(saved)],
        "evaluate": [str(saved), "--dataset", str(data), "--sequence-length", "8"],
        "evaluate-answers": [str(saved), "--dataset", str(data), "--output-dir", str(tmp_path / "answers")],
        "finetune": [str(saved), "--dataset", str(texts), "--output-dir", str(tmp_path / "run"), "--max-steps", "1"],
        "push": [str(saved), "me/it", "--license", "mit", "--dry-run"],
    }
    if command != "push" or case not in ("huge", "a base that is none"):
        check(case, saved, failing_line(command, *words[command]))


def test_a_configuration_of_many_layers_builds_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings("config.json", num_hidden_layers=10**5)(saved)
    monkeypatch.setattr("blockgen_hf.hub.weights.model_shapes", None)
    with pytest.raises(ValueError, match="`num_hidden_layers=100000`"):
        check_model_folder(saved)


def test_half_precision_that_overflows_says_so(
    saved: Path, failing_line: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    value(1e5)(saved)
    assert main(["generate", "a", "--model", str(saved), "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    line = failing_line("generate", "a", "--model", str(saved), "--dtype", "float16")
    assert "or load it in float32" in line


def test_a_tokenizer_of_another_model(saved: Path, failing_line: Callable[..., str]) -> None:
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["u"] = VOCAB_SIZE
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = failing_line("generate", "u", "--model", str(saved))
    assert f"has {VOCAB_SIZE + 1} tokens, but the model has {VOCAB_SIZE}" in line


EXPLODING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
REPLACING = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}


@pytest.mark.parametrize(("part", "pattern"), [("pre_tokenizer", EXPLODING), ("normalizer", REPLACING)])
def test_a_regular_expression_that_explodes(
    part: str, pattern: dict[str, Any], saved: Path, failing_line: Callable[..., str]
) -> None:
    settings("tokenizer.json", **{part: pattern})(saved)
    with pytest.raises(ValueError, match="tokenizer.json .*takes too long"):
        PromptEncoder(AutoTokenizer.from_pretrained(saved))("a" * 40 + "!")
    form = RowForm("text", ("text",))
    with pytest.raises(ValueError, match="tokenizer.json .*takes too long"):
        DocumentTokenizer(AutoTokenizer.from_pretrained(saved), form, "rows")({"text": ["a" * 40 + "!"]}, [0])


def test_generate_names_the_folder_of_a_tokenizer_that_explodes(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings("tokenizer.json", pre_tokenizer=EXPLODING)(saved)
    assert main(["generate", "a" * 40 + "!", "--model", str(saved)]) == 1
    line = capfd.readouterr().err.splitlines()[-1]  # above it is what the library writes of itself
    assert line.startswith("blockgen-hf: error: ") and str(saved) in line and "tokenizer.json" in line


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_published(number: float, saved: Path) -> None:
    value(number)(saved)
    with pytest.raises(ValueError, match=r"model.safetensors gives model.layers.1.mlp.up_proj.weight values that are"):
        plan_push(saved, "me/it", license="mit")


def test_a_whole_folder_passes(saved: Path) -> None:
    assert "lm_head.weight" in check_model_folder(saved)
    settings("generation_config.json", suppress_tokens=[token for token in ALL if token not in (3, MASK)])(saved)
    check_model_folder(saved)


def test_an_epsilon_that_is_infinite() -> None:
    with pytest.raises(ValueError, match="`layer_norm_eps` must be a positive number, but is inf"):
        tiny_config(layer_norm_eps=float("inf"))
