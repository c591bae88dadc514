"""
Fine-tunes a BlockGen checkpoint on GSM8K with nothing but transformers' Trainer, and lets it answer a question.

The model draws block size, noise level and noise itself. Tokens with a label of -100, here the questions, stay clean
and are not scored; the end-of-text token after an answer is learned. By default this trains the small checkpoint of
the package, which learns the form of the answers but no arithmetic.

    python examples/finetune_gsm8k.py --model org/name --output-dir runs/gsm8k
    python examples/finetune_gsm8k.py --train-file train.jsonl --max-steps 20   # a file with `question` and `answer`
"""

import argparse
import time
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed


SEPARATOR = "\n"  # behind a question, in training and in generation


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", help="a folder or a model on the Hub (default: the package's small checkpoint)")
    parser.add_argument("--train-file", help="JSON lines, instead of openai/gsm8k from the Hub")
    parser.add_argument("--output-dir", default="runs/gsm8k")
    parser.add_argument("--max-steps", type=int, default=-1, help="default: --epochs")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a forward pass")
    parser.add_argument("--accumulation-steps", type=int, default=4, help="a block size is drawn for each of them")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--padding", type=int, default=0, help="end-of-text tokens learned after the first")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load_model(name: str | None) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer."""
    if name is None:
        from blockgen_hf.checkpoints import shipped_checkpoint

        name = str(shipped_checkpoint())
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def tokenize(row: dict[str, str], tokenizer: Any, padding: int) -> dict[str, list[int]]:
    question = tokenizer(row["question"] + SEPARATOR, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    answer += [tokenizer.eos_token_id] * (1 + padding)
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def collate(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Padded on the right; padding is neither seen nor scored. All long, `[B, L]`."""
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    fill = {"input_ids": pad_token_id, "labels": -100, "attention_mask": 0}
    return {name: pad_sequence(values, True, fill[name]) for name, values in columns.items()}


def load_rows(args: argparse.Namespace, tokenizer: Any, longest: int) -> Dataset:
    if args.train_file is None:
        problems = load_dataset("openai/gsm8k", "main", split="train")
    else:
        problems = load_dataset("json", data_files=args.train_file, split="train")
    options = {"tokenizer": tokenizer, "padding": args.padding}
    rows = problems.map(tokenize, fn_kwargs=options, remove_columns=problems.column_names)
    short = rows.filter(lambda row: len(row["input_ids"]) <= longest)
    print(f"{len(short):,} problems; {len(rows) - len(short):,} of more than {longest} tokens are left out")
    return short


def main() -> None:
    args = make_parser().parse_args()
    set_seed(args.seed)
    model, tokenizer = load_model(args.model)
    rows = load_rows(args, tokenizer, model.config.max_position_embeddings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=10,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=lambda batch: collate(batch, pad),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train()
    print(f"{trainer.state.global_step} steps in {time.perf_counter() - started:.0f} s")
    trainer.save_model()

    question = "Tom has 3 apples and buys 4 more. How many apples does he have?"
    prompt = tokenizer(question + SEPARATOR, add_special_tokens=False, return_tensors="pt").to(model.device)
    model.eval()
    output = model.generate(**prompt, decoding="arpc", max_new_tokens=128)
    answer = output[0, prompt["input_ids"].shape[1] :]
    print(f"{question}\n{tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
