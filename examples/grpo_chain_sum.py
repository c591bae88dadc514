"""
Reinforcement learning of sums with TRL's GRPO: the reward is whether reasoning-gym's verifier accepts the answer.

The small model of the package first learns from worked examples until it is sometimes right, and then from its own
answers to some of these sums. `OUTPUT/rewards.json` has the mean reward of every step, and the accuracy before and
after on these sums and on sums that it has never seen.

    pip install 'blockgen-hf[trl]' reasoning-gym
    python examples/grpo_chain_sum.py runs/grpo
    python examples/grpo_chain_sum.py runs/grpo_arpc --decoding arpc
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import GRPOConfig

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.training.trl_grpo import BlockGenGRPOTrainer
from blockgen_hf.training.trl_sft import BlockGenSFTConfig, BlockGenSFTTrainer


ANSWER_TOKENS = 6  # "-12" and the end of text are 5 at most
DECODINGS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 4},
    "arpc": {"decoding": "arpc", "block_size": 4, "nfe_per_block": 6},
}
QUIET = dict(report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False)


def sums(num_test: int, seed: int) -> tuple[Dataset, Dataset]:
    """All sums and differences of two digits, split into those to learn from and those to be asked for."""
    source = reasoning_gym.create_dataset(
        "chain_sum", size=5000, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    rows = {entry["metadata"]["expression"]: entry["answer"] for entry in source}
    problems = [
        {"prompt": f"{expression} =", "completion": f" {answer}", "answer": answer}
        for expression, answer in sorted(rows.items())
    ]
    random.Random(seed).shuffle(problems)
    return Dataset.from_list(problems[num_test:]), Dataset.from_list(problems[:num_test])


def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for an answer that the verifier takes for right, else 0."""
    verifier = reasoning_gym.get_score_answer_fn("chain_sum")
    scores = [verifier(text.strip(), {"answer": right}) for text, right in zip(completions, answer, strict=True)]
    return [float(score == 1) for score in scores]


def accuracy(
    model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast, problems: Dataset, **settings: Any
) -> float:
    """Share of right answers, one draw for each problem."""
    prompts = tokenizer(list(problems["prompt"]), return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    sequences = model.eval().generate(**prompts, max_new_tokens=ANSWER_TOKENS, **settings)
    texts = tokenizer.batch_decode(sequences[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(reward(texts, list(problems["answer"]))) / len(texts)


def accuracies(
    model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast, problems: Dataset
) -> dict[str, float]:
    result = {name: accuracy(model, tokenizer, problems, **settings) for name, settings in DECODINGS.items()}
    return {"ar_greedy": accuracy(model, tokenizer, problems, decoding="ar", do_sample=False), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--decoding", choices=DECODINGS, default="ar", help="decoding of the rollouts")
    parser.add_argument("--warmup-steps", type=int, default=200, help="steps on worked examples")
    parser.add_argument("--problems", type=int, default=40, help="number of sums in GRPO, out of the 160 examples")
    parser.add_argument("--steps", type=int, default=60, help="steps of GRPO")
    parser.add_argument("--rollouts", type=int, default=128, help="rollouts per step of GRPO, 8 per sum")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="learning rate of GRPO")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(shipped_checkpoint(), trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(shipped_checkpoint())
    train, test = sums(num_test=40, seed=args.seed)

    examples = train.remove_columns("answer")
    sft_args = BlockGenSFTConfig(
        output_dir=str(args.output / "sft"), max_steps=args.warmup_steps, per_device_train_batch_size=16,
        learning_rate=1e-3, ema_decay=0, logging_steps=25, seed=args.seed, **QUIET,
    )  # fmt: skip
    BlockGenSFTTrainer(model, sft_args, train_dataset=examples, processing_class=tokenizer).train()
    asked = train.select(range(args.problems))
    before = {"asked": accuracies(model, tokenizer, asked), "test": accuracies(model, tokenizer, test)}
    print("after the examples:", json.dumps(before))

    grpo_args = GRPOConfig(
        output_dir=str(args.output / "grpo"), max_steps=args.steps, num_generations=8,
        per_device_train_batch_size=args.rollouts, max_completion_length=ANSWER_TOKENS, logging_steps=1,
        generation_kwargs=DECODINGS[args.decoding],
        learning_rate=args.learning_rate, lr_scheduler_type="constant", seed=args.seed, **QUIET,
    )  # fmt: skip
    trainer = BlockGenGRPOTrainer(model, reward, grpo_args, train_dataset=asked, processing_class=tokenizer)
    trainer.train()
    after = {"asked": accuracies(model, tokenizer, asked), "test": accuracies(model, tokenizer, test)}
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    result = {**vars(args), "output": str(args.output), "before": before, "after": after, "rewards": rewards}
    (args.output / "rewards.json").write_text(json.dumps(result, indent=2) + "\n")
    print("after GRPO:", json.dumps(after))


if __name__ == "__main__":
    main()
