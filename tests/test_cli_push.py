"""`blockgen-hf push`, as a user types it; against a Hub on this machine."""

import json
import re
from pathlib import Path

import fake_hub
import pytest
from fake_hub import FakeHub
from huggingface_hub import constants

from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.cli import main
from blockgen_hf.hub.cards import write_samples
from blockgen_hf.hub.spaces import write_space


hub = fake_hub.hub
REPO = "me/tiny"


@pytest.fixture
def folder(saved: Path) -> Path:
    return saved


def listed(text: str) -> list[str]:
    """The files that were printed, from the line `To ...` to the line `12 files, ...`."""
    return re.findall(r"^  (\S+) +[\d.]+ k?M?B", text.split("Left out:")[0], flags=re.MULTILINE)


def test_a_dry_run_shows_what_a_push_uploads(folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "training_args.bin").write_bytes(b"")
    command = ["push", str(folder), REPO, "--license", "mit", "--private", "--commit-message", "First"]
    assert main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert hub.requests == []
    assert dry.startswith("To me/tiny (model, private, branch main), in one commit: First\n")
    assert re.search(r"Left out:\n  training_args.bin  .*pickle", dry)
    assert "# tiny\n" in dry and "license: mit" in dry

    assert main(command) == 0
    out = capsys.readouterr().out
    uploaded = hub.files(REPO)
    del uploaded[".gitattributes"]
    assert listed(dry) == listed(out) == sorted(uploaded)
    assert f"{len(uploaded)} files" in out
    assert uploaded["README.md"].decode().strip() in dry
    assert f"Uploaded: {hub.url}/me/tiny/commit/" in out
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "First"]


def test_the_shipped_checkpoint_is_pushed_as_it_is(hub: FakeHub) -> None:
    before = {path.name for path in shipped_checkpoint().iterdir()}
    assert main(["push", str(shipped_checkpoint()), "me/stories"]) == 0
    assert before <= set(hub.files("me/stories")) and "modeling_blockgen.py" in before
    assert {path.name for path in shipped_checkpoint().iterdir()} == before


def test_evaluations_stand_on_the_card(folder: Path, tmp_path: Path, hub: FakeHub) -> None:
    evaluation = {"block_sizes": {"4": {"nll": 2.5, "perplexity": 12.18}}, "data": {"dataset": "me/letters"}}
    quality = {"metric": "mauve", "value": 0.5, "decoding": "ar", "num_function_evaluations": 64, "entropy": 4.1}
    (tmp_path / "likelihood.json").write_text(json.dumps(evaluation))
    (tmp_path / "quality.json").write_text(json.dumps({"quality": [quality]}))
    files = [word for name in ("likelihood", "quality") for word in ("--evaluation", str(tmp_path / f"{name}.json"))]
    assert main(["push", str(folder), REPO, "--license", "mit", "--language", "en", *files]) == 0
    card = hub.files(REPO)["README.md"].decode()
    assert "12.18" in card and "| MAUVE | 0.5 | 64 | 4.1 | ar |" in card and "language:\n- en" in card


def test_a_card_shows_the_model_writing(folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    """With the picture of `generate --save-svg`; a README.md of one's own shows it itself."""
    command = ["push", str(folder), REPO, "--license", "mit", "--replay", "Once"]
    assert main(command) == 0
    files = hub.files(REPO)
    assert "step by step](replay.svg)\n\n## Model\n" in files["README.md"].decode()
    svg = folder.parent / "saved.svg"
    options = ["--model", str(folder), "--seed", "0", "--max-new-tokens", "48", "--save-svg", str(svg)]
    assert main(["generate", "Once", *options]) == 0
    assert files["replay.svg"].decode() == svg.read_text()
    (folder / "README.md").write_text("A model.")
    assert main(command) == 1
    assert "without what --replay (`replay`) says" in capsys.readouterr().err
    (folder / "README.md").write_text("![](replay.svg)")
    assert main(command) == 0
    (folder / "README.md").unlink()
    assert main([*command[:-2], "--dry-run"]) == 0
    assert "replay.svg" not in capsys.readouterr().out.split("Nothing was uploaded")[0].split("README.md:")[-1]


def test_a_branch_and_a_pull_request(folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["push", str(folder), REPO, "--license", "mit"]
    assert main([*command, "--revision", "next"]) == 0
    assert "config.json" in hub.files(REPO, "next")
    assert main([*command, "--create-pr"]) == 0
    assert f"Uploaded: {hub.url}/me/tiny/discussions/1" in capsys.readouterr().out
    assert "config.json" not in hub.files(REPO)


def test_samples_are_pushed_as_a_data_set(tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once", "--max-new-tokens", "4", "--seed", "1", "--num-samples", "2", "--json"]) == 0
    (tmp_path / "samples").mkdir()
    write_samples([json.loads(capsys.readouterr().out)], tmp_path / "samples" / "samples.jsonl")
    command = ["push", str(tmp_path / "samples"), "me/samples", "--repo-type", "dataset", "--license", "cc0-1.0"]
    assert main(command) == 0
    there = hub.files("me/samples", repo_type="dataset")
    assert there["samples.jsonl"] == (tmp_path / "samples" / "samples.jsonl").read_bytes()
    assert b"2 texts" in there["README.md"]


def test_a_space_is_pushed_as_one(tmp_path: Path, hub: FakeHub) -> None:
    write_space(tmp_path / "space", "me/tiny", license="mit")
    assert main(["push", str(tmp_path / "space"), "me/space", "--repo-type", "space"]) == 0
    written = {path.relative_to(tmp_path / "space") for path in (tmp_path / "space").rglob("*") if path.is_file()}
    assert {Path("README.md"), Path("app.py"), Path("requirements.txt")} < written
    assert set(hub.files("me/space", repo_type="space")) == {".gitattributes", *map(Path.as_posix, written)}
    assert hub.repositories["space", "me/space"].sdk == "gradio"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "says nothing of its licence"),
        (["--license", "mitt"], "did you mean mit"),
        (["--license", "mit", "--evaluation", "no_such.json"], "no_such.json"),
        (["--license", "mit", "--repo-type", "dataset"], "not of a dataset"),
        (["--license", "mit", "--ignore", "model.safetensors"], "model.safetensors is left out"),
    ],
)
def test_errors_are_one_line_and_send_nothing(
    options: list[str], message: str, folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(folder), REPO, *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("case", "message"),
    [("token", "hf auth login"), ("namespace", "403"), ("no hub", "does not answer"), ("offline", "offline")],
)
def test_what_the_hub_refuses_is_one_line(
    case: str,
    message: str,
    folder: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "no hub":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    elif case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo_id = "others/tiny" if case == "namespace" else REPO
    assert main(["push", str(folder), repo_id, "--license", "mit"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert hub.repositories == {}
