"""Files are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(target: Path, content: str | bytes) -> None:
    """
    Writes a file, text in UTF-8, under another name first, so that the old one is there until the new one is complete
    and on the disk. A link stays a link; a device or a pipe, such as /dev/stdout, is written to as it is.
    """
    data = content if isinstance(content, bytes) else content.encode()
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    target = target.resolve()
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def json_text(value: Any) -> str:
    """JSON as files for people hold it: indented, letters of all languages as they are, a line end at its end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    """[`write_whole`] of [`json_text`]."""
    write_whole(target, json_text(value))


__all__ = ["json_text", "write_json", "write_whole"]
