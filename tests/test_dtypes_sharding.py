"""bf16 and fp16, sharded checkpoints, `device_map` and offloading: the same model wherever and however it lies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import BLOCK_CAUSAL, MASK, VARIANTS, assert_near, generate, tiny_model, words
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from blockgen_hf import BlockGenForDiffusionLM


TEXT = words(2, 8)
DTYPES = [torch.bfloat16, torch.float16]
DECODINGS: list[dict[str, Any]] = [
    {"decoding": "ar"},
    {"decoding": "ar", "do_sample": False},
    {"decoding": "block_diffusion", "block_size": 4},
    {"decoding": "arpc", "block_size": 4, "corrector": "ar_kl", "noise_removal": "greedy"},
]


def save(folder: Path, variant: str = "masked", **settings: Any) -> BlockGenForDiffusionLM:
    """A model that is in `folder` now, in several files."""
    model = tiny_model(variant, **settings)
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT, TEXT, block_size=4, noise_level=0.5).logits


def texts(model: Any) -> list[list[list[int]]]:
    return [generate(model, TEXT, max_new_tokens=6, **settings).tolist() for settings in DECODINGS]


# ---- types
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((variant, torch.bfloat16) for variant in VARIANTS),
        *((variant, torch.float16) for variant in ("masked", "uniform_time_conditional")),
    ],
    ids=str,
)
def test_half_precision_is_near_and_writes_text(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    """Logits of both uses finite and near those of float32, no mask token in any text, whatever the decoding."""
    model = save(tmp_path, variant)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.004  # 8 and 11 bits of precision
    expected, got = logits(model), logits(half)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < tolerance * expected.norm()
    if variant in BLOCK_CAUSAL:
        sequences = generate(half, TEXT, max_new_tokens=6, block_size=4)
        assert sequences.shape == (2, 14)
        return
    probabilities, exact = (one(TEXT).logits.float().softmax(-1) for one in (half, model))
    torch.testing.assert_close(probabilities, exact, atol=2 * tolerance, rtol=0.1)
    for sequences in texts(half):
        assert torch.tensor(sequences).shape == (2, 14)
        assert model.config.diffusion_type == "uniform" or MASK not in torch.tensor(sequences)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["masked", "uniform", "uniform_time_conditional"])
def test_a_training_step_in_half_precision_is_finite(variant: str, dtype: torch.dtype) -> None:
    """Also where next to nothing is noised, and all is: the loss itself is computed in float32."""
    model = tiny_model(variant).to(dtype).train()
    for noise_level in (1e-3, 0.5, 1.0):
        for block_size in (1, 4):
            outputs = model(TEXT, labels=TEXT, block_size=block_size, noise_level=noise_level)
            assert outputs.loss.dtype == torch.float32 and outputs.loss.isfinite()
            outputs.loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_type_survives_saving(tmp_path: Path, dtype: torch.dtype) -> None:
    """The configuration says it, loading takes it unless told otherwise, and the weights are bit for bit the same."""
    half = tiny_model().to(dtype)
    half.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for settings in ({}, {"dtype": "auto"}, {"dtype": dtype}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        assert loaded.dtype == dtype
        assert all(torch.equal(p, q) for p, q in zip(half.parameters(), loaded.parameters(), strict=True))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_the_attention_implementation_is_chosen_at_loading(tmp_path: Path) -> None:
    """It belongs to the machine: transformers does not save it. A configuration that names one is heeded."""
    model = save(tmp_path)
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"
    assert chosen.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert chosen(TEXT, TEXT, block_size=4, output_attentions=True).attentions is not None
    assert_near(logits(chosen), logits(model))
    chosen.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config._attn_implementation == "sdpa"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "eager"


# ---- places
DEVICE_MAPS: dict[str, dict[str, Any]] = {
    "auto": {"device_map": "auto"},
    "all_on_disk": {"device_map": {"": "disk"}},
    "half_on_disk": {"device_map": "auto", "max_memory": {"cpu": "24KB"}},
    "by_hand": {
        "device_map": {
            "model.embed_tokens": "disk",
            "model.time_embedding": "disk",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "model.norm_modulation": "disk",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        }
    },
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("auto", "masked"),
        ("all_on_disk", "uniform_time_conditional"),
        ("half_on_disk", "masked"),
        ("by_hand", "uniform_time_conditional"),
    ],
)
def test_a_model_runs_wherever_its_layers_lie(tmp_path: Path, name: str, variant: str) -> None:
    """The same logits, texts and losses, in training mode too, from shards, with layers on a disk."""
    pytest.importorskip("accelerate")
    model = save(tmp_path / "model", variant)
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", offload_folder=str(tmp_path / "offload"), **DEVICE_MAPS[name]
    )
    places = {parameter.device.type for parameter in spread.parameters()}
    assert places == {"auto": {"cpu"}, "all_on_disk": {"meta"}}.get(name, {"cpu", "meta"})
    assert_near(logits(spread), logits(model))
    assert texts(spread) == texts(model)
    for one in (spread, model):
        one.train()
    training = dict(labels=TEXT, block_size=4, noise_level=1.0)
    noisy = words(2, 8, seed=1) if variant.startswith("uniform") else torch.full_like(TEXT, MASK)
    losses = [one(TEXT, noisy, **training).loss for one in (spread, model)]
    assert_near(*losses)
    assert losses[0] > 0


def test_tied_weights_lie_on_a_disk_once(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = save(tmp_path / "model", tie_word_embeddings=True)
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", offload_folder=str(tmp_path / "offload"), **DEVICE_MAPS["all_on_disk"]
    )
    assert_near(logits(spread), logits(model))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accelerate_loads_a_checkpoint_into_an_empty_model(tmp_path: Path, tied: bool) -> None:
    """`load_checkpoint_and_dispatch`: buffers that are not saved, such as rotary frequencies, are there too."""
    accelerate = pytest.importorskip("accelerate")
    model = save(tmp_path, tie_word_embeddings=tied)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path), device_map="auto", no_split_module_classes=empty._no_split_modules
    ).eval()
    assert_near(logits(loaded), logits(model))
    assert texts(loaded) == texts(model)


def test_a_model_that_fsdp_shards_generates_the_same_text() -> None:
    """One process: weights are gathered in the forward passes of the layers, and only there."""
    model = tiny_model()
    expected = texts(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
        assert texts(model) == expected
    finally:
        dist.destroy_process_group()
