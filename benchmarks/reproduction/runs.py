"""Models are trained once and used by every claim; what was measured is kept in one file."""

import json
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import set_seed

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.metrics.generative_perplexity.generative_perplexity import Judge
from blockgen_hf.training import BlockGenTrainer, BlockGenTrainingArguments, apply_preset, load_datasets
from blockgen_hf.training.recipe_building import vocabulary
from blockgen_hf.whole_files import write_json

from ..experiments import rounded
from .measures import MEASURES
from .settings import Settings
from .tasks import Task, load_task, story_data


_HEAD_SIZE = 32
_JUDGE_LENGTH = 64
_JUDGE_SEED = 1000
_CLIPPING_ROWS = 32


@dataclass(frozen=True)
class Variant:
    """A model: a preset, and in what it differs from it."""

    preset: str
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "mixture": Variant("blockgen-masked"),
    "mixture, uniform noise": Variant("blockgen-uniform"),
    "mixture, 5 % AR": Variant("blockgen-5-percent-ar"),
    "mixture, one size per step": Variant("blockgen-masked", training={"block_size_sampling": "shared"}),
    "block size 1": Variant("ar-block-1"),
    "block size 4": Variant("blockgen-masked", {"block_sizes": [4]}),
    "block size 16": Variant("blockgen-masked", {"block_sizes": [16]}),
    "block size 16, uniform noise": Variant("blockgen-uniform", {"block_sizes": [16]}),
    # Noise levels are not clipped: so few steps leave no time for choosing intervals.
    "mix-scale": Variant("mix-scale", training={"noise_interval_steps": 0}),
    "BD3-LM, whole interval": Variant("bd3lm", training={"noise_interval_steps": 0}),
    "BD3-LM, clipped": Variant("bd3lm", training={"noise_interval_rows": _CLIPPING_ROWS}),
}


@dataclass(frozen=True)
class Cell:
    """
    A figure of every seed.

    Args:
        measure: one of `MEASURES`, and `key`, what it is asked for.
        metric: the figure's name in what the measure returns.
    """

    task: str
    variant: str
    measure: str
    key: str
    metric: str


class Bench:
    """Trains and measures what is asked for and not yet known."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self.file = Path(settings.results) if settings.results else self.folder / "results.json"
        self.found: dict[str, Any] = {}
        self._tasks: dict[str, Task] = {}
        self._models: dict[str, BlockGenForDiffusionLM] = {}
        if self.file.exists():
            content = json.loads(self.file.read_text())
            if content["settings"] != settings.that_matter():
                raise SystemExit(f"{self.file} has the results of other settings: name another file with --results.")
            self.found = content["results"]

    def values(self, cell: Cell) -> list[float]:
        """The figure of each seed."""
        return [self.record(cell, seed)[cell.metric] for seed in range(self.settings.seeds)]

    def is_known(self, cell: Cell) -> bool:
        """Whether all seeds have been measured."""
        return all(_name(cell, seed) in self.found for seed in range(self.settings.seeds))

    def record(self, cell: Cell, seed: int) -> dict[str, Any]:
        """What the cell's measure returned, measured now if it was not before."""
        name = _name(cell, seed)
        if name not in self.found:
            model = self.model(cell.task, cell.variant, seed)
            started = time.process_time()
            record = MEASURES[cell.measure](self, self.task(cell.task), model, cell.key)
            self._keep(name, {**record, "cpu_seconds": round(time.process_time() - started, 1)})
        return self.found[name]

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            self._tasks[name] = load_task(name, self.settings)
        return self._tasks[name]

    def model(self, task_name: str, variant: str, seed: int) -> BlockGenForDiffusionLM:
        folder = self.folder / task_name / re.sub(r"\W+", "-", variant) / str(seed)
        if str(folder) not in self._models:
            if not (folder / "config.json").exists():
                chosen, settings, task = VARIANTS[variant], self.settings, self.task(task_name)
                sizes = {"hidden_size": settings.hidden_size, "num_hidden_layers": settings.layers}
                record = self._train(task, folder, chosen, sizes, {"max_steps": settings.steps}, seed=seed)
                self._keep(f"{task_name} | {variant} | training | {seed}", record)
            self._models[str(folder)] = BlockGenForDiffusionLM.from_pretrained(folder).eval()
        return self._models[str(folder)]

    @cached_property
    def judge(self) -> Judge:
        """An AR model of the same stories, with another seed and larger, which no text was drawn from."""
        stories, folder = self.task("tinystories"), self.folder / "tinystories" / "judge"
        if not (folder / "config.json").exists():
            data = story_data(self.settings, folder.parent, sequence_length=_JUDGE_LENGTH, packing="packed")
            train, validation = load_datasets(data, stories.tokenizer)
            task = Task("judge", _JUDGE_LENGTH, stories.tokenizer, train, validation)
            sizes = {"hidden_size": self.settings.judge_size, "num_hidden_layers": self.settings.layers + 1}
            arguments = {"max_steps": self.settings.judge_steps}
            self._keep(
                "tinystories | judge | training",
                self._train(task, folder, Variant("ar"), sizes, arguments, seed=_JUDGE_SEED),
            )
        return Judge(BlockGenForDiffusionLM.from_pretrained(folder).eval(), stories.tokenizer, "AR, same data")

    def _train(
        self,
        task: Task,
        folder: Path,
        variant: Variant,
        sizes: dict[str, Any],
        arguments: dict[str, Any],
        *,
        seed: int,
    ) -> dict[str, Any]:
        settings = self.settings
        fields, training = apply_preset(
            variant.preset,
            task.length,
            {
                **sizes,
                "num_attention_heads": max(1, sizes["hidden_size"] // _HEAD_SIZE),
                "max_position_embeddings": task.length,
                "hidden_dropout": 0.0,
                "cond_dim": 16,
            },
            {
                **arguments,
                "per_device_train_batch_size": settings.batch_size,
                "block_size_unit": "sequence",  # every step has all block sizes
                "learning_rate": settings.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "adam_beta2": 0.98,
                "ema_decay": 0.98,
            },
        )
        fields |= variant.model
        training |= variant.training
        fields |= vocabulary(task.tokenizer, fields["diffusion_type"])
        if training["noise_interval_steps"]:
            training["noise_interval_steps"] = max(1, arguments["max_steps"] // 4)
        set_seed(seed)
        trainer = BlockGenTrainer(
            BlockGenForDiffusionLM(BlockGenConfig(**fields)),
            BlockGenTrainingArguments(
                output_dir=str(folder.with_name("trainer")),
                save_strategy="no",
                logging_steps=max(1, arguments["max_steps"] // 10),
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=seed,
                **training,
            ),
            train_dataset=task.train,
            eval_dataset=task.validation,
            processing_class=task.tokenizer,
        )
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        trainer.model.save_pretrained(folder)
        return {
            "parameters": trainer.model.num_parameters(),
            "tokens": trainer.state.num_input_tokens_seen,
            "cpu_seconds": round(seconds, 1),
        }

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        self.found[name] = rounded(record)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"settings": self.settings.that_matter(), "results": self.found})


def _name(cell: Cell, seed: int) -> str:
    return f"{cell.task} | {cell.variant} | {cell.measure} {cell.key} | {seed}"
