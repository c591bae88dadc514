"""Tokens and passwords: in no file that is written, and in none that is published."""

import json
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import yaml
from fake_hub import FakeHub
from recipes import TINY, stand_ins
from training import make_trainer

from blockgen_hf.cli import main
from blockgen_hf.hub.push import plan_push
from blockgen_hf.hub.secrets import find_secret, without_secrets


hub = fake_hub.hub
REPO = "me/tiny"
SECRET = "hf_" + "AbCdEfGhIjKl" * 3


def assert_nowhere(secret: str, folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if secret.encode() in path.read_bytes()]


# What is written


@pytest.mark.parametrize("token", [SECRET, "a-token-of-another-form"])
def test_the_token_of_a_training_is_in_no_file_of_its_folder(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipe, arguments, checkpoints, logs."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    run = tmp_path / "run"
    words = [*TINY, *stand_ins("laptop", tmp_path / "data"), "--output-dir", str(run), f"training.hub_token={token}"]
    assert main(["train", "laptop", *words]) == 0
    printed = capsys.readouterr()
    assert token not in printed.out + printed.err
    assert list(run.rglob("training_args.bin")) and (run / "recipe.yaml").exists()
    assert_nowhere(token, run)
    assert "learning_rate" in yaml.safe_load((run / "recipe.yaml").read_text())["training"]


def test_a_value_that_looks_like_a_token_stops_a_training_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    run = tmp_path / "run"
    words = [*TINY, *stand_ins("laptop", tmp_path / "data"), "--output-dir", str(run)]
    assert main(["train", "laptop", *words, f"training.run_name={SECRET}"]) == 1
    err = capsys.readouterr().err
    assert "`training.run_name` holds what looks like a token" in err and SECRET not in err
    assert not (run / "recipe.yaml").exists()


def test_a_trainer_uploads_its_checkpoints_without_its_token(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    trainer = make_trainer(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=REPO,
        hub_license="mit",
        hub_token=fake_hub.TOKEN,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    trainer.train()
    assert trainer.push_in_progress is not None and not any(job.exception() for job in trainer.push_in_progress.jobs)
    uploaded = hub.files(REPO)
    assert "checkpoint-2/training_args.bin" in uploaded
    assert not [path for path, content in uploaded.items() if fake_hub.TOKEN.encode() in content]
    assert_nowhere(fake_hub.TOKEN, tmp_path / "run")
    assert trainer.args.hub_token == fake_hub.TOKEN  # it is used, not lost


def test_settings_keep_everything_but_secrets() -> None:
    values = {
        "tokenizer": {"eos_token": "<end>", "pad_token": "<pad>", "name_or_path": "gpt2"},
        "training": {"hub_token": SECRET, "push_to_hub_token": "x", "max_steps": 3, "hub_model_id": "me/tiny"},
        "data": {"token": True, "password": "", "dataset": ["a", "b"]},
    }
    assert without_secrets(values) == {
        "tokenizer": {"eos_token": "<end>", "pad_token": "<pad>", "name_or_path": "gpt2"},
        "training": {"max_steps": 3, "hub_model_id": "me/tiny"},
        "data": {"token": True, "password": "", "dataset": ["a", "b"]},
    }
    with pytest.raises(ValueError, match=r"`data.dataset` holds what looks like a token"):
        without_secrets({"data": {"dataset": ["a.txt", f"https://me:{SECRET}@huggingface.co/x"]}})


# What is published


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("recipe.yaml", "training:\n  hub_token: anything\n", "`training.hub_token`"),
        ("recipe.yaml", f"training:\n  run_name: {SECRET}\n", "line 2 looks like a token"),
        ("conversion.json", json.dumps({"source_config": {"api_key": "anything"}}), "`source_config.api_key`"),
        ("generation_config.json", json.dumps({"hf_token": "anything"}), "`hf_token`"),
        ("README.md", f"---\nlicense: mit\n---\n\nexport HF_TOKEN={SECRET}\n", "line 5 looks like a token"),
        ("NOTICE", "-----BEGIN RSA PRIVATE KEY-----", "line 1 looks like a token"),
    ],
)
def test_a_folder_with_a_secret_is_not_published(name: str, text: str, place: str, saved: Path, hub: FakeHub) -> None:
    """An older version wrote the token of the Hub to recipe.yaml."""
    (saved / name).write_text(text)
    for strict in (True, False):  # False: from a Trainer
        with pytest.raises(ValueError, match=rf"{name} holds a secret, {place}") as error:
            plan_push(saved, REPO, license="mit", strict=strict)
        assert SECRET not in str(error.value)
    assert hub.requests == []
    plan_push(saved, REPO, license="mit", ignore=[name])


def test_samples_with_a_secret_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(json.dumps({"text": f"my token is {SECRET}"}))
    with pytest.raises(ValueError, match=r"samples.jsonl holds a secret"):
        plan_push(tmp_path, "me/samples", repo_type="dataset", license="mit")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", {"eos_token": "<end>", "mask_token": "<mask>", "token": None}),
        ("tokenizer.json", {"model": {"vocab": {"password": 3, "hub_token": 4, "token": 5}}}),
        ("recipe.yaml", {"training": {"hub_token": "<HUB_TOKEN>", "push_to_hub_token": ""}}),
        ("config.json", {"include_num_input_tokens_seen": "all", "hf_home": "x", "name": "hf_of_me"}),
    ],
)
def test_tokens_of_a_vocabulary_are_no_secrets(name: str, value: dict[str, Any]) -> None:
    assert find_secret(name, json.dumps(value)) is None
