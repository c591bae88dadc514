"""Fixtures, and quiet for the terminal."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test needs the network
# Code and data of one run are not those of another that goes on beside it, nor what the user has in the cache.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="blockgen-hf-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: with more, tiny tensors and several workers take longer

import pytest
import torch
import transformers
from tiny import VARIANTS, tiny_model, tiny_tokenizer

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.cli import main
from blockgen_hf.generation.draft_lengths_blockgen import MeasuredRoundCosts, RoundCosts
from blockgen_hf.hub.portable import make_tokenizer_portable


transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
with suppress(ImportError):  # the tests for GPUs do without
    from hypothesis import settings

    # The same examples on every run, and no limit on the time of one, which a busy machine would break.
    settings.register_profile("tests", deadline=None, derandomize=True, database=None)
    settings.load_profile("tests")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """
    What a test compiles does not count towards the next one's limit of recompilations: Dynamo counts them by code
    object, and the decorators of transformers' forward passes are one code object for all models.
    """
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much speculation drafts does not depend on the clock, nor on other rows."""
    for costs in (RoundCosts, MeasuredRoundCosts):
        monkeypatch.setattr(costs, "of_token", lambda self: 0.002)

    def measured(device: torch.device, draft_passes: int, **shared: Any) -> MeasuredRoundCosts:
        return MeasuredRoundCosts(device, draft_passes)

    if generations := sys.modules.get("blockgen_hf.serving.generations"):  # where the test serves
        monkeypatch.setattr(generations, "SharedRoundCosts", measured)


@pytest.fixture
def loud_transformers() -> Iterator[None]:
    """Warnings of transformers reach `caplog`, those too that another test has seen once already."""
    logging = transformers.utils.logging
    logging.set_verbosity_warning()
    logging.enable_propagation()
    logging.warning_once.cache_clear()
    yield
    logging.disable_propagation()
    logging.set_verbosity_error()


@pytest.fixture
def model() -> BlockGenForDiffusionLM:
    """A tiny masked model, evaluation mode, no parameter zero."""
    return tiny_model()


@pytest.fixture
def uniform_model() -> BlockGenForDiffusionLM:
    return tiny_model("uniform")


@pytest.fixture(params=VARIANTS)
def any_model(request: pytest.FixtureRequest) -> BlockGenForDiffusionLM:
    """Each of the variants in turn."""
    return tiny_model(request.param)


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def failing_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `blockgen-hf` with some words, which must fail with a single line; returns that line."""

    def run_command(*words: str) -> str:
        try:
            assert main(words) == 1
        except SystemExit as exit:
            assert exit.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("blockgen-hf: error: ") and printed.err.count("\n") == 1
        return printed.err

    return run_command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a tiny masked model with its tokenizer."""
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    make_tokenizer_portable(path, tiny_model().config.max_position_embeddings)
    return path
