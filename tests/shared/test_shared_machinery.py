"""How the shared tests are fetched and skipped."""

import io
import subprocess
import tarfile
import unittest
from pathlib import Path

import pytest
import transformers
import transformers_tests
from shared_models import BlockGenTester, RandomBlockGen
from shared_not_applicable import NotApplicable, skip_when_failing


def run_skipped(error: str, body: str) -> unittest.TestResult:
    """Runs a test whose entry expects `error`."""

    class Example(unittest.TestCase):
        def test_it(self) -> None:
            with self.subTest("part"):
                exec(body, {"self": self})

        test_it = skip_when_failing(test_it, NotApplicable(error, "why"))

    result = unittest.TestResult()
    Example("test_it").run(result)
    return result


def test_what_fails_as_its_entry_says_is_skipped_with_the_reason() -> None:
    result = run_skipped("no such", "raise ValueError('no such thing')")
    assert result.wasSuccessful() and [reason for _, reason in result.skipped] == ["why"]


@pytest.mark.parametrize("body", ["pass", "self.skipTest('needs a GPU')"])
def test_a_stale_entry_fails(body: str) -> None:
    result = run_skipped("no such", body)
    (failure,) = result.failures
    assert "NOT_APPLICABLE['test_it'] is stale" in failure[1]
    assert result.skipped == []


def test_what_fails_in_another_way_than_its_entry_says_fails() -> None:
    result = run_skipped("no such", "raise ValueError('something else')")
    assert "something else" in result.errors[0][1] and result.skipped == []


def test_every_parameter_of_the_random_model_counts() -> None:
    model = RandomBlockGen(BlockGenTester().get_config())
    assert [name for name, parameter in model.named_parameters() if not parameter.any()] == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "blockgen-hf"


def downloads(monkeypatch: pytest.MonkeyPatch, status: int, files: dict[str, str]) -> list[list[str]]:
    """Puts an archive of `files` in pip's place; the commands that were to run."""
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        commands.append(command)
        if status == 0:
            target = Path(command[command.index("--dest") + 1], "transformers.tar.gz")
            with tarfile.open(target, "w:gz") as tar:
                for name, text in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(text)
                    tar.addfile(member, io.BytesIO(text.encode()))
        return subprocess.CompletedProcess(command, status, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(transformers_tests.subprocess, "run", run)
    return commands


def test_the_tests_of_the_installed_version_are_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "transformers-5/tests/test_a.py": "a = 1",
        "transformers-5/src/test_b.py": "",
        "transformers-5/setup.py": "",
    }
    commands = downloads(monkeypatch, 0, files)
    folder = transformers_tests.fetch()
    assert folder == transformers_tests.fetch()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"test_a.py": "a = 1"}
    assert len(commands) == 1 and commands[0][-1] == f"transformers=={transformers.__version__}"
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, "transformers-tests.lock"]


def test_without_a_network_the_reason_is_pips(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, 1, {})
    with pytest.raises(transformers_tests.TestsUnavailable, match="ERROR: no network"):
        transformers_tests.fetch()
    assert [path.name for path in cache.iterdir()] == ["transformers-tests.lock"]
