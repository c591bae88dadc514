"""A Gradio Space that shows a model."""

import json
import re
import shutil
import tempfile
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

from huggingface_hub import RepoCard
from huggingface_hub.repocard_data import CardData
from huggingface_hub.utils import validate_repo_id

from ..places import local_folder
from ..whole_files import write_whole
from .cards import template
from .files import README
from .licenses import check_license


GRADIO = "6.31.0"  # that the app was tried with
_PACKAGES = ("torch", "transformers")  # what the app imports; Spaces bring gradio themselves


def write_space(folder: str | Path, model_id: str, *, license: str, title: str | None = None) -> None:
    """
    Writes a Gradio Space: `app.py` with what it imports, `requirements.txt`, and `README.md` with its metadata.
    `blockgen-hf push --repo-type space` uploads it, `blockgen-hf demo` runs the same app on this machine.

    Args:
        folder (`str` or `Path`): a new or empty folder.
        model_id (`str`): a model on the Hub, or a model folder, to try the app on this machine.
        license (`str`): licence of the app, an identifier of the Hub.
        title (`str`, *optional*): title of the app. Default: the model's name.

    Raises:
        ValueError: the folder is not empty, or the name or the licence is invalid.
    """
    folder = Path(folder)
    is_local = local_folder(model_id) is not None
    if not is_local:
        validate_repo_id(model_id)
    check_license(license)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must be a new folder or an empty one, but {folder} holds something.")
    title = title or Path(model_id).name
    data = CardData(
        title=title,
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        models=None if is_local else [model_id],
        license=license,
        tags=["blockgen"],
    )
    card = RepoCard.from_template(data, template_str=template("space/README.md"), model_id=model_id)
    names = {"MODEL_ID": model_id, "MODEL_TITLE": title}
    app = re.sub('"(MODEL_ID|MODEL_TITLE)"', lambda found: json.dumps(names[found[1]]), template("space/app.py"))
    contents = {
        "app.py": app,
        "requirements.txt": "".join(f"{line}\n" for line in _requirements()),
        README: str(card),
        **_parts(),
    }
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        for name, content in contents.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            write_whole(unfinished / name, content)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _requirements() -> list[str]:
    """The releases that this package declares."""
    declared = requires("blockgen-hf") or []
    return [line for line in declared if re.split(r"[^\w-]", line)[0] in _PACKAGES and "extra ==" not in line]


def _parts() -> dict[str, str]:
    """What the app imports: copies of this package's files, which stand alone."""
    package = files("blockgen_hf")
    viewer = [file for file in (package / "replay").iterdir() if file.is_file()]
    return {
        **{name: template(f"space/{name}") for name in ("remote.py", "writing.py")},
        "frames.py": (package / "generation" / "frames.py").read_text(encoding="utf-8"),
        **{
            f"replay/{file.name}": file.read_text(encoding="utf-8")
            for file in sorted(viewer, key=lambda file: file.name)
        },
    }


__all__ = ["GRADIO", "write_space"]
