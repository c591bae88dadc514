"""
What of a folder goes to the Hub.

Every file of the folder is one of three things: part of what is published, by the lists below; left by a training run,
or by a tool, by the lists below, or named by the caller, which is left out, and said; or something else, which is
refused.
"""

import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import blockgen_hf

from ..modeling.remote_code_blockgen import AUTO_MAP, remote_code
from .card_facts import read_model
from .files import (
    ADAPTER_FILES,
    CHAT_TEMPLATES,
    CODE,
    CONFIG,
    CONVERSION,
    MODEL_FILES,
    README,
    WEIGHT_FILES,
    matches,
    read_json,
)
from .model_checks import check_model_folder
from .portable import has_portable_form, portable_text
from .secrets import find_secret


_EVERYWHERE = (README, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", ".gitattributes")
_KINDS: dict[str, tuple[str, ...]] = {
    "model": (
        *_EVERYWHERE,
        CONFIG, *WEIGHT_FILES, *ADAPTER_FILES, CONVERSION, *MODEL_FILES, CHAT_TEMPLATES,
        "recipe.yaml",
    ),
    "dataset": (*_EVERYWHERE, "*.jsonl"),
    "space": (
        *_EVERYWHERE, "app.py", "requirements.txt",
        "frames.py", "remote.py", "writing.py", "replay/*.py", "replay/viewer.*",
    ),
}  # fmt: skip
# Left by a training run or a tool. Names of folders end with a bar.
_LEFTOVERS = {
    "checkpoint-*/": "a checkpoint of the training",
    "_*/": "unfinished",
    "runs/": "logs of the training",
    "tokenizer/": "the tokenizer as it was trained, which lies beside the weights too",
    "training_args.bin": "the training's arguments, a pickle",
    "trainer_state.json": "the training's state",
    "all_results.json": "the training's figures",
    "train_results.json": "the training's figures",
    "eval_results.json": "the training's figures",
    ".git/": "version control",
    ".cache/": "a cache",
    "__pycache__/": "a cache",
    ".lock": "the lock of a run",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5")


@dataclass(frozen=True)
class PlannedFile:
    """
    A file to upload.

    Args:
        path (`str`): in the repository.
        source (`Path` or `bytes`): where it lies, or what it holds if it is not the folder's own.
        note (`str`): why it is not the folder's own.
    """

    path: str
    source: Path | bytes
    note: str = ""

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class FolderContents:
    """What is published, by path, and what is left out: path and reason."""

    files: dict[str, PlannedFile] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def with_file(self, file: PlannedFile) -> "FolderContents":
        return replace(self, files={**self.files, file.path: file})


def read_folder(
    folder: Path,
    repo_type: str = "model",
    *,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    update_code: bool = False,
    strict: bool = True,
) -> FolderContents:
    """
    The files of a folder that belong on the Hub, checked.

    Args:
        repo_type: `"model"`, `"dataset"` (of samples) or `"space"`.
        ignore, include: globs of paths to leave out, and of others to take.
        update_code: whether code of another version than this package's is replaced, instead of being refused.
        strict: whether files that do not belong there are refused, instead of being left out.

    Raises:
        ValueError: files that do not belong there, links out of the folder, a file with a token or a password, or a
            model that would not load.
    """
    if repo_type not in _KINDS:
        raise ValueError(f"`repo_type` must be one of {list(_KINDS)}, but is {repo_type!r}.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    contents = _sort_files(folder, (*_KINDS[repo_type], *include), ignore, repo_type if strict else None)
    _refuse_secrets(folder, contents)
    if repo_type == "model":
        return _portable(_with_code(folder, _checked_model(folder, contents), update_code))
    needed = {"dataset": (), "space": ("app.py", README)}[repo_type]
    missing = [name for name in needed if name not in contents.files]
    if missing:
        raise ValueError(f"{folder} is no {repo_type}: it lacks {' and '.join(missing)}.")
    return _portable(contents)


def _sort_files(folder: Path, accepted: Sequence[str], ignore: Sequence[str], repo_type: str | None) -> FolderContents:
    """Without a type, what is not accepted is left out."""
    files: dict[str, PlannedFile] = {}
    left_out: list[tuple[str, str]] = []
    pickles, foreign = [], []
    for path, source in _walk(folder, ignore, left_out):
        if _matches(path, ignore):
            left_out.append((path, "ignored, as asked"))
        elif reason := _leftover(path):
            left_out.append((path, reason))
        elif repo_type is None and not _matches(path, accepted):
            left_out.append((path, "not of the model"))
        elif source.is_dir() or not source.is_file() or not source.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{source} is a link out of the folder, or to a folder: put a copy there, or ignore it.")
        elif path.lower().endswith(_PICKLES):
            pickles.append(path)
        elif _matches(path, accepted):
            files[path] = PlannedFile(path, source)
        else:
            foreign.append(path)
    if pickles:
        raise ValueError(
            f"{folder} holds files that may be pickles, which run code when they are read, and are not published: "
            f"{_shown(pickles)}. Delete them, or leave them out with --ignore GLOB (`ignore=`)."
        )
    if foreign:
        raise ValueError(
            f"{folder} holds files that are not of a {repo_type}: {_shown(foreign)}. Leave them out with --ignore "
            "GLOB (`ignore=`), or, if they belong there, take them with --include GLOB (`include=`)."
        )
    return FolderContents(files, sorted(left_out))


def _refuse_secrets(folder: Path, contents: FolderContents) -> None:
    """Looks into every file but the weights: an older version, or a user, may have written a token there."""
    for path, file in contents.files.items():
        if path.endswith(".safetensors"):
            continue
        place = find_secret(path, file.read().decode("utf-8", errors="replace"))
        if place is not None:
            raise ValueError(
                f"{folder / path} holds a secret, {place}, and is not published. Delete it there; if the folder was "
                "ever uploaded or shared, revoke the token too."
            )


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def _walk(folder: Path, ignore: Sequence[str], left_out: list[tuple[str, str]]) -> Iterable[tuple[str, Path]]:
    """Files, and links to folders; folders that are left out as a whole are noted, and not entered."""
    for root, folders, names in os.walk(folder):
        base = Path(root)
        for name in sorted(folders):
            path = (base / name).relative_to(folder).as_posix()
            reason = "ignored, as asked" if _matches(path, ignore) else _leftover(f"{path}/")
            if reason:
                left_out.append((f"{path}/", reason))
                folders.remove(name)
            elif (base / name).is_symlink():
                folders.remove(name)
                yield path, base / name
        folders.sort()
        for name in sorted(names):
            yield (base / name).relative_to(folder).as_posix(), base / name


def _leftover(path: str) -> str | None:
    """Why a path is left out. Training writes into the folder itself, tools anywhere."""
    for pattern, reason in _LEFTOVERS.items():
        if fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/"):
            return reason
    return _LEFTOVERS.get(f"{Path(path).name}/") if path.endswith("/__pycache__/") else None


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """A pattern without a bar is one of the folder itself, as `*` does not cross bars here."""
    parts = path.split("/")
    for pattern in patterns:
        wanted = pattern.rstrip("/").split("/")
        if len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            return True
    return False


def _checked_model(folder: Path, contents: FolderContents) -> FolderContents:
    facts = read_model(folder)
    for file in {tensor.file for tensor in facts.tensors.values()}:
        if file not in contents.files:
            raise ValueError(f"{file} is left out, but holds weights of the model.")
    if facts.config is None:
        return contents
    if CONFIG not in contents.files:
        raise ValueError("config.json is left out, but without it nobody can load the model.")
    check_model_folder(folder, with_adapter=True)
    return contents


def _portable(contents: FolderContents) -> FolderContents:
    """Without paths of this machine, and with a tokenizer that is as long as the model."""
    config = contents.files.get(CONFIG)
    positions = None if config is None else json.loads(config.read()).get("max_position_embeddings")
    for path, file in contents.files.items():
        if has_portable_form(path):
            text = file.read().decode("utf-8", errors="surrogateescape")
            portable = portable_text(path, text, positions)
            if portable != text:
                note = "; ".join(filter(None, (file.note, "without what is of this machine only")))
                content = portable.encode("utf-8", errors="surrogateescape")
                contents = contents.with_file(PlannedFile(path, content, note))
    return contents


def is_model_file(path: str) -> bool:
    """Whether a file of this name belongs to a published model."""
    return _matches(path, _KINDS["model"])


def _package_code() -> dict[str, bytes]:
    return {name: text.encode() for name, text in remote_code().items()}


def _with_code(folder: Path, contents: FolderContents, update: bool) -> FolderContents:
    """With this package's code and the map to it, so that `trust_remote_code=True` loads it; adapters have none."""
    if CONFIG not in contents.files:
        return contents
    own, code = {path for path in contents.files if matches(path, [CODE])}, _package_code()
    differing = sorted(name for name in own if name not in code or contents.files[name].read() != code[name])
    values = read_json(folder / CONFIG)
    auto_map = values.get("auto_map")
    if auto_map not in (None, AUTO_MAP):
        differing.append("`auto_map` in config.json")
    if differing and not update:
        raise ValueError(
            f"The code in {folder} is not that of this blockgen-hf ({blockgen_hf.__version__}): "
            f"{', '.join(differing)}. Publish this package's instead with --update-code (`update_code=True`), or push "
            "with the version that wrote the folder."
        )
    files = {path: file for path, file in contents.files.items() if path not in own or path not in differing}
    for name, source in code.items():
        if name not in files:
            files[name] = PlannedFile(name, source, "this package's code")
    if auto_map != AUTO_MAP:
        text = json.dumps({**values, "auto_map": AUTO_MAP}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        files[CONFIG] = PlannedFile(CONFIG, text.encode(), "`auto_map` names the code")
    return replace(contents, files=dict(sorted(files.items())))


__all__ = ["FolderContents", "PlannedFile", "is_model_file", "read_folder"]
