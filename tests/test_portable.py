"""Published folders tell nothing of this machine, and their tokenizers open in older releases too."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_reference import settings, weights, write
from recipes import TINY, stand_ins
from transformers import AutoTokenizer

from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.cli import main
from blockgen_hf.hub.cards import write_samples
from blockgen_hf.hub.conversion import convert_checkpoint
from blockgen_hf.hub.folders import read_folder
from blockgen_hf.hub.portable import portable_tokenizer_config, without_paths
from blockgen_hf.hub.push import plan_push


def published(folder: Path, repo_type: str = "model") -> dict[str, bytes]:
    plan = plan_push(folder, "me/it", license="mit", repo_type=repo_type)
    return {file.path: file.read() for file in plan.files}


def check_nothing_of(place: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        assert str(place).encode() not in content, name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/data/stories.txt", "stories.txt"),
        ("/home/me/runs/", "runs"),
        ("~/data/*.txt", "*.txt"),
        ("../x/y.txt", "y.txt"),
        ("C:\\Users\\me\\y.txt", "y.txt"),
        ("file:///home/me/y.txt", "y.txt"),
        ("me/stories", "me/stories"),
        ("/", "/"),
        ("a / b", "a / b"),
        ("https://huggingface.co/me", "https://huggingface.co/me"),
        ({"a": ["/home/me/x", 3]}, {"a": ["x", 3]}),
    ],
)
def test_paths_are_names(value: Any, expected: Any) -> None:
    assert without_paths(value) == expected


def test_what_train_writes_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    folder = tmp_path / "run"
    words = [*TINY, *stand_ins("laptop", tmp_path / "data"), "model.max_position_embeddings=24"]
    assert main(["train", "laptop", *words, "--max-steps", "1", "--output-dir", str(folder)]) == 0
    assert (folder / "tokenizer").is_dir()  # of one that was trained
    assert "tokenizer/" in dict(read_folder(folder).left_out)
    files = published(folder)
    check_nothing_of(tmp_path, files)
    assert yaml.safe_load(files["recipe.yaml"])["data"]["dataset"] == "stories.txt"
    for described in (files["tokenizer_config.json"], (folder / "tokenizer_config.json").read_bytes()):
        values = json.loads(described)
        assert values["model_max_length"] == 24
        assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not {"is_local", "local_files_only"} & set(values)
    one, other = (
        AutoTokenizer.from_pretrained(place, trust_remote_code=False) for place in (folder, folder / "tokenizer")
    )
    assert one("a b c")["input_ids"] == other("a b c")["input_ids"]


def test_an_older_folder_is_put_right_when_it_is_pushed(saved: Path) -> None:
    (saved / "recipe.yaml").write_text(f"data: {{dataset: {saved}/x.txt}}\n")
    for name, changed in (
        ("config.json", {"_name_or_path": str(saved)}),
        ("tokenizer_config.json", {"model_max_length": 10**30, "name_or_path": str(saved)}),
        ("conversion.json", {"source_config": {"_name_or_path": str(saved)}}),
    ):
        file = saved / name
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**values, **changed}))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    files = published(saved)
    check_nothing_of(saved, files)
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 64
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_conversions(tmp_path: Path) -> None:
    source = write(
        tmp_path / "source", {**settings("block-dit"), "_name_or_path": str(tmp_path)}, weights("block-dit")
    )
    convert_checkpoint(source, tmp_path / "out", diffusion_type="masked", block_sizes=[1, 4])
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".json"}
    check_nothing_of(tmp_path, texts)


def test_samples_name_their_model_without_its_folder(tmp_path: Path) -> None:
    sample = {"text": "/a/b", "completion": "b", "num_new_tokens": 1, "num_function_evaluations": 1}
    result = {"model": str(tmp_path / "tiny"), "dtype": "float32", "prompt": "/a/", "seed": 0}
    result["results"] = [{"decoding": "ar", "settings": {}, "samples": [{**sample, "tokens_per_forward": 1.0}]}]
    file = tmp_path / "samples" / "samples.jsonl"
    file.parent.mkdir()
    write_samples([result], file)
    row = json.loads(file.read_text())
    assert (row["model"], row["text"], row["prompt"]) == ("tiny", "/a/b", "/a/")
    file.write_text(json.dumps({**row, "model": str(tmp_path / "tiny")}) + "\n")
    assert json.loads(published(file.parent, "dataset")["samples.jsonl"]) == row


def test_the_length_of_a_tokenizer_is_that_of_the_model_or_not_said() -> None:
    endless = {"model_max_length": 1000000000000000019884624838656, "mask_token": "/x/y"}
    assert portable_tokenizer_config(endless, 64) == {"model_max_length": 64, "mask_token": "/x/y"}
    assert portable_tokenizer_config(endless, None) == {"mask_token": "/x/y"}


def test_the_shipped_tokenizer_opens_in_older_releases() -> None:
    values = json.loads((shipped_checkpoint() / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast" and values["model_max_length"] == 256
