"""The small trained model of the package: small enough, complete, and able to tell a story from noise."""

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
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.checkpoints.__main__ import write_code
from blockgen_hf.modeling.remote_code_blockgen import AUTO_MAP, remote_code


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside with her toys. One day, she saw "
    "a big dog in the park. The dog was very friendly and wanted to play with her."
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(shipped_checkpoint())


@pytest.fixture(scope="module")
def model() -> BlockGenForDiffusionLM:
    return AutoModelForCausalLM.from_pretrained(shipped_checkpoint()).eval()


def test_the_folder_is_small_and_complete() -> None:
    """At most 12 MB: weights, configuration, generation settings, tokenizer, card, and the code that loads it."""
    files = {path.name: path.stat().st_size for path in shipped_checkpoint().iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *remote_code(),
    }
    assert sum(files.values()) < 12e6


def test_its_code_is_that_of_the_package() -> None:
    """Otherwise `python -m blockgen_hf.checkpoints` was forgotten."""
    for name, text in remote_code().items():
        assert (shipped_checkpoint() / name).read_text() == text, name
    assert json.loads((shipped_checkpoint() / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_the_command_that_writes_the_code_brings_a_folder_up_to_date(tmp_path: Path) -> None:
    for name in ("config.json", "modeling_blockgen.py"):
        (tmp_path / name).write_bytes((shipped_checkpoint() / name).read_bytes())
    (tmp_path / "modeling_blockgen.py").write_text("old")
    (tmp_path / "gone_blockgen.py").write_text("of another version")
    write_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", *remote_code()}
    assert (tmp_path / "modeling_blockgen.py").read_bytes() == remote_code()["modeling_blockgen.py"].encode()


@pytest.mark.slow
def test_the_snippet_of_its_card_runs_without_the_package(tmp_path: Path) -> None:
    """And a pipeline opens the folder by its name, with torch and transformers alone."""
    card = (shipped_checkpoint() / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    pipeline = f"""
from transformers import pipeline
write = pipeline("text-generation", model={str(shipped_checkpoint())!r}, trust_remote_code=True)
print("PIPELINE", write("The dog", max_new_tokens=8)[0]["generated_text"])
"""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + snippet + pipeline],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=shipped_checkpoint(),
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and "PIPELINE The dog" in done.stdout


def test_special_tokens_are_the_last_and_the_mask_the_very_last(
    model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """End, pad and mask agree between tokenizer, configuration and generation settings."""
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.mask_token_id == model.config.mask_token_id == len(tokenizer) - 1
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
        return diffusion.loss(logits, ids, noisy, alpha, diffusion.schedule.alpha_derivative(t), "elbo").mean().item()

    assert bound(story) < bound(disorder) - 1
    assert bound(story) < math.log(len(tokenizer)) / 2


def test_text_is_made_of_words(model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Greedy text repeats nothing but what stories are made of: known words, and never the mask token."""
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    output = model.generate(**inputs, decoding="ar", do_sample=False, max_new_tokens=24)
    assert tokenizer.mask_token_id not in output
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a")
