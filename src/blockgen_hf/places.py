"""Whether a name means something on this machine or on the Hub."""

import glob
import os
from pathlib import Path
from typing import Any, Literal


# How the names of data files end, with what is read of them (`training/documents.py`), and of others.
DATA_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_FILES = (*DATA_KINDS, *COMPRESSIONS, ".csv", ".arrow")


def looks_like_a_path(name: str) -> bool:
    """Whether a name can only mean a file or a folder, whether it is there or not."""
    return (
        glob.has_magic(name)
        or name.startswith((".", "~", "/", os.sep))
        or name.count("/") > 1
        or name.lower().endswith(_FILES)
    )


def is_hub_id(name: Any) -> bool:
    """Whether a name can be an id on the Hub, `name` or `namespace/name`, and is nothing on this machine."""
    if not isinstance(name, str) or not name or looks_like_a_path(name) or Path(name).exists():
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii()


def local_folder(name: str | Path) -> Path | None:
    """
    The folder of a model or a tokenizer on this machine; None where the name is one on the Hub.

    Raises:
        FileNotFoundError: it can only be a folder, but there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"There is no folder {name}: that is a file.")
    if looks_like_a_path(str(name)):
        raise FileNotFoundError(f"There is no folder {name}.")
    return None


def data_place(names: str | list[str]) -> Literal["folder", "files", "hub"]:
    """Where data are: in a folder, in files, which may be globs and need not be there, or on the Hub."""
    names = [names] if isinstance(names, str) else names
    path = os.path.expanduser(names[0])
    if len(names) == 1 and os.path.isdir(path):
        return "folder"
    return "files" if len(names) > 1 or os.path.exists(path) or looks_like_a_path(names[0]) else "hub"


def name_without_folder(name: str) -> str:
    """A name for what leaves this machine: an id on the Hub as it is, a path without the folders that lead to it."""
    return name if is_hub_id(name) else Path(name).name


__all__ = [
    "COMPRESSIONS",
    "DATA_KINDS",
    "data_place",
    "is_hub_id",
    "local_folder",
    "looks_like_a_path",
    "name_without_folder",
]
