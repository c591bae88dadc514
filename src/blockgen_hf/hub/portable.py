"""What no published folder says: where things lie on this machine, and names that older releases do not know."""

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..tokenizer_loading import LOCAL_SETTINGS
from ..whole_files import json_text, write_whole
from .files import (
    ADAPTER_CONFIG,
    CONFIG,
    CONVERSION,
    GENERATION_CONFIG,
    RECIPE,
    TOKENIZER_CONFIG,
    read_json,
    yaml_text,
)


_PATH = re.compile(r"(file:)?(/|~\w*/|\.{1,2}/|[A-Za-z]:[\\/])[^\n]+")
_PATH_KEY = re.compile(r"name_or_path|.*_(file|dir|path)")  # of a tokenizer, whose tokens may look like paths
_NO_LIMIT = 1e9  # what transformers writes where a tokenizer has no length is larger
_SETTINGS = (CONFIG, GENERATION_CONFIG, CONVERSION, ADAPTER_CONFIG)


def without_paths(value: Any) -> Any:
    """Nested settings in which files and folders of this machine are named without the folders that they lie in."""
    if isinstance(value, str):
        return (re.split(r"[\\/]", value.rstrip("\\/"))[-1] or value) if _PATH.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, list) else value


def portable_tokenizer_config(values: dict[str, Any], positions: int | None) -> dict[str, Any]:
    """
    tokenizer_config.json as it is published: of a class that transformers 4 knows too, which opens the same tokenizer;
    as long as the model; and without paths.

    Args:
        positions: of the model; None where it is not known.
    """
    kept = {key: value for key, value in values.items() if key not in LOCAL_SETTINGS}
    for key in filter(_PATH_KEY.fullmatch, kept):
        kept[key] = without_paths(kept[key])
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if positions is not None:
        kept["model_max_length"] = positions
    elif isinstance(kept.get("model_max_length"), (int, float)) and kept["model_max_length"] > _NO_LIMIT:
        del kept["model_max_length"]
    return kept


def make_tokenizer_portable(folder: Path, positions: int | None) -> None:
    """Rewrites the tokenizer_config.json that `save_pretrained` left, if there is one."""
    file = folder / TOKENIZER_CONFIG
    if file.is_file():
        values = portable_tokenizer_config(read_json(file), positions)
        write_whole(file, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def portable_text(path: str, text: str, positions: int | None) -> str:
    """
    A small file as it is published; what needs no change comes back as it is.

    Args:
        path: of the file in the folder.
        positions: see [`portable_tokenizer_config`].
    """
    if path.endswith(".jsonl"):
        return "\n".join(map(_portable_line, text.split("\n")))
    try:
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text  # whoever reads it says so
    if path == TOKENIZER_CONFIG:
        portable = portable_tokenizer_config(values, positions)
    else:
        portable = without_paths(values)
    if portable == values:
        return text
    if path.endswith(".json"):
        return json_text(portable)
    return yaml_text(portable)


def has_portable_form(path: str) -> bool:
    """Whether [`portable_text`] knows the file."""
    return path in (*_SETTINGS, TOKENIZER_CONFIG, RECIPE) or path.endswith(".jsonl")


def _portable_line(line: str) -> str:
    """A sample: its texts are left alone, the model that wrote it is named without its folder."""
    try:
        row = json.loads(line)
    except ValueError:
        return line
    if not isinstance(row, dict) or without_paths(row.get("model")) == row.get("model"):
        return line
    return json.dumps({**row, "model": without_paths(row["model"])}, ensure_ascii=False)


__all__ = [
    "has_portable_form",
    "make_tokenizer_portable",
    "portable_text",
    "portable_tokenizer_config",
    "without_paths",
]
