"""Files that are complete or not there."""

import os
from pathlib import Path


def write_whole(target: Path, content: str | bytes) -> None:
    """Writes a file, text in UTF-8, under another name first: the old one is there until the new one is complete."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(unfinished, target)


__all__ = ["write_whole"]
