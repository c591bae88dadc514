"""
Results on a card: what `blockgen-hf evaluate --json` writes, and qualities of samples.

No quality of samples without its price: each row says how many function evaluations a sample took, and the entropy of
the samples, which tells whether they say the same again and again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.evaluation_draws_blockgen import is_exact
from ..places import is_hub_id, name_without_folder
from ..tables import error_bar, number
from .files import read_json


Evaluation = str | Path | Mapping[str, Any]

_MIXTURE = {  # the figure to quote first: a bound with any number of draws
    "jensen": ("mixture, Jensen (Eq. 7)", "upper bound"),
    "log_sum_exp": ("mixture, log-sum-exp (Eq. 20)", "on average too low"),
    "log_sum_exp_corrected": ("mixture, the same, corrected", "estimate"),
    "log_sum_exp_upper": ("mixture, the same, from above", "upper bound"),
}
_QUALITY_NUMBERS = ("value", "num_function_evaluations", "entropy")
_METRIC_NAMES = {"generative_perplexity": "generative perplexity", "mauve": "MAUVE"}


@dataclass(frozen=True)
class LikelihoodRow:
    """A line of the table: nats a token, perplexity, its standard error over the draws, and what the figure is."""

    name: str
    nll: float
    perplexity: float
    standard_error: float | None
    meaning: str


@dataclass(frozen=True)
class LikelihoodTable:
    """The figures of one data set."""

    title: str
    details: str
    rows: list[LikelihoodRow]
    dataset: dict[str, Any]

    def cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                f"{row.nll:.4f}",
                f"{row.perplexity:.2f}",
                error_bar(row.standard_error, row.perplexity),
                row.meaning,
            )
            for row in self.rows
        ]


@dataclass(frozen=True)
class QualityRow:
    """The quality of samples of one decoding."""

    metric: str
    value: float
    standard_error: float | None
    decoding: str
    settings: str
    num_function_evaluations: float
    entropy: float
    num_samples: int | None
    scorer: str | None
    dataset: str | None

    @property
    def name(self) -> str:
        return _METRIC_NAMES.get(self.metric, self.metric.replace("_", " ")) + (
            f" by {self.scorer}" if self.scorer else ""
        )


@dataclass(frozen=True)
class Results:
    likelihoods: list[LikelihoodTable]
    qualities: list[QualityRow]

    @property
    def is_empty(self) -> bool:
        return not (self.likelihoods or self.qualities)

    def quality_cells(self) -> list[tuple[str, ...]]:
        return [
            (
                ", ".join(filter(None, (row.name, row.dataset))),
                f"{number(row.value, 'g')} {error_bar(row.standard_error, row.value)}".rstrip(),
                number(row.num_function_evaluations, "g"),
                number(row.entropy, "g"),
                ", ".join(
                    filter(None, (row.decoding, row.settings, f"{row.num_samples} samples" * bool(row.num_samples)))
                ),
            )
            for row in self.qualities
        ]


def read_results(evaluations: Iterable[Evaluation], config: BlockGenConfig | None) -> Results:
    """
    Args:
        evaluations: files, or what is in them: the result of `blockgen-hf evaluate --json`, or `{"quality": [row,
            ...]}`, each row with `metric`, `value`, `decoding`, `num_function_evaluations` (a sample, on average),
            `entropy`, and, if you like, `settings`, `standard_error`, `num_samples`, `scorer` and `dataset`.
        config: of the model; tells which bounds are exact.

    Raises:
        ValueError: something else, figures that are not finite, or a quality without its price.
    """
    likelihoods, qualities = [], []
    for evaluation in evaluations:
        name = str(evaluation) if isinstance(evaluation, (str, Path)) else "the evaluation"
        values = read_json(Path(evaluation)) if isinstance(evaluation, (str, Path)) else evaluation
        if "block_sizes" in values:
            likelihoods.append(_likelihood_table(values, config, name))
        if "quality" in values:
            if not isinstance(values["quality"], Sequence) or isinstance(values["quality"], str):
                raise ValueError(f"`quality` of {name} must be a list of rows, but is {values['quality']!r}.")
            qualities += [
                _quality_row(row, f"row {number} of `quality` in {name}")
                for number, row in enumerate(values["quality"], 1)
            ]
        if not {"block_sizes", "quality"} & set(values):
            raise ValueError(
                f"{name} is no evaluation: it has neither `block_sizes`, as `blockgen-hf evaluate --json` writes, nor "
                f"`quality`, but {sorted(values)}."
            )
    return Results(likelihoods, qualities)


def validation_table(metrics: Mapping[str, float], step: int | None, config: BlockGenConfig | None) -> LikelihoodTable:
    """What Trainer logged, as a table of its own."""
    nested: dict[str, Any] = {"block_sizes": {}}
    for name, nll in metrics.items():
        if name.startswith("nll_") and not name.startswith("nll_standard_error"):
            which = name.removeprefix("nll_")
            figure = {
                "nll": nll,
                "perplexity": metrics[f"perplexity_{which}"],
                "perplexity_standard_error": metrics.get(f"perplexity_standard_error_{which}"),
            }
            size = which.removeprefix("block_size_")
            (nested["block_sizes"] if size != which else nested)[size] = figure
    title = "Validation rows of the training"
    return LikelihoodTable(
        title, f"At step {step:,}, as the Trainer logged it.", _likelihood_rows(nested, config, title), {}
    )


def _likelihood_table(values: Mapping[str, Any], config: BlockGenConfig | None, name: str) -> LikelihoodTable:
    data = values.get("data") or {}
    dataset = data.get("dataset") or "unnamed data"
    names = dataset if isinstance(dataset, list) else [dataset]
    title = ", ".join(map(name_without_folder, names))
    details = []
    if data.get("dataset_split") and all(map(is_hub_id, names)):
        details.append(f"split {data['dataset_split']}")
    for key, words in (
        ("num_sequences", "rows"),
        ("num_tokens", "tokens scored"),
        ("num_draws", "Monte-Carlo draws a row"),
    ):
        if values.get(key) is not None:
            details.append(f"{values[key]:,} {words}")
    if values.get("seed") is not None:
        details.append(f"seed {values['seed']}")
    if values.get("dtype"):
        details.append(str(values["dtype"]))
    if values.get("weights"):
        details.append(
            "mixture weights " + ", ".join(f"{size}: {weight:.3g}" for size, weight in values["weights"].items())
        )
    described = {
        "dataset_type": names[0] if is_hub_id(names[0]) else title,
        "dataset_name": title,
        "dataset_config": data.get("dataset_config"),
        "dataset_split": data.get("dataset_split"),
        "dataset_revision": data.get("dataset_revision"),
    }
    return LikelihoodTable(title, ", ".join(details), _likelihood_rows(values, config, name), described)


def _likelihood_rows(values: Mapping[str, Any], config: BlockGenConfig | None, name: str) -> list[LikelihoodRow]:
    rows = []
    for size, figure in sorted(values["block_sizes"].items(), key=lambda item: int(item[0])):
        meaning = "exact" if config is not None and is_exact(config, int(size)) else "upper bound"
        rows.append(_likelihood_row(f"block size {size}", figure, meaning, name))
    for key, (label, meaning) in _MIXTURE.items():
        if values.get(key) is not None:
            rows.append(_likelihood_row(label, values[key], meaning, name))
    if not rows:
        raise ValueError(f"{name} holds no figure of a block size.")
    return rows


def _likelihood_row(label: str, figure: Mapping[str, Any], meaning: str, name: str) -> LikelihoodRow:
    try:
        nll, perplexity = float(figure["nll"]), float(figure["perplexity"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The figure of {label!r} in {name} needs the numbers `nll` and `perplexity`, but is {figure!r}."
        ) from error
    if not (math.isfinite(nll) and math.isfinite(perplexity)):
        raise ValueError(
            f"The figure of {label!r} in {name} is not finite: {figure!r}. Evaluate again, or leave it out."
        )
    return LikelihoodRow(label, nll, perplexity, figure.get("perplexity_standard_error"), meaning)


def _quality_row(row: Any, where: str) -> QualityRow:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be an object, but is {row!r}.")
    for key in ("metric", "decoding"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise ValueError(f"{where} must say its `{key}`, but has {row.get(key)!r}.")
    for key in _QUALITY_NUMBERS:
        value = row.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(
                f"{where} must have a number `{key}`, but has {value!r}: a quality of samples says nothing without "
                "the function evaluations that a sample took, and without the entropy of the samples."
            )
    if row["num_function_evaluations"] <= 0:
        raise ValueError(
            f"`num_function_evaluations` of {where} must be positive, but is {row['num_function_evaluations']!r}."
        )
    settings = row.get("settings") or {}
    if isinstance(settings, Mapping):
        settings = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "decoding")
    return QualityRow(
        metric=row["metric"],
        value=row["value"],
        standard_error=row.get("standard_error"),
        decoding=row["decoding"],
        settings=str(settings),
        num_function_evaluations=row["num_function_evaluations"],
        entropy=row["entropy"],
        num_samples=row.get("num_samples"),
        scorer=row.get("scorer"),
        dataset=row.get("dataset"),
    )


def model_index(results: Results) -> list[EvalResult]:
    """The results as metadata."""
    found = []
    for table in results.likelihoods:
        for row in table.rows:
            found.append(
                EvalResult(
                    task_type="text-generation",
                    metric_type="perplexity",
                    metric_name=f"Perplexity, {row.name} ({row.meaning})",
                    metric_value=round(row.perplexity, 4),
                    **table.dataset,
                )
            )
    for quality in results.qualities:
        price = f"{quality.num_function_evaluations:g} function evaluations, entropy {quality.entropy:g}"
        how = ", ".join(filter(None, (quality.decoding, quality.settings)))
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=quality.dataset or "samples",
                dataset_name=quality.dataset or "Samples of the model",
                metric_type=quality.metric,
                metric_name=f"{quality.name} ({how}; {price})",
                metric_value=quality.value,
                metric_args={
                    "decoding": quality.decoding,
                    "num_function_evaluations": quality.num_function_evaluations,
                    "entropy": quality.entropy,
                },
            )
        )
    return found


__all__ = ["Evaluation", "LikelihoodTable", "QualityRow", "Results", "model_index", "read_results", "validation_table"]
