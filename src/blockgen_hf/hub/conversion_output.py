"""Output folders of conversions: complete, or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import ADAPTER_FILES, CONFIG, CONVERSION, MODEL_FILES, WEIGHT_FILES, matches, move_model, read_json


_UNFINISHED = "_unfinished-"  # one that was killed stays, and is not pushed


def check_output(output: Path, overwrite: bool) -> None:
    """
    Raises:
        ValueError: `output` cannot be written, holds something and `overwrite` is False, or has a link or a folder
            where a file of the model goes.
    """
    place = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"`output` must be a folder, but {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"`output` {output} cannot be written: you have no permission. Name another folder.")
    is_empty = not output.is_dir() or all(path.name.startswith(_UNFINISHED) for path in output.iterdir())
    if not overwrite and not is_empty:
        raise ValueError(
            f"`output` {output} is not empty: name another folder, or replace the model in it with `overwrite` "
            "(--overwrite)."
        )
    for path in sorted(output.iterdir()) if output.is_dir() else ():
        is_of_a_model = matches(path.name, (*MODEL_FILES, *WEIGHT_FILES, CONFIG, *ADAPTER_FILES, CONVERSION))
        if is_of_a_model and (path.is_symlink() or not path.is_file()):
            kind = "link" if path.is_symlink() else "folder"
            raise ValueError(
                f"{path} is a {kind}, which is not replaced by a file: move it away, or name another folder."
            )


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """
    A folder to write to, beside `output` if there is none yet, else in it, as it may be all that may be written. When
    the block ends it becomes `output`, or its files replace those of an earlier conversion there and leave all others;
    when it fails nothing is left of it.

    Raises:
        ValueError: something was written to `output` in the meantime, and `overwrite` is False.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (output if output.is_dir() else output.parent) / f"{_UNFINISHED}{output.name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        check_output(output, overwrite)
        if output.is_dir():
            move_model(unfinished, output, _former_files(output))
        else:
            os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _former_files(folder: Path) -> list[Path]:
    """
    What an earlier conversion wrote and a new one may not write again. The list came with the folder, which may be a
    download: it only chooses among the files of the folder that have the names of a model's files.
    """
    if not (folder / CONVERSION).is_file():
        return []
    names = read_json(folder / CONVERSION).get("files")
    if not isinstance(names, list):
        return []
    return [path for path in folder.iterdir() if path.name in names and matches(path.name, MODEL_FILES)]


__all__ = ["check_output", "new_folder"]
