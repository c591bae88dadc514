"""
Does training on a mixture of block sizes pay? Two small models with the same data, seed and number of tokens: one
trained on block sizes 1, 2, 4, 8, 16, one on 16 alone (BlockGen, Sec. 5.2 and Table 6, on a scale of minutes).

    python benchmarks/mixture_likelihood.py --output-dir runs/mixture
    python benchmarks/mixture_likelihood.py --output-dir runs/mixture --train-file a.txt --validation-file b.txt

Without files the stories come from the Hub (roneneldan/TinyStories); files have a line <|endoftext|> between stories.
The tokenizer is that of the shipped checkpoint. Run it again to resume. Prints a table and writes results.json.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.evaluation import LikelihoodResult, evaluate_likelihood
from blockgen_hf.tables import Table, error_bar
from blockgen_hf.training import BlockGenTrainer, BlockGenTrainingArguments, DataArguments, load_datasets
from blockgen_hf.whole_files import write_json


RUNS = {"mixture": [1, 2, 4, 8, 16], "block size 16": [16]}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--train-file")
    parser.add_argument("--validation-file")
    parser.add_argument("--steps", type=int, default=700, help="of training, for each model")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--diffusion-type", choices=("masked", "uniform"), default="masked")
    parser.add_argument("--eval-rows", type=int, default=256, help="rows of the validation data for the last figures")
    parser.add_argument("--eval-draws", type=int, default=16, help="Monte-Carlo draws a row for the last figures")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def data_arguments(args: argparse.Namespace) -> DataArguments:
    source: dict[str, Any] = dict(
        dataset="roneneldan/TinyStories", validation_split="validation", max_documents=50_000
    )
    if args.train_file:
        files = dict(dataset=args.train_file, validation_dataset=args.validation_file)
        source = dict(**files, document_separator="<|endoftext|>")
    return DataArguments(**source, sequence_length=args.length, cache_dir=str(args.output_dir / "cache"))


def make_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, block_sizes: list[int]
) -> BlockGenForDiffusionLM:
    masked = args.diffusion_type == "masked"
    config = BlockGenConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        max_position_embeddings=args.length,
        hidden_dropout=0.0,
        cond_dim=32,
        diffusion_type=args.diffusion_type,
        mask_token_id=tokenizer.mask_token_id if masked else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        block_sizes=block_sizes,
    )
    return BlockGenForDiffusionLM(config)


def training_arguments(args: argparse.Namespace, folder: Path) -> BlockGenTrainingArguments:
    return BlockGenTrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        block_size_unit="sequence",  # every batch has every block size
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        adam_beta2=0.98,
        ema_decay=0.98,
        logging_steps=max(args.steps // 10, 1),
        eval_strategy="steps",
        eval_steps=max(args.steps // 5, 1),
        eval_monte_carlo_samples=2,
        save_steps=max(args.steps // 10, 1),
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=False,
        seed=args.seed,
    )


def train(args: argparse.Namespace, tokenizer: Any, datasets: tuple[Any, Any], name: str) -> dict[str, Any]:
    """Trains one model (or goes on) and measures all block sizes. What training logged is in its checkpoint."""
    folder = args.output_dir / name.replace(" ", "-")
    settings = training_arguments(args, folder)
    set_seed(args.seed)
    model = make_model(args, tokenizer, RUNS[name])
    train_rows, validation_rows = datasets
    trainer = BlockGenTrainer(
        model,
        settings,
        processing_class=tokenizer,
        train_dataset=train_rows,
        eval_dataset=validation_rows.select(range(64)),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    trainer.save_model()
    history = [log for log in trainer.state.log_history if "eval_loss" in log]
    rows = validation_rows.select(range(min(args.eval_rows, len(validation_rows))))
    block_sizes = sorted({size for sizes in RUNS.values() for size in sizes})
    result = evaluate_likelihood(
        trainer.model, rows, block_sizes, args.eval_draws, batch_size=32, data_collator=trainer.data_collator
    )
    return {
        "parameters": model.num_parameters(),
        "tokens": trainer.state.num_input_tokens_seen,
        "train_seconds": trainer.state.log_history[-1].get("train_runtime"),
        "history": history,
        "likelihood": result,
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Leads with what training minimises, Jensen's bound."""
    rows = []
    for name, result in results.items():
        likelihood: LikelihoodResult = result["likelihood"]
        figures = [likelihood.jensen, *likelihood.block_sizes.values(), likelihood.log_sum_exp_corrected]
        cells = [
            f"{figure.perplexity:.2f} {error_bar(figure.perplexity_standard_error, figure.perplexity, '.2f')}"
            for figure in figures
            if figure
        ]
        rows.append([name, f"{result['tokens']:,}", *cells])
    sizes = [f"L' = {size}" for size in RUNS["mixture"]]
    print(Table(["trained on", "tokens", "mixture, Jensen", *sizes, "mixture, log-sum-exp"], rows).markdown())


def main() -> None:
    args = make_parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(shipped_checkpoint())
    datasets = load_datasets(data_arguments(args), tokenizer)
    results = {name: train(args, tokenizer, datasets, name) for name in RUNS}
    print_table(results)
    written = {name: {**result, "likelihood": result["likelihood"].to_dict()} for name, result in results.items()}
    settings = {name: str(value) for name, value in vars(args).items()}
    write_json(args.output_dir / "results.json", {"settings": settings, "results": written})


if __name__ == "__main__":
    main()
