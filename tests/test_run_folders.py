"""One process at a time writes to an output folder."""

import subprocess
import sys
from pathlib import Path

import pytest

import blockgen_hf
from blockgen_hf.run_folders import FolderInUseError, lock_folder


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
