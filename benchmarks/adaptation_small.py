"""
What adaptation is worth at small scale. A Llama is trained from scratch on stories, becomes a BlockGen model, and is
adapted in both modes. The same network is also trained for all block sizes from the beginning, on as many tokens.

    python -m benchmarks.adaptation_small --train-file stories.txt
    python -m benchmarks.adaptation_small --report --results benchmarks/adaptation_small.json

Prints the figures as Markdown tables, and draws the losses against the tokens trained on. Models that are there are
reused, and an interrupted command goes on when it is repeated.
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.cli import main as blockgen_hf
from blockgen_hf.evaluation import evaluate_likelihood
from blockgen_hf.evaluation.acceptance import accepted_draft_tokens, greedy_texts
from blockgen_hf.hub import convert_checkpoint
from blockgen_hf.tables import Table, error_bar
from blockgen_hf.training import BlockGenDataCollator, DataArguments, load_datasets, train_tokenizer
from blockgen_hf.training.recipe_building import training_texts
from blockgen_hf.training.tokenizers import END_OF_TEXT
from blockgen_hf.whole_files import write_json

from .adaptation import read_evaluations
from .experiments import option, rounded, svg_figure


SIZES = (1, 2, 4, 8)
_PROMPT = 16
_HEADS = 4


@dataclass(frozen=True)
class Settings:
    """The defaults made the committed figures."""

    train_file: str | None = option(None, "Stories, separated by <|endoftext|>; the last 60 are held out.")
    output_dir: str = option("runs/adaptation", "Folder for models, prepared data and results.")
    results: str | None = option(None, "Results file. Default: results.json in the output folder.")
    figure: str | None = option(None, "Where the curves are drawn. Default: curves.svg in the output folder.")
    report: bool = option(False, "Train nothing: report what has been measured.")

    vocab_size: int = option(1024, "Tokens of the tokenizer.")
    max_documents: int = option(12_000, "Stories to train on.")
    length: int = option(128, "Tokens per row.")
    hidden_size: int = option(128, "Width of the models.")
    layers: int = option(4, "Layers of the models.")
    batch_size: int = option(8, "Rows per step.")

    llama_steps: int = option(1000, "Training steps of the Llama.")
    adapt_steps: int = option(600, "Training steps of an adaptation.")
    learning_rate: float = option(3e-3, "Peak learning rate from scratch.")
    full_learning_rate: float = option(1e-3, "Of the adaptation of all weights.")
    adapter_learning_rate: float = option(3e-3, "Of the adapter.")

    eval_rows: int = option(120, "Validation rows.")
    eval_draws: int = option(2, "Draws of noise per validation row.")
    texts: int = option(32, "Texts whose drafts are counted.")
    timed_texts: int = option(4, "Texts that decodings are timed on, one at a time.")
    repeats: int = option(3, "Repeats of the timing.")

    def __post_init__(self) -> None:
        if self.train_file is None and not self.report:
            raise ValueError("`train_file` names the stories to train on; only `--report` needs none.")


LLAMA, LONGER = "Llama", "Llama, trained as long"
FRESH, ADAPTER, FULL, BEGINNING = "converted", "adapter", "full", "from the beginning"
FOLDERS = {LLAMA: "llama", LONGER: "llama-longer", FRESH: "base", ADAPTER: "adapter", FULL: "full"}
FOLDERS[BEGINNING] = "beginning"


class Bench:
    """Trains and measures what is not there yet."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, Path(settings.output_dir)
        self.file = Path(settings.results) if settings.results else self.folder / "results.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self) -> None:
        """Everything, in the order of what builds on what."""
        chosen = self.settings
        for name, steps in ((LLAMA, chosen.llama_steps), (LONGER, chosen.llama_steps + chosen.adapt_steps)):
            self.once(name, lambda steps=steps, name=name: self.train_llama(name, steps))
        self.convert(self.path(LLAMA), self.path(FRESH))
        untrained = self.folder / "untrained"
        if not untrained.exists():
            self.untrained_llama().save_pretrained(untrained)
            self.tokenizer.save_pretrained(untrained)
        self.convert(untrained, self.folder / "untrained-base")
        base, rates = self.path(FRESH), (chosen.full_learning_rate, chosen.adapter_learning_rate)
        for name, rate in zip((FULL, ADAPTER), rates, strict=True):
            self.once(name, lambda name=name, rate=rate: self.adapt(name, base, rate, chosen.adapt_steps))
        steps = chosen.llama_steps + chosen.adapt_steps
        start = self.folder / "untrained-base"
        self.once(BEGINNING, lambda: self.adapt(BEGINNING, start, chosen.learning_rate, steps))
        for name in (FULL, ADAPTER, BEGINNING):
            self.once(f"{name}, curve", lambda name=name: {"evaluations": curve(self.path(name))})
        for name in FOLDERS:
            self.once(f"{name}, evaluation", lambda name=name: self.evaluate(name))
        for name in (FRESH, ADAPTER, FULL, BEGINNING):
            self.once(f"{name}, speed", lambda name=name: self.speed(name))

    def once(self, name: str, measure: Any) -> None:
        if name in self.found:
            return
        started = time.process_time()
        record = measure() or {}
        self.found[name] = rounded({**record, "cpu_seconds": round(time.process_time() - started, 1)})
        write_json(self.file, self.found)
        print(name, self.found[name], flush=True)

    def path(self, name: str) -> Path:
        return self.folder / FOLDERS[name]

    @cached_property
    def data(self) -> DataArguments:
        self.folder.mkdir(parents=True, exist_ok=True)
        return DataArguments(**self.data_settings)

    @property
    def data_settings(self) -> dict[str, Any]:
        return dict(
            dataset=self.settings.train_file,
            document_separator=END_OF_TEXT,
            max_documents=self.settings.max_documents,
            validation_documents=60,
            sequence_length=self.settings.length,
            packing="packed",
            cache_dir=str(self.folder / "cache"),
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        saved = self.folder / "tokenizer"
        if not saved.exists():
            texts = training_texts(self.data, self.settings.max_documents)
            train_tokenizer(texts, self.settings.vocab_size, self.settings.length).save_pretrained(saved)
        return PreTrainedTokenizerFast.from_pretrained(saved)

    @cached_property
    def rows(self) -> tuple[Any, Any]:
        train, validation = load_datasets(self.data, self.tokenizer)
        return train, validation.select(range(min(len(validation), self.settings.eval_rows)))

    def untrained_llama(self) -> LlamaForCausalLM:
        chosen = self.settings
        set_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=chosen.hidden_size,
                intermediate_size=chosen.hidden_size * 11 // 4,
                num_hidden_layers=chosen.layers,
                num_attention_heads=_HEADS,
                num_key_value_heads=_HEADS // 2,
                max_position_embeddings=chosen.length,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    def train_llama(self, name: str, steps: int) -> dict[str, Any]:
        """With transformers' own model and trainer."""
        chosen, model = self.settings, self.untrained_llama()
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=0,
        )
        rows = self.rows[0].map(lambda row: {"labels": row["input_ids"]}, load_from_cache_file=False)
        columns = [column for column in rows.column_names if column not in ("input_ids", "labels")]
        Trainer(model, arguments, train_dataset=rows.remove_columns(columns)).train()
        model.save_pretrained(self.path(name))
        self.tokenizer.save_pretrained(self.path(name))
        return {"parameters": model.num_parameters(), "tokens": steps * chosen.batch_size * chosen.length}

    def convert(self, source: Path, output: Path) -> None:
        if not output.exists():
            convert_checkpoint(source, output, family="causal-lm", block_sizes=list(SIZES))

    def adapt(self, name: str, base: Path, rate: float, steps: int) -> dict[str, Any]:
        """By the command that users have."""
        chosen, data = self.settings, self.data_settings
        options = {
            "--dataset": data["dataset"],
            "--mode": "adapter" if name == ADAPTER else "full",
            "--output-dir": self.path(name),
            "--max-steps": steps,
            "--learning-rate": rate,
            "--batch-size": chosen.batch_size,
            "--sequence-length": chosen.length,
            "--validation-documents": data["validation_documents"],
        }
        overrides = [
            f"data.document_separator={json.dumps(END_OF_TEXT)}",
            f"data.max_documents={chosen.max_documents}",
            f"data.cache_dir={data['cache_dir']}",
            "training.eval_on_start=true",
            "training.eval_steps=0.2",
            "training.save_strategy=no",
            "training.save_total_limit=null",
        ]
        command = ["adapt", str(base), *map(str, (part for pair in options.items() for part in pair)), "--overwrite"]
        if blockgen_hf([*command, *overrides]) != 0:
            raise SystemExit(f"{name}: the training failed.")
        return {"tokens": steps * chosen.batch_size * chosen.length}

    def model(self, name: str) -> BlockGenForDiffusionLM:
        """The model of this name; of a Llama, what it is as a BlockGen model."""
        if name in (LLAMA, LONGER):
            base = self.folder / f"{FOLDERS[name]}-base"
            self.convert(self.path(name), base)
            return BlockGenForDiffusionLM.from_pretrained(base).eval()
        model = BlockGenForDiffusionLM.from_pretrained(self.path(FRESH if name == ADAPTER else name)).eval()
        if name == ADAPTER:
            model.load_adapter(str(self.path(ADAPTER)))
        return model

    def evaluate(self, name: str) -> dict[str, Any]:
        """Perplexities, and the accepted tokens of a draft."""
        chosen, model = self.settings, self.model(name)
        sizes = [1] if name in (LLAMA, LONGER) else list(SIZES)
        result = evaluate_likelihood(
            model,
            self.rows[1],
            sizes,
            chosen.eval_draws,
            batch_size=16,
            data_collator=BlockGenDataCollator(self.tokenizer),
        )
        record: dict[str, Any] = {"perplexity": {size: result.block_sizes[size].perplexity for size in sizes}}
        record["error"] = {size: result.block_sizes[size].perplexity_standard_error for size in sizes}
        if len(sizes) > 1:
            written = greedy_texts(model, self.prompts(chosen.texts), chosen.length - _PROMPT)
            record["accepted"] = accepted_draft_tokens(model, written, _PROMPT, SIZES[1:])
        return record

    def prompts(self, count: int) -> torch.Tensor:
        return torch.tensor(self.rows[1]["input_ids"][:count])[:, :_PROMPT]

    def speed(self, name: str) -> dict[str, Any]:
        """Tokens per CPU second, greedy, one text at a time; the decodings take turns, the first turn warms up."""
        chosen, model = self.settings, self.model(name)
        new_tokens = chosen.length - _PROMPT
        contenders: dict[str, dict[str, Any]] = {"ar": {"decoding": "ar"}}
        contenders |= {str(size): {"decoding": "speculative", "block_size": size} for size in SIZES[1:]}
        rates: dict[str, list[float]] = {contender: [] for contender in contenders}
        texts: dict[str, list[torch.Tensor]] = {contender: [] for contender in contenders}
        prompts = self.prompts(chosen.timed_texts).split(1)
        for repeat in range(chosen.repeats + 1):
            for contender, settings in contenders.items():
                started = time.process_time()
                texts[contender] = [
                    model.generate(
                        prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **settings
                    )
                    for prompt in prompts
                ]
                if repeat:
                    rates[contender].append(new_tokens * len(prompts) / (time.process_time() - started))
        same = all(
            torch.equal(one, two) for found in texts.values() for one, two in zip(found, texts["ar"], strict=True)
        )
        if not same:
            raise SystemExit(f"{name}: speculative decoding wrote another text.")
        times = {
            contender: statistics.median(a / b for a, b in zip(found, rates["ar"], strict=True))
            for contender, found in rates.items()
        }
        return {"rates": {contender: statistics.median(found) for contender, found in rates.items()}, "times": times}


def curve(run: Path) -> list[dict[str, float]]:
    """Of each evaluation of a run: the tokens trained on, and nats per token by block size."""
    return [
        {"tokens": entry["tokens"], **{str(size): entry[f"eval_nll_block_size_{size}"] for size in SIZES}}
        for entry in read_evaluations(run)
    ]


def draw(found: dict[str, Any], file: Path) -> None:
    """An SVG image: nats per token against the tokens trained on, a panel for each block size."""
    with svg_figure(file, 3.2 * len(SIZES), 3.2) as figure:
        panels = figure.subplots(1, len(SIZES), sharey=True)
        for panel, size in zip(panels, SIZES, strict=True):
            for name in (BEGINNING, FULL, ADAPTER):
                before = found[LLAMA]["tokens"] if name in (FULL, ADAPTER) else 0
                entries = found[f"{name}, curve"]["evaluations"]
                entries = [entry for entry in entries if entry["tokens"] or name != BEGINNING]  # untrained: 6.9 nats
                tokens = [(entry["tokens"] + before) / 1e6 for entry in entries]
                panel.plot(tokens, [entry[str(size)] for entry in entries], "o-", markersize=3, label=name)
            panel.set(title=f"block size {size}", xlabel="million tokens")
            panel.grid(visible=True, alpha=0.3)
        panels[0].set_ylabel("nats per token")
        panels[0].legend(frameon=False)


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = []
    for name in FOLDERS:
        if f"{name}, evaluation" not in found:
            continue
        record = found[f"{name}, evaluation"]
        tokens = found.get(name, found[LLAMA])["tokens"] + (found[LLAMA]["tokens"] if name in (ADAPTER, FULL) else 0)
        perplexities = [_with_error(record, str(size)) for size in SIZES]
        accepted = [f"{record['accepted'][str(size)]:.2f}" if "accepted" in record else "" for size in SIZES[1:]]
        rows.append([name, f"{tokens:,}", *perplexities, *accepted])
    columns = ["model", "tokens", *(f"perplexity, block {size}" for size in SIZES)]
    first = Table([*columns, *(f"accepted of {size}" for size in SIZES[1:])], rows)
    speeds = []
    for name in (FRESH, ADAPTER, FULL, BEGINNING):
        if f"{name}, speed" in found:
            record = found[f"{name}, speed"]
            cells = [f"{record['rates'][size]:.0f} ({record['times'][size]:.2f} x)" for size in map(str, SIZES[1:])]
            speeds.append([name, f"{record['rates']['ar']:.0f}", *cells])
    second = Table(["tokens per CPU second", "ar", *(f"speculative, block {size}" for size in SIZES[1:])], speeds)
    costs = {name: found[name]["cpu_seconds"] for name in FOLDERS if name in found}
    measured = sum(record["cpu_seconds"] for name, record in found.items() if name not in FOLDERS)
    costs = {f"{name}, training": seconds for name, seconds in costs.items()} | {"all measurements": measured}
    third = Table(["", "CPU minutes"], [[name, f"{seconds / 60:.1f}"] for name, seconds in costs.items()])
    return "\n\n".join(table.markdown() for table in (first, second, third))


def _with_error(record: dict[str, Any], size: str) -> str:
    if size not in record["perplexity"]:
        return ""
    value, error = record["perplexity"][size], record["error"][size]
    return f"{value:.2f} {error_bar(error or None, value, '.2f')}".rstrip()


def main() -> None:
    parser = HfArgumentParser(Settings, prog="python -m benchmarks.adaptation_small", description=__doc__)
    try:
        (settings,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    bench = Bench(settings)
    if not settings.report:
        bench.run()
    print(tables(bench.found))
    if all(f"{name}, curve" in bench.found for name in (FULL, ADAPTER, BEGINNING)):
        figure = Path(settings.figure or bench.folder / "curves.svg")
        draw(bench.found, figure)
        print(f"\n{figure}")


if __name__ == "__main__":
    main()
