"""benchmarks/reproduction: exact figures, verdicts, the page with its results, and the command from end to end."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SMALL = """--seeds 1 --max-documents 30 --vocab-size 280 --story-length 16 --hidden-size 32 --layers 1 --steps 2
    --judge-size 32 --judge-steps 1 --eval-rows 4 --eval-draws 2 --texts 2 --variance-draws 2 --batch-size 2"""

Command = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The folder is no package of the project's."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture
def reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command on a few invented stories; returns what it printed."""
    from benchmarks.reproduction.__main__ import main

    stories = tmp_path / "stories.txt"
    stories.write_text("<|endoftext|>".join(f"Story {n}: once there was a cat who had {n} hats." for n in range(30)))

    def run_command(*arguments: str) -> str:
        files = [
            "--train-file",
            str(stories),
            "--validation-file",
            str(stories),
            "--output-dir",
            str(tmp_path / "runs"),
        ]
        monkeypatch.setattr(sys, "argv", ["reproduction", *SMALL.split(), *files, *arguments])
        main()
        return capsys.readouterr().out

    return run_command


def test_equations_are_right_and_wrong_ones_are_counted() -> None:
    from benchmarks.reproduction.tasks import equations, share_of_right_equations

    stream = equations(0)
    rows = [next(stream) for _ in range(20)]
    assert len({len(row) for row in rows}) == 1
    assert share_of_right_equations(rows) == 1.0
    assert share_of_right_equations(["1+2=3;1+2=4;1+2=3;1+23=;4+4=8;", ""]) == 0.3


def test_a_verdict_asks_every_seed() -> None:
    """An ordering holds if it holds for every seed; of right answers more are better."""
    from benchmarks.reproduction.claims import Claim, Ordering
    from benchmarks.reproduction.report import markdown
    from benchmarks.reproduction.runs import Bench, Cell
    from benchmarks.reproduction.settings import Settings

    bench = Bench(Settings(output_dir="nowhere"))
    figures = {"low": (1.0, 2.0, 3.0), "high": (2.0, 3.0, 4.0), "mixed": (0.0, 3.0, 4.0)}
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            bench.found[f"t | {variant} | samples d | {seed}"] = {"perplexity": value, "right": value}

    def verdict(better: str, worse: str, metric: str) -> str:
        pair = (Cell("t", variant, "samples", "d", metric) for variant in (better, worse))
        return markdown(Claim("", "", [], [Ordering("", "", *pair)]), bench).splitlines()[-1]

    assert verdict("low", "high", "perplexity").endswith("| 2.00 ± 1.00 | 3.00 ± 1.00 | holds (3 of 3 seeds) |")
    assert verdict("low", "high", "right").endswith("does not hold (0 of 3 seeds) |")
    assert verdict("low", "mixed", "perplexity").endswith("undecided (2 of 3 seeds) |")


def test_the_page_has_the_committed_results() -> None:
    """Every table of docs/reproduction.md is what the command prints from benchmarks/reproduction/results.json."""
    from benchmarks.reproduction.claims import CLAIMS
    from benchmarks.reproduction.report import known, markdown
    from benchmarks.reproduction.runs import Bench
    from benchmarks.reproduction.settings import Settings

    page = (ROOT / "docs" / "reproduction.md").read_text()
    bench = Bench(Settings(results=str(ROOT / "benchmarks" / "reproduction" / "results.json")))
    for claim in CLAIMS.values():
        found = known(claim, bench)
        if found.orderings:
            assert markdown(found, bench) in page, f"{claim.name}: paste what the command prints"
            assert f"figures/reproduction_{claim.name}.svg" in page


@pytest.mark.slow
def test_models_are_trained_once(reproduce: Command, tmp_path: Path) -> None:
    """A claim trains, measures and draws; a second command finds all of it, and other settings are refused."""
    pytest.importorskip("matplotlib")
    printed = reproduce("stratification", "revision")
    assert "| stratified |" in printed and "draft, then revise (snapshot): 2 per block + 8" in printed
    assert "<svg" in (tmp_path / "runs" / "reproduction_revision.svg").read_text()
    file = tmp_path / "runs" / "results.json"
    before = file.stat().st_mtime_ns
    assert reproduce("revision", "--report").splitlines()[-1] in printed
    assert "nothing has been compared" in reproduce("noise-types", "--report")
    assert file.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other settings: name another file with --results"):
        reproduce("revision", "--steps", "3")
