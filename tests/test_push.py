"""What goes to the Hub, and what does not; against a Hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import torch
from fake_hub import FakeHub, environment
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from test_conversion import ONE_OF_EACH_FAMILY, convert
from tiny import generate, tiny_config, tiny_model, tiny_tokenizer, words
from training import TokenRows, make_trainer
from transformers import Trainer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.hub.folders import read_folder
from blockgen_hf.hub.push import plan_push, push_folder
from blockgen_hf.modeling.remote_code_blockgen import AUTO_MAP, remote_code


CODE = set(remote_code())
REPO = "me/tiny"
hub = fake_hub.hub


@pytest.fixture
def folder(saved: Path) -> Path:
    return saved


def planned(folder: Path, **options: Any) -> dict[str, bytes]:
    return {file.path: file.read() for file in plan_push(folder, REPO, **{"license": "mit", **options}).files}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The plan


def test_a_saved_model_is_uploaded_as_it_lies_with_a_card(folder: Path) -> None:
    files = planned(folder)
    card = files.pop("README.md")
    assert b"license: mit" in card and b'from_pretrained("me/tiny"' in card
    assert files == contents(folder)


def test_planning_contacts_nobody_and_changes_nothing(folder: Path, hub: FakeHub) -> None:
    before = contents(folder)
    planned(folder)
    assert hub.requests == [] and contents(folder) == before


def test_planning_leaves_the_random_numbers_of_the_user_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    planned(folder)
    assert torch.equal(state, torch.get_rng_state())


def test_code_and_map_are_added_where_they_are_missing(folder: Path) -> None:
    saved = planned(folder)
    for name in CODE:
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("auto_map") == AUTO_MAP
    (folder / "config.json").write_text(json.dumps(config))
    bare = contents(folder)

    files = planned(folder)
    assert {name: files[name] for name in CODE} == {name: saved[name] for name in CODE}
    assert json.loads(files["config.json"]) == {**config, "auto_map": AUTO_MAP}
    assert contents(folder) == bare


def test_code_of_another_version_is_refused_or_replaced(folder: Path) -> None:
    file = folder / "modeling_blockgen.py"
    own = file.read_bytes()
    file.write_bytes(own + b"\n")
    (folder / "former_blockgen.py").write_text("")
    with pytest.raises(ValueError, match=r"former_blockgen.py, modeling_blockgen.py.*--update-code"):
        planned(folder)
    files = planned(folder, update_code=True)
    assert files["modeling_blockgen.py"] == own and "former_blockgen.py" not in files


def test_a_map_to_other_code_is_refused_or_replaced(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "org/other--modeling_blockgen.BlockGenForDiffusionLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="auto_map"):
        planned(folder)
    assert json.loads(planned(folder, update_code=True)["config.json"])["auto_map"] == AUTO_MAP


def test_what_a_training_leaves_is_left_out_and_said(folder: Path) -> None:
    for name in (
        "training_args.bin",
        "trainer_state.json",
        "train_results.json",
        "checkpoint-4/optimizer.pt",
        "runs/x",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    plan = plan_push(folder, REPO, license="mit")
    left_out = [path for path, reason in plan.left_out if reason]
    assert left_out == ["checkpoint-4/", "runs/", "train_results.json", "trainer_state.json", "training_args.bin"]
    assert not {file.path for file in plan.files} & set(left_out)


@pytest.mark.parametrize("name", ["notes.txt", "deep/model.safetensors", "training_weights.safetensors", ".env"])
def test_other_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    with pytest.raises(ValueError, match=rf"not of a model: {name}"):
        planned(folder)
    plan = plan_push(folder, REPO, license="mit", ignore=[name])
    assert [path for path, _ in plan.left_out] == [name]
    assert planned(folder, include=[name])[name] == b""


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "scheduler.pkl"])
def test_pickles_are_refused_even_if_they_are_asked_for(folder: Path, name: str) -> None:
    (folder / name).write_text("")
    for options in ({}, {"include": [name]}):
        with pytest.raises(ValueError, match=rf"pickles.*{name}"):
            planned(folder, **options)


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="LICENSE is a link out of the folder"):
        planned(folder)
    (folder / "LICENSE").unlink()
    (folder / "runs2").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="runs2 is a link out of the folder"):
        planned(folder)


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "LICENSE").write_text("text")
    (folder / "NOTICE").symlink_to(folder / "LICENSE")
    assert planned(folder)["NOTICE"] == b"text"


def test_models_of_other_types_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        planned(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_without_a_part_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is left out"):
        planned(folder, ignore=[name])
    (folder / name).unlink()
    with pytest.raises(ValueError, match="holds no (weights|model)"):
        planned(folder)


def test_weights_that_are_not_the_configurations_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != "lm_head.bias"}, "missing: lm_head.bias"),
        ({**tensors, "more": torch.zeros(1)}, "unknown: more"),
        ({**tensors, "lm_head.bias": torch.zeros(3)}, r"of another shape: lm_head.bias is \[3\] instead of"),
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            planned(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        planned(folder)


def test_shards_must_be_those_of_the_index(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny_model().save_pretrained(sharded, max_shard_size="4KB")
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert len(shards) > 2 and set(shards) < set(planned(sharded))
    with pytest.raises(ValueError, match=r"holds model.safetensors and shards"):
        shutil.copy(folder / "model.safetensors", sharded)
        planned(sharded)
    (sharded / "model.safetensors").unlink()
    shutil.copy(sharded / shards[0], sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(ValueError, match=r"does not name model-00009-of-00009.safetensors"):
        planned(sharded)
    (sharded / "model-00009-of-00009.safetensors").unlink()
    (sharded / shards[1]).unlink()
    with pytest.raises(ValueError, match=rf"names {shards[1]}, which"):
        planned(sharded)


# Licences


def test_a_folder_without_a_licence_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="says nothing of its licence"):
        planned(folder, license=None)


def test_a_licence_that_the_hub_does_not_know_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'Apache2'.*apache-2.0"):
        planned(folder, license="Apache2")


def test_the_licence_of_a_card_counts_and_is_not_contradicted(folder: Path) -> None:
    text = "---\nlicense: mit\nlanguage: en\n---\n\n# Mine\n"
    (folder / "README.md").write_text(text)
    assert planned(folder, license=None)["README.md"].decode() == text
    with pytest.raises(ValueError, match=r"'apache-2.0', but README.md says 'mit'"):
        planned(folder, license="apache-2.0")


def test_the_licence_is_added_to_a_card_without_one(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\n---\n\n# Mine\n")
    assert planned(folder)["README.md"].decode() == "---\nlanguage: en\nlicense: mit\n---\n\n# Mine\n"


@pytest.mark.parametrize("text", [b"---\nlicense: [mit\n---\n", b"\xff\xfe"])
def test_a_card_that_is_damaged_is_refused(folder: Path, text: bytes) -> None:
    (folder / "README.md").write_bytes(text)
    for options in ({}, {"new_card": True}):
        with pytest.raises(ValueError, match="README.md cannot be read"):
            planned(folder, **options)


def test_a_folder_without_a_name_is_not_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="`folder` must be the name of a folder, but is empty"):
        plan_push("", REPO, license="mit")


def test_a_licence_of_ones_own_is_named_by_its_file(folder: Path) -> None:
    (folder / "LICENSE").write_text("\n  The Tiny License, Version 3\n\nDo as you like.\n")
    card = planned(folder, license=None)["README.md"].decode()
    assert "license: other\n" in card and "license_name: the-tiny-license-version-3\n" in card
    assert "license_link: LICENSE\n" in card
    (folder / "LICENSE").unlink()
    with pytest.raises(ValueError, match="needs the licence's text"):
        planned(folder, license="other")


def test_results_for_a_card_that_is_not_written_are_refused(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    evaluation = {"block_sizes": {"1": {"nll": 1.0, "perplexity": 2.7}}}
    with pytest.raises(ValueError, match="--new-card"):
        planned(folder, evaluations=[evaluation])
    card = planned(folder, evaluations=[evaluation], new_card=True, license=None)["README.md"].decode()
    assert "# Mine" not in card and "2.70" in card and "license: mit" in card


def test_adapters_are_pushed_with_a_card_in_place_of_the_template(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.name_or_path = model.config._name_or_path = "me/base"
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert "[More Information Needed]" in (tmp_path / "adapter" / "README.md").read_text()
    files = planned(tmp_path / "adapter")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].decode()
    assert "base_model: me/base" in card and "[More Information Needed]" not in card


@pytest.mark.parametrize("repo_id", ["tiny", "me/tiny/more", "me/-tiny", "", "me/ti ny"])
def test_bad_names_are_refused(folder: Path, repo_id: str) -> None:
    with pytest.raises(ValueError):
        plan_push(folder, repo_id, license="mit")


# The upload


def test_what_is_planned_is_what_is_uploaded_in_one_commit(folder: Path, hub: FakeHub) -> None:
    files = planned(folder)
    commit = push_folder(folder, REPO, license="mit", commit_message="First")
    uploaded = hub.files(REPO)
    del uploaded[".gitattributes"]  # the Hub's own
    assert uploaded == files
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "First"]
    assert commit.oid in hub.repositories["model", REPO].commits
    assert not hub.repositories["model", REPO].private


@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_pushed_loads_with_the_same_tensors_and_texts(
    sharded: bool,
    tmp_path: Path,
    hub: FakeHub,
) -> None:
    model, saved = tiny_model(), tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="4KB" if sharded else "1GB")
    push_folder(saved, REPO, license="mit")
    again = BlockGenForDiffusionLM.from_pretrained(REPO, cache_dir=tmp_path / "cache").eval()
    tensors, others = model.state_dict(), again.state_dict()
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    for decoding in ("ar", "block_diffusion", "arpc"):
        texts = []
        for one in (model, again):
            torch.manual_seed(1)
            texts.append(one.generate(words(2, 5), decoding=decoding, max_new_tokens=9).tolist())
        assert texts[0] == texts[1], decoding


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_converted_checkpoints_come_back_the_same(name: str, tmp_path: Path, hub: FakeHub) -> None:
    """Convert, load, save, push, load."""
    model = BlockGenForDiffusionLM.from_pretrained(convert(tmp_path, name)).eval()
    model.save_pretrained(tmp_path / "saved")
    push_folder(tmp_path / "saved", REPO, license="mit")
    again = BlockGenForDiffusionLM.from_pretrained(REPO, cache_dir=tmp_path / "cache").eval()
    tensors, others = model.state_dict(), again.state_dict()
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    texts = [generate(one, words(2, 5), seed=3, max_new_tokens=9).tolist() for one in (model, again)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_converted_folders_are_pushed_with_where_they_come_from(name: str, tmp_path: Path) -> None:
    folder = convert(tmp_path, name)
    files = planned(folder)
    assert set(contents(folder)) | {"README.md"} == set(files)
    notes = json.loads(files["conversion.json"])
    assert f"converted from `{notes['source']}` (family `{notes['family']}`)" in files["README.md"].decode()


@pytest.mark.slow
def test_a_stranger_loads_what_was_pushed_by_its_own_code(
    folder: Path,
    tmp_path: Path,
    hub: FakeHub,
) -> None:
    """Another process without the package, from a folder that had no code."""
    for name in CODE:
        (folder / name).unlink()
    push_folder(folder, REPO, license="mit", private=True)
    script = """
import sys
sys.modules["blockgen_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("me/tiny")
inputs = tokenizer("abcde", return_tensors="pt")
torch.manual_seed(1)
print("RESULT", tokenizer.decode(model.generate(**inputs, decoding="arpc", max_new_tokens=9)[0]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(hub, tmp_path / "home"), "PATH": os.environ["PATH"]},
    )
    assert run.returncode == 0, run.stderr
    model, tokenizer = tiny_model(), tiny_tokenizer()
    inputs = tokenizer("abcde", return_tensors="pt")
    torch.manual_seed(1)
    tokens = model.generate(**inputs, decoding="arpc", max_new_tokens=9)
    assert run.stdout.split("RESULT ")[1].strip() == tokenizer.decode(tokens[0])


def test_private_repositories_branches_and_pull_requests(folder: Path, hub: FakeHub) -> None:
    files = planned(folder)
    push_folder(folder, REPO, license="mit", private=True, revision="next")
    repository = hub.repositories["model", REPO]
    assert repository.private and set(repository.branches) == {"main", "next"}
    assert set(files) <= set(hub.files(REPO, "next")) and "config.json" not in hub.files(REPO)
    commit = push_folder(folder, REPO, license="mit", create_pr=True)
    assert commit.pr_url.endswith("/discussions/1")
    assert set(files) <= set(hub.files(REPO, "refs/pr/1")) and "config.json" not in hub.files(REPO)


def test_a_public_repository_is_not_written_to_when_private_is_asked_for(folder: Path, hub: FakeHub) -> None:
    push_folder(folder, REPO, license="mit")
    with pytest.raises(ValueError, match="is there already, and public"):
        push_folder(folder, REPO, license="mit", private=True, commit_message="Second")
    assert len(hub.commits(REPO)) == 2


def test_weights_in_other_shards_are_replaced(folder: Path, tmp_path: Path, hub: FakeHub) -> None:
    sharded = tmp_path / "sharded"
    tiny_model(seed=3).save_pretrained(sharded, max_shard_size="4KB")
    push_folder(folder, REPO, license="mit")
    push_folder(sharded, REPO, license="mit")
    there = hub.files(REPO)
    assert "model.safetensors" not in there and "tokenizer.json" in there
    loaded = BlockGenForDiffusionLM.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    assert torch.equal(loaded.lm_head.weight, tiny_model(seed=3).lm_head.weight)


@pytest.mark.parametrize("case", ["token", "namespace", "card"])
def test_nothing_is_created_when_the_hub_refuses(
    case: str,
    folder: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "card":
        (folder / "README.md").write_text("---\nlicense: mit\npipeline_tag: [a, b]\n---\n")
    repo_id = "others/tiny" if case == "namespace" else REPO
    with pytest.raises(
        (OSError, ValueError), match={"token": "oken", "namespace": "403", "card": "pipeline_tag"}[case]
    ):
        push_folder(folder, repo_id, license="mit")
    assert hub.repositories == {}


def test_nothing_is_sent_when_the_folder_is_refused(folder: Path, hub: FakeHub) -> None:
    (folder / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="notes.txt"):
        push_folder(folder, REPO, license="mit")
    assert hub.requests == []


# Trainer


def prepared(folder: Path) -> Path:
    """An output folder that says its licence, and holds something else too."""
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    (folder / "notes.txt").write_text("not of the model")
    return folder


def test_saving_with_an_upload_takes_the_code_along(tmp_path: Path, hub: FakeHub) -> None:
    """transformers uploads what changed while it saved, a model or a configuration alone: the code belongs to it."""
    tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=REPO)
    assert set(hub.files(REPO)) >= CODE | {"config.json", "model.safetensors"}
    tiny_config().save_pretrained(tmp_path / "config", push_to_hub=True, repo_id="me/config")
    assert set(hub.files("me/config")) >= CODE | {"config.json"}


def test_a_trainer_makes_a_private_repository_where_transformers_cannot_be_told(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Trainer.init_hf_repo` takes `private` from transformers 5.23 on; `hub_private_repo` works everywhere."""
    init = Trainer.init_hf_repo
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: init(self, token))
    trainer = make_trainer(prepared(tmp_path / "run"), hub_model_id=REPO)
    trainer.hub_model_id = None
    trainer.push_to_hub(private=True)
    assert hub.repositories["model", REPO].private


def test_a_trainer_pushes_what_the_command_would(tmp_path: Path, hub: FakeHub) -> None:
    folder = prepared(tmp_path / "run")
    trainer = make_trainer(folder, push_to_hub=True, hub_model_id=REPO, hub_private_repo=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    uploaded = hub.files(REPO)
    del uploaded[".gitattributes"]
    assert uploaded == planned(folder, ignore=["notes.txt"], license=None)
    assert set(uploaded) == CODE | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert hub.repositories["model", REPO].private
    assert (folder / "training_args.bin").exists()  # but was not uploaded
    card = uploaded["README.md"].decode()
    assert "license: mit" in card and "language: en" in card and "| Steps done | 2 |" in card

    (tmp_path / "weights").write_bytes(uploaded["model.safetensors"])
    pushed, averages = load_file(tmp_path / "weights"), trainer.model.state_dict()
    assert all(torch.equal(pushed[name], averages[name]) for name in averages)


def test_a_trainer_pushes_averages_while_it_trains(tmp_path: Path, hub: FakeHub) -> None:
    folder = prepared(tmp_path / "run")
    trainer = make_trainer(
        folder,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="every_save",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    trainer.train()
    assert trainer.push_in_progress is not None and [job.exception() for job in trainer.push_in_progress.jobs] == [
        None
    ]
    assert [commit.message for commit in hub.commits(REPO)][1:] == ["Training in progress, step 2"]
    uploaded = hub.files(REPO)
    assert uploaded["model.safetensors"] == (folder / "checkpoint-2" / "model.safetensors").read_bytes()
    assert not {name for name in uploaded if name.endswith((".bin", ".pt", ".pth"))}
    snapshot = snapshot_download(REPO, cache_dir=tmp_path / "cache")
    assert read_folder(Path(shutil.copytree(snapshot, tmp_path / "copy"))).left_out == []


def test_a_trainer_without_a_licence_says_so_before_it_trains(tmp_path: Path, hub: FakeHub) -> None:
    with pytest.raises(ValueError, match=r"cannot be pushed.*licence.*output_dir"):
        make_trainer(tmp_path / "run", push_to_hub=True, hub_model_id=REPO)
    assert hub.repositories == {}


def test_a_trainer_pushes_when_it_is_told_to(tmp_path: Path, hub: FakeHub) -> None:
    trainer = make_trainer(tmp_path / "run", rows=TokenRows(8), max_steps=1)
    with pytest.raises(ValueError, match="licence"):
        trainer.push_to_hub()
    assert hub.repositories == {}
    trainer.args.hub_model_id = REPO
    trainer.push_to_hub(license="mit", tags="letters", dataset_tags="me/letters", commit_message="Told")
    assert hub.commits(REPO)[-1].message == "Told"
    card = hub.files(REPO)["README.md"].decode()
    assert "- letters\n" in card and "- me/letters\n" in card
