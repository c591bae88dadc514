"""The Python snippets of the README and of docs/ run as they stand, each page from top to bottom."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {"ecosystem.md"}  # compiles and exports a model


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in PAGES if snippets(page)],
    ids=lambda page: page.name,
)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace and in an empty folder, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {}
    for snippet in snippets(page):
        exec(compile(snippet, page.name, "exec"), namespace)


def test_the_pages_point_to_files_that_exist() -> None:
    """Relative links of README and docs."""
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_paper_index_names_tests_that_exist() -> None:
    """Every test file of docs/paper_index.md is there."""
    for name in re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "paper_index.md").read_text()):
        assert (ROOT / "tests" / name).is_file(), name


def test_the_pages_name_files_of_the_model_that_exist() -> None:
    """Every `*_blockgen.py` of README and docs/, in its folder if the page gives one."""
    package = ROOT / "src" / "blockgen_hf"
    for page in PAGES:
        for name in re.findall(r"[\w/]*\w_blockgen\.py", page.read_text(encoding="utf-8")):
            name = name.rpartition("src/blockgen_hf/")[2]
            assert list(package.glob(name if "/" in name else f"*/{name}")), (page.name, name)


def test_no_example_asks_whether_to_run_code() -> None:
    """`AutoTokenizer` asks on standard input if it is not told, where a folder carries code."""
    for file in [*PAGES, *sorted((ROOT / "examples").glob("*.py"))]:
        for call in re.findall(r"AutoTokenizer\.from_pretrained\(.*", file.read_text()):
            assert "trust_remote_code=" in call, (file.name, call)
