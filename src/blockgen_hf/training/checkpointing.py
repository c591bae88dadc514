"""Folders that are complete or not there: written beside their place, then moved to it."""

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints


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


def _delete(folder: Path, unfinished: Path) -> None:
    unfinished.mkdir(parents=True, exist_ok=True)
    doomed = unfinished / f"deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


__all__ = ["UNFINISHED", "keep_checkpoint", "replace_folder", "rotate_checkpoints"]
