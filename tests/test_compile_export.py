"""`torch.compile` without breaks and without recompilation, and `torch.export` of a denoising step."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CAUSAL, MASK, generate, left_padded, tiny_model, words
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from transformers import Cache, DynamicCache, StaticCache
from transformers.exporters.base import ExportedModel
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from blockgen_hf import BlockGenForDiffusionLM


pytestmark = pytest.mark.slow  # compiling takes seconds

DECODINGS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 2},
    "arpc": {"decoding": "arpc", "block_size": 4, "denoising_steps": 2},
}


# ---- torch.compile
@torch.no_grad()
@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional", "block_causal"])
def test_the_compiled_forward_is_one_graph_with_equal_logits(variant: str) -> None:
    """Every use: causal, training layout, a block behind its prefix."""
    model, text, block = tiny_model(variant), words(2, 8), words(2, 4, seed=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    behind = dict(noisy_position_ids=torch.arange(8, 12)[None], block_size=4, noise_level=0.5)
    for args, kwargs in (
        ((text,), {"use_cache": False}),
        ((text, text), {"block_size": 4, "noise_level": 0.5}),
        ((text, block), behind),
    ):
        if len(args) == 1 and variant not in CAUSAL:
            continue
        torch.testing.assert_close(compiled(*args, **kwargs).logits, model(*args, **kwargs).logits)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional"])
def test_blocks_of_a_static_cache_share_their_graphs(variant: str) -> None:
    """Denoising and committing are compiled in the first block, and never again: the cache keeps its shape."""
    model = tiny_model(variant)
    caches = [StaticCache(model.config, max_cache_len=32) for _ in range(2)]
    counter = CompileCounterWithBackend("eager")
    models = [torch.compile(model, backend=counter, fullgraph=True), model]
    counts = []
    for number in range(5):
        block = words(2, 4, seed=number)
        for time in (0.8, 0.3):
            kwargs = dict(noisy_input_ids=block, block_size=4, noise_level=torch.tensor(time))
            got, expected = (one(cache=cache, **kwargs).logits for one, cache in zip(models, caches, strict=True))
            torch.testing.assert_close(got, expected)
        for one, cache in zip(models, caches, strict=True):
            one(block, block[:, :0], cache=cache, use_cache=True, noise_level=torch.tensor(1.0))
        counts.append(counter.frame_count)
    assert 0 < counts[0] <= 4 and counts[1:] == counts[:1] * 4


@pytest.mark.parametrize(
    ("variant", "decoding", "padded"),
    [
        ("masked", "arpc", False),
        ("masked", "ar", True),
        ("uniform_time_conditional", "block_diffusion", True),
    ],
)
def test_a_compiled_model_generates_the_same_text(variant: str, decoding: str, padded: bool) -> None:
    """With a static cache of some size, a longer text needs no further graph."""
    model, compiled = tiny_model(variant), tiny_model(variant)
    counter = CompileCounterWithBackend("eager")
    compiled.forward = torch.compile(compiled.forward, backend=counter)
    inputs = left_padded([words(8), words(5, seed=1)]) if padded else {"input_ids": words(2, 8)}
    counts = []
    for length in (12, 28):
        texts = []
        for one in (compiled, model):
            torch.manual_seed(0)
            cache = StaticCache(model.config, max_cache_len=40)
            texts.append(one.generate(**inputs, cache=cache, max_new_tokens=length, **DECODINGS[decoding]))
        assert torch.equal(*texts)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_inductor_generates_the_same_text() -> None:
    """The default backend, by `model.compile()`; test_model.py compiles the denoiser so."""
    model, compiled, text = tiny_model(), tiny_model(), words(2, 8)
    compiled.compile()
    settings = dict(max_new_tokens=8, cache_implementation="static", **DECODINGS["ar"])
    assert torch.equal(generate(compiled, text, **settings), generate(model, text, **settings))


def test_a_compiled_training_step_equals_the_eager_one() -> None:
    model, text = tiny_model().train(), words(2, 8)
    noisy = torch.where(torch.arange(8) % 2 == 0, MASK, text)
    compiled = torch.compile(model, backend="aot_eager")
    gradients = []
    for one in (compiled, model):
        one(text, noisy, labels=text, block_size=4, noise_level=0.5).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


# ---- torch.export
def step_inputs(rows: int = 2, prefix: int = 8, block: int = 4) -> dict[str, Any]:
    """One denoising step: a clean prefix, a noisy block behind it."""
    return dict(
        input_ids=words(rows, prefix, seed=prefix),
        noisy_input_ids=words(rows, block, seed=1),
        noisy_position_ids=torch.arange(prefix, prefix + block)[None],
        noise_level=torch.tensor(0.3),
        block_size=4,
    )


def export(
    model: BlockGenForDiffusionLM, folder: Path, inputs: dict[str, Any], config: DynamoConfig
) -> torch.nn.Module:
    """What transformers exports, saved, and loaded with torch alone."""
    DynamoExporter().export(model, inputs, config=config).save_pretrained(folder)
    program: torch.nn.Module = torch.export.load(folder / "model.pt2").module()
    return program


@torch.no_grad()
@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional", "block_causal"])
def test_an_exported_denoising_step_has_equal_logits(tmp_path: Path, variant: str) -> None:
    """Any number of rows, any prefix, any block up to the block size, any noise level; the block size is fixed."""
    model = tiny_model(variant)
    rows, prefix, block = Dim("rows", max=64), Dim("prefix", min=2, max=48), Dim("block", min=2, max=8)
    shapes = dict(
        input_ids={0: rows, 1: prefix},
        noisy_input_ids={0: rows, 1: block},
        noisy_position_ids={1: block},
        noise_level=None,
        block_size=None,
    )
    program = export(model, tmp_path, step_inputs(), DynamoConfig(dynamic=True, dynamic_shapes=shapes))
    for inputs in (step_inputs(), step_inputs(5, 20), step_inputs(1, 4, 3)):
        for level in (0.3, 0.9):
            inputs["noise_level"] = torch.tensor(level)
            torch.testing.assert_close(program(**inputs)["logits"], model(**inputs).logits)
    with pytest.raises(AssertionError, match="block_size"):
        program(**{**step_inputs(), "block_size": 2})


@torch.no_grad()
def test_an_export_with_fixed_shapes_loads_through_transformers(tmp_path: Path) -> None:
    model = tiny_model()
    DynamoExporter().export(model, step_inputs(), config=DynamoConfig()).save_pretrained(tmp_path)
    # From 5.24 on transformers asks, as a program is unpickled.
    asks = "trust_remote_code" in inspect.signature(ExportedModel.from_pretrained).parameters
    loaded = ExportedModel.from_pretrained(tmp_path, **({"trust_remote_code": True} if asks else {}))
    inputs = {**step_inputs(), "input_ids": words(2, 8, seed=5)}
    torch.testing.assert_close(loaded(**inputs)["logits"], model(**inputs).logits)


def filled_cache(model: BlockGenForDiffusionLM, length: int, rows: int, static: bool) -> Cache:
    cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    text = words(rows, length, seed=length)
    model(text, text[:, :0], cache=cache, use_cache=True, noise_level=1.0)
    return cache


@torch.no_grad()
@pytest.mark.parametrize(("variant", "static"), [("masked", False), ("uniform_time_conditional", True)])
def test_an_exported_denoising_step_reads_a_cache(variant: str, static: bool) -> None:
    """A dynamic cache of any length and number of rows; a static one however full it is."""
    model = tiny_model(variant)

    def inputs(length: int, rows: int) -> dict[str, Any]:
        step = {name: value for name, value in step_inputs(rows).items() if "noisy_position" not in name}
        step.pop("input_ids")
        return {**step, "cache": filled_cache(model, length, rows, static)}

    exported = DynamoExporter().export(model, inputs(8, 2), config=DynamoConfig(dynamic=not static))
    program = exported.program.module()
    for length, rows in ((8, 2), (20, 2)) if static else ((8, 2), (20, 2), (4, 3)):
        torch.testing.assert_close(program(**inputs(length, rows))["logits"], model(**inputs(length, rows)).logits)


@torch.no_grad()
def test_the_causal_language_model_exports(tmp_path: Path) -> None:
    model = tiny_model()
    program = export(model, tmp_path, {"input_ids": words(2, 8)}, DynamoConfig(dynamic=True))
    for text in (words(2, 8), words(3, 20)):
        torch.testing.assert_close(program(input_ids=text)["logits"], model(text, use_cache=False).logits)
