"""TRL's GRPO on a BlockGen model: exact log-probabilities, rollouts by every decoding, a reward that rises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LETTERS, PAD, tiny_model, tiny_tokenizer, words
from transformers import AutoModelForCausalLM


pytest.importorskip("trl")
pytest.importorskip("peft")

import datasets
from peft import LoraConfig
from trl import GRPOConfig

from blockgen_hf.training.trl_grpo import BlockGenGRPOTrainer


MODELS: dict[str, dict[str, Any]] = {
    "masked": {},
    "uniform": {"variant": "uniform"},
    "baseline": {"next_token_prediction": True, "block_sizes": [1], "adaptive_layer_norm": False},
}
DECODINGS: dict[str, dict[str, Any]] = {
    "ar": {},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 2},
    "arpc": {"decoding": "arpc", "block_size": 4, "nfe_per_block": 4},
    "speculative": {"decoding": "speculative", "block_size": 4},
}
FAST = {("masked", "ar"), ("uniform", "arpc")}


def early_letters(completions: list[str], **kwargs: Any) -> list[float]:
    """The share of letters of the first half of the alphabet, `a` apart, which the tokenizer takes for unknown."""
    return [sum(LETTERS[0] < letter < LETTERS[10] for letter in text) / 8 for text in completions]


def make(folder: Path, model: Any = None, peft_config: Any = None, **settings: Any) -> BlockGenGRPOTrainer:
    """Eight rollouts a step, of eight tokens, from prompts of different lengths."""
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        seed=1,
    )
    return BlockGenGRPOTrainer(
        tiny_model() if model is None else model,
        early_letters,
        GRPOConfig(**{**defaults, **settings}),
        train_dataset=datasets.Dataset.from_list([{"prompt": LETTERS[1 : 2 + row % 4]} for row in range(16)]),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def logged(trainer: BlockGenGRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_the_causal_model(name: str, tmp_path: Path) -> None:
    """Of every row by itself, without padding, at the temperature of the rollouts; zero at padding."""
    model = tiny_model(**MODELS[name])
    trainer = make(tmp_path, model, temperature=0.7)
    rows = [(words(5), words(4, seed=1)), (words(2, seed=2), words(3, seed=3))]
    input_ids = torch.full((2, 9), PAD)
    attention_mask = torch.zeros(2, 9, dtype=torch.long)
    expected, entropies = torch.zeros(2, 4), torch.zeros(2, 4)
    for row, (prompt, completion) in enumerate(rows):
        text = torch.cat([prompt, completion])
        columns = slice(5 - len(prompt), 5 + len(completion))
        input_ids[row, columns], attention_mask[row, columns] = text, 1
        logits = model(text[None]).logits[0, len(prompt) - 1 : -1]
        law = torch.distributions.Categorical(logits=logits.double().clamp(min=-1e9) / 0.7)
        expected[row, : len(completion)] = law.log_prob(completion).float()
        entropies[row, : len(completion)] = law.entropy().float()
    for batch_size in (None, 1):
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, 4, batch_size, compute_entropy=True
        )
        torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy, entropies, atol=1e-5, rtol=1e-5)
    (logps.sum() + entropy.sum()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.lm_head.weight.grad.abs().sum() > 0


ROLLOUTS: dict[str, dict[str, Any]] = {
    "ar": {},
    "match": {"decoding": "speculative", "block_size": 4, "draft_steps": 2},
    "rejection": {"decoding": "speculative", "block_size": 4, "acceptance": "rejection"},
}


@pytest.mark.parametrize(
    ("name", "rollouts"), [*((name, "ar") for name in MODELS), ("masked", "match"), ("masked", "rejection")]
)
def test_rollouts_of_the_autoregressive_law_are_drawn_from_the_policy(
    name: str, rollouts: str, tmp_path: Path
) -> None:
    """At a temperature close to zero they are its most likely tokens, in training mode too."""
    model = tiny_model(**MODELS[name], hidden_dropout=0.5)
    trainer = make(tmp_path, model, temperature=1e-4, generation_kwargs=ROLLOUTS[rollouts])
    trainer.model.train()
    prompts = [words(4), words(2, seed=1)]
    completions, _ = trainer._generate_single_turn([prompt.tolist() for prompt in prompts], None, {}, 1)
    for prompt, completion in zip(prompts, completions, strict=True):
        text = prompt.tolist()
        for token in completion:
            assert token == model(torch.tensor([text])).logits[0, -1].argmax()
            text.append(token)


@pytest.mark.parametrize(
    ("name", "decoding"),
    [
        pytest.param(name, decoding, marks=[] if (name, decoding) in FAST else [pytest.mark.slow])
        for name in ("masked", "uniform")
        for decoding in DECODINGS
    ],
)
def test_the_reward_rises(name: str, decoding: str, tmp_path: Path) -> None:
    trainer = make(
        tmp_path, tiny_model(**MODELS[name]), generation_kwargs=DECODINGS[decoding], max_steps=16,
        per_device_train_batch_size=16, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6


def test_old_log_probabilities_and_those_of_the_reference_are_the_policy_s_before_the_first_step(
    saved: Path, tmp_path: Path
) -> None:
    """Nothing is clipped and nothing diverges at first; a second step on the same rollouts has another policy."""
    settings = dict(beta=0.1, num_iterations=2, max_steps=3, learning_rate=0.05, lr_scheduler_type="constant")
    model = AutoModelForCausalLM.from_pretrained(saved)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    for trainer in (
        make(tmp_path / "full", model, **settings),
        make(tmp_path / "adapter", tiny_model(), adapter, gradient_checkpointing=True, **settings),
    ):
        trainer.train()
        divergences = logged(trainer, "kl")
        assert divergences[0] == pytest.approx(0, abs=1e-6) and min(divergences[1:]) > 1e-4
        assert logged(trainer, "clip_ratio/region_mean")[0] == 0


def test_checkpoints_are_models_and_training_goes_on_from_them(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=1).train()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), type(tiny_model()))
    resumed = make(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and len(logged(resumed, "reward")) == 3


def test_settings_of_generation_are_checked_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`decoding` must be one of"):
        make(tmp_path, generation_kwargs={"decoding": "beam"})
    with pytest.raises(ValueError, match="contradict"):
        make(tmp_path, generation_kwargs={"denoising_steps": 2, "nfe_per_block": 2})
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        with pytest.raises(ValueError, match=f"`{name}` must be False"):
            make(tmp_path, **{name: True})


def test_a_token_that_would_be_uploaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`hub_token` must be None") as error:
        make(tmp_path, hub_token="hf_secret")
    assert "hf_secret" not in str(error.value)


def test_a_model_without_autoregressive_probabilities_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`clean_attention` of the model must be 'causal', but is 'block_causal'"):
        make(tmp_path, tiny_model("block_causal"))
