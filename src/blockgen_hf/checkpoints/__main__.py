"""
Writes this package's code into the shipped checkpoints, which carry it as published ones do: so a folder loads with
torch and transformers alone. `python -m blockgen_hf.checkpoints`, after a change of that code; a test compares.
"""

import json
from pathlib import Path

from ..hub.files import read_json
from ..hub.portable import make_tokenizer_portable
from ..modeling.remote_code_blockgen import AUTO_MAP, remote_code, write_remote_code
from . import SHIPPED, shipped_checkpoint


def write_code(folder: Path) -> None:
    for path in folder.glob("*.py"):
        if path.name not in remote_code():
            path.unlink()
    write_remote_code(folder)
    config = folder / "config.json"
    values = {**read_json(config), "auto_map": AUTO_MAP}
    make_tokenizer_portable(folder, values["max_position_embeddings"])
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in SHIPPED:
        write_code(shipped_checkpoint(name))
