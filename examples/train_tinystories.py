"""
Trains the small BlockGen that the package ships: byte-level BPE tokenizer, model, evaluation and model card.

It needs nothing but `transformers.Trainer`: `BlockGenForDiffusionLM.forward(input_ids, labels)` draws block size,
noise level and noise itself. By default the stories come from the Hub (`roneneldan/TinyStories`); `--train-file` reads
a local text instead (also `.xz`), one story, then a line `<|endoftext|>`. Run it again to resume from the last
checkpoint.

    python examples/train_tinystories.py --output-dir runs/tinystories --max-steps 3000
"""

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM


END_OF_TEXT = "<|endoftext|>"
DATASET = "roneneldan/TinyStories"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="checkpoints, and the final model in `final/`")
    parser.add_argument("--train-file", type=Path, help="local stories instead of the Hub's (.txt or .txt.xz)")
    parser.add_argument("--validation-file", type=Path, help="local validation stories, with --train-file")
    parser.add_argument(
        "--max-stories", type=int, default=200_000, help="stories to take from the Hub's training split"
    )
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument(
        "--eval-rows", type=int, default=256, help="validation rows that the card's perplexities are of"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_stories(args: argparse.Namespace, split: str) -> list[str]:
    """The stories of a split, from the local file if there is one, else from the Hub."""
    path = args.train_file if split == "train" else args.validation_file
    if path is not None:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return [story.strip() for story in data.decode("utf-8").split(END_OF_TEXT) if story.strip()]
    from datasets import load_dataset

    selection = f"train[:{args.max_stories}]" if split == "train" else "validation[:2000]"
    return [story.strip() for story in load_dataset(DATASET, split=selection)["text"] if story.strip()]


def train_tokenizer(stories: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with end of text, padding and mask as the last three ids, the mask last of all."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(stories, vocab_size=vocab_size - 3, min_frequency=2)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token=END_OF_TEXT,
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        padding_side="left",
        model_max_length=length,
    )


class PackedStories(torch.utils.data.Dataset):
    """Stories joined with end of text and cut into rows of equal length: `{"input_ids", "labels"}`, both `[L]`."""

    def __init__(self, stories: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        encoded = tokenizer(stories, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@torch.no_grad()
def perplexities(model: BlockGenForDiffusionLM, rows: torch.Tensor, draws: int = 4) -> dict[str, float]:
    """
    Perplexity bound of every block size (Eq. 13, 18, 19) over the rows: ELBO, exact cross entropy at block size 1; and
    of the mixture by the log-sum-exp of every sequence (Eq. 20).
    """
    model.eval()
    set_seed(0)
    config, diffusion = model.config, model.diffusion
    nll = {size: torch.zeros(len(rows), dtype=torch.float64) for size in config.block_sizes}
    for size in config.block_sizes:
        num_draws = 1 if size == 1 else draws
        for _ in range(num_draws):
            # One noise level a sequence, stratified over the rows.
            t = ((torch.randperm(len(rows)) + torch.rand(1).item()) / len(rows)).double()[:, None]
            alpha = torch.zeros_like(t) if size == 1 else diffusion.schedule.alpha(t)
            for start in range(0, len(rows), 16):
                part = slice(start, start + 16)
                noisy = diffusion.corrupt(rows[part], alpha[part])
                logits = model(rows[part], noisy, block_size=size).logits
                objective = "cross_entropy" if size == 1 else "elbo"
                slope = diffusion.schedule.alpha_derivative(t[part])
                loss = diffusion.loss(logits, rows[part], noisy, alpha[part], slope, objective)
                nll[size][part] += loss.double().sum(-1) / num_draws
    weights = config.block_size_weights or [1 / len(nll)] * len(nll)
    joint = torch.stack([math.log(weight) - nll[size] for size, weight in zip(nll, weights, strict=True)])
    totals = {str(size): values.mean().item() for size, values in nll.items()}
    totals["mixture (log-sum-exp)"] = -joint.logsumexp(0).mean().item()
    return {name: math.exp(total / rows.shape[1]) for name, total in totals.items()}


def model_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> BlockGenConfig:
    return BlockGenConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.length,
        hidden_dropout=0.0,
        cond_dim=32,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # "Mostly AR" weights (Sec. 5.2): gamma_1 > gamma_n > the rest. Autoregressive steps learn from every token.
        block_sizes=[1, 2, 4, 8, 16],
        block_size_weights=[0.4, 0.1, 0.1, 0.15, 0.25],
    )


def main() -> None:
    args = make_parser().parse_args()
    if (args.train_file is None) != (args.validation_file is None):
        raise SystemExit("--train-file and --validation-file go together.")
    set_seed(args.seed)
    print("reading stories and training the tokenizer ...")
    stories = read_stories(args, "train")
    tokenizer_dir = args.output_dir / "tokenizer"
    if tokenizer_dir.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    else:
        tokenizer = train_tokenizer(stories, args.vocab_size, args.length)
        tokenizer.save_pretrained(tokenizer_dir)
    train_set = PackedStories(stories, tokenizer, args.length)
    valid_set = PackedStories(read_stories(args, "validation"), tokenizer, args.length)
    model = BlockGenForDiffusionLM(model_config(args, tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(train_set):,} rows of {args.length} tokens")

    training_args = TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        weight_decay=0.1,
        logging_steps=50,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=args.seed,
        dataloader_num_workers=0,
    )
    trainer = Trainer(model=model, args=training_args, train_dataset=train_set)
    started = time.time()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.output_dir)))
    hours = (time.time() - started) / 3600

    results = perplexities(model, valid_set.rows[: args.eval_rows])
    for name, value in results.items():
        print(f"validation perplexity, block size {name}: {value:.2f}")
    final = args.output_dir / "final"
    # Stored in bfloat16 to be small, loaded in float32.
    model.to(torch.bfloat16)
    model.config.dtype = torch.float32
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    summary = {
        "perplexity": results,
        "eval_rows": min(args.eval_rows, len(valid_set)),
        "hours_of_last_run": hours,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * args.batch_size * args.length,
    }
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
