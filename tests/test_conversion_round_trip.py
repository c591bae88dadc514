"""Conversions lose nothing: there and back bit by bit, through save and load, and without the package installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from published_reference import settings, weights, write
from safetensors.torch import load_file
from stranger import WITHOUT_THE_PACKAGE
from test_conversion import SOURCES, convert, every_source, ids
from tiny import generate, tiny_config, tiny_model
from torch import Tensor

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.hub.conversion import convert_checkpoint


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        bits = [value.reshape(-1).view(torch.uint8) for value in (found[name], tensor)]
        assert bits[0].equal(bits[1]), name


@every_source
@pytest.mark.parametrize(("dtype", "inv_freq"), [(torch.float32, True), (torch.bfloat16, False)])
def test_published_to_ours_to_published(tmp_path: Path, name: str, dtype: torch.dtype, inv_freq: bool) -> None:
    """The same tensors, names, bytes, buffers and config.json."""
    family, changes, _ = SOURCES[name]
    tensors = weights(family, inv_freq=inv_freq)
    tensors = {
        key: value if value.ndim == 0 or "inv_freq" in key else value.to(dtype) for key, value in tensors.items()
    }
    ours = convert(tmp_path, name, tensors)
    report = convert_checkpoint(ours, tmp_path / "back", to="published")
    assert report.family == family
    assert {path.name for path in report.output.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_bits(load_file(report.output / "model.safetensors"), tensors)
    assert json.loads((report.output / "config.json").read_text()) == settings(family, **changes)


@hypothesis_settings(max_examples=12)
@given(
    family=st.sampled_from(["block-dit", "dense-dit", "ar"]),
    rows=st.integers(2, 40),
    head=st.sampled_from([2, 4, 6]),
    heads=st.integers(1, 3),
    layers=st.integers(1, 3),
    cond=st.integers(1, 9),
    adaptive=st.booleans(),
)
def test_any_sizes_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    rows: int,
    head: int,
    heads: int,
    layers: int,
    cond: int,
    adaptive: bool,
) -> None:
    tmp_path = tmp_path_factory.mktemp("sizes")
    sizes: dict[str, int] = dict(rows=rows, width=head * heads, layers=layers, heads=heads, cond=cond)
    tensors = weights(family, adaptive=adaptive and family != "ar", **sizes)
    config = settings(family, hidden_size=head * heads, n_heads=heads, n_blocks=layers, cond_dim=cond)
    source = write(tmp_path / "source", config, tensors)
    told: dict[str, Any] = {} if family == "ar" else {"diffusion_type": "uniform"}
    told |= {"block_sizes": [1, 4]} if family == "block-dit" else {}
    ours = convert_checkpoint(source, tmp_path / "ours", family=family, **told).output
    back = convert_checkpoint(ours, tmp_path / "back", to="published").output
    assert_same_bits(load_file(back / "model.safetensors"), tensors)


OURS: dict[str, dict[str, Any]] = {
    "mixture": dict(block_sizes=[1, 4], block_size_weights=[0.25, 0.75]),
    "uniform": dict(diffusion_type="uniform"),
    "block_causal": dict(clean_attention="block_causal", block_sizes=[4]),
    "without_adaln": dict(adaptive_layer_norm=False),
    "full_sequence": dict(clean_attention="block_causal", block_sizes=[64], training_objective="elbo"),
    "timed_full_sequence": dict(
        clean_attention="block_causal", block_sizes=[64], diffusion_type="uniform", time_conditioning=True
    ),
    "next_token": dict(next_token_prediction=True, block_sizes=[1], adaptive_layer_norm=False),
}


@pytest.mark.parametrize("variant", OURS)
def test_ours_to_published_to_ours(tmp_path: Path, variant: str) -> None:
    """The same tensors and the same configuration, if what the published files do not say is said again."""
    ids_of_text = dict(pad_token_id=None, intermediate_size=64)
    model = tiny_model(**{**ids_of_text, **OURS[variant]})
    model.save_pretrained(tmp_path / "ours")
    config = model.config
    published = convert_checkpoint(tmp_path / "ours", tmp_path / "published", to="published")
    told: dict[str, Any] = {}
    if published.family != "ar":
        told["diffusion_type"] = config.diffusion_type
    if published.family == "block-dit":
        told |= {"block_sizes": config.block_sizes, "block_size_weights": config.block_size_weights}
    for name in told:
        if told[name] is not None:
            assert f"{name}={told[name]!r}" in published.notes[0]
    again = convert_checkpoint(tmp_path / "published", tmp_path / "again", **told)
    assert again.family == published.family
    loaded = BlockGenForDiffusionLM.from_pretrained(tmp_path / "again")
    assert_same_bits(loaded.state_dict(), model.state_dict())
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again"))
    assert after == before


def test_a_sharded_folder_of_ours_becomes_one_published_file(tmp_path: Path) -> None:
    ours = convert(tmp_path, "mixture", max_shard_size="20KB")
    assert len(list(ours.glob("model-*.safetensors"))) > 1
    back = convert_checkpoint(ours, tmp_path / "back", to="published").output
    assert_same_bits(load_file(back / "model.safetensors"), weights("block-dit"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` is True instead of False"),
        ({"hidden_act": "relu"}, "`hidden_act` is 'relu'"),
        ({"intermediate_size": 48}, "`intermediate_size` is 48 instead of 64"),
        ({"layer_norm_eps": 1e-6}, "`layer_norm_eps` is 1e-06"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "`rope_parameters` are"),
        ({"time_conditioning": True}, "not that of the family 'block-dit'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_published_layout_cannot_hold_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = tiny_config(**{"intermediate_size": 64, **changes})
    BlockGenForDiffusionLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="The published layout cannot hold this model") as error:
        convert_checkpoint(tmp_path / "ours", tmp_path / "published", to="published")
    assert message in str(error.value)
    assert not (tmp_path / "published").exists()


def test_the_way_back_leads_to_the_family_of_the_source(tmp_path: Path) -> None:
    ours = convert(tmp_path, "mdlm")
    with pytest.raises(ValueError, match="`family` is 'block-dit', but .* was converted from a 'dense-dit'"):
        convert_checkpoint(ours, tmp_path / "back", to="published", family="block-dit")
    with pytest.raises(ValueError, match="`tokenizer` has no place in a published checkpoint"):
        convert_checkpoint(ours, tmp_path / "back", to="published", tokenizer="gpt2")
    with pytest.raises(ValueError, match="`max_shard_size` has no place in a published checkpoint"):
        convert_checkpoint(ours, tmp_path / "back", to="published", max_shard_size="1GB")


def test_notes_of_a_conversion_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    ours = convert(tmp_path, "mixture")
    notes = json.loads((ours / "conversion.json").read_text())
    notes["source_config"]["length"] = 4096
    (ours / "conversion.json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match="has another `length` than its config.json"):
        convert_checkpoint(ours, tmp_path / "back", to="published")


@every_source
def test_a_converted_folder_survives_save_and_load(tmp_path: Path, name: str) -> None:
    """Identical tensors, and the same text for a seed."""
    first = BlockGenForDiffusionLM.from_pretrained(convert(tmp_path, name)).eval()
    first.save_pretrained(tmp_path / "again")
    second = BlockGenForDiffusionLM.from_pretrained(tmp_path / "again").eval()
    assert_same_bits(second.state_dict(), first.state_dict())
    prompt = ids(2, 6)
    texts = [generate(model, prompt, seed=3, max_new_tokens=10).tolist() for model in (first, second)]
    assert texts[0] == texts[1]


def test_the_notes_tell_where_the_model_comes_from(tmp_path: Path) -> None:
    ours = convert(tmp_path, "bd3lm")
    notes = json.loads((ours / "conversion.json").read_text())
    assert notes["source"] == "source" and notes["family"] == "bd3lm"  # not the folders above
    assert str(tmp_path) not in (ours / "conversion.json").read_text()
    assert notes["source_config"] == settings("bd3lm")
    assert set(notes["buffers"]) == {"backbone.rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max"}
    assert notes["files"] == sorted(path.name for path in ours.iterdir())


STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import json
import torch
from transformers import AutoModelForCausalLM

texts = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    torch.manual_seed(5)
    texts[folder] = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8).tolist()
print("RESULT" + json.dumps(texts))
"""
)


@pytest.mark.slow
def test_a_converted_folder_works_without_the_package(tmp_path: Path) -> None:
    """Every family loads and generates from its folder alone, the same text as with the package."""
    folders = {name: str(convert(tmp_path / name, name)) for name in ("mixture", "duo", "ar", "bd3lm")}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, *folders.values()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
    texts = json.loads(run.stdout.split("RESULT")[1])
    for folder in folders.values():
        model = BlockGenForDiffusionLM.from_pretrained(folder).eval()
        assert texts[folder] == generate(model, torch.tensor([[1, 2, 3]]), seed=5, max_new_tokens=8).tolist()
