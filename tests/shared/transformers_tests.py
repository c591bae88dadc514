"""
transformers' shared model tests, fetched from the source distribution of the installed version and imported under the
name of this module: `transformers_tests.test_modeling_common` is `tests/test_modeling_common.py` there. None of it is
kept in this repository.

Wheels leave the tests out, and the source distribution leaves out the subfolders of `tests/`. What the shared tests
import from those has a counterpart here (`COUNTERPARTS`).
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import shared_ranks
import transformers
from filelock import FileLock


class TestsUnavailable(Exception):
    """Why there are no tests to run: the reason to skip them."""


class ExportTesterMixin:
    """A base of `ModelTesterMixin`. What it tests is not in the source distribution."""


class GenerationTesterMixin:
    """Imported beside `ModelTesterMixin`. What it tests is not in the source distribution: no class of ours has it."""


# Values other than the defaults for what every configuration has.
CONFIG_COMMON_KWARGS: dict[str, Any] = {
    "architectures": ["BlockGenForDiffusionLM"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "is_encoder_decoder": True,
    "label2id": {"label": 0},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}

COUNTERPARTS: dict[str, dict[str, Any]] = {
    "distributed_testing_utils": vars(shared_ranks),
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
}


def fetch() -> Path:
    """
    The folder with the shared tests of the installed transformers. Downloaded once, by one process at a time.

    Raises:
        TestsUnavailable: they cannot be downloaded.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blockgen-hf"
    folder = cache / f"transformers-{transformers.__version__}-tests"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "transformers-tests.lock"):
            if not folder.is_dir():
                download(folder)
    return folder


def download(folder: Path) -> None:
    """Leaves the files of the source distribution's `tests/` in the folder: all of them, or there is no folder."""
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        command += ["--no-deps", "--no-binary", "transformers", "--dest", temporary, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        except subprocess.TimeoutExpired:
            raise TestsUnavailable(f"pip did not download the source of {requirement} within 200 s") from None
        if done.returncode != 0:
            errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise TestsUnavailable(f"pip could not download the source of {requirement}: {errors[-1]}")
        (archive,) = Path(temporary).glob("*.tar.gz")
        unpacked = Path(temporary, "unpacked")
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and Path(member.name).match("transformers-*/tests/test_*.py"):
                    (unpacked / Path(member.name).name).write_bytes(content.read())
        unpacked.rename(folder)


def open_package() -> None:
    """
    Makes `transformers_tests.test_...` importable.

    Raises:
        TestsUnavailable: as [`fetch`].
    """
    sys.modules[__name__].__path__ = [str(fetch())]
    for name, attributes in COUNTERPARTS.items():
        module = ModuleType(f"{__name__}.{name}")
        vars(module).update({key: value for key, value in attributes.items() if not key.startswith("__")})
        sys.modules[module.__name__] = module


@contextmanager
def import_settings() -> Iterator[None]:
    """What the shared tests find around them in their own repository, while they are imported."""
    with tempfile.TemporaryDirectory() as tiny_models:
        Path(tiny_models, "reports").mkdir()
        Path(tiny_models, "reports", "tiny_model_summary.json").write_text("{}")
        # It would execute the `transformers` of that repository a second time.
        installed = mock.patch("transformers.utils.direct_transformers_import", return_value=transformers)
        with installed, mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=tiny_models):
            yield


def shared_module(name: str) -> Any:
    """`tests/test_{name}.py` of transformers."""
    with import_settings():
        return importlib.import_module(f"{__name__}.test_{name}")
