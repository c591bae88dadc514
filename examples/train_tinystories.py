"""
Trains the small BlockGen models of the package: byte-level BPE tokenizer, model, evaluation and model card.

It uses plain `transformers.Trainer`: `BlockGenForDiffusionLM.forward(input_ids, labels)` draws block size, noise level
and noise itself. By default, the stories come from the Hub (`roneneldan/TinyStories`). `--train-file` reads a local
text instead (also `.xz`), with a line `<|endoftext|>` after each story. Run the script again to resume from the last
checkpoint.

    python examples/train_tinystories.py --output-dir runs/tinystories --max-steps 3000

`--init-from` continues from a trained model of the same width. A deeper model repeats its layers, and a uniform model
may start from a masked one, which costs a fraction of training from the beginning:

    python examples/train_tinystories.py --output-dir runs/uniform --init-from runs/tinystories/final --num-layers 6 \
        --diffusion-type uniform --max-steps 1500

`--self-data` mixes in as many stories that the first model writes, autoregressively and at the temperature of the
final model's generation settings. Tokens of such stories depend less on chance, so that a block of them can be
predicted at once, and drafts agree more often with the autoregressive text:

    python examples/train_tinystories.py --output-dir runs/again --init-from runs/tinystories/final --num-layers 6 \
        --self-data 4000 --max-steps 1000
"""

import argparse
import json
import lzma
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood
from blockgen_hf.training import train_tokenizer
from blockgen_hf.training.self_data import text_prompts, write_self_data


END_OF_TEXT = "<|endoftext|>"
DATASET = "roneneldan/TinyStories"
TEMPERATURE = 0.5  # of the final model's generation settings, and of --self-data
CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
datasets:
- roneneldan/TinyStories
tags:
- blockgen
- discrete-diffusion
- block-diffusion
---

# BlockGen, {diffusion_type}, TinyStories, {parameters:.1f}M parameters

A small [BlockGen](https://github.com/jdeschena/blockgen) model for trying things out: one denoiser that generates
autoregressively, by block diffusion, or by block diffusion with an autoregressive corrector (ARPC). It writes simple
stories for children, with mistakes. It is no baseline for anything.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, decoding="arpc", block_size=16, max_new_tokens=64)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```

## Model

{noise}, {layers} layers of width {width}, {positions} positions, a byte-level BPE vocabulary of {vocabulary}
tokens. Block sizes {block_sizes} with weights {weights}, causal attention among clean tokens. The weights are
stored in bfloat16 and loaded in float32.

## Training

{stories:,} stories of TinyStories (CDLA-Sharing-1.0, which leaves trained models unrestricted){own}, joined with
`<|endoftext|>` and cut into rows of {positions} tokens; {objective} (BlockGen, Sec. 5.1). {start}{steps:,} steps
of {batch_size} rows, {tokens:,} tokens or {epochs:.1f} epochs, {optimizer} with peak learning rate
{learning_rate:g} and
cosine decay, {minutes:.0f} minutes on a CPU. Script: `examples/train_tinystories.py`.

## Evaluation

Perplexity a token on {eval_rows} rows of the validation stories ({eval_tokens:,} tokens of this vocabulary, so not
comparable with other tokenizers): {bound} (ELBO, {draws} draws a row). One
training run.

| block size | perplexity |
|---|---|
{perplexities}

## Limits

Short sentences are often right, stories wander. It knows nothing but stories for children, and was not examined for
bias.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="checkpoints, and the final model in `final/`")
    parser.add_argument("--train-file", type=Path, help="local stories instead of the Hub's (.txt or .txt.xz)")
    parser.add_argument("--validation-file", type=Path, help="local validation stories, with --train-file")
    parser.add_argument(
        "--max-stories", type=int, default=200_000, help="stories to take from the Hub's training split"
    )
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--diffusion-type", choices=("masked", "uniform"), default="masked")
    parser.add_argument("--init-from", help="start from this model: a folder, or a name on the Hub")
    parser.add_argument("--self-data", type=int, default=0, help="stories of the model to start from to train on, too")
    parser.add_argument(
        "--block-size-weights",
        type=float,
        nargs=5,
        default=[0.4, 0.1, 0.1, 0.15, 0.25],
        help='of block sizes 1, 2, 4, 8, 16. Default: "mostly AR" (BlockGen, Sec. 5.2)',
    )
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--max-steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument("--eval-rows", type=int, default=256, help="validation rows for the perplexities of the card")
    parser.add_argument("--eval-draws", type=int, default=4, help="Monte-Carlo draws per row for the bounds")
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


def own_stories(args: argparse.Namespace, stories: list[str]) -> list[str]:
    """Stories by the model to start from, behind the first words of given ones; those that have an end."""
    file = args.output_dir / "self_data.jsonl"
    if not file.exists():
        print(f"{args.init_from} writes {args.self_data:,} stories ...")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init_from)
        write_self_data(
            BlockGenForDiffusionLM.from_pretrained(args.init_from, dtype=torch.float32).eval(),
            tokenizer,
            text_prompts(stories, tokenizer, 8),
            file,
            count=args.self_data,
            length=args.length,
            temperature=TEMPERATURE,
            batch_size=64,
            seed=args.seed,
        )
    texts = (json.loads(line)["text"].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [text for text in texts if text.endswith((".", "!", "?", '"'))]


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


class ElapsedTime(TrainerCallback):
    """Seconds of training, over interruptions: kept beside the checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = json.loads(path.read_text()) if path.exists() else 0.0
        self.started = time.time()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.path.write_text(json.dumps(self.before + time.time() - self.started))


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for all other weights, as one optimizer that `Trainer` takes."""

    def __init__(self, model: BlockGenForDiffusionLM, learning_rate: float) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            is_matrix = ".layers." in name and ".modulation." not in name and parameter.ndim == 2
            (matrices if is_matrix else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            # Updates as large as AdamW's, so that one learning rate serves both.
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98)),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def start_from(model: BlockGenForDiffusionLM, source: str) -> None:
    """
    Copies the weights of a trained model of the same width and vocabulary. A deeper model repeats its layers in order.
    """
    trained = BlockGenForDiffusionLM.from_pretrained(source, dtype=torch.float32)
    weights, depth = trained.state_dict(), trained.config.num_hidden_layers
    copied = {}
    for name in model.state_dict():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is not None:
            original = int(layer[1]) * depth // model.config.num_hidden_layers
            name_there = name.replace(layer[0], f".layers.{original}.")
        else:
            name_there = name
        copied[name] = weights[name_there]
    model.load_state_dict(copied)


def model_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> BlockGenConfig:
    return BlockGenConfig(
        diffusion_type=args.diffusion_type,
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.length,
        hidden_dropout=0.0,
        cond_dim=32,
        mask_token_id=tokenizer.mask_token_id if args.diffusion_type == "masked" else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        block_sizes=[1, 2, 4, 8, 16],
        block_size_weights=args.block_size_weights,
    )


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
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


def make_tokenizer(args: argparse.Namespace, stories: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of an interrupted run, or that of the model to start from, or a new one."""
    folder = args.output_dir / "tokenizer"
    if folder.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if args.init_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init_from)
    else:
        tokenizer = train_tokenizer(stories, args.vocab_size, args.length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> None:
    args = make_parser().parse_args()
    if (args.train_file is None) != (args.validation_file is None):
        raise SystemExit("--train-file and --validation-file go together.")
    if args.self_data and not args.init_from:
        raise SystemExit("--self-data needs --init-from, the model that writes the stories.")
    set_seed(args.seed)
    print("reading stories and training the tokenizer ...")
    stories = read_stories(args, "train")
    tokenizer = make_tokenizer(args, stories)
    own = own_stories(args, stories) if args.self_data else []
    train_set = PackedStories([*(stories[: len(own)] if own else stories), *own], tokenizer, args.length)
    valid_set = PackedStories(read_stories(args, "validation"), tokenizer, args.length)
    model = BlockGenForDiffusionLM(model_config(args, tokenizer))
    if args.init_from:
        start_from(model, args.init_from)
    print(f"{model.num_parameters():,} parameters, {len(train_set):,} rows of {args.length} tokens")

    elapsed = ElapsedTime(args.output_dir / "seconds.json")
    checkpoint = get_last_checkpoint(str(args.output_dir))
    if checkpoint is not None and checkpoint.endswith(f"checkpoint-{args.max_steps}"):
        print(f"{checkpoint} is complete: evaluating it")
        model = BlockGenForDiffusionLM.from_pretrained(checkpoint)
    else:
        trainer = Trainer(
            model=model,
            args=training_arguments(args),
            train_dataset=train_set,
            processing_class=tokenizer,
            callbacks=[elapsed],
            optimizers=(MuonAndAdamW(model, args.learning_rate) if args.optimizer == "muon" else None, None),
        )
        trainer.train(resume_from_checkpoint=checkpoint)

    rows = valid_set.rows[: args.eval_rows]
    likelihood = evaluate_likelihood(model, rows, monte_carlo_samples=args.eval_draws, batch_size=16)
    results = {size: figure.perplexity for size, figure in likelihood.block_sizes.items()}
    for name, value in results.items():
        print(f"validation perplexity, block size {name}: {value:.2f}")
    config = model.config
    tokens = args.max_steps * args.batch_size * args.length
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        diffusion_type=config.diffusion_type,
        noise=f"{config.diffusion_type.capitalize()} diffusion",
        objective="unweighted cross entropy" if config.training_objective == "cross_entropy" else "ELBO",
        start=f"Started from `{Path(args.init_from).name}`. " if args.init_from else "",
        optimizer="AdamW" if args.optimizer == "adamw" else "Muon for the matrices and AdamW for the rest,",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        positions=args.length,
        vocabulary=len(tokenizer),
        block_sizes=config.block_sizes,
        weights=config.block_size_weights,
        stories=len(own) or len(stories),
        own=f" and {len(own):,} that the first model wrote at temperature {TEMPERATURE}" if own else "",
        steps=args.max_steps,
        batch_size=args.batch_size,
        tokens=tokens,
        epochs=tokens / train_set.rows.numel(),
        learning_rate=args.learning_rate,
        minutes=json.loads(elapsed.path.read_text()) / 60,
        eval_rows=len(rows),
        eval_tokens=rows.numel(),
        draws=args.eval_draws,
        bound="exact at block size 1, else an upper bound"
        if config.diffusion_type == "masked"
        else "an upper bound at every block size",
        perplexities="\n".join(f"| {name} | {value:.1f} |" for name, value in results.items()),
    )
    save(model, tokenizer, card, args.output_dir / "final")


def save(model: BlockGenForDiffusionLM, tokenizer: PreTrainedTokenizerFast, card: str, folder: Path) -> None:
    """Weights in bfloat16 to be small, loaded in float32; tokenizer, generation settings and card with them."""
    model.to(torch.bfloat16)
    model.generation_config.update(
        decoding="arpc", corrector_period=1, do_sample=True, top_k=0, temperature=TEMPERATURE, max_new_tokens=128
    )
    model.save_pretrained(folder)
    model.config.dtype, model.config.use_cache = torch.float32, True
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
