"""An adapter and its base in one folder, and the adapter beside the plain causal language model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import ROWS, converted, original, texts
from stranger import WITHOUT_THE_PACKAGE
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.cli import main
from blockgen_hf.hub import convert_checkpoint, plan_push
from blockgen_hf.training.recipe_adapter import add_adapter


peft = pytest.importorskip("peft")


def adapter_folder(folder: Path, *, settings: Any = None, **chosen: Any) -> tuple[Path, BlockGenForDiffusionLM]:
    """A converted model with a tokenizer, and a random adapter of it."""
    model = converted(folder, original("llama"), name="base", **chosen)
    tiny_tokenizer().save_pretrained(folder / "base")
    is_masked = model.config.diffusion_type == "masked"
    given = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "r": 2}
    given |= {"modules_to_save": ["noise_embedding"]} if is_masked else {}
    adapted = add_adapter(model, {"task_type": "CAUSAL_LM", **given, **(settings or {})}, str(folder / "base"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "adapter")
    loaded = BlockGenForDiffusionLM.from_pretrained(folder / "base").eval()
    loaded.load_adapter(str(folder / "adapter"))
    return folder / "adapter", loaded


@torch.no_grad()
def drafted(model: Any) -> torch.Tensor:
    """Logits of canvases of four tokens."""
    ids = texts(1, 8)
    noise = texts(1, 8, seed=1) if model.config.mask_token_id is None else torch.full_like(ids, ROWS)
    logits: torch.Tensor = model(ids, noise, block_size=4).logits
    return logits


def test_a_folder_with_the_base_and_its_adapter_loads_at_once(tmp_path: Path, capsys: Any) -> None:
    adapter, model = adapter_folder(tmp_path)
    assert main(["convert", str(adapter), "--output", str(tmp_path / "one")]) == 0
    shutil.move(tmp_path / "one", tmp_path / "moved")  # and needs nothing but itself
    shutil.move(tmp_path / "base", tmp_path / "gone")
    shutil.rmtree(adapter)
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "moved").eval()
    plain = BlockGenForDiffusionLM.from_pretrained(tmp_path / "gone").eval()
    assert torch.equal(drafted(one), drafted(model))
    assert not torch.allclose(drafted(one), drafted(plain))
    assert torch.equal(one(texts(1, 8)).logits, plain(texts(1, 8)).logits)
    name = "model.safetensors"
    assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()
    command = ["generate", "ab", "--model", str(tmp_path / "moved"), "--max-new-tokens", "6", "--greedy"]
    capsys.readouterr()
    assert main([*command, "--decoding", "speculative"]) == 0
    speculative = capsys.readouterr().out
    assert main([*command, "--decoding", "ar", "--model", str(tmp_path / "gone")]) == 0
    assert speculative == capsys.readouterr().out != ""


def test_such_a_folder_is_pushed_as_one_that_names_itself(tmp_path: Path) -> None:
    adapter, _ = adapter_folder(tmp_path)
    conversion = tmp_path / "base" / "conversion.json"
    notes = {"source": "hf:them/llama", "revision": "0" * 40}
    conversion.write_text(json.dumps({**json.loads(conversion.read_text()), **notes}))
    convert_checkpoint(adapter, tmp_path / "one")
    plan = plan_push(tmp_path / "one", "me/one", license="apache-2.0")
    files = {file.path: file.read() for file in plan.files}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/one"
    assert {"adapter_model.safetensors", "model.safetensors", "modeling_blockgen.py"} <= files.keys()
    for said in ("base_model: them/llama", "license: apache-2.0", "LoRA of rank 2", "transformers and peft are"):
        assert said in plan.card


@pytest.mark.slow
def test_such_a_folder_loads_without_this_package(tmp_path: Path) -> None:
    adapter, model = adapter_folder(tmp_path)
    convert_checkpoint(adapter, tmp_path / "one")
    code = f"""{WITHOUT_THE_PACKAGE}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "one")!r}, trust_remote_code=True).eval()
ids = torch.tensor({texts(1, 8).tolist()})
torch.save(model(ids, torch.full_like(ids, {ROWS}), block_size=4).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), drafted(model))


@torch.no_grad()
def test_an_exported_adapter_drafts_over_the_plain_model_as_here(tmp_path: Path) -> None:
    """As a server does: the last token goes through the base, tokens of noise behind it through the adapter."""
    chosen: dict[str, Any] = dict(diffusion_type="uniform", noisy_attention="causal")
    adapter, model = adapter_folder(tmp_path, **chosen)
    report = convert_checkpoint(adapter, tmp_path / "plain", to="causal-lm")
    assert "UNO" in " ".join(report.notes)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids, noise = texts(1, 7), texts(1, 3, seed=2)
    expected = model(
        ids[:, :-1], torch.cat([ids[:, -1:], noise], dim=1), noisy_position_ids=torch.arange(6, 10)[None], block_size=4
    ).logits
    cache = DynamicCache(config=plain.config)
    anchor = plain(ids, past_key_values=cache).logits[:, -1:]
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "plain" / "adapter").eval()
    drafts = adapted(noise, past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([anchor, drafts], dim=1), expected, atol=1e-4, rtol=1e-4)
    # One folder gives the same two.
    convert_checkpoint(adapter, tmp_path / "one")
    convert_checkpoint(tmp_path / "one", tmp_path / "again", to="causal-lm")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize(
    ("chosen", "settings", "named"),
    [
        ({}, {}, "`diffusion_type` must be 'uniform' and `noisy_attention` 'causal'"),
        ({"diffusion_type": "uniform"}, {}, "but are 'uniform' and 'block'"),
        ({"diffusion_type": "uniform", "noisy_attention": "causal"}, {"use_rslora": True}, "`use_rslora` is True"),
    ],
)
def test_an_adapter_that_would_be_another_is_not_exported(
    chosen: dict[str, Any], settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    adapter, _ = adapter_folder(tmp_path, settings=settings, **chosen)
    with pytest.raises(ValueError, match=named):
        convert_checkpoint(adapter, tmp_path / "plain", to="causal-lm")
    assert not (tmp_path / "plain").exists()


def test_what_is_no_adapter_of_a_converted_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "tiny")
    adapted = add_adapter(
        model, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2}, str(tmp_path / "tiny")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge_and_unload"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "one")
    with pytest.raises(ValueError, match="`dtype` has no meaning"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "one", dtype="bfloat16")
    shutil.rmtree(tmp_path / "tiny")
    with pytest.raises(ValueError, match="base model of .* is not there"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "one")
