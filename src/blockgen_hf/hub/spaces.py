"""A Gradio Space that shows a model."""

import json
import re
import shutil
import tempfile
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
_REQUIREMENTS = ("torch>=2.6", "transformers>=5.20,<6")  # Spaces bring gradio themselves


def write_space(folder: str | Path, model_id: str, *, license: str, title: str | None = None) -> None:
    """
    Writes a Gradio Space: `app.py`, `requirements.txt`, and `README.md` with its metadata. `blockgen-hf push
    --repo-type space` uploads it.

    Args:
        folder (`str` or `Path`): a new one, or an empty one.
        model_id (`str`): the model on the Hub, or a folder with one, to try the app here.
        license (`str`): of the app, an identifier of the Hub.
        title (`str`, *optional*): what stands above it. Default: the model's name.

    Raises:
        ValueError: the folder holds something, or a bad name or licence.
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
    card = RepoCard.from_template(data, template_str=template("space_card.md"), model_id=model_id)
    app = re.sub('"MODEL_ID"', lambda found: json.dumps(model_id), template("space_app.py"))
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        requirements = "".join(f"{line}\n" for line in _REQUIREMENTS)
        for name, content in (("app.py", app), ("requirements.txt", requirements), (README, str(card))):
            write_whole(unfinished / name, content)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


__all__ = ["GRADIO", "write_space"]
