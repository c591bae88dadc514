"""Quantised loading on CPUs, int8 and nf4: small, near the whole model, with every decoding, and under LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MASK, assert_near, generate, tiny_model, words
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from blockgen_hf import BlockGenForDiffusionLM


# Wide enough for the groups of 64 weights that some formats need.
WIDE = dict(hidden_size=64, intermediate_size=128, cond_dim=32)
TEXT = words(2, 8)
NOISY = torch.where(torch.arange(8) % 2 == 0, MASK, TEXT)  # every other token
TRAINING: dict[str, Any] = dict(noisy_input_ids=NOISY, labels=TEXT, block_size=4, noise_level=0.5)
DECODINGS: list[dict[str, Any]] = [
    {"decoding": "ar"},
    {"decoding": "block_diffusion", "block_size": 4},
    {"decoding": "arpc", "block_size": 4, "corrector_period": 2},
]


def torchao(kind: str, **settings: Any) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(getattr(quantization, kind)(), **settings)


def quanto() -> QuantoConfig:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return QuantoConfig(weights="int8")


def bitsandbytes(**settings: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**settings)


# How to load, the relative difference in logits that it may make, and the smallest saving of bytes in the layers.
FORMATS: dict[str, tuple[Callable[[], Any], float, float]] = {
    "quanto_int8": (quanto, 0.04, 0.65),
    "torchao_int8": (lambda: torchao("Int8WeightOnlyConfig"), 0.04, 0.65),
    "torchao_int8_dynamic": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 0.06, 0.65),
    "bitsandbytes_int8": (lambda: bitsandbytes(load_in_8bit=True), 0.06, 0.4),
    "bitsandbytes_nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.4, 0.5),
}
# transformers does not save what quanto quantised; the others are checkpoints.
SAVED = [name for name in FORMATS if name != "quanto_int8"]
# torchao quantises activations without a gradient.
TRAINABLE = [name for name in FORMATS if name != "torchao_int8_dynamic"]
VARIANTS = ["masked", "uniform_time_conditional"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a variant."""
    path = tmp_path_factory.mktemp("whole")
    for variant in VARIANTS:
        tiny_model(variant, **WIDE).save_pretrained(path / variant)
    return path


def load(folder: Path, name: str, variant: str = "masked", **settings: Any) -> BlockGenForDiffusionLM:
    return AutoModelForCausalLM.from_pretrained(
        folder / variant, quantization_config=FORMATS[name][0](), dtype=torch.float32, **settings
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT, NOISY, block_size=4, noise_level=0.5).logits


def num_bytes(value: Any) -> int:
    """Memory of a tensor, of the parts of one that is a wrapper around others, or of all in a module."""
    if isinstance(value, torch.nn.Module):
        return sum(map(num_bytes, [*value.parameters(), *value.buffers()]))
    if hasattr(value, "__tensor_flatten__"):
        return sum(num_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_model_is_small_and_near_the_whole_one(folder: Path, name: str, variant: str) -> None:
    """Logits within the format's error; every decoding runs; the output layer and the embedding stay as they are."""
    whole = tiny_model(variant, **WIDE)
    quantised = load(folder, name, variant)
    _, tolerance, saving = FORMATS[name]
    expected, got = logits(whole), logits(quantised)
    assert 0 < (got - expected).norm() / expected.norm() < tolerance
    assert num_bytes(quantised.model.layers) < (1 - saving) * num_bytes(whole.model.layers)
    assert torch.equal(quantised.lm_head.weight, whole.lm_head.weight)
    assert torch.equal(quantised.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    for settings in DECODINGS:
        assert generate(quantised, TEXT, max_new_tokens=6, **settings).shape == (2, 14)


@pytest.mark.parametrize("name", SAVED)
def test_a_quantised_model_is_saved_and_loaded_without_being_asked(folder: Path, tmp_path: Path, name: str) -> None:
    """The configuration says how it was quantised."""
    quantised = load(folder, name)
    quantised.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_near(logits(again), logits(quantised))
    assert num_bytes(again) == num_bytes(quantised)
    settings = {"max_new_tokens": 6, "decoding": "arpc", "block_size": 4}
    assert torch.equal(generate(again, TEXT, **settings), generate(quantised, TEXT, **settings))


def test_quanto_is_not_saved_silently(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load(folder, "quanto_int8").save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", TRAINABLE)
def test_adapters_train_on_a_quantised_base(folder: Path, name: str) -> None:
    """QLoRA: the base stays, the adapters learn, the loss runs without logits, as the output layer is plain."""
    peft = pytest.importorskip("peft")
    base = peft.prepare_model_for_kbit_training(load(folder, name), use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    before = logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(8):
        outputs = model(input_ids=TEXT, **TRAINING)
        assert outputs.logits is None
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    model.eval()
    assert losses[-1] < losses[0] - 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert generate(model, TEXT, max_new_tokens=4, decoding="arpc", block_size=4).shape == (2, 12)


def test_a_quantised_output_layer_falls_back_to_logits(folder: Path) -> None:
    """Its weights are no matrix that the chunked loss could multiply; asked to skip them, it says so."""
    config = torchao("Int8WeightOnlyConfig", include_input_output_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "masked", quantization_config=config, dtype=torch.float32
    ).train()
    assert num_bytes(model.lm_head.weight) < num_bytes(tiny_model(**WIDE).lm_head.weight) / 2
    outputs = model(TEXT, **TRAINING)
    assert outputs.logits is not None
    whole = tiny_model(**WIDE)(TEXT, **TRAINING)
    torch.testing.assert_close(outputs.loss, whole.loss, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="`skip_logits=True`"):
        model(TEXT, **TRAINING, skip_logits=True)
