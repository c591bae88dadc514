"""Fine-tuning on answers: what is scored, adapters as a section of a recipe, a checkpoint's noise and block sizes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_rows
from safetensors.torch import load_file
from tiny import EOS, LETTERS, MASK, tiny_config, tiny_model, tiny_tokenizer
from training import are_equal, checkpoints, weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from blockgen_hf.hub.push import plan_push
from blockgen_hf.training.data import DataArguments, load_datasets
from blockgen_hf.training.estimates import count_parameters, estimate_memory, step_operations
from blockgen_hf.training.recipe import Recipe, load_recipe
from blockgen_hf.training.recipe_adapter import LINEAR_LAYERS
from blockgen_hf.training.recipe_building import build_trainer, load_tokenizer, make_config, make_model
from blockgen_hf.training.trainer import BlockGenTrainer


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
ANSWERS = [{"prompt": LETTERS[n : n + 4], "completion": LETTERS[n + 4 : n + 7 + n % 3]} for n in range(10)]
RECIPE = """
model: {name_or_path: BASE}
data: {dataset: DATA, packing: none, sequence_length: 16, cache_dir: CACHE}
training: {output_dir: OUT, max_steps: 4, per_device_train_batch_size: 4, use_cpu: true, warmup_steps: 0,
    learning_rate: 0.05, ema_decay: 0.9, save_steps: 2, report_to: none, disable_tqdm: true, logging_steps: 1}
"""
LORA = ("adapter.r=2", "adapter.lora_alpha=4")
DORA = (*LORA, "adapter.use_dora=true")


@pytest.fixture
def answers(tmp_path: Path) -> str:
    return write_rows(tmp_path / "answers.jsonl", ANSWERS)


@pytest.fixture
def file(tmp_path: Path, answers: str) -> Path:
    """A recipe that goes on from a tiny masked model."""
    save_base(tmp_path / "base")
    places = {"BASE": tmp_path / "base", "DATA": answers, "CACHE": tmp_path / "cache", "OUT": tmp_path / "run"}
    text = RECIPE
    for name, place in places.items():
        text = text.replace(name, str(place))
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def save_base(folder: Path, variant: str = "masked", **overrides: Any) -> None:
    tiny_model(variant, eos_token_id=EOS, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def load(file: Path, *overrides: str) -> Recipe:
    return load_recipe(str(file), overrides)


def train(file: Path, *overrides: str, resume: str | None = None) -> BlockGenTrainer:
    trainer = build_trainer(load(file, *overrides))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


# what is scored


def rows_of(path: str, tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any) -> list[dict[str, Any]]:
    options = {"packing": "none", "sequence_length": 16, "cache_dir": str(cache), **settings}
    return list(load_datasets(DataArguments(path, **options), tokenizer)[0])


@pytest.mark.parametrize(("padding", "ends"), [(0, [1, 1]), (3, [4, 4]), (100, [9, 8])])
@pytest.mark.parametrize("streaming", [False, True])
def test_padding_behind_the_answer(
    answers: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, padding: int, ends: list[int], streaming: bool
) -> None:
    """Prompts are not scored, the end is, and as much behind it as was asked for and fits."""
    rows = rows_of(answers, tokenizer, tmp_path / "cache")  # in the cache, where other rows must not find it
    assert len(rows[0]["input_ids"]) == 8
    rows = rows_of(answers, tokenizer, tmp_path / "cache", train_on_padding=padding, streaming=streaming)
    for row, answer, count in zip(rows, ANSWERS, ends, strict=False):
        expected = [*map(LETTERS.index, answer["completion"]), *[EOS] * count]
        assert row["labels"] == [*[-100] * 4, *expected]
        assert row["input_ids"] == [*map(LETTERS.index, answer["prompt"]), *expected]


def test_padding_behind_texts_and_what_is_truncated(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", [{"text": "ab"}, {"text": "abcdefgh"}, {"text": ""}])
    rows = rows_of(path, tokenizer, tmp_path / "cache", sequence_length=6, train_on_padding=2)
    assert [row["input_ids"] for row in rows] == [[0, 1, EOS, EOS, EOS], [0, 1, 2, 3, 4, 5]]
    assert "labels" not in rows[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "packed", "train_on_padding": 1}, "`train_on_padding` is for `packing='none'`"),
        ({"train_on_padding": -1}, "`train_on_padding` is a whole number from 0 on, not -1"),
        ({"train_on_padding": True}, "`train_on_padding` is a whole number from 0 on, not True"),
    ],
)
def test_refused_padding(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        DataArguments("x", **{"packing": "none", **settings})
    assert message in str(error.value)


def test_prompts_stay_clean_and_ends_are_noised(file: Path) -> None:
    trainer = build_trainer(load(file, "data.train_on_padding=2", "training.block_size_unit=sequence"))
    trainer.state.max_steps = 2  # as within `train`: behind the last step there are no batches
    noised = torch.zeros(MASK + 1, dtype=torch.bool)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    for batch in batches:
        is_noise = batch["noisy_input_ids"] == MASK
        assert not is_noise[batch["labels"] == -100].any()
        noised[batch["input_ids"][is_noise]] = True
    assert noised[EOS] and noised.sum() > 1


# adapters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rank=2"], "mine.yaml, section `adapter`: there is no key `rank`"),
        (["adapter.lora_alhpa=2"], "Did you mean `lora_alpha`?"),
        (["adapter.base_model_name_or_path=x"], "there is no key `base_model_name_or_path`"),
        (["adapter.task_type=SEQ_CLS"], "there is no key `task_type`"),
        (["adapter.r=0"], "mine.yaml: `adapter.r` must be positive, but is 0"),
        (["adapter.r=two"], "mine.yaml: `adapter.r` must be a whole number, but is 'two'"),
        (["adapter.bias=some"], "mine.yaml: `adapter.bias` must be 'none' or 'all' or 'lora_only', but is 'some'"),
        (
            ["adapter.r=2", "adapter.layers_to_transform=[0]", "adapter.target_modules=.*q_proj"],
            "mine.yaml, `adapter`",
        ),
        (["adapter.r=2", "model.diffusion_type=uniform"], "is for the weights of a model, which an adapter leaves"),
        (["adapter.r=2", "model.name_or_path=null", "tokenizer.name_or_path=x"], "`adapter` needs a checkpoint"),
    ],
)
def test_refused_adapters(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(file, *overrides)
    assert message in str(error.value)


def test_peft_is_asked_for_where_it_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    load(file)
    with pytest.raises(ImportError, match=r"pip install 'blockgen-hf\[train\]'"):
        load(file, *LORA)


def texts(model: Any) -> list[list[list[int]]]:
    """What each decoding writes from a seed."""
    prompt = torch.arange(8).view(2, 4)
    sequences = []
    for settings in ({"decoding": "ar"}, {"decoding": "block_diffusion"}, {"decoding": "arpc", "denoising_steps": 2}):
        torch.manual_seed(0)
        sequences.append(model.eval().generate(input_ids=prompt, block_size=4, max_new_tokens=8, **settings).tolist())
    return sequences


@pytest.mark.parametrize(
    "kind", [LORA, DORA, pytest.param((*LORA, "adapter.target_modules=all-linear"), marks=pytest.mark.slow)]
)
def test_an_adapter_is_the_same_saved_loaded_and_merged(file: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    base = tiny_model(eos_token_id=EOS)
    trainer = train(file, *kind)
    expected = texts(trainer.model)
    assert expected != texts(base)
    frozen = weights(trainer.model)
    for name, weight in base.named_parameters():  # under PEFT's names
        stem, leaf = name.rsplit(".", 1)
        found = frozen.get(f"base_model.model.{name}", frozen.get(f"base_model.model.{stem}.base_layer.{leaf}"))
        assert torch.equal(found, weight)

    run = tmp_path / "run"
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert not (run / "model.safetensors").exists() and not (run / "config.json").exists()
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run)
    assert texts(loaded) == expected
    assert texts(peft.AutoPeftModelForCausalLM.from_pretrained(run)) == expected
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert texts(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == expected


def test_what_an_adapter_trains_by_default(file: Path) -> None:
    trainer = build_trainer(load(file, *LORA))
    names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert len(names) == 2 * len(LINEAR_LAYERS) * 2 and all("lora" in name for name in names)
    assert all(any(f".{layer}." in name for name in names) for layer in LINEAR_LAYERS)


@pytest.mark.parametrize("kind", [LORA, pytest.param(DORA, marks=pytest.mark.slow)])
def test_the_average_is_saved_and_a_run_goes_on_with_the_weights(
    file: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    train(file, *kind)
    whole = load_file(run / "adapter_model.safetensors")
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4"]
    # By hand: the average is warmed up as (1 + n) / (10 + n), and begins with an adapter that changes nothing.
    averages = [load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4)]
    trained = load_file(run / "checkpoint-4" / "training_weights.safetensors")
    assert are_equal(averages[1], whole)
    name = next(name for name in whole if "lora_B" in name)
    weight = trained[name.replace(".weight", ".default.weight")]
    assert not torch.allclose(weight, whole[name])
    assert weight.abs().sum() > whole[name].abs().sum() > averages[0][name].abs().sum() > 0

    train(file, *kind, resume=str(run / "checkpoint-2"))
    assert are_equal(load_file(run / "adapter_model.safetensors"), whole)


def test_the_folder_of_an_adapter_can_be_pushed(file: Path, tmp_path: Path) -> None:
    """Once its base model has a name that others know; a README.md that was there is not PEFT's template."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    trainer = train(file, *LORA)
    with pytest.raises(ValueError, match="push the base model first"):
        trainer.create_model_card()
    assert (run / "README.md").read_text().endswith("Mine.")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/tiny"}))
    files = {file.path for file in plan_push(run, "me/adapter").files}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not any("training_weights" in name or "checkpoint" in name or name.endswith(".bin") for name in files)


def test_estimates_of_an_adapter() -> None:
    config = tiny_config()
    every, adapter = count_parameters(config), count_parameters(config, {"r": 2, "target_modules": LINEAR_LAYERS})
    added = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32))  # as in test_peft.py
    assert (every.trained, every.is_adapter) == (every.total, False)
    assert (adapter.trained, adapter.total, adapter.is_adapter) == (added, every.total + added, True)
    full, small = (estimate_memory(config, parameters, 4, 16) for parameters in (every, adapter))
    assert (small.weights, small.gradients, small.optimizer, small.average) == (
        full.weights + 4 * added,
        4 * added,
        8 * added,
        4 * added,
    )
    assert small.activations == full.activations and full.head - small.head == 4 * every.head
    assert step_operations(config, adapter, 4, 16) < step_operations(config, every, 4, 16)


# another noise, other block sizes


def config_of(file: Path, *overrides: str) -> Any:
    recipe = load(file, *overrides)
    return make_config(recipe, load_tokenizer(recipe, recipe.training_arguments()))


def test_a_masked_checkpoint_goes_on_as_a_uniform_one(file: Path, tmp_path: Path) -> None:
    trainer = train(file, "model.diffusion_type=uniform")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.diffusion_type, config.training_objective, config.mask_token_id) == ("uniform", "elbo", None)
    assert len(trainer.state.log_history) > 4
    assert config_of(file, "model.diffusion_type=uniform", "model.training_objective=cross_entropy").diffusion_type


@pytest.mark.parametrize(
    ("variant", "own", "overrides", "dropped"),
    [
        ("masked", {"sampler": "first_hitting", "block_size": 8}, ["model.diffusion_type=uniform"], ["sampler"]),
        (
            "uniform",
            {"decoding": "arpc", "corrector": "entropy"},
            ["model.diffusion_type=masked", f"model.mask_token_id={MASK}"],
            ["corrector"],
        ),
        ("masked", {"block_size": 8, "denoising_steps": 4}, ["model.block_sizes=[1,4]"], ["block_size"]),
        ("masked", {"block_size": 16}, [], []),
        ("masked", {"block_size": 4}, ["model.block_sizes=[1,4]"], []),
    ],
)
def test_settings_of_generation_for_another_noise_or_other_blocks_are_dropped(
    file: Path, tmp_path: Path, variant: str, own: dict[str, Any], overrides: list[str], dropped: list[str]
) -> None:
    """A model that is saved must be able to generate as it stands."""
    base = tiny_model(variant, eos_token_id=EOS)
    base.generation_config.update(**{"decoding": "block_diffusion", **own})
    base.save_pretrained(tmp_path / "base")
    recipe = load(file, *overrides)
    model = make_model(recipe, make_config(recipe, load_tokenizer(recipe, recipe.training_arguments())))
    kept = {name: getattr(model.generation_config, name) for name in own}
    assert kept == {name: None if name in dropped else value for name, value in own.items()}
    assert model.eval().generate(max_new_tokens=4).shape == (1, 4)


def test_a_uniform_checkpoint_needs_a_mask_token(file: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "uniform")
    with pytest.raises(ValueError, match="has no mask token, since its noise is uniform: choose"):
        config_of(file, "model.diffusion_type=masked")
    with pytest.raises(ValueError, match="has the mask token 22, and the model 3"):
        config_of(file, "model.diffusion_type=masked", "model.mask_token_id=3")
    config = config_of(file, "model.diffusion_type=masked", f"model.mask_token_id={MASK}")
    assert (config.training_objective, config.mask_token_id) == ("cross_entropy", MASK)
    assert config_of(file).training_objective == "elbo"


def test_other_block_sizes_have_weights_of_their_own(file: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", block_size_weights=[0.4, 0.3, 0.2, 0.1])
    assert config_of(file).block_size_weights == [0.4, 0.3, 0.2, 0.1]
    assert config_of(file, "model.block_sizes=[1,16]").block_size_weights is None
    assert config_of(file, "model.block_sizes=[1,16]", "model.block_size_weights=[0.5,0.5]").block_sizes == [1, 16]
    assert config_of(file, "model.block_sizes=[1,2,4,8]").block_size_weights == [0.4, 0.3, 0.2, 0.1]
