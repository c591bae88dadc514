"""What comes along when causal language models are converted, there and back, and what is refused by name."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import adopted, converted, original, texts
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.hub import convert_checkpoint
from blockgen_hf.hub.causal_lm import causal_config


def change_json(file: Path, **changes: Any) -> dict[str, Any]:
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(values))
    return values


def there_and_back(folder: Path, **options: Any) -> BlockGenForDiffusionLM:
    """What `folder / source` becomes; `folder / back` is the way back."""
    convert_checkpoint(folder / "source", folder / "here", **options)
    convert_checkpoint(folder / "here", folder / "back", to="causal-lm")
    return BlockGenForDiffusionLM.from_pretrained(folder / "here").eval()


def assert_same_files(folder: Path, *names: str) -> None:
    for name in names:
        assert json.loads((folder / "back" / name).read_text()) == json.loads((folder / "source" / name).read_text())


@pytest.mark.parametrize("is_copy", [True, False])
def test_an_output_matrix_beside_a_tied_embedding_is_kept_where_it_is_another_one(
    is_copy: bool, tmp_path: Path
) -> None:
    original().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if is_copy else embedding.flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    model = there_and_back(tmp_path)
    assert model.config.tie_word_embeddings is is_copy
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    torch.testing.assert_close(model(texts(1, 6)).logits, source(texts(1, 6)).logits, atol=1e-4, rtol=1e-4)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert_same_files(tmp_path, "config.json")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "again")
    assert any("tie_word_embeddings" in note for note in report.notes) is not is_copy


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
@pytest.mark.parametrize("how", ["type", "factor", "tensor", "none"])
def test_a_gguf_file_with_a_scaled_rotary_embedding_is_refused(how: str, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    from blockgen_hf.hub.gguf_files import check_gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    if how == "type":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    elif how == "factor":
        writer.add_rope_scaling_factor(4.0)
    elif how == "tensor":
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    else:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if how == "none":
        check_gguf(tmp_path / "model.gguf")
        return
    named = {"type": "rope.scaling.type = 'linear'", "factor": "rope.scaling.factor = 4.0", "tensor": "rope_freqs"}
    with pytest.raises(ValueError, match=f"{named[how]}.*original checkpoint"):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "here")


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_way_back_records_another_type_of_the_weights(field: str, tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    values = json.loads(file.read_text())
    values[field] = values.pop("dtype")
    file.write_text(json.dumps(values))
    there_and_back(tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**values, field: "bfloat16"}
    convert_checkpoint(tmp_path / "here", tmp_path / "float32", to="causal-lm", dtype="float32")
    assert json.loads((tmp_path / "float32" / "config.json").read_text()) == values


@pytest.mark.parametrize("family", ["qwen2", "smollm3"])
def test_a_head_of_another_width_comes_back(family: str, tmp_path: Path) -> None:
    source = original(family, head_dim=12)
    source.save_pretrained(tmp_path / "source")
    model = there_and_back(tmp_path)
    assert model.config.head_dim == causal_config(model.config).head_dim == 12
    assert_same_files(tmp_path, "config.json")
    (tmp_path / "here" / "conversion.json").unlink()
    convert_checkpoint(tmp_path / "here", tmp_path / "unrecorded", to="causal-lm")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "unrecorded").eval()
    torch.testing.assert_close(again(texts(1, 6)).logits, source(texts(1, 6)).logits)


def test_settings_that_mean_nothing_do_not_stop_a_conversion_and_come_back(tmp_path: Path) -> None:
    source = original()
    source.save_pretrained(tmp_path / "source")
    settings = {"temperature": 0.9, "top_p": 0.6, "chat_format": "chatml", "pad_token_id": -1, "max_new_tokens": 7}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    model = there_and_back(tmp_path)
    assert torch.equal(model.generate(texts(1, 4)), source.generate(texts(1, 4), max_new_tokens=7))
    assert not hasattr(model.generation_config, "chat_format")
    assert_same_files(tmp_path, "config.json", "generation_config.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 0}, "config.json"),
        ({"vocab_size": "x"}, "config.json.*vocab_size"),
        ({"rms_norm_eps": 0.0}, "config.json.*rms_norm_eps"),
        ({"num_key_value_heads": 3}, "config.json.*num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}}, "config.json.*no model"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "config.json.*factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 3,
                    "factor": 2.0, "original_max_position_embeddings": 32,
                }
            },
            "long_factor.*config.json.*must have 4",
        ),
    ],
)  # fmt: skip
def test_a_broken_config_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "source")
    change_json(tmp_path / "source" / "config.json", **changes)
    with pytest.raises(ValueError, match=named):
        convert_checkpoint(tmp_path / "source", tmp_path / "here")


@pytest.mark.parametrize("values", [4, [], "1,2"])
@pytest.mark.parametrize("name", ["block_sizes", "block_size_weights"])
def test_what_is_no_list_of_block_sizes_is_refused(name: str, values: Any, tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"`{name}` must be a list of numbers"):
        convert_checkpoint(tmp_path / "source", tmp_path / "here", **{name: values})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"model_type": "qwen2_vl", "vision_config": {"depth": 2}}, "vision_config"),
    ],
)
def test_other_models_of_transformers_are_refused_by_name_without_a_family(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    original().save_pretrained(tmp_path / "source")
    change_json(tmp_path / "source" / "config.json", **changes)
    with pytest.raises(ValueError, match=named):
        convert_checkpoint(tmp_path / "source", tmp_path / "here")


def test_a_name_on_the_hub_without_its_prefix_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write hf:org/name"):
        convert_checkpoint("org/name", tmp_path / "here")


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"attention_bias": True}), ("qwen3", {"mlp_bias": True}), ("tied_llama", {"pad_token_id": -1})],
)
def test_settings_that_transformers_does_not_read_are_not_read_here(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = original(family)
    source.save_pretrained(tmp_path / "source")
    change_json(tmp_path / "source" / "config.json", **changes)
    model = there_and_back(tmp_path)
    assert model.config.pad_token_id in (0, None)
    torch.testing.assert_close(model(texts(1, 6)).logits, source(texts(1, 6)).logits, atol=1e-4, rtol=1e-4)
    assert_same_files(tmp_path, "config.json")


def test_a_rotary_embedding_in_the_old_layout_comes_back_as_it_was(tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    values = json.loads(file.read_text())
    del values["rope_parameters"]
    file.write_text(json.dumps({**values, "rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    there_and_back(tmp_path)
    assert_same_files(tmp_path, "config.json")


def test_all_chat_templates_come_along(tmp_path: Path) -> None:
    original().save_pretrained(tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "tools: {{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "source")
    assert (tmp_path / "source" / "additional_chat_templates" / "tool_use.jinja").is_file()
    there_and_back(tmp_path)
    for name in ("here", "back"):
        found = AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert found == tokenizer.chat_template


def test_the_way_back_of_one_folder_with_a_masked_adapter_says_what_to_do(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    converted(tmp_path, original(), name="base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["noise_embedding"])
    model = peft.get_peft_model(adopted(original()), settings)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    convert_checkpoint(tmp_path / "adapter", tmp_path / "one")
    with pytest.raises(ValueError, match="convert a copy of .*one without the files adapter_config.json"):
        convert_checkpoint(tmp_path / "one", tmp_path / "back", to="causal-lm")
    with pytest.raises(ValueError, match="convert the base, .*base"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "back", to="causal-lm")
