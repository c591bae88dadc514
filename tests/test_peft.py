"""PEFT's adapters: trained, saved, loaded in every way, merged, with every decoding; what PEFT cannot do here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_near, tiny_model, words
from training import LabelledRows, make_trainer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from blockgen_hf import BlockGenForDiffusionLM


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# What docs/ecosystem.md recommends: PEFT has no defaults for a model type that it does not know.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FAST = {("masked", "lora"), ("masked", "dora"), ("masked", "head_saved"), ("uniform", "head")}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": TARGET_MODULES},
    "dora": {"target_modules": TARGET_MODULES, "use_dora": True},
    "all_linear": {"target_modules": "all-linear"},
    "head": {"target_modules": [*TARGET_MODULES, "lm_head"]},
    "head_saved": {"target_modules": TARGET_MODULES, "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": [*TARGET_MODULES, "embed_tokens"]},
    "embedding_and_head_saved": {"target_modules": TARGET_MODULES, "modules_to_save": ["embed_tokens", "lm_head"]},
    "some_tokens": {"target_modules": TARGET_MODULES, "trainable_token_indices": [1, 2, 3]},
}
# Fast where they differ most.
KINDS = [
    pytest.param(variant, name, marks=[] if (variant, name) in FAST else [pytest.mark.slow], id=f"{variant}-{name}")
    for variant in ("masked", "uniform")
    for name in ADAPTERS
]
DECODINGS: list[dict[str, Any]] = [
    {"decoding": "ar"},
    {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 2},
    {"decoding": "arpc", "block_size": 4, "denoising_steps": 2},
]
TEXT = words(2, 8)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a variant."""
    path: Path = tmp_path_factory.mktemp("bases")
    for variant in ("masked", "uniform"):
        tiny_model(variant).save_pretrained(path / variant)
    return path


def load(folder: Path) -> BlockGenForDiffusionLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapt(model: BlockGenForDiffusionLM, **settings: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **settings))


def texts(model: Any) -> list[list[list[int]]]:
    """What each decoding writes from a seed."""
    sequences = []
    for settings in DECODINGS:
        torch.manual_seed(0)
        sequences.append(model.generate(input_ids=TEXT, max_new_tokens=4, **settings).tolist())
    return sequences


def train(model: Any, steps: int = 3) -> None:
    """Steps of a plain loop: block sizes and noise are drawn by the model."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        torch.manual_seed(step)
        model(input_ids=TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(("variant", "name"), KINDS)
def test_an_adapter_is_the_same_saved_loaded_and_merged(bases: Path, tmp_path: Path, variant: str, name: str) -> None:
    """The three ways to load it, and weights that it was merged into, which are a model as before."""
    base = bases / variant
    adapted = adapt(load(base), **ADAPTERS[name])
    before = texts(adapted)
    train(adapted)
    expected, logits = texts(adapted), adapted(TEXT).logits
    assert expected != before
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = [
        peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True),
    ]
    if name != "dora":  # transformers 5.23 does not find DoRA's magnitudes in any model: docs/ecosystem.md
        loaded.append(load(base))
        loaded[-1].load_adapter(tmp_path / "adapter")
    for model in loaded:
        assert_near(model(TEXT).logits, logits)
        assert texts(model) == expected

    merged = loaded[0].merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, load(tmp_path / "merged")):
        assert type(model) is BlockGenForDiffusionLM
        torch.testing.assert_close(model(TEXT).logits, logits, atol=1e-5, rtol=1e-5)
        assert texts(model) == expected


def test_what_is_trained_is_what_was_asked_for() -> None:
    """Six matrices a layer; `all-linear` has the modulations and the time embedding too, and leaves out the head."""
    model = tiny_model()
    adapted = adapt(model, target_modules=TARGET_MODULES)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6 * 2 and all("lora" in name for name in trained)
    # rank x (inputs + outputs) of four matrices 16 x 16 and two 16 x 32, in two layers
    assert sum(p.numel() for p in trained.values()) == 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32))
    everything = adapt(tiny_model(), target_modules="all-linear")
    names = {name for name, p in everything.named_parameters() if p.requires_grad}
    for module in ("layers.0.modulation", "model.norm_modulation", "time_embedding.linear_1"):
        assert any(module in name for name in names)
    assert not any("lm_head" in name for name in names)


def test_without_target_modules_peft_says_that_it_needs_them() -> None:
    """It looks them up by model type in a table of its own; a checkpoint has no way to bring them."""
    with pytest.raises(ValueError, match="specify `target_modules`"):
        adapt(tiny_model())


def test_an_adapter_can_be_switched_off(bases: Path) -> None:
    base = bases / "masked"
    adapted = adapt(load(base), target_modules=TARGET_MODULES)
    train(adapted)
    with adapted.disable_adapter():
        plain = texts(adapted)
    assert plain == texts(load(base)) != texts(adapted)


@pytest.mark.parametrize("name", ["lora", "head_saved"])
def test_plain_trainer_trains_an_adapter(tmp_path: Path, name: str) -> None:
    """`transformers.Trainer` with nothing of ours: the model draws block sizes and noise itself."""
    adapted = adapt(tiny_model(), **ADAPTERS[name])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, learning_rate=0.02, per_device_train_batch_size=8, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=10, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=LabelledRows(number=8, unscored=()))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["dora", "head_saved"])
def test_our_trainer_trains_every_block_size_of_the_mixture(tmp_path: Path, name: str) -> None:
    """Stratified draws reach the model through the adapter; the average of weights is that of what is trained."""
    trainer = make_trainer(
        tmp_path, adapt(tiny_model(), **ADAPTERS[name]), max_steps=4, gradient_accumulation_steps=4, learning_rate=1e-2
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    sizes = {key for entry in logged for key in entry if key.startswith("loss") and key != "loss"}
    assert len(sizes) == len(tiny_model().config.block_sizes)
    assert texts(trainer.model.eval())


def test_prompt_tuning_is_refused() -> None:
    """It passes embeddings in the place of `input_ids`; noisy tokens have no embeddings to be put before."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="`input_ids`"):
        model(input_ids=TEXT)


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "beams"])
@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_generation_refuses_virtual_tokens_instead_of_ignoring_them(name: str, decoding: str) -> None:
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model(), config).eval()
    settings: dict[str, Any] = dict(decoding="ar", num_beams=2) if decoding == "beams" else dict(decoding=decoding)
    with pytest.raises(ValueError, match=name):
        model.generate(input_ids=TEXT, max_new_tokens=4, **settings)
