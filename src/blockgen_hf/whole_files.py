"""Files that are complete or not there, and disks that are full."""

import errno
import os
from pathlib import Path


# How libraries say it that do not hand on the error of the operating system: safetensors, pyarrow; torch.
_FULL = ("no space left on device", "os error 28", "pytorchstreamwriter failed", "inline_container.cc")


def write_whole(target: Path, content: str | bytes) -> None:
    """Writes a file, text in UTF-8, under another name first: the old one is there until the new one is complete."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(unfinished, target)


def full_disk_error(error: BaseException | None) -> BaseException | None:
    """Of an error and those that it came from, the one of a disk that is full."""
    while error is not None:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or any(words in str(error).lower() for words in _FULL):
            return error
        error = error.__cause__ or error.__context__
    return None


__all__ = ["full_disk_error", "write_whole"]
