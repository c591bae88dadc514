"""The small trained models of the package: small enough, complete, and able to tell a story from noise."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stranger import WITHOUT_THE_PACKAGE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.checkpoints import SHIPPED, find_checkpoint, shipped_checkpoint
from blockgen_hf.checkpoints.__main__ import write_code
from blockgen_hf.modeling.remote_code_blockgen import AUTO_MAP, remote_code


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside with her toys. One day, she saw "
    "a big dog in the park. The dog was very friendly and wanted to play with her."
)


@pytest.fixture(scope="module", params=SHIPPED)
def folder(request: pytest.FixtureRequest) -> Path:
    return shipped_checkpoint(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> BlockGenForDiffusionLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_model_of_the_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in SHIPPED:
        assert find_checkpoint(name) == str(shipped_checkpoint(name))
    Path(SHIPPED[1]).mkdir()
    assert find_checkpoint(SHIPPED[1]) == SHIPPED[1]
    with pytest.raises(ValueError, match="one of tinystories-masked, tinystories-uniform, but is 'gpt2'"):
        shipped_checkpoint("gpt2")


def test_all_folders_together_are_small() -> None:
    assert sum(path.stat().st_size for name in SHIPPED for path in shipped_checkpoint(name).iterdir()) < 20e6


def test_the_folder_is_complete(folder: Path) -> None:
    """Weights, configuration, generation settings, tokenizer, card, and the code that loads it."""
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *remote_code(),
    }


def test_its_code_is_that_of_the_package(folder: Path) -> None:
    """Otherwise `python -m blockgen_hf.checkpoints` was forgotten."""
    for name, text in remote_code().items():
        assert (folder / name).read_text() == text, name
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_the_command_that_writes_the_code_brings_a_folder_up_to_date(tmp_path: Path) -> None:
    for name in ("config.json", "modeling_blockgen.py"):
        (tmp_path / name).write_bytes((shipped_checkpoint() / name).read_bytes())
    (tmp_path / "modeling_blockgen.py").write_text("old")
    (tmp_path / "gone_blockgen.py").write_text("of another version")
    write_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", *remote_code()}
    assert (tmp_path / "modeling_blockgen.py").read_bytes() == remote_code()["modeling_blockgen.py"].encode()


@pytest.mark.slow
def test_the_snippet_of_its_card_runs_without_the_package(folder: Path, tmp_path: Path) -> None:
    """And a pipeline opens the folder by its name, with torch and transformers alone."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    pipeline = f"""
from transformers import pipeline
write = pipeline("text-generation", model={str(folder)!r}, trust_remote_code=True)
print("PIPELINE", write("The dog", max_new_tokens=8)[0]["generated_text"])
"""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + snippet + pipeline],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and "PIPELINE The dog" in done.stdout


def test_special_tokens_agree(model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """End, pad and mask agree between tokenizer, configuration and generation settings."""
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert model.config.mask_token_id == (len(tokenizer) - 1 if model.config.diffusion_type == "masked" else None)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert (model.generation_config.do_sample, model.generation_config.top_k) == (True, 0)


@torch.no_grad()
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16])
def test_a_story_is_likelier_than_its_words_in_disorder(
    model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast, block_size: int
) -> None:
    """At every block size that it was trained on, by the bound (Eq. 15) at a few noise levels."""
    story = tokenizer(STORY, return_tensors="pt")["input_ids"]
    disorder = story[:, torch.randperm(story.shape[1], generator=torch.Generator().manual_seed(0))]

    def bound(input_ids: torch.Tensor) -> float:
        diffusion, t = model.diffusion, torch.linspace(0.1, 1, 16, dtype=torch.float64)[:, None]
        alpha = torch.zeros_like(t) if block_size == 1 else diffusion.schedule.alpha(t)
        ids = input_ids.expand(len(t), -1)
        noisy = diffusion.corrupt(ids, alpha, torch.Generator().manual_seed(0))
        logits = model(ids, noisy, block_size=block_size).logits
        # Block size 1 is fully noised: its bound is the cross entropy, exactly (Suppl. C.1, Eq. 14).
        objective = "cross_entropy" if block_size == 1 else "elbo"
        derivative = diffusion.schedule.alpha_derivative(t)
        return diffusion.loss(logits, ids, noisy, alpha, derivative, objective).mean().item()

    assert bound(story) < bound(disorder) - 1
    assert bound(story) < math.log(len(tokenizer)) / 2


def test_text_is_made_of_words(model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Greedy text repeats nothing but what stories are made of: known words, and never the mask token."""
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    output = model.generate(**inputs, decoding="ar", do_sample=False, max_new_tokens=24)
    assert tokenizer.mask_token_id not in output
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a")
