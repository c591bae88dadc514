"""`BlockGenConfig`: defaults, refusals that name the field, and what a saved configuration brings back."""

from pathlib import Path
from typing import Any

import pytest
from tiny import VARIANTS, tiny_config
from transformers import AutoConfig

from blockgen_hf import BlockGenConfig, MaskedDiffusion, UniformDiffusion, diffusion_from_config


def test_defaults_are_those_of_the_contract() -> None:
    """The 170M-parameter backbone of the paper (Suppl. A.2)."""
    config = BlockGenConfig()
    expected = dict(
        model_type="blockgen",
        vocab_size=50258,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        layer_norm_eps=1e-5,
        hidden_dropout=0.1,
        diffusion_type="masked",
        mask_token_id=50257,
        block_sizes=[1, 2, 4, 8, 16],
        block_size_weights=None,
        clean_attention="causal",
        noise_schedule="linear",
        noise_schedule_eps=1e-3,
        training_objective="cross_entropy",
        adaptive_layer_norm=True,
        cond_dim=128,
        time_conditioning=False,
        tie_word_embeddings=False,
    )
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_two_configurations_do_not_share_their_lists() -> None:
    """A default list is made anew for every configuration."""
    first, second = BlockGenConfig(), BlockGenConfig()
    first.block_sizes.append(32)
    assert second.block_sizes == [1, 2, 4, 8, 16]
    assert BlockGenConfig().block_sizes == [1, 2, 4, 8, 16]


def test_objective_follows_the_noise_unless_given() -> None:
    """Section 5.1: masked models train with cross entropy, uniform ones with the ELBO."""
    assert BlockGenConfig(diffusion_type="uniform").training_objective == "elbo"
    assert BlockGenConfig(diffusion_type="masked").training_objective == "cross_entropy"
    given = BlockGenConfig(diffusion_type="uniform", training_objective="cross_entropy")
    assert given.training_objective == "cross_entropy"


def test_mask_token_is_the_last_id_of_a_masked_model_only() -> None:
    """The last id of the vocabulary when none is given; uniform noise needs none."""
    assert BlockGenConfig(vocab_size=100).mask_token_id == 99
    assert BlockGenConfig(vocab_size=100, mask_token_id=3).mask_token_id == 3
    assert BlockGenConfig(vocab_size=100, mask_token_id=0).mask_token_id == 0
    assert BlockGenConfig(vocab_size=100, diffusion_type="uniform").mask_token_id is None


BAD_VALUES: list[tuple[str, Any]] = [
    ("diffusion_type", "absorb"),
    ("diffusion_type", None),
    ("mask_token_id", 50258),
    ("mask_token_id", -1),
    ("mask_token_id", 1.5),
    ("mask_token_id", "mask"),
    ("block_sizes", []),
    ("block_sizes", [0, 1]),
    ("block_sizes", [1, -4]),
    ("block_sizes", [1, 2.5]),
    ("block_sizes", [1, 2, 2]),
    ("block_sizes", [True, 2]),
    ("block_sizes", 16),
    ("block_sizes", "16"),
    ("block_size_weights", [1.0]),
    ("block_size_weights", [0.5, 0.5, 0.5, 0.5, 0.5]),
    ("block_size_weights", [1.5, -0.5, 0.0, 0.0, 0.0]),
    ("block_size_weights", [float("nan")] * 5),
    ("block_size_weights", ["a"] * 5),
    ("block_size_weights", 0.2),
    ("clean_attention", "bidirectional"),
    ("noise_schedule", "loglinear"),
    ("noise_schedule_eps", -1e-3),
    ("noise_schedule_eps", 1.0),
    ("noise_schedule_eps", "small"),
    ("training_objective", "mse"),
    ("adaptive_layer_norm", "yes"),
    ("adaptive_layer_norm", None),
    ("cond_dim", 0),
    ("cond_dim", 12.5),
    ("time_conditioning", 1.5),
    ("vocab_size", 0),
    ("vocab_size", "50258"),
    ("hidden_size", -768),
    ("hidden_size", "768"),
    ("intermediate_size", 0),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", True),
    ("num_attention_heads", 0),
    ("num_attention_heads", 7),
    ("num_attention_heads", 768),  # heads of width 1 cannot rotate
    ("max_position_embeddings", 0),
    ("layer_norm_eps", 0.0),
    ("layer_norm_eps", "tiny"),
    ("hidden_dropout", 1.0),
    ("hidden_dropout", -0.1),
    ("hidden_act", "no_such_activation"),
    ("use_cache", "always"),
    ("tie_word_embeddings", "yes"),
    ("rope_parameters", {"rope_type": "no_such_rope", "rope_theta": 10000.0}),
]


@pytest.mark.parametrize("field, value", BAD_VALUES, ids=[f"{field}={value!r}" for field, value in BAD_VALUES])
def test_bad_value_is_refused_by_its_name(field: str, value: Any) -> None:
    """A field's bad value raises `ValueError` that names the field."""
    with pytest.raises(ValueError, match=rf"`{field}`"):
        BlockGenConfig(**{field: value})


def test_refusal_says_what_was_given_and_what_is_accepted() -> None:
    """STYLE, rule 9."""
    with pytest.raises(ValueError, match=r"masked.*uniform.*absorb"):
        BlockGenConfig(diffusion_type="absorb")


def test_time_conditioning_needs_the_layers_that_it_enters_by() -> None:
    """The noise level reaches the model through adaLN only."""
    with pytest.raises(ValueError, match="`time_conditioning=True` needs `adaptive_layer_norm=True`"):
        BlockGenConfig(time_conditioning=True, adaptive_layer_norm=False)


@pytest.mark.parametrize("block_sizes", [[1, 2, 4, 8, 16], [1, 4], [4, 16]])
def test_several_block_sizes_are_refused_with_block_causal_attention(block_sizes: list[int]) -> None:
    """Sec. 3.2: with block-causal clean tokens the sizes cannot share a cache; the error says what to use instead."""
    with pytest.raises(ValueError, match="(?s)`clean_attention='block_causal'`.*`clean_attention='causal'`"):
        BlockGenConfig(clean_attention="block_causal", block_sizes=block_sizes)
    assert BlockGenConfig(clean_attention="block_causal", block_sizes=[16]).block_sizes == [16]


def test_block_sizes_are_any_positive_sizes() -> None:
    """Not only powers of two, and in any order."""
    config = BlockGenConfig(block_sizes=(7, 1, 12), block_size_weights=(0.5, 0.25, 0.25))
    assert config.block_sizes == [7, 1, 12]
    assert config.block_size_weights == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_auto_config(variant: str, tmp_path: Path) -> None:
    """Every field survives a save, and `AutoConfig` knows the class on import of the package."""
    config = tiny_config(
        variant, noise_schedule="cosine", noise_schedule_eps=1e-4, mask_token_id=5, tie_word_embeddings=True
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is BlockGenConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_a_bad_saved_field_is_refused_on_load_too(tmp_path: Path) -> None:
    """A checkpoint whose file was edited by hand gives the same message."""
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"linear"', '"log"'))
    with pytest.raises(ValueError, match="`noise_schedule`"):
        AutoConfig.from_pretrained(tmp_path)


def test_overrides_of_a_loaded_configuration_are_checked(tmp_path: Path) -> None:
    """`from_pretrained(..., field=bad)` is no way around the check."""
    tiny_config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, noise_schedule="cosine").noise_schedule == "cosine"
    with pytest.raises(ValueError, match="`noise_schedule`"):
        AutoConfig.from_pretrained(tmp_path, noise_schedule="log")


def test_configuration_builds_the_diffusion_it_names() -> None:
    """`diffusion_from_config`: process, vocabulary, mask token and schedule."""
    masked = diffusion_from_config(tiny_config(noise_schedule="cosine", noise_schedule_eps=0.01, mask_token_id=7))
    assert isinstance(masked, MaskedDiffusion)
    assert (masked.vocab_size, masked.mask_token_id) == (23, 7)
    assert (masked.schedule.name, masked.schedule.eps) == ("cosine", 0.01)
    uniform = diffusion_from_config(tiny_config("uniform"))
    assert isinstance(uniform, UniformDiffusion)
    assert uniform.vocab_size == 23
