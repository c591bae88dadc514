"""`import blockgen_hf` imports neither torch nor transformers, and registers with the Auto classes all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import blockgen_hf


USE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained(folder)).__module__.startswith("blockgen_hf.")
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__module__.startswith("blockgen_hf.")
assert isinstance(AutoModel.from_config(blockgen_hf.BlockGenConfig(**small)), blockgen_hf.BlockGenForDiffusionLM)
"""


LIGHT = """
import sys, blockgen_hf, blockgen_hf.checkpoints
assert not {"torch", "transformers"} & set(sys.modules)
assert "BlockGenConfig" in dir(blockgen_hf)
assert blockgen_hf.modeling.BlockGenConfig is blockgen_hf.BlockGenConfig
"""
ORDERS = [
    "import blockgen_hf, transformers",
    "import blockgen_hf.modeling.configuration_blockgen, blockgen_hf",
    "from blockgen_hf import *; import blockgen_hf",
    "import blockgen_hf, importlib.util; importlib.util.find_spec('transformers')",
    "import blockgen_hf; from transformers.generation.utils import GenerationMixin",
]


@pytest.mark.parametrize(
    "imports",  # each in an interpreter of its own, which takes seconds
    [
        pytest.param(LIGHT, id="the package alone, which is light"),
        "import transformers, blockgen_hf",
        *(pytest.param(imports, marks=pytest.mark.slow) for imports in ORDERS),
    ],
)
def test_classes_are_registered(saved: Path, imports: str) -> None:
    small = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    run(f"{imports}\nfolder, small = {str(saved)!r}, {small}\n{USE}")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'blockgen_hf' has no attribute 'BlokGen'"):
        blockgen_hf.BlokGen  # noqa: B018


def run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(blockgen_hf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
