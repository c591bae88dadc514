"""Quality against function evaluations and throughput, by samples of many decodings (BlockGen, tables 2, 8 to 19)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..places import name_without_folder
from ..quantization import readable_weights, weights_format
from ..run_folders import digest, sampled_digest
from ..whole_files import json_text, write_json
from .processes import Processes
from .samples_drawing import DrawnText, draw_texts, encode_prompts
from .samples_folder import SampleFolder
from .samples_grid import SampleCell, SkippedCell, sample_cells
from .samples_scores import SampleScorer, cut_texts


Progress = Callable[[str], None]


@dataclass(frozen=True)
class SampleResults:
    """
    What an evaluation of samples found.

    Args:
        settings (`dict`): what all cells have in common: model, length and number of texts, seed, machine, judge ...
        cells (`list[dict]`): figures of all cells in the folder, those of earlier runs too: `cell` ([`SampleCell`]),
            cost, `scores` ([`SampleScorer.score`]).
        skipped (`list` of [`SkippedCell`]): what of the grid cannot be, and why.
    """

    settings: dict[str, Any]
    cells: list[dict[str, Any]]
    skipped: list[SkippedCell]

    def to_dict(self) -> dict[str, Any]:
        skipped = [{"name": cell.name, "reason": cell.reason} for cell in self.skipped]
        return {"settings": self.settings, "cells": self.cells, "skipped": skipped}


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[SampleCell],
    output_dir: Path | str,
    *,
    num_samples: int,
    max_new_tokens: int,
    scorer: SampleScorer | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
    skipped: Sequence[SkippedCell] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SampleResults | None:
    """
    Generates texts in every cell, then scores them. Existing texts and scores in `output_dir` are reused, and
    are part of the results even if `cells` are fewer than before.

    Under `accelerate launch` or `torchrun`, each process generates a share of the texts with the whole model. The main
    process scores them and is the only one that gets the result; only it needs the scorer.

    Args:
        cells (`Sequence` of [`SampleCell`]): cells of [`sample_cells`], for the same `max_new_tokens`.
        output_dir (`Path`): see [`SampleFolder`]; `results.json` is written there too.
        num_samples (`int`): texts per cell. Text i has the same random numbers in every cell.
        scorer ([`SampleScorer`], *optional*): default: one without a judge.
        batch_size (`int`): texts generated together in a process. It changes tokens per second, not the texts.
        skipped (`Sequence` of [`SkippedCell`]): passed on to the result.
        overwrite (`bool`): whether to replace results of other settings.
        progress (`Callable`, *optional*): called with the next task, in the main process.

    Returns:
        [`SampleResults`]; None in processes other than the main one.

    Raises:
        ValueError: a number or a prompt is invalid, or the folder has other settings or is in use by another process.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be positive, but is {value!r}.")
    encode_prompts(model, tokenizer, prompts or [""], max_new_tokens)
    processes = Processes(on_cpu=model.device.type == "cpu")
    scorer = scorer or SampleScorer(tokenizer)
    drawing = {
        **_facts(model),
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "num_prompts": len(prompts),
        "prompts": digest([json_text(list(prompts))]),
        "seed": seed,
        "batch_size": batch_size,
        "processes": processes.count,
    }
    with processes.locking(output_dir):
        folder = SampleFolder(output_dir, drawing, scorer.settings, overwrite) if processes.is_main else None
        missing = [cell for cell in cells if folder is not None and not folder.has_texts(cell.name)]
        for number, cell in enumerate(processes.broadcast(missing), 1):
            if progress is not None and processes.is_main:
                progress(f"drawing {number} of {len(missing)}: {cell.name}")
            own = range(processes.rank, num_samples, processes.count)
            found = draw_texts(
                model,
                tokenizer,
                cell,
                own,
                max_new_tokens=max_new_tokens,
                prompts=prompts,
                seed=seed,
                batch_size=batch_size,
            )
            shares = processes.gather(found)
            if folder is not None:
                texts = sorted((text for drawn, _ in shares for text in drawn), key=lambda text: text.index)
                seconds, cpu_seconds = zip(*(clocks for _, clocks in shares), strict=True)
                folder.write_drawn(cell.name, texts, _figures(cell, texts, max(seconds), sum(cpu_seconds)))
        if folder is None:
            return None
        results = SampleResults({**drawing, **scorer.settings}, _score(folder, cells, scorer, progress), list(skipped))
        write_json(folder.path / "results.json", results.to_dict())
        return results


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    """What the texts and the time that they take depend on."""
    on_gpu = model.device.type == "cuda"
    return {
        "model": name_without_folder(model.name_or_path),
        "weights": sampled_digest(model, readable_weights(model)),
        "diffusion_type": model.config.diffusion_type,
        "dtype": weights_format(model),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "threads": torch.get_num_threads(),
    }


def _figures(cell: SampleCell, texts: Sequence[DrawnText], seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """What a cell cost: seconds on the wall, of the slowest process, and of the CPU, of all processes."""
    num_tokens = sum(len(text.token_ids) for text in texts)
    evaluations = sum(text.num_function_evaluations for text in texts)
    seeded = cell.ar_seed_tokens * len(texts)
    blocks = cell.num_blocks * len(texts)
    return {
        "cell": cell.to_dict(),
        "num_texts": len(texts),
        "num_new_tokens": num_tokens,
        "evaluations_per_text": evaluations / len(texts),
        "evaluations_per_token": evaluations / num_tokens,
        "evaluations_per_block": (evaluations - seeded) / blocks if blocks else None,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": num_tokens / seconds,
        "tokens_per_cpu_second": num_tokens / cpu_seconds,
        "scores": None,
    }


def _score(
    folder: SampleFolder, cells: Sequence[SampleCell], scorer: SampleScorer, progress: Progress | None
) -> list[dict[str, Any]]:
    """Figures of all cells that the folder holds, those of an earlier and larger grid too, with scores."""
    found = folder.all_figures()
    lost = [cell.name for cell in cells if cell.name not in found]
    if lost:
        raise ValueError(f"`output_dir` has lost the cell {lost[0]} while the evaluation ran.")
    for number, (name, figures) in enumerate(found.items(), 1):
        if not folder.has_scores(figures):
            if progress is not None:
                progress(f"scoring {number} of {len(found)}: {name}")
            figures["scores"] = scorer.score(folder.read_texts(name))
            folder.write_figures(name, figures)
    series = list(dict.fromkeys([cell.series for cell in cells] + [one["cell"]["series"] for one in found.values()]))
    return sorted(found.values(), key=lambda figures: _place(figures["cell"], series))


def _place(cell: dict[str, Any], series: list[str]) -> tuple[float, ...]:
    """Cells of one series together, in the order of their numbers, the budget last."""
    numbers = (cell[name] or 0 for name in ("block_size", "ar_seed_tokens", "temperature", "top_p", "nfe"))
    return (series.index(cell["series"]), *numbers)


__all__ = [
    "SampleCell",
    "SampleResults",
    "SampleScorer",
    "SkippedCell",
    "cut_texts",
    "evaluate_samples",
    "sample_cells",
]
