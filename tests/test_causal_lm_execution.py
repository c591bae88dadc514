"""Converted models (grouped queries, RMS norm, gated MLP, anchored blocks) run in every way as they do eagerly."""

from typing import Any

import pytest
import torch
from causal_models import ROWS, adopted, original, texts
from test_training_mask import chunk_size
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as integration

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.modeling.trunk_blockgen import BlockGenModel
from blockgen_hf.quantization import quantize_for_cpu


NOISY_ATTENTIONS = ["block", "causal"]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture
def flex_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's reference implementation in the place of the compiled kernel, which CPUs cannot train with."""
    monkeypatch.setattr(BlockGenModel, "_check_attention", lambda self, needs_mask: None)

    def attend(*args: Any, training: bool = False, **kwargs: Any) -> Any:
        return flex_attention(*args, **kwargs)

    def make_mask(*args: Any, _compile: bool = False, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", make_mask)


def noised(ids: torch.Tensor) -> torch.Tensor:
    """Every other token is noise."""
    return torch.where(torch.arange(ids.shape[1]) % 2 == 0, ROWS, ids)


def losses(model: BlockGenForDiffusionLM, length: int = 20, **more: Any) -> list[torch.Tensor]:
    """Of tokens, in training: by blocks, of one size and of one a row, and by the clean half."""
    ids = texts(2, length)
    found = []
    for size in (4, [2, 8]):
        outputs = model.train()(ids, noised(ids), labels=ids, block_size=size, noise_level=0.5, **more)
        found += [outputs.token_losses, outputs.ar_token_losses]
    return found


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("noisy_attention", NOISY_ATTENTIONS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_trains_under_the_same_mask(noisy_attention: str, flex_on_cpus: None) -> None:
    model = adopted(original(), noisy_attention=noisy_attention)
    ids = torch.cat([texts(1, 20), torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = (torch.arange(24) < 20).long()[None]
    documents = (torch.arange(20) >= 7).long().expand(2, -1).contiguous()
    found = []
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        padded = model(ids, noised(ids), attention_mask=mask, block_size=4).logits[:, :20]
        found.append([padded, *losses(model), *losses(model, document_ids=documents)])
        model.eval()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("noisy_attention", NOISY_ATTENTIONS)
def test_training_in_chunks_of_queries_has_the_same_losses_and_gradients(noisy_attention: str) -> None:
    """On CPUs with `sdpa`, chunks see a run of clean keys and one of noisy keys; eager attention has a dense mask."""
    found = []
    for implementation in ("sdpa", "eager"):
        model = adopted(original(), noisy_attention=noisy_attention)
        model.set_attn_implementation(implementation)
        with chunk_size(8):
            values = losses(model)
            ids = texts(2, 20)
            model(ids, noised(ids), labels=ids, block_size=4, noise_level=0.5).loss.backward()
        found.append([*values, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.slow
def test_the_compiled_forward_is_one_graph() -> None:
    """Autoregressive, in the layout of training, and a canvas behind a prefix."""
    model = adopted(original("qwen3"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = texts(2, 9)
    canvas = torch.cat([ids[:, 8:], torch.full((2, 3), ROWS)], dim=1)
    behind = dict(noisy_position_ids=torch.arange(8, 12)[None], block_size=4)
    for args, kwargs in (
        ((ids,), {"use_cache": False}),
        ((ids, noised(ids)), {"block_size": 4}),
        ((ids[:, :8], canvas), behind),
    ):
        torch.testing.assert_close(compiled(*args, **kwargs).logits, model(*args, **kwargs).logits)


@pytest.mark.slow
def test_a_compiled_training_step_equals_the_eager_one() -> None:
    model, ids = adopted(original()).train(), texts(2, 9)
    compiled = torch.compile(model, backend="aot_eager")
    gradients = []
    for one in (compiled, model):
        one(ids, noised(ids), labels=ids, block_size=4, noise_level=0.5).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 0.06), ("float16", 2e-3), ("float32", 2e-6)])
def test_packed_weights_are_near(weights: str, tolerance: float) -> None:
    """Clean and noisy tokens; relative to the logits."""
    ids = texts(2, 8)
    for given in ((ids,), (ids, noised(ids))):
        packed = quantize_for_cpu(adopted(original(**SIZES)), weights)
        found, expected = packed(*given, block_size=4).logits, adopted(original(**SIZES))(*given, block_size=4).logits
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "speculative"])
def test_packed_float32_weights_write_the_same_text(decoding: str) -> None:
    settings: dict[str, Any] = dict(decoding=decoding, max_new_tokens=12)
    settings |= {} if decoding == "ar" else {"block_size": 4}
    written = []
    for model in (adopted(original(**SIZES)), quantize_for_cpu(adopted(original(**SIZES)), "float32")):
        torch.manual_seed(0)  # of the order in which blocks are denoised
        written.append(model.generate(texts(2, 5), **settings))
    assert torch.equal(*written)
