"""Where a checkpoint is read from: a folder, or one of the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..places import is_hub_id, local_folder
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CHAT_TEMPLATES,
    CODE,
    CONFIG,
    CONVERSION,
    GENERATION_CONFIG,
    INDEX,
    RECIPE,
    SHARDS,
    TOKENIZER_FILES,
    WEIGHTS,
    read_json,
)


HUB_PREFIX = "hf:"
_GGUF = ".gguf"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """
    A checkpoint on this machine.

    Attributes:
        name: as the user named it.
        folder: where its files are.
        parts: of the path that may tell what it is.
        commit: of a source on the Hub, None for a folder.
        config: its config.json; empty for a GGUF file.
        gguf: the name of the GGUF file in the folder that the checkpoint is.
        adapter: the folder of an adapter (PEFT) of the checkpoint: its own, or the one that was named.
    """

    name: str
    folder: Path
    parts: tuple[str, ...]
    commit: str | None
    config: dict[str, Any]
    gguf: str | None = None
    adapter: Path | None = None


def open_source(source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Source:
    """
    Finds a checkpoint, downloads it if it is on the Hub, and reads its config.json.

    Args:
        source: a folder, or `hf:org/repo`, or `hf:org/repo/folder/in/it`; or a GGUF file, here or in a repository. Of
            an adapter's folder, the checkpoint is the base model that it names.
        revision: branch, tag or commit of a source on the Hub.
        cache_dir: where downloads are kept. Default: the cache of huggingface_hub.

    Raises:
        ValueError: no such folder or repository, no config.json, or pickles instead of safetensors.
    """
    name = str(source)
    is_on_hub, commit = name.startswith(HUB_PREFIX), None
    if is_on_hub:
        repo, inner = _split(name)
        files = (
            CONFIG, GENERATION_CONFIG, CONVERSION, INDEX, WEIGHTS, SHARDS, CODE, RECIPE,
            *ADAPTER_FILES, *TOKENIZER_FILES, CHAT_TEMPLATES,
        )  # fmt: skip
        patterns = [inner] if inner.endswith(_GGUF) else [f"{inner}/{file}".lstrip("/") for file in files]
        snapshot = download(repo, patterns, revision, cache_dir)
        folder, parts, commit = snapshot / inner, tuple(inner.split("/")), snapshot.name
    else:
        if revision is not None:
            raise ValueError(
                f"`revision` is for sources on the Hub ({HUB_PREFIX}org/repo), not for the folder {name}."
            )
        folder = Path(name).expanduser()
        parts = folder.resolve().parts
    if folder.is_file() and folder.suffix == _GGUF:
        return Source(name, folder.parent, parts, commit, {}, gguf=folder.name)
    if not folder.is_dir():
        _refuse_pickles([folder] if folder.is_file() else [])
        what = "that is a file" if folder.is_file() else "there is no such folder"
        hint = f" For the one on the Hub, write {HUB_PREFIX}{name}." if not is_on_hub and is_hub_id(name) else ""
        raise ValueError(
            f"`source` must be a folder with {CONFIG} and {WEIGHTS}, or {HUB_PREFIX}org/repo/folder, but is {name!r}: "
            f"{what}{' in the repository' if is_on_hub else ''}.{hint}"
        )
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    if adapter is not None and not (folder / CONFIG).is_file():
        return replace(_open_base(adapter, cache_dir), adapter=adapter)
    if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        _refuse_pickles(sorted(folder.iterdir()))
        raise ValueError(f"There are no weights in {name}: it has neither {WEIGHTS} nor {INDEX}.")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"There is no {CONFIG} in {name}: put the one there that was published with the weights.")
    return Source(name, folder, parts, commit, read_json(folder / CONFIG), adapter=adapter)


def _open_base(adapter: Path, cache_dir: str | Path | None) -> Source:
    """The base model that an adapter names."""
    settings = read_json(adapter / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} does not name its base model, `base_model_name_or_path`.")
    try:
        is_here = local_folder(base) is not None
    except FileNotFoundError as error:
        raise ValueError(
            f"The base model of {adapter} is not there: {error} Write its place into `base_model_name_or_path` of "
            f"{ADAPTER_CONFIG}."
        ) from error
    if is_here:
        return open_source(base)
    return open_source(f"{HUB_PREFIX}{base}", settings.get("revision"), cache_dir)


def _split(name: str) -> tuple[str, str]:
    """The repository, and the folder in it."""
    parts = name.removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts) or ".." in parts:
        raise ValueError(f"`source` must have the form {HUB_PREFIX}org/repo or {HUB_PREFIX}org/repo/folder: {name!r}.")
    return "/".join(parts[:2]), "/".join(parts[2:])


def download(
    repo: str, patterns: Sequence[str], revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """
    The snapshot of a repository with the files of these patterns; that of the cache if the Hub does not answer.

    Raises:
        ValueError: no such repository or revision, neither Hub nor cache has it, or a download that broke off.
    """
    try:
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"There is no repository {repo!r} on the Hub that you have access to.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"The repository {repo!r} has no revision {revision!r} on the Hub.") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(f"The Hub does not answer, and its cache does not hold {repo}.") from error
    except HTTPError as error:  # of the client, in the middle
        raise ValueError(f"The download of {repo} broke off: {error}. Try again; it goes on where it was.") from error


def _refuse_pickles(files: list[Path]) -> None:
    pickles = [file for file in files if file.suffix in _PICKLES]
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened. Make safetensors of it "
            f'first: `safetensors.torch.save_file(tensors, "{WEIGHTS}")` with tensors of '
            "`torch.load(file, weights_only=True)`, the averaged (EMA) ones of the backbone."
        )


__all__ = ["Source", "download", "open_source"]
