# Copyright 2026 The blockgen-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The code that travels with a checkpoint: the model's own module and what it needs, as one flat folder.

transformers loads remote code from a single folder, whose files import one another as `.name`. Here they lie in
`modeling/` and `generation/`, where people look for them. In a folder that was loaded with `trust_remote_code=True`
they are flat already, and the same function copies them as they are.
"""

import re
from pathlib import Path


AUTO_MAP = {
    "AutoConfig": "configuration_blockgen.BlockGenConfig",
    "AutoModel": "modeling_blockgen.BlockGenForDiffusionLM",
    "AutoModelForCausalLM": "modeling_blockgen.BlockGenForDiffusionLM",
}

_RELATIVE_IMPORT = re.compile(r"^from (\.+)([\w.]*?)(\w+_blockgen) import", re.MULTILINE)


def remote_code() -> dict[str, str]:
    """Name and text of every file that `AUTO_MAP` needs, found along the relative imports, which become `.name`."""
    folder = Path(__file__).parent
    # A configuration that was loaded alone, by `AutoConfig`, has no model beside it.
    roots = {folder / f"{target.split('.')[0]}.py" for target in AUTO_MAP.values()}
    waiting = [path for path in roots if path.exists()]
    texts: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if path.name in texts:
            continue
        text = path.read_text(encoding="utf-8")
        for dots, package, name in _RELATIVE_IMPORT.findall(text):
            base = path.parents[len(dots) - 1]
            waiting.append(base.joinpath(*package.split("."), f"{name}.py"))
        texts[path.name] = _RELATIVE_IMPORT.sub(r"from .\3 import", text)
    return dict(sorted(texts.items()))


def write_remote_code(folder: Path) -> None:
    for name, text in remote_code().items():
        (folder / name).write_text(text, encoding="utf-8")


__all__ = ["AUTO_MAP", "remote_code", "write_remote_code"]
