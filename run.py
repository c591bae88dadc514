#!/usr/bin/env python3
"""Sets up blockgen-hf in .venv and runs it there. Needs Python, and a network the first time; then it works offline.

usage:
    python3 run.py generate "Once upon a time"    run a command of blockgen-hf; add --help to see its options
    python3 run.py train laptop --dry-run         the same for train, finetune, evaluate ... (installs more packages)
    python3 run.py test [pytest's options]        run the fast tests; `test -m slow` runs the slow ones
    python3 run.py quality                        check style, types, imports and documentation; changes nothing
    python3 run.py style                          fix what the linter and the formatter can fix
    python3 run.py docs                           serve the documentation on http://127.0.0.1:8000
    python3 run.py setup                          only set up, with everything needed for development
    python3 run.py compat [--short]               test the oldest and newest supported releases
    python3 run.py lock                           update constraints.txt, the pinned releases
    python3 run.py --newest COMMAND ...           run any of the above except the last two with the newest releases

Installed releases are pinned in constraints.txt. `--newest` installs newer ones in .venv-newest, once a day.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen


ROOT = Path(__file__).resolve().parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
BUILD_BACKEND = re.findall(r'requires = \["(.+?)"\]', PROJECT)[0]
OLDEST_PYTHON = tuple(map(int, re.findall(r'requires-python = ">=(\d+)\.(\d+)"', PROJECT)[0]))
if sys.version_info[:2] < OLDEST_PYTHON:  # before anything that an older Python cannot read
    needed, found = ("{}.{}".format(*version) for version in (OLDEST_PYTHON, sys.version_info))
    sys.exit(f"blockgen-hf needs Python {needed} or newer; this is Python {found}. Try: python{needed} run.py ...")

VENV = ROOT / ".venv"
NEWEST_VENV = ROOT / ".venv-newest"
CONSTRAINTS = ROOT / "constraints.txt"
PINS = CONSTRAINTS.read_text(encoding="utf-8") if CONSTRAINTS.exists() else ""

TORCH = "torch==2.13.0"  # in constraints.txt; its CPU build is what Linux without an NVIDIA GPU gets
CPU_TORCH = f"{TORCH}+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOCK_TOOL = "uv==0.13.9"

EVERYTHING = "dev"  # the extra that brings all others
EXTRA_OF_COMMAND = {
    "train": "[train]",
    "evaluate": "[train]",
    "finetune": "[train]",
    "evaluate-answers": "[train,eval]",
    "evaluate-samples": "[train,eval]",
    "demo": "[demo]",
    "serve": "[serve]",
}

LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"  # no `python -m` for it

TASKS: dict[str, list[list[str]]] = {  # arguments of Python
    "setup": [],
    "compat": [],
    "test": [["-m", "pytest", "-m", "not slow", "-n", str(min(4, os.cpu_count() or 1))]],
    "quality": [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-m", "mlinter", "--no-cache", "--no-progress", "src"],
        ["-c", LINT_IMPORTS, "--no-cache", "--no-logo"],
        ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site"],
    ],
    "docs": [["-m", "mkdocs", "serve", "--strict"]],
    "style": [["-m", "ruff", "check", "--fix", "."], ["-m", "ruff", "format", "."]],
}


def call(*command: str) -> int:
    return subprocess.call(command)


def python_of(venv: Path) -> str:
    return str(venv / ("Scripts" if os.name == "nt" else "bin") / "python")


def pip_install(venv: Path, *requirements: str, pinned: bool = False) -> bool:
    """Whether it could be installed; `pinned` in the releases of constraints.txt, what builds the project included."""
    environment = dict(os.environ)
    if pinned:  # by variables, which hold for builds too; since 25.3 pip has one of its own for those
        environment |= dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), CONSTRAINTS.as_uri())
    options = ("--disable-pip-version-check", "--retries", "2")  # fewer than pip's 5: without a network, say so soon
    command = [python_of(venv), "-m", "pip", "install", *options, *requirements]
    return subprocess.call(command, env=environment) == 0


def create_venv(venv: Path) -> None:
    if call(sys.executable, "-m", "venv", str(venv)):
        sys.exit(
            f"Could not create {venv}. On Debian and Ubuntu, `apt install python3-venv` installs what is missing."
        )


def takes_cpu_torch() -> bool:
    """Wheels for Linux carry gigabytes of CUDA by default; a machine without an NVIDIA GPU is spared them."""
    if sys.platform != "linux":
        return False
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode != 0
    except OSError:
        return True


def answers(index: str) -> bool:
    try:
        urlopen(f"{index}/torch/", timeout=5).close()
    except OSError:
        return False
    return True


def install_cpu_torch() -> None:
    """The CPU build, from pip's own sources or from PyTorch's; where neither has it, the default build comes later."""
    requirements = [CPU_TORCH]
    if answers(CPU_INDEX):
        requirements += ["--extra-index-url", CPU_INDEX]
    else:
        print(f"{CPU_INDEX} cannot be reached: looking for {CPU_TORCH} elsewhere.", flush=True)
    if not pip_install(VENV, *requirements):
        print(
            "There is no CPU build of torch for this machine: installing the default build, which is large.",
            flush=True,
        )


def names_of(extra: str) -> set[str]:
    """Of extras as pip takes them: `[train,eval]`, or nothing."""
    return set(extra.strip("[]").split(",")) - {""}


def set_up(extra: str) -> None:
    """Installs the project and the pinned releases in .venv, unless the stamp says that this was done."""
    stamp = VENV / "installed.txt"
    key = hashlib.sha256(f"{ROOT}\n{PROJECT}\n{PINS}".encode()).hexdigest()
    stamped, _, found = (stamp.read_text() if stamp.exists() else "").partition(" ")
    installed = names_of(found) if stamped == key else set()
    if stamped == key and (names_of(extra) <= installed or EVERYTHING in installed):
        return
    names = ",".join(sorted(names_of(extra) | installed))
    print(f"Setting up {VENV} (once, a few minutes) ...", flush=True)
    create_venv(VENV)
    if takes_cpu_torch():
        install_cpu_torch()
    if not pip_install(VENV, "--editable", f"{ROOT}[{names}]" if names else str(ROOT), pinned=True):
        sys.exit("The installation failed, see above. It needs a network; run the same command again to continue.")
    stamp.write_text(f"{key} [{names}]")


def lay_over(venv: Path) -> None:
    """An environment that sees what is in .venv. What is installed in it comes first and leaves .venv as it is."""
    create_venv(venv)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    base, here = (
        subprocess.run([python_of(each), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        for each in (VENV, venv)
    )
    # addsitedir, as the project is in .venv through a .pth file of its own
    (Path(here) / "zz_base.pth").write_text(f"import site; site.addsitedir({base!r})\n", encoding="utf-8")


def set_up_newest(extra: str) -> None:
    """
    Lays the newest releases that pip finds over .venv, once a day.

    Torch is the newest CPU build where a CPU build is what the machine takes and PyTorch's index answers, and else the
    pinned one: no gigabytes of CUDA for a test.
    """
    stamp = NEWEST_VENV / "installed.txt"
    key = f"{hashlib.sha256(f'{ROOT} {PROJECT} {PINS}'.encode()).hexdigest()} {extra} {time.strftime('%Y-%m-%d')}"
    if stamp.exists() and stamp.read_text() == key:
        return
    print(f"Installing the newest releases on top of {VENV}, in {NEWEST_VENV} ...", flush=True)
    lay_over(NEWEST_VENV)
    if takes_cpu_torch() and answers(CPU_INDEX):
        pip_install(NEWEST_VENV, "--upgrade", "torch", "--index-url", CPU_INDEX)
    ask = "import importlib.metadata as m; print('torch==' + m.version('torch'))"
    torch = subprocess.check_output([python_of(NEWEST_VENV), "-c", ask], text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "torch.txt"
        kept.write_text(torch)
        upgrade = ("--upgrade", "--upgrade-strategy", "eager", "--constraint", str(kept))
        done = pip_install(NEWEST_VENV, *upgrade, "--editable", f"{ROOT}{extra}")
    if not done and not stamp.exists():
        sys.exit("The newest releases could not be installed, see above.")
    if done:
        stamp.write_text(key)
    else:
        print("Could not look up the newest releases: using those of the last time.", flush=True)
    print(f"Newest releases: {newer_than_pinned()}", flush=True)


def releases(venv: Path) -> dict[str, str]:
    """The release of every package that an environment sees."""
    ask = "import importlib.metadata as m; [print(d.name, d.version) for d in reversed(list(m.distributions()))]"
    lines = subprocess.check_output([python_of(venv), "-c", ask], text=True).splitlines()
    return {re.sub(r"[-_.]+", "-", name).lower(): release for name, release in map(str.split, lines)}


def newer_than_pinned() -> str:
    """What .venv-newest has in another release than .venv."""
    pinned = releases(VENV)
    newer = [f"{name} {release}" for name, release in releases(NEWEST_VENV).items() if pinned.get(name) != release]
    return ", ".join(sorted(newer)) or "those that are pinned"


def lock() -> None:
    """Resolves everything for each supported Python and platform, and writes that to constraints.txt."""
    with tempfile.TemporaryDirectory() as folder:
        create_venv(Path(folder))
        if not pip_install(Path(folder), LOCK_TOOL):
            sys.exit("Could not install uv, which resolves for other Pythons and platforms than this one.")
        more = Path(folder) / "more.txt"
        more.write_text(f"{TORCH}\n{BUILD_BACKEND}\n", encoding="utf-8")
        status = call(
            *(python_of(Path(folder)), "-m", "uv", "pip", "compile", "--universal", "--all-extras", "--upgrade"),
            *("--python-version", "{}.{}".format(*OLDEST_PYTHON), "--no-annotate", "--quiet"),
            *("--custom-compile-command", "python3 run.py lock", "--output-file", str(CONSTRAINTS)),
            *(str(ROOT / "pyproject.toml"), str(more)),
        )
    sys.exit(status)


def become(command: list[str]) -> None:
    """Ends this program by running `command` in its place, so that signals and the exit status are its own."""
    if os.name == "nt":
        sys.exit(call(*command))
    os.execv(command[0], command)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    newest = arguments[0] == "--newest"
    name, *options = arguments[newest:] or ["setup"]
    if name == "lock":
        lock()
    extra = "[dev]" if name in TASKS else EXTRA_OF_COMMAND.get(name, "")
    set_up(extra)
    if newest:
        set_up_newest(extra)
    python = python_of(NEWEST_VENV if newest else VENV)
    if name not in TASKS:
        become([python, "-m", "blockgen_hf", name, *options])
    os.chdir(ROOT)
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # an announcement of mkdocs-material
    if name == "test":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core, a thread a process
        become([python, *TASKS[name][0], *options])
    if name == "compat":
        become([sys.executable, str(ROOT / "scripts" / "compat.py"), *options])
    failures = [command for command in TASKS[name] if call(python, *command) != 0]
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
