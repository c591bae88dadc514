"""`quantize_for_cpu`: near the whole model, the same text in every batch, refusals; on the command line too."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MASK, generate, left_padded, spaced_tokenizer, tiny_model, words
from torch import nn
from transformers import StaticCache

from blockgen_hf import quantization
from blockgen_hf.cli import main
from blockgen_hf.evaluation.likelihood import sequence_nll
from blockgen_hf.evaluation.throughput import weight_bytes
from blockgen_hf.quantization import FORMATS, Int8Linear, PackedLinear, quantize_for_cpu


pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the kernels are those of x86 CPUs"
)

# Relative difference in logits.
TOLERANCES = {"int8": 0.06, "float16": 2e-3, "float32": 2e-6}
VARIANTS = ("masked", "uniform_time_conditional", "block_causal", "without_adaln")
DECODINGS: list[dict[str, Any]] = [
    {"decoding": "ar"},
    {"decoding": "block_diffusion", "block_size": 4},
    {"decoding": "block_diffusion", "block_size": 4, "sampler": "first_hitting"},
    {"decoding": "arpc", "block_size": 4, "corrector_period": 2},
]


def packed(weights: str = "int8", variant: str = "masked", **overrides: Any) -> Any:
    return quantize_for_cpu(tiny_model(variant, **overrides), weights)


def logits(model: Any, text: torch.Tensor) -> torch.Tensor:
    noisy = torch.where(torch.arange(8) % 2 == 0, 5, text)
    with torch.no_grad():
        return model(text, noisy, block_size=4, noise_level=0.5).logits


# near the whole model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", FORMATS)
def test_logits_are_near(weights: str, variant: str) -> None:
    expected, got = (logits(model, words(2, 8)) for model in (tiny_model(variant), packed(weights, variant)))
    difference = (got - expected).norm() / expected.norm()
    assert difference < TOLERANCES[weights]
    assert difference > 0 or weights == "float32"


@pytest.mark.parametrize("weights", FORMATS)
def test_queries_keys_and_values_are_told_apart(weights: str) -> None:
    """Fewer heads of keys than of queries, biases, a norm for either, and a gated MLP."""
    llama = dict(
        adaptive_layer_norm=False, num_key_value_heads=1, head_dim=4, attention_bias=True, qk_norm=True,
        norm_type="rms_norm", gated_mlp=True,
    )  # fmt: skip
    expected, got = (logits(model, words(2, 8)) for model in (tiny_model(**llama), packed(weights, **llama)))
    assert (got - expected).norm() / expected.norm() < TOLERANCES[weights]


@pytest.mark.parametrize("weights", FORMATS)
def test_likelihood_is_near(weights: str) -> None:
    batch = {"input_ids": words(2, 8)}
    expected, got = (sequence_nll(model, batch, monte_carlo_samples=2) for model in (tiny_model(), packed(weights)))
    torch.testing.assert_close(got, expected, rtol=TOLERANCES[weights], atol=0)


@pytest.mark.parametrize("levels", [63, 127])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_arithmetic(has_bias: bool, levels: int) -> None:
    """Integers times integers, each scaled by the largest of its token or output: worked out in float64."""
    linear = nn.Linear(48, 20, bias=has_bias)
    layer = Int8Linear(linear).eval()
    layer.largest_level = levels = min(levels, layer.largest_level)  # 63 is all that some CPUs can
    states = torch.randn(2, 3, 48) * torch.tensor([1e-3, 1.0, 50.0])[:, None]
    states[1, 2] = 0
    step = states.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
    scale = linear.weight.abs().amax(-1, keepdim=True) / 127
    integers = (states / step).round().double() @ (linear.weight / scale).round().double().T
    expected = integers * step * scale.squeeze(-1) + (0 if linear.bias is None else linear.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(states), expected.float(), rtol=1e-5, atol=1e-6)
        assert layer(states[:0]).shape == (0, 3, 20)


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    """To the last bit, though another token is a thousand times as large."""
    layer = Int8Linear(nn.Linear(48, 20)).eval()
    states = torch.randn(5, 48) * torch.tensor([1.0, 1e3, 1e-3, 1.0, 1.0])[:, None]
    with torch.no_grad():
        assert torch.equal(layer(states), torch.cat([layer(token[None]) for token in states]))


def test_hidden_states_have_fewer_bits_where_the_cpu_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    for saturates, levels in ((True, 63), (False, 127)):
        monkeypatch.setattr(quantization, "_saturates", lambda answer=saturates: answer)
        assert Int8Linear(nn.Linear(8, 8)).largest_level == levels


def test_a_saturating_product_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of products that stop at 2^15 - 1."""
    quantization._saturates.cache_clear()
    monkeypatch.setattr(quantization, "_multiply_int8", lambda *args: torch.full((1, 16), 32.0 * (2**15 - 1)))
    try:
        assert quantization._saturates()
    finally:
        quantization._saturates.cache_clear()


# in generate


@pytest.mark.parametrize(("weights", "variant"), [*((weights, "masked") for weights in FORMATS), ("int8", "uniform")])
def test_every_decoding_and_cache(weights: str, variant: str) -> None:
    """Batches, a block at a time, and static caches, whose masks are others."""
    model = packed(weights, variant)
    for settings in DECODINGS:
        if "sampler" in settings and variant == "uniform":
            continue
        text = generate(model, words(2, 8), max_new_tokens=6, **settings)
        assert text.shape == (2, 14)
        assert variant == "uniform" or not (text == MASK).any()
        cache = StaticCache(config=model.config, max_cache_len=32)
        assert torch.equal(generate(model, words(2, 8), max_new_tokens=6, cache=cache, **settings), text)


@pytest.mark.parametrize("settings", DECODINGS, ids=str)
@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_weights_that_are_nearly_the_same_write_the_same_text(weights: str, settings: dict[str, Any]) -> None:
    """Their error is too small for another draw here; prompts of different lengths, and an end of text."""
    texts, prompts = [], left_padded([words(7), words(4)])
    for model in (tiny_model(), packed(weights)):
        texts.append(generate(model, None, **prompts, max_new_tokens=6, eos_token_id=3, **settings))
    assert torch.equal(*texts)


def test_a_tied_embedding_stays() -> None:
    model = packed(tie_word_embeddings=True)
    assert torch.equal(model.model.embed_tokens.weight, tiny_model(tie_word_embeddings=True).model.embed_tokens.weight)
    assert generate(model, words(2, 8), max_new_tokens=4, decoding="ar").shape == (2, 12)


@pytest.mark.parametrize(("weights", "part"), [("int8", 0.25), ("float16", 0.5), ("float32", 1.0)])
def test_bytes_are_counted(weights: str, part: float) -> None:
    """Matrices shrink; scales, biases and the modulations are whole."""
    size = dict(hidden_size=64, intermediate_size=256, vocab_size=1000, mask_token_id=999)
    whole, model = tiny_model(**size), packed(weights, **size)
    matrices = [name for name, _ in whole.named_modules() if name.endswith(("_proj", "lm_head"))]
    assert len(matrices) == 2 * 6 + 1
    # Queries, keys and values are one product.
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 4 + 1
    saved = sum((1 - part) * whole.get_submodule(name).weight.nbytes for name in matrices)
    scales = 4 * (2 * (5 * 64 + 256) + 1000) if weights == "int8" else 0
    assert weight_bytes(model) == weight_bytes(whole) - saved + scales


# refusals


def bad_models() -> dict[str, tuple[Any, str]]:
    """What cannot be packed, and a part of what is said."""
    wrapped = tiny_model()
    wrapped.model.layers[1].mlp.up_proj = nn.Sequential(wrapped.model.layers[1].mlp.up_proj)
    return {
        "training": (tiny_model().train(), "is in training mode"),
        "type": (tiny_model().bfloat16(), "but lm_head is torch.bfloat16 on cpu"),
        "device": (tiny_model().to("meta"), "is torch.float32 on meta"),
        "twice": (packed(), "lm_head is a Int8Linear"),
        "wrapped": (wrapped, "model.layers.1.mlp.up_proj is a Sequential"),
        "other": (nn.Linear(2, 2), "must be a BlockGen model, but is a Linear"),
    }


@pytest.mark.parametrize("name", ["training", "type", "device", "twice", "wrapped", "other"])
def test_what_cannot_be_packed_is_refused(name: str) -> None:
    model, message = bad_models()[name]
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        quantize_for_cpu(model)
    assert [type(module) for module in model.modules()] == before


def test_formats_and_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be one of 'int8', 'float16', 'float32', but is 'int4'"):
        quantize_for_cpu(tiny_model(), "int4")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="needs an x86 CPU .* but this is aarch64"):
        quantize_for_cpu(tiny_model())


@pytest.mark.parametrize("weights", FORMATS)
def test_for_inference_on_the_cpu_in_float32_only(weights: str, tmp_path: Path) -> None:
    model = packed(weights)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="pass no gradient on"):
        model(words(2, 8))
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="torch.bfloat16 on cpu"), torch.no_grad():
        packed(weights).bfloat16()(words(2, 8))


# the command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    spaced_tokenizer().save_pretrained(folder)
    return str(folder)


def test_generate_command(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "a b", "--model", checkpoint, "--max-new-tokens", "6", "--seed", "1", "--json"]
    texts = []
    for more in ([], ["--cpu-weights", "float16"]):
        assert main([*options, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["results"][0]["samples"][0]["text"])
    assert texts[0] == texts[1]
    assert main([*options, "--cpu-weights", "int8", "--dtype", "bfloat16"]) == 1
    assert "--cpu-weights: `model` must be float32 on the CPU" in capsys.readouterr().err


def test_matrices_of_some_size_are_packed_unasked(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of a small model, nor for AR, where a pass has a single new token; `none` turns it off."""
    options = ["generate", "a b", "--model", checkpoint, "--max-new-tokens", "6", "--seed", "1", "--json"]
    arpc = ["--decoding", "arpc", "--block-size", "4"]

    def weights_of(*more: str) -> str:
        assert main([*options, *more]) == 0
        return str(json.loads(capsys.readouterr().out)["dtype"])

    assert weights_of(*arpc) == "float32"
    monkeypatch.setattr(quantization, "_LARGE", 0)
    assert weights_of(*arpc) == weights_of("--decoding", "ar", "--num-samples", "2") == "float32, packed"
    assert weights_of("--decoding", "ar") == weights_of(*arpc, "--cpu-weights", "none") == "float32"
    assert weights_of(*arpc, "--dtype", "bfloat16") == "bfloat16"
    assert main([*options[:-1], *arpc]) == 0
    assert ", float32, packed weights, seed 1)" in capsys.readouterr().err


def test_the_other_commands_that_generate_pack_too(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they write is not mixed with that of other weights."""
    monkeypatch.setattr(quantization, "_LARGE", 0)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "a b", "answer": "#### 1"}) + "\n")
    answers = ["evaluate-answers", checkpoint, "--dataset", str(questions), "--decodings", "block_diffusion:2"]
    answers += ["--max-new-tokens", "4", "--output-dir", str(tmp_path / "answers")]
    samples = ["evaluate-samples", checkpoint, "--decodings", "block_diffusion", "--nfe", "2", "--num-samples", "1"]
    samples += [
        "--block-sizes",
        "2",
        "--max-new-tokens",
        "4",
        "--judge",
        "none",
        "--output-dir",
        str(tmp_path / "samples"),
    ]
    for command in (answers, samples):
        assert main(command) == 0
        assert "float32, packed" in capsys.readouterr().out
        assert main([*command, "--cpu-weights", "none"]) == 1
        assert "other settings" in capsys.readouterr().err


def test_bench_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "tiny", "--diffusion-types", "masked", "--batch-sizes", "1", "--prefixes", "0"]
    options += ["--decodings", "block_diffusion:2", "--new-tokens", "4", "--block-size", "4", "--repeats", "1"]
    assert main(["bench", *options, "--cpu-weights", "int8,float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("blockgen", "blockgen-int8", "blockgen-float16", "gpt2")
    found = [word for line in lines for word in line.split()[1:2] if word in names]
    assert list(dict.fromkeys(found)) == list(names)  # a table too wide for the terminal names them in every part
