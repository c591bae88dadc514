"""How files are written and read, and whether a name means something on this machine or on the Hub."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

import blockgen_hf
from blockgen_hf.hub.cards import read_samples
from blockgen_hf.hub.portable import portable_text
from blockgen_hf.places import data_place, is_hub_id, local_folder, name_without_folder
from blockgen_hf.text_files import json_rows
from blockgen_hf.whole_files import write_json, write_whole


SEPARATORS = "a\u2028b\u2029c\x85d\x0be"  # where `str.splitlines` splits, and JSON lines do not


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(file)
    write_json(file, {"text": "é"})
    write_whole(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "fsync", fail)
        write_whole(file, "newer")
    assert file.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json"]


def fail(_: int) -> None:
    raise OSError("full")


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)


def test_lines_of_json_end_at_line_feeds_only(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": SEPARATORS, "number": number} for number in range(3)]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    assert [row for _, row in json_rows(str(tmp_path / "rows.jsonl"))] == rows


def test_published_samples_may_hold_any_separator(tmp_path: Path) -> None:
    sample = {"model": "/home/me/model", "dtype": "float32", "prompt": "", "seed": 0, "decoding": "ar"}
    sample |= {"settings": {}, "text": SEPARATORS, "completion": SEPARATORS, "num_new_tokens": 3}
    sample |= {"num_function_evaluations": 3, "tokens_per_forward": 1.0}
    content = json.dumps(sample, ensure_ascii=False) + "\n"
    (tmp_path / "samples.jsonl").write_text(content, encoding="utf-8")
    assert read_samples(tmp_path) == [sample]
    portable = portable_text("samples.jsonl", content, None)
    assert json.loads(portable) == {**sample, "model": "model"} and portable.endswith("}\n")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("folder", "folder"),
        ("a.txt", "files"),
        ("missing.txt", "files"),
        ("./missing", "files"),
        ("*.txt", "files"),
        ("a/b/c", "files"),
        (["org/name", "a.txt"], "files"),
        ("org/name", "hub"),
        ("name", "hub"),
    ],
)
def test_where_data_are(name: str | list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").touch()
    assert data_place(name) == place
    if isinstance(name, str):
        assert is_hub_id(name) is (place == "hub")


def test_models_are_folders_or_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "file").touch()
    assert local_folder("model") == Path("model")
    assert local_folder("~/model") == tmp_path / "model"
    assert local_folder("org/model") is None
    for name in ("./missing", "~/missing", "a/b/c", "file"):
        with pytest.raises(FileNotFoundError, match=f"There is no folder {name}"):
            local_folder(name)
    assert not any(map(is_hub_id, ("model", "a b", "-a", "é", "", None, 3, "org/na--me", "data.csv")))
    assert [name_without_folder(name) for name in ("org/name", "/a/b/c", "model", "")] == [
        "org/name",
        "c",
        "model",
        "",
    ]


def test_no_module_imports_one_that_imports_it() -> None:
    """Imports in functions and for types count: who must hide an import has drawn a line in the wrong place."""
    root = Path(blockgen_hf.__file__).parent
    names = {path: _module(path.relative_to(root.parent)) for path in root.rglob("*.py") if "-" not in str(path)}
    imports = {name: _imports(path, name, set(names.values())) for path, name in names.items()}
    while free := [name for name, needed in imports.items() if not needed & imports.keys()]:
        for name in free:
            del imports[name]
    assert not imports


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path, name: str, modules: set[str]) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
        source = ".".join(filter(None, (base, node.module)))
        found |= {f"{source}.{alias.name}" for alias in node.names} | {source}
    return (found & modules) - {name}
