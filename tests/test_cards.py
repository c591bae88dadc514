"""Cards say what is known of a model, and nothing else; what they show works."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard
from tiny import tiny_model, tiny_tokenizer

from blockgen_hf.hub.cards import model_card, samples_card, template, write_samples
from blockgen_hf.hub.licenses import LICENSES
from blockgen_hf.hub.push import plan_push
from blockgen_hf.hub.spaces import write_space


QUALITY = {
    "metric": "generative_perplexity",
    "value": 31.25,
    "decoding": "arpc",
    "num_function_evaluations": 24.5,
    "entropy": 4.37,
    "settings": {"block_size": 8, "nfe_per_block": 8},
    "num_samples": 512,
    "scorer": "gpt2-large",
}
LIKELIHOOD = {
    "data": {"dataset": "me/letters", "dataset_split": "test", "dataset_config": "small"},
    "seed": 3,
    "block_sizes": {
        "1": {"nll": 2.5, "perplexity": 12.18, "nll_standard_error": None, "perplexity_standard_error": None},
        "4": {"nll": 2.75, "perplexity": 15.64, "nll_standard_error": 0.002, "perplexity_standard_error": 0.031},
    },
    "log_sum_exp": None,
    "log_sum_exp_upper": {
        "nll": 2.6,
        "perplexity": 13.46,
        "nll_standard_error": 0.01,
        "perplexity_standard_error": 0.13,
    },
    "jensen": {"nll": 2.63, "perplexity": 13.87, "nll_standard_error": 0.01, "perplexity_standard_error": 0.14},
    "weights": {"1": 0.5, "4": 0.5},
    "num_sequences": 1234,
    "num_tokens": 98765,
    "num_draws": 8,
}

# Of each kind of model: overrides of the tiny configuration, and the decodings that its card shows.
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixture": ("masked", {}, ["arpc", "block_diffusion", "speculative", "ar"]),
    "uniform": ("uniform", {}, ["arpc", "block_diffusion", "speculative", "ar"]),
    "one block size": ("masked", {"block_sizes": [4]}, ["block_diffusion"]),
    "block-causal": ("block_causal", {}, ["block_diffusion"]),
    "full sequence": ("block_causal", {"block_sizes": [64]}, ["block_diffusion"]),
    "full sequence, uniform": (
        "uniform",
        {"block_sizes": [64], "clean_attention": "block_causal", "time_conditioning": True},
        ["block_diffusion"],
    ),
    "autoregressive": ("masked", {"block_sizes": [1]}, ["ar"]),
    "next token": (
        "uniform",
        {"next_token_prediction": True, "block_sizes": [1], "adaptive_layer_norm": False, "eos_token_id": 21},
        ["ar"],
    ),
}


def save(folder: Path, kind: str = "mixture", with_tokenizer: bool = True) -> Path:
    variant, overrides, _ = KINDS[kind]
    tiny_model(variant, **overrides).save_pretrained(folder)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "tiny")


def card_of(folder: Path, **options: Any) -> ModelCard:
    return model_card(folder, **{"repo_id": "me/tiny", "license": "mit", **options})


def section(card: RepoCard, title: str) -> str:
    """Text below a heading, up to the next of any level."""
    return re.split(r"^#+ ", card.text.split(f"# {title}\n")[1], flags=re.MULTILINE)[0].strip()


def table(text: str) -> dict[str, str]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1] for row in rows[2:]}


# Models


@pytest.mark.parametrize(
    ("kind", "with_tokenizer"),
    [*((kind, True) for kind in KINDS), ("mixture", False), ("full sequence, uniform", False), ("next token", False)],
)
def test_the_snippets_run_with_every_decoding_of_the_model(
    kind: str, with_tokenizer: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "tiny", kind, with_tokenizer)
    text = model_card(folder, repo_id=str(folder), license="mit").text
    namespace: dict[str, Any] = {}
    snippets = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for snippet in snippets:
        exec(snippet, namespace)
        assert namespace["outputs"].shape[1] > 0
    assert capsys.readouterr().out
    shown = re.findall(r'decoding="(\w+)"', "".join(snippets))
    assert shown == KINDS[kind][2] == re.findall(r'^\| `"(\w+)"` \|', text, flags=re.MULTILINE)


def test_what_the_card_says_of_the_model(folder: Path) -> None:
    facts = table(section(card_of(folder), "Model"))
    assert facts["Block sizes"] == "1, 2, 4, 8"
    assert facts["Parameters"] == f"{tiny_model().num_parameters():,}"
    assert facts["Stored as"] == "float32"
    assert facts["Vocabulary"] == "23, mask token 22"
    assert facts["Attention among clean tokens"] == "causal"
    assert facts["Diffusion"] == "masked (absorbing), linear schedule, trained by cross entropy"


@pytest.mark.parametrize(
    ("kind", "tags", "words"),
    [
        ("mixture", {"diffusion", "block-diffusion", "masked-diffusion"}, "block-wise masked diffusion"),
        ("uniform", {"diffusion", "block-diffusion", "uniform-diffusion"}, "block-wise uniform diffusion"),
        ("full sequence", {"diffusion", "masked-diffusion"}, "full-sequence masked diffusion"),
        ("next token", {"autoregressive"}, "dense causal transformer"),
    ],
)
def test_kinds_of_models_have_their_tags_and_words(kind: str, tags: set[str], words: str, tmp_path: Path) -> None:
    card = card_of(save(tmp_path / "tiny", kind))
    assert set(card.data.tags) == {"blockgen", "custom_code", *tags}
    assert words in card.text


def test_metadata(folder: Path) -> None:
    card = card_of(folder, language=["en", "de"], datasets=["me/letters"], base_model="me/smaller", tags=["letters"])
    data = yaml.safe_load(card.content.split("---\n")[1])
    assert data == card.data.to_dict()
    tags = data.pop("tags")
    assert tags[0] == "blockgen" and tags[-1] == "letters"
    assert data == {
        "license": "mit",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["me/letters"],
        "base_model": "me/smaller",
    }


def test_what_is_not_known_is_not_said(folder: Path) -> None:
    card = card_of(folder)
    for title, words in (
        ("Training data", "Not recorded."),
        ("Training", "Not recorded."),
        ("Likelihood", "Not measured."),
        ("Samples", "Not measured."),
    ):
        assert section(card, title) == words
    assert not {"datasets", "base_model", "language", "model-index"} & set(card.data.to_dict())
    assert not re.search(r"\bNone\b|nan|Undefined", card.content)


def test_a_recipe_and_the_trainers_state_tell_of_the_training(folder: Path) -> None:
    recipe = {
        "model": {"name_or_path": "me/smaller"},
        "tokenizer": {"name_or_path": "gpt2"},
        "data": {"dataset": "me/letters", "sequence_length": 128, "packing": "packed"},
        "training": {
            "max_steps": 40,
            "learning_rate": 3e-4,
            "warmup_steps": 0,
            "output_dir": "/home/me/secret",
            "seed": 0,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    history = [
        {"loss": 2.5, "step": 39},
        {"eval_loss": 2.6, "eval_nll_block_size_4": 2.75, "eval_perplexity_block_size_4": 15.64, "step": 40},
    ]
    state = {"global_step": 40, "epoch": 0.5, "num_input_tokens_seen": 0, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    card = card_of(folder)
    assert card.data.datasets == ["me/letters"] and card.data.base_model == "me/smaller"
    assert table(section(card, "Training data")) == {
        "Data set": "me/letters",
        "Tokens a row": "128",
        "Rows": "packed",
        "Tokenizer": "gpt2",
    }
    settings = table(section(card, "Training"))
    assert settings["Optimizer steps"] == "40" and settings["Warm-up steps"] == "0" and settings["Seed"] == "0"
    assert settings["Steps done"] == "40" and "Tokens seen" not in settings
    assert settings["Last training loss logged, nats a token"] == "2.5 (step 39)"
    assert "secret" not in card.content
    assert "| block size 4 | 2.7500 | 15.64 |" in section(card, "Likelihood")


def test_validation_of_other_weights_than_the_stored_is_not_quoted(folder: Path) -> None:
    entry = {"eval_loss": 2.6, "eval_nll_block_size_4": 2.75, "eval_perplexity_block_size_4": 15.64, "step": 30}
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 40, "log_history": [entry]}))
    assert section(card_of(folder), "Likelihood") == "Not measured."


def test_files_are_no_data_sets_of_the_hub(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": {"dataset": "/home/me/private/letters.txt"}}))
    card = card_of(folder)
    assert card.data.datasets is None
    assert "letters.txt" in card.text and "private" not in card.text


def test_likelihoods_stand_in_text_and_metadata(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "likelihood.json").write_text(json.dumps(LIKELIHOOD))
    card = card_of(folder, evaluations=[tmp_path / "likelihood.json"])
    text = section(card, "Likelihood")
    assert "me/letters: split test, 1,234 rows, 98,765 tokens scored, 8 Monte-Carlo draws a row, seed 3" in text
    assert "| block size 1 | 2.5000 | 12.18 |  | exact |" in text
    assert "| block size 4 | 2.7500 | 15.64 | ± 0.031 | upper bound |" in text
    assert "| mixture, the same, from above | 2.6000 | 13.46 | ± 0.13 | upper bound |" in text
    (index,) = card.data.to_dict()["model-index"]
    (result,) = index["results"]
    assert index["name"] == "tiny" and result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {"name": "me/letters", "type": "me/letters", "config": "small", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [12.18, 15.64, 13.87, 13.46]
    assert {metric["type"] for metric in result["metrics"]} == {"perplexity"}


def test_the_bound_at_block_size_1_is_exact_for_masked_models_only(tmp_path: Path) -> None:
    card = card_of(save(tmp_path / "tiny", "uniform"), evaluations=[LIKELIHOOD])
    assert "| block size 1 | 2.5000 | 12.18 |  | upper bound |" in card.text


def test_qualities_stand_beside_their_price(folder: Path) -> None:
    card = card_of(folder, evaluations=[{"quality": [QUALITY]}])
    price = "31.25 | 24.5 | 4.37 | arpc, block_size=8, nfe_per_block=8, 512 samples |"
    assert f"| generative perplexity by gpt2-large | {price}" in section(card, "Samples")
    (metric,) = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 31.25 and "24.5 function evaluations, entropy 4.37" in metric["name"]
    assert metric["args"] == {"decoding": "arpc", "num_function_evaluations": 24.5, "entropy": 4.37}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "missing") for name in ("num_function_evaluations", "entropy", "value", "decoding", "metric")),
        ("num_function_evaluations", True),
        ("entropy", float("nan")),
        ("value", None),
        ("decoding", None),
        ("metric", True),
    ],
)
def test_qualities_without_their_price_are_refused(folder: Path, name: str, value: Any) -> None:
    row = (
        {key: kept for key, kept in QUALITY.items() if key != name} if value == "missing" else {**QUALITY, name: value}
    )
    with pytest.raises(ValueError, match=f"`{name}`"):
        card_of(folder, evaluations=[{"quality": [row]}])


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"perplexity": 3}, "no evaluation"),
        ({"block_sizes": {}}, "no figure"),
        ({"block_sizes": {"1": {"nll": 800.0, "perplexity": float("inf")}}}, "not finite"),
        ({"block_sizes": {"1": {"nll": 1.0}}}, "perplexity"),
        ({"quality": QUALITY}, "list of rows"),
        ("no_such.json", "There is no file no_such.json"),
    ],
)
def test_other_evaluations_are_refused(folder: Path, evaluation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        card_of(folder, evaluations=[evaluation])


def test_conversions_name_their_source(folder: Path) -> None:
    (folder / "conversion.json").write_text(json.dumps({"source": "org/original", "family": "mdlm"}))
    text = card_of(folder).text
    assert "converted from `org/original` (family `mdlm`)" in text and "not the work of whoever uploaded" not in text
    (folder / "conversion.json").write_text(json.dumps({"source": "hf:org/original/a", "family": "mdlm"}))
    assert "they are not the work of whoever uploaded this copy" in card_of(folder).text


def test_adapters(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.name_or_path = "me/tiny"
    model.config._name_or_path = "me/tiny"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter", repo_id="me/adapter")
    assert card.data.base_model == "me/tiny" and card.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in card.text

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="push the base model first"):
        card_of(tmp_path / "adapter")


def test_licences_are_sorted_and_unique() -> None:
    assert list(LICENSES) == sorted(set(LICENSES)) and "unknown" not in LICENSES


# Samples


def generated(**overrides: Any) -> dict[str, Any]:
    """What `blockgen-hf generate --json` prints."""
    sample = {
        "text": "ab",
        "completion": "b",
        "num_new_tokens": 1,
        "num_function_evaluations": 3,
        "tokens_per_forward": 0.3,
    }
    generation = {"decoding": "arpc", "settings": {"decoding": "arpc", "block_size": 4}, "samples": [sample, sample]}
    return {"model": "me/tiny", "dtype": "float32", "prompt": "a", "seed": 1, "results": [generation], **overrides}


def test_samples_are_written_and_described(tmp_path: Path) -> None:
    assert write_samples([generated(), generated(seed=2)], tmp_path / "samples.jsonl") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
    card = samples_card(tmp_path, repo_id="me/samples", license="cc0-1.0", language="en")
    assert isinstance(card, DatasetCard)
    assert card.data.license == "cc0-1.0" and card.data.size_categories == "n<1K"
    assert "4 texts" in card.text and "[me/tiny](https://huggingface.co/me/tiny)" in card.text
    assert "| arpc | block_size=4 | 4 | 3.0 |" in card.text


def test_the_samples_load_as_the_card_says(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    write_samples([generated()], tmp_path / "data" / "samples.jsonl")
    (tmp_path / "data" / "README.md").write_text(str(samples_card(tmp_path / "data", repo_id="me/s", license="mit")))
    samples = datasets.load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert samples["text"] == ["ab", "ab"] and samples[0]["settings"] == {"block_size": 4}


@pytest.mark.parametrize("name", ["text", "prompt", "decoding", "settings", "seed", "num_function_evaluations"])
def test_samples_without_their_settings_or_price_are_refused(tmp_path: Path, name: str) -> None:
    write_samples([generated()], tmp_path / "samples.jsonl")
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    del row[name]
    (tmp_path / "samples.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"samples.jsonl, line 1.*`{name}`"):
        samples_card(tmp_path, repo_id="me/samples", license="mit")


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples"):
        samples_card(tmp_path, repo_id="me/samples", license="mit")
    with pytest.raises(ValueError, match="generate --json"):
        write_samples([{"text": "ab"}], tmp_path / "samples.jsonl")


# Space


def test_a_space_has_its_metadata(tmp_path: Path) -> None:
    write_space(tmp_path / "space", "me/tiny", license="mit", title="Letters")
    assert {path.name for path in tmp_path.iterdir()} == {"space"}
    found = {path.name for path in (tmp_path / "space").iterdir()}
    assert found == {"README.md", "app.py", "requirements.txt", "frames.py", "remote.py", "replay", "writing.py"}
    data = RepoCard.load(tmp_path / "space" / "README.md", repo_type="space").data.to_dict()
    assert data["sdk"] == "gradio" and data["app_file"] == "app.py" and data["models"] == ["me/tiny"]
    required = (tmp_path / "space" / "requirements.txt").read_text().split()
    assert [line.split(">")[0].split("<")[0] for line in required] == ["torch", "transformers"]
    assert all(line in metadata.requires("blockgen-hf") for line in required)
    assert 'MODEL, TITLE = "me/tiny", "Letters"' in (tmp_path / "space" / "app.py").read_text()
    plan = plan_push(tmp_path / "space", "me/demo", repo_type="space")  # every part of the app is taken
    assert {file.path for file in plan.files} == {
        path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*") if path.is_file()
    }
    with pytest.raises(ValueError, match="holds something"):
        write_space(tmp_path / "space", "me/tiny", license="mit")
    with pytest.raises(ValueError, match="no licence"):
        write_space(tmp_path / "other", "me/tiny", license="mine")
    assert not (tmp_path / "other").exists()


def test_templates_are_part_of_the_package() -> None:
    for name in ("model_card.md", "samples_card.md", "space/README.md", "space/app.py", "space/writing.py"):
        assert template(name)
