"""Several processes train as one does: DDP and FSDP2 with gloo on CPUs, and checkpoints that pass between them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    CHECKPOINT_FILES,
    checkpoints,
    history,
    run_in_process,
    run_in_processes,
    saved_model,
    saved_weights,
)

from blockgen_hf import BlockGenForDiffusionLM


pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(config: str, num_processes: int, **specification: Any) -> None:
    """`accelerate launch` of the script with a configuration, those of the examples by their name."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--num_processes", str(num_processes), "--main_process_port", str(free_port())]
    command += [str(TESTS / "trainer_script.py"), json.dumps(specification)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]


def ranks(num: int, one_a_node: bool = False) -> list[dict[str, str]]:
    """What `torchrun` tells the processes, all on one machine, or each on a machine of its own."""
    port = str(free_port())
    return [
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(num),
            "RANK": str(rank),
            "LOCAL_RANK": "0" if one_a_node else str(rank),
            "LOCAL_WORLD_SIZE": "1" if one_a_node else str(num),
            "ACCELERATE_USE_CPU": "true",
        }
        for rank in range(num)
    ]


FSDP = {  # as `accelerate launch` passes `fsdp2_cpu.yaml` on
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BlockGenDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def assert_same_history(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """
    All that was logged of all steps, losses of block sizes and evaluations among it, to 1e-5; errors, which are
    differences of figures that are alike, to 1e-3.
    """
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for entry, other in zip(found, expected, strict=True):
        for name, value in other.items():
            tolerance = 1e-3 if "standard_error" in name else 1e-5
            assert entry[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_eval_batch_size": 2,
    "eval_monte_carlo_samples": 2,
    "learning_rate": 1e-3,
}


def test_two_ddp_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path: Path) -> None:
    """2 x 4 = 1 x 8 over 20 steps, rows of unequal length; 10 steps by two processes and 10 more by one."""
    settings = {"max_steps": 20, "save_steps": 10, "gradient_accumulation_steps": 8, **EVALUATION}
    alone, two, resumed = (str(tmp_path / name) for name in ("alone.json", "two.json", "resumed.json"))
    assert run_in_process(tmp_path / "alone", settings=settings, result=alone) == 0
    launch(
        "ddp_cpu.yaml",
        2,
        folder=str(tmp_path / "two"),
        settings={**settings, "gradient_accumulation_steps": 4},
        result=two,
    )
    assert json.loads(Path(two).read_text())["num_processes"] == 2
    expected = history(Path(alone))
    assert sum("loss" in entry for entry in expected) == 20 and sum("eval_loss" in entry for entry in expected) == 5
    assert {f"loss_block_size_{size}" for size in (1, 2, 4, 8)} <= expected[0].keys()
    assert_same_history(history(Path(two)), expected)
    checkpoint = tmp_path / "two" / "checkpoint-10"
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= (CHECKPOINT_FILES - {"rng_state.pth"}) | {"rng_state_0.pth", "rng_state_1.pth"}
    assert_same_tensors(saved_model(checkpoint), saved_model(tmp_path / "alone" / "checkpoint-10"))
    assert_same_tensors(saved_weights(checkpoint), saved_weights(tmp_path / "alone" / "checkpoint-10"))
    assert run_in_process(tmp_path / "resumed", settings=settings, resume=str(checkpoint), result=resumed) == 0
    assert_same_history(history(Path(resumed)), expected)
    last = tmp_path / "alone" / "checkpoint-20"
    for run in ("two", "resumed"):
        assert_same_tensors(saved_model(tmp_path / run / "checkpoint-20"), saved_model(last))
        assert not (tmp_path / run / "_unfinished").exists()


@pytest.mark.parametrize("unit", ["micro_batch", "sequence"])
def test_a_checkpoint_of_one_process_is_resumed_by_two(unit: str, tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_steps": 4, "gradient_accumulation_steps": 4, "block_size_unit": unit}
    alone, two = tmp_path / "alone.json", tmp_path / "two.json"
    assert run_in_process(tmp_path / "alone", settings=settings, result=str(alone)) == 0
    specification = {
        "folder": str(tmp_path / "two"),
        "settings": {**settings, "gradient_accumulation_steps": 2},
        "resume": str(tmp_path / "alone" / "checkpoint-4"),
        "result": str(two),
    }
    assert run_in_processes(*({**specification, "environment": rank} for rank in ranks(2))) == [0, 0]
    assert_same_history(history(two), history(alone))
    assert_same_tensors(
        saved_model(tmp_path / "two" / "checkpoint-8"), saved_model(tmp_path / "alone" / "checkpoint-8")
    )


def test_two_fsdp_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path: Path) -> None:
    """FSDP2, 2 x 2 = 1 x 4; what is saved is the whole average, which any process loads."""
    settings = {"max_steps": 8, "save_steps": 4, "gradient_accumulation_steps": 4, **EVALUATION}
    alone, two, resumed = (str(tmp_path / name) for name in ("alone.json", "two.json", "resumed.json"))
    assert run_in_process(tmp_path / "alone", settings=settings, result=alone, save=True) == 0
    launch(
        str(TESTS / "fsdp2_cpu.yaml"),
        2,
        folder=str(tmp_path / "two"),
        settings={**settings, "gradient_accumulation_steps": 2},
        result=two,
        save=True,
    )
    said = json.loads(Path(two).read_text())
    assert said["num_processes"] == 2 and said["distributed_type"].endswith("FSDP")
    assert_same_history(history(Path(two)), history(Path(alone)))
    for name in ("checkpoint-4", "checkpoint-8", "."):
        assert_same_tensors(saved_model(tmp_path / "two" / name), saved_model(tmp_path / "alone" / name))
        BlockGenForDiffusionLM.from_pretrained(tmp_path / "two" / name)
    checkpoint = str(tmp_path / "two" / "checkpoint-4")
    assert (
        run_in_process(
            tmp_path / "resumed",
            settings=settings,
            resume=checkpoint,
            result=resumed,
            save=True,
            environment={**ranks(1)[0], **FSDP},
        )
        == 0
    )
    assert json.loads(Path(resumed).read_text())["distributed_type"].endswith("FSDP")
    assert_same_history(history(Path(resumed)), history(Path(alone)))
    assert_same_tensors(saved_model(tmp_path / "resumed"), saved_model(tmp_path / "alone"))


def test_two_nodes_with_one_folder_write_one_checkpoint(tmp_path: Path) -> None:
    """Each node has a process that is the first on its machine; the folder is shared, as on a cluster."""
    settings = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2}
    specification = {"folder": str(tmp_path / "run"), "settings": settings}
    environments = ranks(2, one_a_node=True)
    assert run_in_processes(*({**specification, "environment": rank} for rank in environments)) == [0, 0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-5", "checkpoint-6"]
    for name in checkpoints(tmp_path / "run"):
        files = {path.name for path in (tmp_path / "run" / name).iterdir()}
        assert files >= (CHECKPOINT_FILES - {"rng_state.pth"}) | {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_loss_that_is_not_finite_on_one_process_ends_all(tmp_path: Path) -> None:
    """None waits for the one that has met it."""
    specification = {"folder": str(tmp_path / "run"), "settings": {"save_steps": 1}, "poison": 3}
    assert run_in_processes(*({**specification, "environment": rank} for rank in ranks(2)), timeout=60) == [1, 1]
    for name in checkpoints(tmp_path / "run"):
        assert all(value.isfinite().all() for value in saved_model(tmp_path / "run" / name).values())
        assert all(value.isfinite().all() for value in saved_weights(tmp_path / "run" / name).values())


def test_two_processes_choose_the_noise_levels_of_one(tmp_path: Path) -> None:
    """The same intervals on both ranks, and so the same losses as in one process."""
    settings = {
        "max_steps": 4,
        "noise_interval_steps": 2,
        "noise_interval_rows": 4,
        "noise_level_sampling": "block",
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    alone, two = tmp_path / "alone.json", tmp_path / "two.json"
    accumulated = {**settings, "gradient_accumulation_steps": 2}
    assert run_in_process(tmp_path / "alone", settings=accumulated, result=str(alone)) == 0
    specification = {
        "folder": str(tmp_path / "two"),
        "settings": {**settings, "gradient_accumulation_steps": 1},
        "result": str(two),
    }
    assert run_in_processes(*({**specification, "environment": rank} for rank in ranks(2))) == [0, 0]
    expected = history(alone)
    assert any("noise_level_low_block_size_4" in entry for entry in expected)
    assert_same_history(history(two), expected)
