"""The files of a model's folder: their names, how the small ones are read, and how new ones replace old ones."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import RepoCard


CONFIG = "config.json"
WEIGHTS, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONVERSION = "conversion.json"  # of a converted checkpoint: where it comes from
README = "README.md"


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(values).__name__}.")
    return values


def read_card(folder: Path) -> RepoCard | None:
    """
    The README.md of a folder, None if there is none.

    Raises:
        ValueError: its metadata are damaged, or it is no text.
    """
    file = folder / README
    if not file.is_file():
        return None
    try:
        return RepoCard(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Mend it, or delete it to have a card written.") from error


def move_model(source: Path, target: Path, former: Iterable[Path] = ()) -> None:
    """
    Moves the files of a model into a folder that holds other things too, the weights, or the index of their shards,
    last: until then, the folder is no model, neither the old one nor the new one.

    Args:
        former: what is deleted beside the weights and the configuration of the old model.
    """
    weights = (WEIGHTS, INDEX, ADAPTER_WEIGHTS)
    for path in [*(target / name for name in (*weights, CONFIG, ADAPTER_CONFIG)), *target.glob(SHARDS), *former]:
        _remove(path)
    for path in sorted(source.iterdir(), key=lambda path: path.name in weights):
        _remove(target / path.name)
        os.replace(path, target / path.name)
    shutil.rmtree(source)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CONFIG",
    "CONVERSION",
    "INDEX",
    "README",
    "SHARDS",
    "WEIGHTS",
    "move_model",
    "read_card",
    "read_json",
]
