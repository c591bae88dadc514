"""
What only a GPU shows: attention implementations, dtypes, caches, compilation and memory there agree with one another.

    python -m pytest -m gpu tests/test_gpu.py
    BLOCKGEN_TEST_DEVICE=cpu python -m pytest -m gpu tests/test_gpu.py      # the tests themselves, without a GPU
"""

import os
from typing import Any

import pytest
import torch
from tiny import PAD, generate, left_padded, tiny_model, words
from transformers import DynamicCache, StaticCache
from transformers.utils import is_flash_attn_2_available

from blockgen_hf import BlockGenForDiffusionLM


DEVICE = torch.device(os.environ.get("BLOCKGEN_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device, or BLOCKGEN_TEST_DEVICE=cpu"
    ),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="CPUs have no such kernels")

# Heads of 32 numbers: FlexAttention has no kernel for the narrower ones of other tests.
SIZE: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_attention_heads=2, max_position_embeddings=512, block_sizes=[1, 4, 16]
)
# Tests run in the order in which they stand here: those that compile, which takes long, come last.
PLAIN, COMPILED = ["eager", "sdpa"], pytest.param("flex_attention", marks=needs_gpu)
KINDS = ["plain", "padded", "packed", "block sizes by row"]
DECODINGS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 16, "denoising_steps": 4},
    "arpc": {"decoding": "arpc", "block_size": 16, "denoising_steps": 4},
    "speculative": {"decoding": "speculative", "block_size": 4},
}
CACHES: dict[str, Any] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic, offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "static, offloaded": lambda config: StaticCache(config=config, max_cache_len=64, offloading=True),
}


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """Products of float32 in float32, not in TF32."""
    torch.set_float32_matmul_precision("highest")


def model_on_device(
    attention: str = "sdpa", variant: str = "masked", dtype: torch.dtype = torch.float32, **overrides: Any
) -> BlockGenForDiffusionLM:
    model = tiny_model(variant, **SIZE, **overrides)
    model.set_attn_implementation(attention)
    return model.to(device=DEVICE, dtype=dtype)


def moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def rows_of(kind: str, length: int) -> dict[str, Any]:
    """A batch of two rows to train on."""
    tokens = words(2, length)
    noisy = torch.where(words(2, length, seed=1) < 10, 22, tokens)
    rows: dict[str, Any] = dict(
        input_ids=tokens, labels=tokens, noisy_input_ids=noisy, noise_level=torch.tensor(0.5), block_size=16
    )
    if kind == "padded":
        mask = torch.ones_like(tokens)
        mask[1, length - length // 3 :] = 0
        rows |= dict(attention_mask=mask, labels=torch.where(mask == 1, tokens, -100))
        rows["input_ids"] = torch.where(mask == 1, tokens, PAD)
    elif kind == "packed":
        rows["document_ids"] = (torch.arange(length) >= length // 3).long().expand(2, -1).contiguous()
    elif kind == "block sizes by row":
        rows["block_size"] = [4, 16]
    return rows


def loss_and_gradient(model: BlockGenForDiffusionLM, rows: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    model.train()
    loss = model(**rows).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_training(attention: str, length: int, kind: str) -> None:
    """Loss and gradient against eager attention on the CPU."""
    expected = tiny_model(**SIZE)
    expected.set_attn_implementation("eager")
    rows = rows_of(kind, length)
    found = loss_and_gradient(model_on_device(attention), moved(rows, DEVICE))
    for one, other in zip(found, loss_and_gradient(expected, rows), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


def check_text(attention: str, decoding: str) -> None:
    """Random numbers are keyed, so devices differ by rounding only; prompts of different lengths."""
    prompts = left_padded([words(37), words(20)])
    expected = generate(tiny_model(**SIZE), None, **prompts, max_new_tokens=24, **DECODINGS[decoding])
    found = generate(
        model_on_device(attention), None, **moved(prompts, DEVICE), max_new_tokens=24, **DECODINGS[decoding]
    )
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [100, 128, 333])
@pytest.mark.parametrize("attention", PLAIN)
def test_training_is_the_same_under_every_attention(attention: str, length: int, kind: str) -> None:
    """Against eager attention on the CPU; lengths below, at and above the kernels' tiles of 128."""
    check_training(attention, length, kind)


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("attention", PLAIN)
def test_the_text_is_that_of_the_cpu(attention: str, decoding: str) -> None:
    check_text(attention, decoding)


@pytest.mark.skipif(not (ON_GPU and is_flash_attn_2_available()), reason="flash-attention is not installed")
@pytest.mark.parametrize("decoding", ["ar", "block_diffusion"])
def test_flash_attention_sees_what_sdpa_sees(decoding: str) -> None:
    """Without padding, in bfloat16, where draws may differ: so a step's logits are compared, and a text is made."""
    models = [model_on_device(name, dtype=torch.bfloat16) for name in ("flash_attention_2", "sdpa")]
    logits = []
    for model in models:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            nothing = words(2, 37)[:, :0].to(DEVICE)
            model(words(2, 37).to(DEVICE), nothing, cache=cache, use_cache=True, noise_level=1.0)
            noisy = torch.full((2, 16), 22, device=DEVICE)
            logits.append(model(noisy_input_ids=noisy, cache=cache, block_size=16, noise_level=1.0).logits.float())
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.1)
    text = generate(models[0], words(2, 37).to(DEVICE), max_new_tokens=20, **DECODINGS[decoding])
    assert text.shape == (2, 57)


@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional"])
def test_bfloat16_is_near_float32(variant: str) -> None:
    rows = moved(rows_of("plain", 100), DEVICE)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            losses.append(model_on_device(variant=variant, dtype=dtype)(**rows).loss.float())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
@pytest.mark.parametrize("kind", CACHES)
def test_every_cache_writes_the_same_text(kind: str, decoding: str) -> None:
    if "offloaded" in kind and not ON_GPU:
        pytest.skip("there is nothing to offload from")
    model, prompt = model_on_device(), words(2, 20).to(DEVICE)
    settings = dict(max_new_tokens=24, **DECODINGS[decoding])
    expected = generate(model, prompt, use_cache=False, **settings)
    assert torch.equal(generate(model, prompt, cache=CACHES[kind](model.config), **settings), expected)


@needs_gpu
def test_the_loss_in_chunks_needs_less_memory() -> None:
    """Logits of the whole sequence are what training would need most memory for. There are four chunks."""
    tokens, mask = words(4, 2048).to(DEVICE), 50_257
    rows = dict(input_ids=tokens, labels=tokens, noise_level=torch.tensor(0.5, device=DEVICE), block_size=16)
    peaks = []
    for skip_logits in (True, False):
        model = model_on_device(vocab_size=mask + 1, mask_token_id=mask, max_position_embeddings=2048).train()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(**rows, noisy_input_ids=torch.full_like(tokens, mask), skip_logits=skip_logits).loss
        loss.backward()
        assert loss > 0
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 0.7 * peaks[1]


# What compiles


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("attention", [COMPILED])
def test_the_text_of_a_compiled_attention_is_that_of_the_cpu(attention: str, decoding: str) -> None:
    check_text(attention, decoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [100, 333])
@pytest.mark.parametrize("attention", [COMPILED])
def test_training_is_the_same_under_a_compiled_attention(attention: str, length: int, kind: str) -> None:
    check_training(attention, length, kind)


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=needs_gpu)])
@torch.no_grad()
def test_compiled_blocks_need_no_further_compilation(mode: str) -> None:
    """Denoising and committing with a static cache: compiled in the first block; with CUDA graphs too."""
    model = model_on_device()
    backend: dict[str, Any] = {"mode": mode} if ON_GPU else {"backend": "eager"}  # inductor takes minutes on a CPU
    compiled = torch.compile(model, fullgraph=True, **backend)
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    for cache in caches:  # outside of the graph, whose inputs would else be changed, which CUDA graphs do not take
        cache.early_initialization(2, [2, 2], [32, 32], torch.float32, DEVICE)
    graphs = []
    for number in range(3):
        block = words(2, 16, seed=number).to(DEVICE)
        outputs = []
        for one, cache in zip((compiled, model), caches, strict=True):
            for time in (0.8, 0.3):
                torch.compiler.cudagraph_mark_step_begin()
                level = torch.tensor(time, device=DEVICE)
                logits = one(noisy_input_ids=block, cache=cache, block_size=16, noise_level=level).logits.clone()
            torch.compiler.cudagraph_mark_step_begin()
            one(block, block[:, :0], cache=cache, use_cache=True, noise_level=torch.tensor(1.0, device=DEVICE))
            outputs.append(logits)
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0  # else they were eager kernels


def test_compiled_layers_write_the_same_text() -> None:
    model, compiled, prompt = model_on_device(), model_on_device(), words(2, 20).to(DEVICE)
    compiled.base_model.forward = torch.compile(compiled.base_model.forward, backend="inductor" if ON_GPU else "eager")
    settings = dict(max_new_tokens=24, cache_implementation="static", **DECODINGS["block_diffusion"])
    assert torch.equal(generate(compiled, prompt, **settings), generate(model, prompt, **settings))


@pytest.mark.parametrize("length", [96, 100, 333])
@pytest.mark.parametrize("attention", [*PLAIN, COMPILED])
def test_gradients_under_autocast_are_near_those_of_float32(attention: str, length: int) -> None:
    """As `Trainer(bf16=True)` computes; some kernels for half precision are wrong at some lengths only."""
    rows = moved(rows_of("padded", length), DEVICE)
    expected_loss, expected = loss_and_gradient(model_on_device("eager"), rows)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss, found = loss_and_gradient(model_on_device(attention), rows)
    torch.testing.assert_close(loss, expected_loss, rtol=0.03, atol=0.03)
    assert (found - expected).norm() < 0.1 * expected.norm()
