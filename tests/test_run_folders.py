"""Output folders: one process at a time writes there, and they are resumed where nothing that matters has changed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import blockgen_hf
from blockgen_hf.run_folders import (
    Difference,
    FolderInUseError,
    as_stored,
    check_settings,
    digest,
    lock_folder,
    weights_digest,
)
from blockgen_hf.training.resuming import hash_rows


def test_the_second_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with lock_folder(folder):
        refused = pytest.raises(FolderInUseError, match=f"Another process is writing to the folder {folder}")
        with refused, lock_folder(folder):
            pass
        with lock_folder(tmp_path / "another"):
            pass
    with lock_folder(folder):  # free again
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lock_folder(tmp_path):
        raise KeyboardInterrupt
    with lock_folder(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys, time\n"
        "spec = importlib.util.spec_from_file_location('run_folders', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "with module.lock_folder(sys.argv[2]):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    module = str(Path(blockgen_hf.__file__).parent / "run_folders.py")
    with subprocess.Popen([sys.executable, "-c", code, module, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline().strip() == b"locked"
        with pytest.raises(FolderInUseError), lock_folder(tmp_path):
            pass
        other.kill()
    with lock_folder(tmp_path):
        pass


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    before = as_stored({"seed": 0, "sizes": (1, 4), "judge": None})
    check_settings(tmp_path, before, {"seed": 0, "sizes": [1, 4]})
    with pytest.raises(ValueError, match=r"made with other settings \(`sizes` was \[1, 4\], and is \[1\] now\)"):
        check_settings(tmp_path, before, {"seed": 0, "sizes": [1]})
    with pytest.raises(ValueError, match=r"\(ar: `seed` was 0, and is None now\): overwrite it"):
        check_settings(tmp_path, before, {"sizes": [1, 4]}, "ar")
    assert len(str(Difference("text", "a" * 1000, ""))) < 150


def test_digests_are_those_of_earlier_releases() -> None:
    """They are compared with what the folders of earlier releases hold."""
    linear = torch.nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
        linear.bias.zero_()
    assert weights_digest(linear.state_dict()) == "096212cd910e1b351f701549e7f3d33d"
    assert digest(["a"]) == hashlib.sha256(b"a").hexdigest()[:16]
    assert digest(["a", b"b"], is_long=True) == hashlib.blake2b(b"ab", digest_size=16).hexdigest()
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, 2, -100], [4, 5]]})
    assert hash_rows(rows) == "a90f7c815612ecec243cff9b2382cf17"
