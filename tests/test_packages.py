"""What PyPI would get: a wheel and an sdist, installed in bare environments, with everything inside that they need."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src" / "blockgen_hf").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def call(*command: object, cwd: Path) -> str:
    """Its standard output. No network, and nothing of this checkout on the path."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pattern"), [("wheel", "*.whl"), ("sdist", "*.tar.gz")])
def test_an_installed_package_writes_text_in_a_folder_elsewhere(kind: str, pattern: str, tmp_path: Path) -> None:
    """Every file of the package is there, checkpoints, cards and recipes too; torch and others come from outside."""
    pytest.importorskip("hatchling")
    call(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", tmp_path / "dist", cwd=ROOT)
    [package] = (tmp_path / "dist").glob(pattern)

    environment = tmp_path / "environment"
    venv.create(environment, symlinks=os.name != "nt")
    [site_packages] = environment.glob("**/site-packages")
    # A plain path: .pth files that lie there, such as the one of this checkout, are not read.
    outside = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "outside.pth").write_text("\n".join(outside), encoding="utf-8")
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed")
    call(scripts / "python", "-m", "pip", "install", *options, package, cwd=tmp_path)

    found = (path.relative_to(site_packages).as_posix() for path in (site_packages / "blockgen_hf").rglob("*"))
    assert {name for name in found if name in FILES} == FILES
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = call(scripts / "python", "-c", "import blockgen_hf; print(blockgen_hf.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(site_packages)
    text = call(scripts / "blockgen-hf", "generate", "Once upon a time", "--max-new-tokens", "8", cwd=elsewhere)
    assert text.startswith("Once upon a time")


@pytest.mark.parametrize("path", sorted((ROOT / "src").glob("**/requirements.txt")), ids=lambda path: path.parent.name)
def test_metrics_ask_for_the_releases_that_the_package_declares(path: Path) -> None:
    """Their folders are uploaded as they are, so that each repeats the ranges of pyproject.toml."""
    declared = set(re.findall(r'"([\w-]+[><=][^"; ]*)', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    without_range = {"numpy"}  # comes with what the package needs
    assert [line for line in lines if line and line not in declared | without_range] == []
