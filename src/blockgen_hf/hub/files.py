"""The files of a model's folder: their names, how the small ones are read, and how new ones replace old ones."""

import fnmatch
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import RepoCard

from ..text_files import read_json


CONFIG = "config.json"
WEIGHTS, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"
WEIGHT_FILES = (WEIGHTS, INDEX, SHARDS)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
CONVERSION = "conversion.json"  # of a converted checkpoint: where it comes from
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # beside the first one
CODE = "*_blockgen.py"  # that travels with a model
# What `save_pretrained` of a model and its tokenizer may write beside the weights and config.json.
MODEL_FILES = (GENERATION_CONFIG, *TOKENIZER_FILES, CODE)
README = "README.md"
# What a training run leaves beside its model: the recipe, and the state of the Trainer.
RECIPE, STATE = "recipe.yaml", "trainer_state.json"


def yaml_text(values: dict[str, Any]) -> str:
    """A recipe as it is written: sections and keys in their order, letters of all languages as they are."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


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


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name of a file is one of these, or matches one."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def move_model(source: Path, target: Path, former: Iterable[Path] = ()) -> None:
    """
    Moves the files of a model into a folder that holds other things too, the weights, or the index of their shards,
    last: until then, the folder is no model, neither the old one nor the new one.

    Args:
        former: what is deleted beside the weights and the configuration of the old model.

    Raises:
        OSError: a folder stands where a file goes; it is left alone.
    """
    weights = (WEIGHTS, INDEX, ADAPTER_WEIGHTS)
    for path in [*(target / name for name in (*weights, CONFIG, ADAPTER_CONFIG)), *target.glob(SHARDS), *former]:
        if path.is_symlink() or path.is_file():
            path.unlink()
    for path in sorted(source.iterdir(), key=lambda path: path.name in weights):
        old = target / path.name
        if path.is_dir() and old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        os.replace(path, old)
    shutil.rmtree(source)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copies the tokenizer of a folder, and says whether there is one."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in (*files, *source.glob(CHAT_TEMPLATES)):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    return bool(files)


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILES",
    "ADAPTER_WEIGHTS",
    "CHAT_TEMPLATES",
    "CODE",
    "CONFIG",
    "CONVERSION",
    "GENERATION_CONFIG",
    "INDEX",
    "MODEL_FILES",
    "README",
    "RECIPE",
    "SHARDS",
    "STATE",
    "TOKENIZER",
    "TOKENIZER_CONFIG",
    "TOKENIZER_FILES",
    "WEIGHTS",
    "WEIGHT_FILES",
    "copy_tokenizer",
    "matches",
    "move_model",
    "read_card",
    "read_json",
    "yaml_text",
]
