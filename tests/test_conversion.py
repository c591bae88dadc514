"""Converted checkpoints compute what the published ones do: against an independent evaluation in plain torch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from published_reference import LENGTH, ROWS, WIDTH, Reference, block_mask, settings, weights, write
from safetensors.torch import load_file
from tiny import generate
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood
from blockgen_hf.hub.conversion import convert_checkpoint


MASK = ROWS - 1
TOLERANCE = dict(rtol=0.0, atol=1e-4)
# Family and config.json of the source, what its user says.
BLOCK_DIT: dict[str, Any] = dict(diffusion_type="masked", block_sizes=[1, 2, 4, 8])
SINGLE: dict[str, Any] = dict(diffusion_type="masked", block_sizes=[4])
SOURCES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixture": ("block-dit", {}, BLOCK_DIT),
    "uniform_mixture": ("block-dit", {}, {**BLOCK_DIT, "diffusion_type": "uniform"}),
    "single": ("block-dit", {"x0_causal": False}, SINGLE),
    "uniform_single": ("block-dit", {"x0_causal": False}, {**SINGLE, "diffusion_type": "uniform"}),
    "mdlm": ("dense-dit", {}, {"diffusion_type": "masked"}),
    "duo": ("dense-dit", {}, {"diffusion_type": "uniform"}),
    "ar": ("ar", {}, {}),
    "bd3lm": ("bd3lm", {}, {}),
}
every_source = pytest.mark.parametrize("name", SOURCES)
ONE_OF_EACH_FAMILY = ("mixture", "duo", "ar", "bd3lm")


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(ROWS - 1, shape, generator=torch.Generator().manual_seed(seed))


def noised(clean: Tensor, model: BlockGenForDiffusionLM) -> Tensor:
    return model.diffusion.corrupt(clean, 0.5, torch.Generator().manual_seed(7))


def convert(tmp_path: Path, name: str, tensors: dict[str, Tensor] | None = None, **options: Any) -> Path:
    """Writes a source and converts it into `tmp_path / "converted"`."""
    family, changes, told = SOURCES[name]
    source = write(tmp_path / "source", settings(family, **changes), tensors or weights(family))
    report = convert_checkpoint(source, tmp_path / "converted", **{**told, **options})
    assert report.family == family
    return report.output


def converted(tmp_path: Path, name: str) -> tuple[BlockGenForDiffusionLM, Reference]:
    model = BlockGenForDiffusionLM.from_pretrained(convert(tmp_path, name)).eval()
    return model, Reference(weights(SOURCES[name][0]))


def clean_block_size(name: str) -> int:
    """Up to which position a clean token sees: its own, or the end of its block of 4."""
    family, changes, _ = SOURCES[name]
    return 4 if family == "bd3lm" or changes.get("x0_causal") is False else 1


@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        *(("mixture", size) for size in (1, 2, 3, 8)),
        ("uniform_mixture", 1),
        ("uniform_mixture", 4),
        ("single", 4),
        ("uniform_single", 8),
        ("bd3lm", 4),
    ],
)
@torch.no_grad()
def test_training_use(tmp_path: Path, name: str, block_size: int) -> None:
    """[x0; z_t], both halves at the same positions."""
    model, reference = converted(tmp_path, name)
    clean = ids(2, 19)
    noisy = noised(clean, model)
    places = range(19)
    expected = reference.logits(
        torch.cat([clean, noisy], dim=1),
        torch.tensor([*places, *places]),
        block_mask(places, places, block_size, clean_block_size(name)),
    )[:, 19:]
    found = model(clean, noisy, block_size=block_size).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["mixture", "uniform_mixture", "single", "bd3lm"])
@torch.no_grad()
def test_generation_use(tmp_path: Path, name: str) -> None:
    """A cached prefix, committed in two calls, and the noisy block behind it."""
    model, reference = converted(tmp_path, name)
    prefix, block = ids(2, 12), noised(ids(2, 4, seed=1), model)
    cache = DynamicCache(config=model.config)
    for part in (prefix[:, :8], prefix[:, 8:]):
        model(part, part[:, :0], cache=cache, use_cache=True, block_size=4)
    found = model(noisy_input_ids=block, cache=cache, block_size=4).logits
    clean, noisy = range(12), range(12, 16)
    expected = reference.logits(
        torch.cat([prefix, block], dim=1),
        torch.tensor([*clean, *noisy]),
        block_mask(clean, noisy, 4, clean_block_size(name)),
    )[:, 12:]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["mixture", "uniform_mixture"])
@torch.no_grad()
def test_verification_use(tmp_path: Path, name: str) -> None:
    """Behind a cached prefix proposed tokens, and a fully noised query at the position of each: block size 1."""
    model, reference = converted(tmp_path, name)
    prefix, proposal = ids(2, 9), ids(2, 5, seed=1)
    queries = model.diffusion.prior((2, 5), "cpu", torch.Generator().manual_seed(3))
    cache = DynamicCache(config=model.config)
    model(prefix, prefix[:, :0], cache=cache, use_cache=True)
    found = model(proposal, queries, cache=cache, block_size=1).logits
    clean, noisy = range(14), range(9, 14)
    expected = reference.logits(
        torch.cat([prefix, proposal, queries], dim=1),
        torch.tensor([*clean, *noisy]),
        block_mask(clean, noisy, 1, 1),
    )[:, 14:]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_next_token_use(tmp_path: Path) -> None:
    """The dense causal transformer: the hidden state of a token predicts the next one."""
    model, reference = converted(tmp_path, "ar")
    text = ids(2, 15)
    causal = torch.ones(15, 15, dtype=torch.bool).tril()
    expected = reference.logits(text, torch.arange(15), causal)
    torch.testing.assert_close(model(text).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["mdlm", "duo"])
@pytest.mark.parametrize("length", [LENGTH, 10])
@torch.no_grad()
def test_full_sequence_use(tmp_path: Path, name: str, length: int) -> None:
    """Every token sees every token; Duo is told its noise level, sigma = -log alpha, a sequence, MDLM zero."""
    model, reference = converted(tmp_path, name)
    noisy = noised(ids(2, length), model)
    t = torch.tensor([0.3, 0.8])
    sigma = -(1e-3 + (1 - 1e-3) * (1 - t)).log() if name == "duo" else torch.zeros(2)
    everything = torch.ones(length, length, dtype=torch.bool)
    expected = reference.logits(noisy, torch.arange(length), everything, sigma[:, None].expand(2, length))
    found = model(noisy_input_ids=noisy, noise_level=t).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


@every_source
def test_the_configuration_is_that_of_the_source(tmp_path: Path, name: str) -> None:
    config = BlockGenForDiffusionLM.from_pretrained(convert(tmp_path, name)).config
    family, _, told = SOURCES[name]
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (ROWS, WIDTH, LENGTH)
    assert config.hidden_dropout == 0.1 and config.adaptive_layer_norm == (family != "ar")
    assert config.next_token_prediction == (family == "ar")
    assert config.time_conditioning == (name == "duo")
    sizes = {"dense-dit": [LENGTH], "ar": [1], "bd3lm": [4]}
    assert config.block_sizes == sizes.get(family, told.get("block_sizes"))
    assert config.clean_attention == ("causal" if name in ("mixture", "uniform_mixture", "ar") else "block_causal")
    if family != "ar":
        assert config.diffusion_type == told.get("diffusion_type", "masked")
        assert config.mask_token_id == (MASK if config.diffusion_type == "masked" else None)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("mixture", "uniform_single", "mdlm", "duo", "ar", "bd3lm")),
        *((name, torch.float16) for name in ("uniform_mixture", "single", "ar")),
    ],
    ids=str,
)
def test_a_source_in_half_precision_stays_so(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """bfloat16 and float16 weights bit by bit, and the model generates in them."""
    tensors = {key: value.to(dtype) for key, value in weights(SOURCES[name][0]).items()}
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path, name, tensors), dtype="auto").eval()
    assert model.dtype == dtype
    prefix = "backbone." if name == "bd3lm" else ""
    assert torch.equal(model.model.embed_tokens.weight, tensors[prefix + "vocab_embed.embedding"])
    assert generate(model, ids(2, 4), max_new_tokens=6, do_sample=True).shape == (2, 10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    path = convert(tmp_path, "mixture", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert BlockGenForDiffusionLM.from_pretrained(path).dtype == getattr(torch, dtype)


def test_a_sharded_source_and_a_sharded_result_hold_the_same_tensors(tmp_path: Path) -> None:
    whole = BlockGenForDiffusionLM.from_pretrained(convert(tmp_path, "mixture"))
    source = write(tmp_path / "shards", settings("block-dit"), weights("block-dit"), shards=3)
    report = convert_checkpoint(source, tmp_path / "sharded", max_shard_size="20KB", **BLOCK_DIT)
    assert (report.output / "model.safetensors.index.json").is_file()
    assert not (report.output / "model.safetensors").exists()
    state = BlockGenForDiffusionLM.from_pretrained(report.output).state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_attention_implementation_is_chosen_when_it_is_loaded(tmp_path: Path, implementation: str) -> None:
    """Whatever kernel the source was trained with (here `flex`), which is no property of the weights."""
    path = convert(tmp_path, "single")
    model = BlockGenForDiffusionLM.from_pretrained(path, attn_implementation=implementation).eval()
    assert model.config._attn_implementation == implementation
    clean = ids(1, 8)
    expected = Reference(weights("block-dit")).logits(
        torch.cat([clean, clean], dim=1),
        torch.tensor([*range(8), *range(8)]),
        block_mask(range(8), range(8), 4, 4),
    )[:, 8:]
    torch.testing.assert_close(model(clean, clean, block_size=4).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_weights_without_frequencies_are_the_same_model(tmp_path: Path, name: str) -> None:
    """`rotary_emb.inv_freq` may be absent."""
    with_them = load_file(convert(tmp_path / "with", name) / "model.safetensors")
    family = SOURCES[name][0]
    without = load_file(convert(tmp_path / "without", name, weights(family, inv_freq=False)) / "model.safetensors")
    assert with_them.keys() == without.keys()
    assert all(torch.equal(value, without[key]) for key, value in with_them.items())


def test_frequencies_of_another_base_become_that_base(tmp_path: Path) -> None:
    tensors = weights("block-dit", width=32)
    tensors["rotary_emb.inv_freq"] = 1 / 500000 ** (torch.arange(0, 16, 2).float() / 16)
    source = write(tmp_path / "source", settings("block-dit", hidden_size=32), tensors)
    report = convert_checkpoint(source, tmp_path / "converted", **BLOCK_DIT)
    assert report.config.rope_parameters["rope_theta"] == 500000
    model = BlockGenForDiffusionLM.from_pretrained(report.output)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, tensors["rotary_emb.inv_freq"])


@every_source
def test_every_family_is_evaluated_with_the_same_call(tmp_path: Path, name: str) -> None:
    """Perplexities of the block sizes that the source was trained on; that of AR is the reference's."""
    model, reference = converted(tmp_path, name)
    rows = ids(3, LENGTH)
    result = evaluate_likelihood(model, rows, monte_carlo_samples=2)
    assert list(result.block_sizes) == model.config.block_sizes
    assert all(math.isfinite(figure.perplexity) for figure in result.block_sizes.values())
    if name == "ar":
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        scores = reference.logits(rows, torch.arange(LENGTH), causal)[:, :-1].log_softmax(-1)
        expected = -scores.gather(-1, rows[:, 1:, None]).mean()
        assert result.block_sizes[1].nll == pytest.approx(expected.item(), abs=1e-4)


def test_without_adaptive_layer_norms(tmp_path: Path) -> None:
    """A block DiT has the tensors of an autoregressive model then; its config.json tells what it is."""
    source = write(tmp_path / "source", settings("block-dit"), weights("block-dit", adaptive=False))
    report = convert_checkpoint(source, tmp_path / "converted", **BLOCK_DIT)
    assert report.family == "block-dit" and not report.config.adaptive_layer_norm
    assert not report.config.next_token_prediction


@pytest.mark.parametrize(
    ("name", "decoding"),
    [("mixture", "arpc"), ("single", "block_diffusion"), ("mdlm", "block_diffusion"), ("ar", "ar")],
)
def test_generation_settings_fit_the_family(tmp_path: Path, name: str, decoding: str) -> None:
    model = BlockGenForDiffusionLM.from_pretrained(convert(tmp_path, name)).eval()
    assert model.generation_config.decoding == decoding
    assert model.generation_config.do_sample and model.generation_config.top_k == 0
    assert generate(model, ids(2, 5), max_new_tokens=9).shape == (2, 14)
