"""Checkpoints are complete or not there: written beside their place, then moved to it. And how they are read."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import sort_checkpoints

from ..errors import first_line
from ..hub.files import STATE, read_json
from .ema import TRAINING_WEIGHTS


# Where things are written that are not complete; the upper bar keeps it out of what Trainer uploads to the Hub.
UNFINISHED = "_unfinished"


def replace_folder(source: Path, target: Path) -> None:
    """Moves a folder to its place in one step; what stood there is deleted. Both are on one file system."""
    if target.exists():
        _delete(target, source.parent)
    os.replace(source, target)


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """
    Deletes the oldest checkpoints of a folder until `limit` are left, never the latest nor the best: as Trainer does,
    but a checkpoint that is being deleted is none any more.
    """
    if not limit or limit < 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    kept = {checkpoints[-1], *([Path(best)] if best is not None else [])} if checkpoints else set()
    for checkpoint in checkpoints:
        if len(checkpoints) <= max(limit, len(kept)):
            break
        if checkpoint not in kept:
            _delete(checkpoint, folder / UNFINISHED)
            checkpoints = [path for path in checkpoints if path != checkpoint]


def keep_checkpoint(folder: Path, best: str) -> None:
    """Deletes all checkpoints of a folder but one, if that one is there."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    if Path(best) in checkpoints:
        for checkpoint in checkpoints:
            if checkpoint != Path(best):
                _delete(checkpoint, folder / UNFINISHED)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


# Reading


@contextmanager
def reading(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """
    Whatever goes wrong within is the checkpoint's.

    Raises:
        ValueError: names the checkpoint, and says what to do.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch, safetensors, json, pickle and zipfile raise all kinds for damaged files
        raise ValueError(
            f"The checkpoint {checkpoint} cannot be read: {first_line(error)}. If it is damaged, delete its folder to "
            "resume from an earlier one, or start a new run."
        ) from error


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The state of the training, as [`Trainer`] saved it.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    with reading(checkpoint):
        return read_json(Path(checkpoint) / STATE)


def missing_file(checkpoint: str | os.PathLike[str], has_average: bool) -> str | None:
    """
    A file that is not there, and without which a run goes on otherwise than before; None if all are there.

    Args:
        has_average: whether the run averages its weights, and saves both.
    """
    folder = Path(checkpoint)
    needed = {"*optimizer*": "optimizer.pt", "scheduler.pt": "scheduler.pt", "rng_state*.pth": "rng_state.pth"}
    if any(folder.glob("global_step*")):  # DeepSpeed keeps all in files of its own
        needed = {}
    elif has_average and not any(folder.glob("pytorch_model_fsdp*")):
        needed[TRAINING_WEIGHTS] = TRAINING_WEIGHTS
    needed[STATE] = STATE
    return next((name for pattern, name in needed.items() if not any(folder.glob(pattern))), None)


def _delete(folder: Path, unfinished: Path) -> None:
    unfinished.mkdir(parents=True, exist_ok=True)
    doomed = unfinished / f"deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


__all__ = [
    "STATE",
    "UNFINISHED",
    "keep_checkpoint",
    "missing_file",
    "read_state",
    "reading",
    "replace_folder",
    "rotate_checkpoints",
]
