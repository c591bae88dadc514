"""The model as a citizen of transformers: initialisation, saving, tying, Auto classes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import CAUSAL, MASK, VARIANTS, VOCAB_SIZE, assert_near, generate, tiny_config, tiny_model, words
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM, BlockGenModel


# ---- initialisation
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_model_has_zero_logits(variant: str) -> None:
    """The paper's backbone: adaLN and the output layer start at zero, so x_hat is uniform, layers are identities."""
    model = BlockGenForDiffusionLM(tiny_config(variant)).eval()
    text = words(2, 8)
    outputs = model(text, text, block_size=4, noise_level=0.5, output_hidden_states=True)
    assert (outputs.logits == 0).all()
    if variant != "without_adaln":
        embedded = model.model.embed_tokens(torch.cat([text, text], dim=1))
        assert all(torch.equal(states, embedded) for states in outputs.hidden_states)
    for name, parameter in model.named_parameters():
        is_zero = bool((parameter == 0).all())
        assert is_zero == ("modulation" in name or name.startswith("lm_head")), name


def test_the_rest_starts_as_torch_has_it() -> None:
    """Linear layers uniform in +-1/sqrt(fan in), layer norms at one; the loss of a new model is log(V)."""
    model = BlockGenForDiffusionLM(tiny_config(hidden_size=64, intermediate_size=128, vocab_size=100))
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        assert weight.abs().max() <= 128**-0.5
        assert weight.std().item() == pytest.approx(128**-0.5 / 3**0.5, rel=0.05)
        assert (layer.input_layernorm.weight == 1).all()
    text = words(4, 8)
    loss = model(text, labels=text, block_size=1).loss
    assert loss.item() == pytest.approx(torch.tensor(99.0).log().item(), rel=1e-5)  # all but the mask token


def test_initialisation_is_reproducible() -> None:
    """One seed, one model."""
    torch.manual_seed(1)
    first = BlockGenForDiffusionLM(tiny_config()).state_dict()
    torch.manual_seed(1)
    second = BlockGenForDiffusionLM(tiny_config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tied_output_layer_is_the_embedding() -> None:
    """`tie_word_embeddings`: one matrix, not zeroed by the output layer's initialisation."""
    model = BlockGenForDiffusionLM(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.abs().sum() > 0
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_the_vocabulary_can_be_resized(variant: str, tied: bool) -> None:
    """`resize_token_embeddings`, after a tokenizer got new tokens: the diffusion works on the new vocabulary too."""
    model = tiny_model(variant, tie_word_embeddings=tied)
    text = words(1, 8)
    before = model(text, text, block_size=2).logits
    model.resize_token_embeddings(30, mean_resizing=False)
    assert model.config.vocab_size == 30 and model.diffusion.vocab_size == 30
    after = model(text, text, block_size=2).logits
    assert after.shape[-1] == 30
    torch.testing.assert_close(after[..., :23], before, atol=1e-5, rtol=1e-5)
    assert model(text, labels=text, block_size=2).loss.isfinite()
    for decoding in ("ar", "block_diffusion", "arpc"):
        assert generate(model, text, max_new_tokens=4, decoding=decoding).shape == (1, 12)


# ---- saving and loading
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_give_the_same_model(variant: str, tmp_path: Path) -> None:
    """Weights are safetensors; the Auto classes know the model on import of the package."""
    model, text = tiny_model(variant), words(2, 8)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not [*tmp_path.glob("*.bin")]
    expected = model(text, text, block_size=4, noise_level=0.5).logits
    for auto_class in (AutoModel, AutoModelForCausalLM, BlockGenForDiffusionLM):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is BlockGenForDiffusionLM
        assert not loaded.training
        assert_near(loaded(text, text, block_size=4, noise_level=0.5).logits, expected)
        assert loaded.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    """safetensors refuses shared tensors: one of the two names is written."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & names) == 1
    loaded, info = BlockGenForDiffusionLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_near(loaded(words(1, 4)).logits, model(words(1, 4)).logits)


def test_loading_finds_every_key(tmp_path: Path) -> None:
    """No missing, unexpected or mismatched key, and the rotary frequencies are computed, not stored."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded, info = BlockGenForDiffusionLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name for name, _ in model.named_parameters()} == set(file.keys())


def test_auto_classes_build_from_a_configuration() -> None:
    """`AutoModel` and `AutoModelForCausalLM` return the language model."""
    config = AutoConfig.for_model("blockgen", vocab_size=VOCAB_SIZE, hidden_size=16, num_attention_heads=2)
    assert isinstance(config, BlockGenConfig)
    assert type(AutoModel.from_config(config)) is BlockGenForDiffusionLM
    assert type(AutoModelForCausalLM.from_config(config)) is BlockGenForDiffusionLM


def test_the_trunk_alone_refuses_what_only_the_whole_model_does() -> None:
    """Trainers that call the base model for their own head would train it wrongly: the error says so."""
    model = tiny_model()
    assert isinstance(model.base_model, BlockGenModel)
    with pytest.raises(ValueError, match="`BlockGenForDiffusionLM`"):
        model.base_model(words(1, 4))


# ---- precision and devices
def test_autocast_runs_forward_and_backward() -> None:
    """Mixed precision as `Trainer(bf16=True)` does it: float32 weights, bf16 matrix products."""
    model, text = tiny_model().train(), words(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(text, labels=text, block_size=4).loss
        cached = model.eval()(text).cache
        model(text[:, :1], cache=cached)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_model_on_the_meta_device_holds_no_memory() -> None:
    """Large models are built there first."""
    with torch.device("meta"):
        model = BlockGenForDiffusionLM(tiny_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.slow
def test_compiled_denoiser_equals_the_eager_one() -> None:
    """`torch.compile` of the whole forward pass, without a graph break."""
    model, text, noisy = tiny_model(), words(2, 8), words(2, 8, seed=1)
    compiled = torch.compile(model, fullgraph=True)
    expected = model(text, noisy, block_size=4).logits
    torch.testing.assert_close(compiled(text, noisy, block_size=4).logits, expected, atol=1e-4, rtol=1e-4)


def test_classes_declare_what_distributed_loaders_ask_for() -> None:
    """No layer is split over devices; the tensor-parallel plan names modules that exist; caches stay in place."""
    model = tiny_model()
    assert model._no_split_modules and set(model._no_split_modules) <= {type(m).__name__ for m in model.modules()}
    assert "past_key_values" in model._skip_keys_device_placement
    names = [name for name, _ in model.model.named_modules()]
    for pattern in model.config.base_model_tp_plan:
        assert pattern.replace("*", "0") in names, pattern
    projections = {name.split(".")[-1] for name, m in model.model.layers.named_modules() if name.endswith("_proj")}
    assert projections == {pattern.split(".")[-1] for pattern in model.config.base_model_tp_plan}


# ---- pipeline and PEFT
@pytest.mark.parametrize("variant", CAUSAL)
def test_the_causal_use_never_proposes_the_mask_token(variant: str) -> None:
    """Outside samplers and log-likelihoods take logits as they are: its probability is zero there."""
    model = tiny_model(variant)
    probabilities = model(words(2, 5)).logits.softmax(-1)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5))
    if model.config.diffusion_type == "masked":
        assert (probabilities[..., MASK] == 0).all()


@pytest.mark.parametrize("size", [MASK, 4])
def test_a_vocabulary_keeps_its_mask_token(size: int) -> None:
    model = tiny_model()
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=f"`new_num_tokens` must be at least {MASK + 1}"):
        model.resize_token_embeddings(size)
    assert model.config.vocab_size == MASK + 1  # nothing has changed
    assert torch.equal(model.lm_head.weight, before)


def test_outputs_come_as_a_tuple_on_request() -> None:
    model, text = tiny_model(), words(1, 8)
    logits, *_ = model(text, use_cache=False, return_dict=False)
    assert torch.equal(logits, model(text, use_cache=False).logits)
    assert isinstance(model(text, labels=text, return_dict=False), tuple)
