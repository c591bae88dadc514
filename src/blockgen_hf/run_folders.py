"""
Output folders of work that may be interrupted and resumed: who may write there, and what the work was made with.

An evaluation or a training run keeps the settings that its results depend on beside them, as JSON. When it finds them
again, it goes on only where they are the same. What is too large to be kept, such as weights or data, is kept as a
digest. Rows are appended so that a kill loses nothing but the row that was being written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


LOCK = ".lock"
_LONGEST_VALUE = 80  # characters of a value in a message
_NUMBERS_OF_A_TENSOR = 64  # that a sampled digest reads


# Who writes


class FolderInUseError(ValueError):
    """Another process is writing to a folder."""


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """
    Keeps other processes from writing to a folder, which is created if it does not exist, until the block ends.

    The operating system holds the lock, so that nothing is left of it when a process is killed. Its file stays in the
    folder, since another process may be about to take it; a folder that was created here and is still empty goes.

    Raises:
        FolderInUseError: another process has the lock.
        OSError: the folder cannot be created or written to.
    """
    path = Path(folder).expanduser()
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"Another process is writing to the folder {folder}. Wait until it has finished, or choose another "
            "output folder."
        ) from None
    try:
        yield
    finally:
        if is_new and [entry.name for entry in path.iterdir()] == [LOCK]:
            with suppress(OSError):
                (path / LOCK).unlink()
                path.rmdir()
        lock.release()


# Settings


@dataclass(frozen=True)
class Difference:
    """A setting that differs between an earlier run and this one. As a string it is part of a sentence."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"`{self.name}` was {shown(self.before)}, and is {shown(self.now)} now"


def shown(value: Any) -> str:
    """A value of a setting for messages, not too long."""
    text = repr(getattr(value, "value", value))  # of an enumeration its value
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ, by name. A setting that one of them lacks is None there."""
    names = sorted({*before, *now})
    return [Difference(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def as_stored(value: Any) -> Any:
    """A value as it is read again from JSON, where tuples are lists and keys are strings."""
    return json.loads(json.dumps(value))


def check_settings(place: Path, before: Mapping[str, Any], now: Mapping[str, Any], group: str = "") -> None:
    """
    Refuses to go on with other settings.

    Args:
        place: a file or folder that holds the results so far.
        before, now: the settings as they are stored.
        group: what they are settings of, for the message.

    Raises:
        ValueError: names the first setting that differs.
    """
    for found in differences(before, now)[:1]:
        where = f"{group}: " if group else ""
        raise ValueError(
            f"{place} was made with other settings ({where}{found}): overwrite it, or choose another folder."
        )


# Rows


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSONL. Half of a surrogate pair, which UTF-8 cannot write, is escaped as JSON does it."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode("utf-8", errors="backslashreplace")


def append_rows(stream: BinaryIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends JSON lines to a file; they are on the disk when this returns."""
    stream.write(json_lines(rows))
    stream.flush()
    os.fsync(stream.fileno())


# Digests


def digest(parts: Iterable[Any], *, is_long: bool = False) -> str:
    """
    A digest of strings and buffers, one after the other: 16 hexadecimal digits of SHA-256, or 32 of BLAKE2
    (`is_long`). Both are found in the folders of earlier releases, which can be resumed as long as neither changes.
    """
    hasher = hashlib.blake2b(digest_size=16) if is_long else hashlib.sha256()
    for part in parts:
        hasher.update(part.encode() if isinstance(part, str) else part)
    return hasher.hexdigest() if is_long else hasher.hexdigest()[:16]


def weights_digest(weights: Mapping[str, "torch.Tensor"]) -> str:
    """A digest of every weight, by name, to the last bit."""
    import torch

    def parts() -> Iterator[Any]:
        for name, tensor in sorted(weights.items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}"
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    return digest(parts(), is_long=True)


def sampled_digest(model: "PreTrainedModel", weights: Mapping[str, Any]) -> str:
    """
    A digest of a model's settings, its layers and some 64 numbers of each of its weights, by name. It differs between
    trained models.
    """
    import torch

    configs = [model.config.to_diff_dict(), model.generation_config.to_diff_dict()]
    for config in configs:
        config.pop("transformers_version", None)
    layout = [*configs, [type(module).__name__ for module in model.modules()]]

    def numbers() -> Iterator[str]:
        for name, weight in sorted(weights.items()):
            if isinstance(weight, torch.Tensor):
                flat = weight.detach().flatten()
                few = flat[:: max(1, flat.numel() // _NUMBERS_OF_A_TENSOR)].to(device="cpu", dtype=torch.float64)
                yield f"{name} {list(weight.shape)} {few.tolist()}"

    return digest(chain([json.dumps(layout, sort_keys=True, default=str)], numbers()))


__all__ = [
    "LOCK",
    "Difference",
    "FolderInUseError",
    "append_rows",
    "as_stored",
    "check_settings",
    "differences",
    "digest",
    "json_lines",
    "lock_folder",
    "sampled_digest",
    "shown",
    "weights_digest",
]
