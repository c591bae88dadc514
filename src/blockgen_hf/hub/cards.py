"""
Cards: what README.md says of a model on the Hub, or of a data set of samples.

    folder, evaluations -> facts (card_facts.py, card_training.py, card_evaluation.py) -> template (hub_cards/) -> card

No figure is made up: what is not known is left out, and a section without content says that nothing was recorded.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from ..places import is_hub_id
from ..run_folders import json_lines
from ..tables import Table
from ..text_files import json_rows
from ..whole_files import write_whole
from .card_evaluation import Evaluation, model_index, read_results, validation_table
from .card_facts import first_prompt, read_model
from .card_training import read_training
from .files import read_card
from .licenses import License, find_license
from .portable import without_paths


REPLAY = "replay.svg"  # in the repository, where a card shows a model writing
_SAMPLE_FIELDS = {
    "text": str,
    "prompt": str,
    "decoding": str,
    "settings": dict,
    "seed": int,
    "num_function_evaluations": int,
}


def template(name: str) -> str:
    """The text of a file in `hub_cards/`."""
    return (files("blockgen_hf") / "hub_cards" / name).read_text(encoding="utf-8")


def model_card(
    folder: str | Path,
    *,
    repo_id: str,
    title: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    evaluations: Iterable[Evaluation] = (),
    replay: str | None = None,
    training_arguments: Mapping[str, Any] | None = None,
    trainer_state: Mapping[str, Any] | None = None,
) -> ModelCard:
    """
    The card of a model or an adapter, written from the contents of its folder.

    Args:
        folder (`str` or `Path`): folder written by `save_pretrained`, `blockgen-hf train` or `blockgen-hf convert`.
        repo_id (`str`): name of the model on the Hub, for the snippets.
        title (`str`, *optional*): title of the card. Default: the last part of `repo_id`.
        license (`str`, *optional*): an identifier of the Hub. Default: that of the folder's README.md, or its LICENSE
            file.
        language (`str` or `list[str]`, *optional*): codes such as `"en"`.
        datasets (`list[str]`, *optional*): names on the Hub. Default: that of the folder's recipe.
        base_model (`str`, *optional*): model on the Hub that it was fine-tuned from. Default: that of the recipe.
        tags (`list[str]`): additional tags.
        evaluations: results, see [`read_results`].
        replay (`str`, *optional*): name of a picture in the repository that shows the model writing.
        training_arguments, trainer_state (`dict`, *optional*): those of a running Trainer. Default: those in the
            folder.

    Raises:
        ValueError: the folder has no model or no licence, or an evaluation is refused.
    """
    folder = Path(folder)
    title = title or repo_id.split("/")[-1]
    facts = read_model(folder)
    training = read_training(folder, training_arguments, trainer_state)
    results = read_results(evaluations, facts.config)
    metadata = read_metadata(folder)
    found = find_license(folder, metadata, license)
    index = model_index(results)
    base_model = base_model or facts.base_model or training.base_model or metadata.get("base_model")
    data = ModelCardData(
        language=_languages(language) or metadata.get("language"),
        library_name="transformers" if facts.config is not None else "peft",
        pipeline_tag="text-generation",
        tags=[*facts.tags, *tags],
        datasets=list(datasets) if datasets else training.datasets or metadata.get("datasets"),
        base_model=base_model,
        model_name=title if index else None,
        eval_results=index or None,
        **found.metadata(),
    )
    return ModelCard.from_template(
        data,
        template_str=template("model_card.md"),
        repo_id=repo_id,
        table=_table,
        title=title,
        facts=facts,
        prompt=first_prompt(facts.config),
        training=training,
        validation=training.validation
        and validation_table(training.validation, training.validation_step, facts.config),
        results=results,
        replay=replay,
        found_license=_license_words(found),
        base=base_model,
    )


def samples_card(
    folder: str | Path,
    *,
    repo_id: str,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    model_id: str | None = None,
) -> DatasetCard:
    """
    The card of a data set of samples: JSONL files with one sample per line, as written by [`write_samples`].

    Args:
        model_id (`str`, *optional*): name of the model on the Hub. Default: that in the samples, if there is one.

    Raises:
        ValueError: there are no samples, or a sample lacks its decoding, settings, seed or function evaluations.
    """
    folder = Path(folder)
    rows = read_samples(folder)
    models = sorted({str(row["model"]) for row in rows if is_hub_id(row.get("model"))})
    metadata = read_metadata(folder)
    found = find_license(folder, metadata, license)
    data = DatasetCardData(
        language=_languages(language) or metadata.get("language"),
        task_categories=["text-generation"],
        size_categories="n<1K" if len(rows) < 1000 else "1K<n<10K" if len(rows) < 10_000 else None,
        pretty_name=repo_id.split("/")[-1],
        tags=["blockgen", "synthetic"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*.jsonl"}]}],
        **found.metadata(),
    )
    return DatasetCard.from_template(
        data,
        template_str=template("samples_card.md"),
        repo_id=repo_id,
        table=_table,
        models=[model_id] if model_id else models,
        num_samples=len(rows),
        groups=_groups(rows),
        fields=sorted({name for row in rows for name in row}),
        found_license=_license_words(found),
    )


def write_samples(results: Iterable[Mapping[str, Any]], file: str | Path) -> int:
    """
    Writes the output of `blockgen-hf generate --json` as JSONL, one sample per line, and returns their number.

    Raises:
        ValueError: a result has another form.
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        try:
            common = {key: result[key] for key in ("model", "dtype", "prompt", "seed")}
            common["model"] = without_paths(common["model"])
            for generation in result["results"]:
                settings = {key: value for key, value in generation["settings"].items() if key != "decoding"}
                about = {**common, "decoding": generation["decoding"], "settings": settings}
                rows += [{**about, **sample} for sample in generation["samples"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`results` must be what `blockgen-hf generate --json` prints; one lacks {error}."
            ) from error
    write_whole(Path(file), json_lines(rows))
    return len(rows)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """
    The samples of all JSONL files in a folder.

    Raises:
        ValueError: there are none, or one lacks a field.
    """
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        rows += [_checked_sample(row, where) for where, row in json_rows(str(file))]
    if not rows:
        raise ValueError(f"{folder} holds no samples: no .jsonl file with a sample a line.")
    return rows


def _checked_sample(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name, kind in _SAMPLE_FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(f"{where}: a sample must have `{name}` ({kind.__name__}), and has {row.get(name)!r}.")
    return row


def _groups(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each decoding with its settings: how many samples, and what one took."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in sorted(row["settings"].items()))
        groups[row["decoding"], settings].append(row["num_function_evaluations"])
    return [(*names, f"{len(costs):,}", f"{sum(costs) / len(costs):.1f}") for names, costs in groups.items()]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For the templates: Markdown, all columns to the left."""
    return Table(columns, rows, num_labels=len(columns)).markdown()


def read_metadata(folder: Path) -> dict[str, Any]:
    """Of the README.md that the folder has already."""
    card = read_card(folder)
    return {} if card is None else dict(card.data.to_dict())


def _languages(language: str | Sequence[str] | None) -> str | list[str] | None:
    return language if language is None or isinstance(language, str) else list(language)


def _license_words(found: License) -> str:
    if found.identifier != "other":
        return found.identifier
    return f"[{found.name}]({found.link})"


__all__ = ["REPLAY", "model_card", "read_metadata", "read_samples", "samples_card", "template", "write_samples"]
