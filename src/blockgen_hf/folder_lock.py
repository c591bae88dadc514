"""A lock on an output folder: one process at a time writes to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = ".lock"


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


__all__ = ["LOCK", "FolderInUseError", "lock_folder"]
