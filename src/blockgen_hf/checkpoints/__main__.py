"""
Writes this package's code into the shipped checkpoints, which carry it as published ones do: so a folder loads with
torch and transformers alone. `python -m blockgen_hf.checkpoints`, after a change of that code; a test compares.
"""

import json
from pathlib import Path

from ..hub.files import read_json
from ..hub.folders import AUTO_MAP, code_files
from ..hub.portable import make_tokenizer_portable
from . import shipped_checkpoint


def write_code(folder: Path) -> None:
    code = code_files()
    for path in folder.glob("*.py"):
        if path.name not in code:
            path.unlink()
    for name, source in code.items():
        (folder / name).write_bytes(source.read_bytes())
    config = folder / "config.json"
    values = {**read_json(config), "auto_map": AUTO_MAP}
    make_tokenizer_portable(folder, values["max_position_embeddings"])
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_code(shipped_checkpoint())
