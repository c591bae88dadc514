"""A saved folder is enough: it loads and generates where blockgen_hf cannot be imported."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stranger import WITHOUT_THE_PACKAGE

import blockgen_hf
from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM


PACKAGE = Path(blockgen_hf.__file__).parent
CLOSURE = sorted([*PACKAGE.glob("modeling/*_blockgen.py"), *PACKAGE.glob("generation/*_blockgen.py")])

DECODINGS = {
    "ar": {"decoding": "ar"},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4},
    "arpc": {"decoding": "arpc", "block_size": 8, "nfe_per_block": 8, "corrector_period": 3, "ar_seed_tokens": 3},
    "draft_revise": {"decoding": "draft_revise", "block_size": 2, "revise_block_size": [4, 8], "revise_ratio": 0.5},
    "model's own": {},
}

# The package may be installed.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import json
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, again, requests = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
input_ids = torch.tensor(requests["input_ids"])

def answers(model):
    texts = {}
    for name, settings in requests["decodings"].items():
        torch.manual_seed(1)
        texts[name] = model.generate(input_ids, max_new_tokens=13, **settings).tolist()
    return {"logits": model(input_ids).logits.tolist(), "texts": texts}

result = {
    "block_sizes": config.block_sizes,
    "classes": [type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__, type(model).__name__],
    "settings": type(model.generation_config).__name__,
    "first": answers(model),
}
model.save_pretrained(again)
result["second"] = answers(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval())
print("RESULT" + json.dumps(result))
"""
)


@pytest.fixture(scope="module", params=["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> BlockGenForDiffusionLM:
    config = BlockGenConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        cond_dim=8,
        max_position_embeddings=64,
        diffusion_type=request.param,
    )
    torch.manual_seed(0)
    model = BlockGenForDiffusionLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.decoding = "arpc"
    model.generation_config.denoising_steps = 5
    return model


def test_a_saved_folder_works_without_the_package(model: BlockGenForDiffusionLM, tmp_path: Path) -> None:
    """Same logits to 1e-6 and same texts in another interpreter, and again after saving from there."""
    model.save_pretrained(tmp_path / "saved")
    input_ids = torch.arange(10).view(2, 5)
    requests = json.dumps({"input_ids": input_ids.tolist(), "decodings": DECODINGS})
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "saved"), str(tmp_path / "again"), requests],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.split("RESULT")[1])

    assert result["block_sizes"] == model.config.block_sizes
    assert result["classes"] == ["BlockGenForDiffusionLM", "BlockGenForDiffusionLM"]
    assert result["settings"] == "BlockGenGenerationConfig"
    with torch.no_grad():
        logits = model(input_ids).logits
    for answers in (result["first"], result["second"]):
        torch.testing.assert_close(torch.tensor(answers["logits"]), logits, rtol=1e-6, atol=1e-6)
        for name, settings in DECODINGS.items():
            torch.manual_seed(1)
            assert answers["texts"][name] == model.generate(input_ids, max_new_tokens=13, **settings).tolist(), name


def test_a_saved_folder_holds_code_weights_and_settings_and_nothing_else(
    model: BlockGenForDiffusionLM, tmp_path: Path
) -> None:
    """The flat closure, safetensors weights, and the three Auto classes in the config."""
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    closure = {path.name for path in CLOSURE}
    assert files == closure | {"config.json", "generation_config.json", "model.safetensors"}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize("path", CLOSURE, ids=lambda path: path.name)
def test_the_closure_imports_only_torch_transformers_and_itself(path: Path) -> None:
    """
    The files of the closure import torch, transformers, the standard library, and one another: generation from
    modeling, and back only where the model class inherits from the mixin.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if node.level:
                imported = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
                assert imported in CLOSURE
                if path.parent.name == "modeling" and path.stem != "modeling_blockgen":
                    assert imported.parent.name == "modeling"
            else:
                assert node.module.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}
