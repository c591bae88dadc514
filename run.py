#!/usr/bin/env python3
"""Sets up blockgen-hf in .venv and runs it there. Needs Python and, the first time, a network; then it works offline.

usage:
    python3 run.py generate "Once upon a time"    any command of blockgen-hf: `--help` behind it tells its options
    python3 run.py train laptop --dry-run         so do `finetune`, `evaluate` and others, which need more packages
    python3 run.py test [pytest's options]        the tests but those marked slow, which `test -m slow` runs
    python3 run.py quality                        linters, formatter and type checker, changing nothing
    python3 run.py style                          mends what the linter and the formatter can
    python3 run.py setup                          sets up only, with everything for development
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen


ROOT = Path(__file__).resolve().parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
OLDEST_PYTHON = tuple(map(int, re.findall(r'requires-python = ">=(\d+)\.(\d+)"', PROJECT)[0]))
if sys.version_info[:2] < OLDEST_PYTHON:  # before anything that an older Python cannot read
    needed, found = ("{}.{}".format(*version) for version in (OLDEST_PYTHON, sys.version_info))
    sys.exit(f"blockgen-hf needs Python {needed} or newer; this is Python {found}. Try: python{needed} run.py ...")

VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = str(BIN / "python")
STAMP = VENV / "installed.txt"

CPU_TORCH = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

EXTRAS = ["", "[train]", "[train,eval]", "[dev]"]  # each brings what those before it bring
EXTRA_OF_COMMAND = {
    "train": "[train]",
    "evaluate": "[train]",
    "finetune": "[train]",
    "evaluate-answers": "[train,eval]",
    "evaluate-samples": "[train,eval]",
}

TASKS: dict[str, list[list[str]]] = {
    "setup": [],
    "test": [["pytest", "-m", "not slow", "-n", str(min(4, os.cpu_count() or 1))]],
    "quality": [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["mlinter", "--no-cache", "--no-progress", "src"],
    ],
    "style": [["ruff", "check", "--fix", "."], ["ruff", "format", "."]],
}


def call(*command: str) -> int:
    return subprocess.call(command)


def pip_install(*requirements: str) -> bool:
    options = ("--disable-pip-version-check", "--retries", "2")  # fewer than pip's 5: without a network, say so soon
    return call(PYTHON, "-m", "pip", "install", *options, *requirements) == 0


def has_nvidia_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    except OSError:
        return False


def install_cpu_torch() -> None:
    """The CPU build, from pip's own sources or from PyTorch's; where neither has it, the default build comes later."""
    requirements = [CPU_TORCH]
    try:
        urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
        requirements += ["--extra-index-url", CPU_INDEX]
    except OSError:
        print(f"{CPU_INDEX} does not answer: looking for {CPU_TORCH} elsewhere.", flush=True)
    if not pip_install(*requirements):
        print("No CPU build of torch for this machine: taking the default build, which is large.", flush=True)


def set_up(extra: str) -> None:
    """Creates .venv and installs the project in it, unless the stamp says that this was done."""
    key = hashlib.sha256(f"{ROOT}\n{PROJECT}".encode()).hexdigest()
    stamp = STAMP.read_text() if STAMP.exists() else ""
    if stamp in [f"{key} {enough}" for enough in EXTRAS[EXTRAS.index(extra) :]]:
        return
    print(f"Setting up {VENV} (once, a few minutes) ...", flush=True)
    if call(sys.executable, "-m", "venv", str(VENV)):
        sys.exit(f"Could not create {VENV}. On Debian and Ubuntu, `apt install python3-venv` brings what is missing.")
    if sys.platform == "linux" and not has_nvidia_gpu():  # wheels for Linux carry gigabytes of CUDA by default
        install_cpu_torch()
    if not pip_install("--editable", f"{ROOT}{extra}"):
        sys.exit("The installation failed, see above. It needs a network; run the same command again to go on.")
    STAMP.write_text(f"{key} {extra}")


def become(command: list[str]) -> None:
    """Ends this program by running `command` in its place, so that signals and the exit status are its own."""
    if os.name == "nt":
        sys.exit(call(*command))
    os.execv(command[0], command)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    name, *options = arguments
    if name not in TASKS:
        set_up(EXTRA_OF_COMMAND.get(name, ""))
        become([str(BIN / "blockgen-hf"), *arguments])
    set_up("[dev]")
    os.chdir(ROOT)
    if name == "test":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core, a thread a process
        become([PYTHON, "-m", *TASKS[name][0], *options])
    failures = [command for command in TASKS[name] if call(PYTHON, "-m", *command) != 0]
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
