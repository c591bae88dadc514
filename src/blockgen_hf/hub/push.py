"""
From a folder to the Hub: checks, a card, and one commit.

    folder -> read_folder (folders.py) -> card (cards.py) -> PushPlan -> HfApi.create_commit
"""

import fnmatch
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..whole_files import json_text
from .card_evaluation import Evaluation
from .cards import REPLAY, model_card, samples_card
from .files import ADAPTER_CONFIG, CONFIG, INDEX, README, SHARDS, WEIGHTS, read_card
from .folders import FolderContents, PlannedFile, read_folder
from .licenses import find_license
from .weights import check_values, read_tensors


_BLANK = "[More Information Needed]"  # in the cards that huggingface_hub and PEFT begin with


@dataclass(frozen=True)
class PushPlan:
    """
    What a push will upload. Nothing has been sent yet.

    Args:
        repo_id, repo_type, revision, private, create_pr, commit_message: the target, as in [`plan_push`].
        files (`tuple[PlannedFile]`): files to upload, including README.md.
        left_out (`tuple[tuple[str, str]]`): files that are left out, with the reason.
    """

    repo_id: str
    repo_type: str
    revision: str
    private: bool | None
    create_pr: bool
    commit_message: str
    files: tuple[PlannedFile, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def card(self) -> str:
        """The text of README.md."""
        return next(file.read().decode() for file in self.files if file.path == README)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files)

    def upload(self, *, token: str | None = None) -> CommitInfo:
        """
        Creates the repository and the branch if they do not exist, and uploads the files in one commit. The commit
        deletes weights of the branch that are not in the plan: with another number of shards, a part of the old model
        would remain.

        Args:
            token (`str`, *optional*): token of the Hub. Default: that of `hf auth login`, or HF_TOKEN.

        Raises:
            ValueError: the Hub refuses the card, or the repository is public and should be private.
            OSError: there is no token, or no permission to write, or the Hub returns an error.
        """
        api = HfApi(token=token)
        api.whoami()  # first of all, since it says what to do without a token
        RepoCard(self.card).validate(self.repo_type)
        where: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        if self.private:
            _check_private(api, where)
        sdk = "gradio" if self.repo_type == "space" else None
        api.create_repo(**where, private=self.private, exist_ok=True, space_sdk=sdk)
        if self.revision != "main":
            api.create_branch(**where, branch=self.revision, exist_ok=True)
        old = self._old_weights(api.list_repo_files(**where, revision=self.revision))
        additions = [CommitOperationAdd(file.path, file.source) for file in self.files]
        return api.create_commit(
            **where,
            operations=[*(CommitOperationDelete(path) for path in old), *additions],
            commit_message=self.commit_message,
            revision=self.revision,
            create_pr=self.create_pr,
        )

    def upload_in_background(self, *, token: str | None = None) -> Future:
        """Like [`~PushPlan.upload`], in a thread: the result of the future is the commit, or the error."""
        return HfApi().run_as_future(self.upload, token=token)

    def _old_weights(self, paths: Iterable[str]) -> list[str]:
        new = {file.path for file in self.files}
        if not any(map(_is_weight, new)):
            return []
        return [path for path in paths if _is_weight(path) and path not in new]


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    evaluations: Iterable[Evaluation] = (),
    replay: str | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    new_card: bool = False,
    update_code: bool = False,
    strict: bool = True,
) -> PushPlan:
    """
    Checks a folder and returns what [`push_folder`] would upload. Makes no network requests and changes nothing.

    Args:
        folder (`str` or `Path`): folder with a model, an adapter, a data set of samples, or a Space.
        repo_id (`str`): `namespace/name`.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        private (`bool`, *optional*): whether a new repository is private. Default: that of the namespace.
        revision (`str`, *optional*): branch, which is created if it does not exist. Default: main.
        create_pr (`bool`): whether to open a pull request instead of writing to the branch.
        commit_message (`str`, *optional*): Default: "Upload NAME with blockgen-hf".
        license, language, evaluations: see [`model_card`]. The card is the folder's README.md, if it has one.
        replay (`str`, *optional*): an animated picture, as `replay_svg` draws it. It is uploaded as replay.svg, and
            the card shows it.
        ignore, include (`list[str]`): globs of files to leave out, and of files to add.
        new_card (`bool`): whether to write a new card even if there is a README.md.
        update_code (`bool`): whether to publish this package's code instead of the folder's, if they differ.
        strict (`bool`): whether to refuse files that do not belong to a model; False leaves them out.

    Raises:
        ValueError: the folder contains something that must not be published.
    """
    if not str(folder):
        raise ValueError("`folder` must be the name of a folder, but is empty.")
    folder = Path(folder).expanduser()
    _check_repo_id(repo_id)
    contents = read_folder(folder, repo_type, ignore=ignore, include=include, update_code=update_code, strict=strict)
    if {CONFIG, ADAPTER_CONFIG} <= contents.files.keys():
        contents = contents.with_file(_own_adapter(contents.files[ADAPTER_CONFIG], repo_id))
    if repo_type == "model":
        check_values(folder, read_tensors(folder))
    facts: dict[str, Any] = dict(license=license, language=language)
    if repo_type == "model":
        facts["evaluations"] = list(evaluations)
    if replay is not None:
        if repo_type != "model":
            raise ValueError(f"`replay` (--replay) is for the card of a model, not of a {repo_type}.")
        contents = contents.with_file(PlannedFile(REPLAY, replay.encode(), "shows the model writing"))
        facts["replay"] = REPLAY
    card = _card(folder, repo_id, repo_type, contents, new_card, facts)
    return PushPlan(
        repo_id=repo_id,
        repo_type=repo_type,
        revision=revision or "main",
        private=private,
        create_pr=create_pr,
        commit_message=commit_message or f"Upload {repo_id.split('/')[-1]} with blockgen-hf",
        files=tuple(file for _, file in sorted(contents.with_file(card).files.items())),
        left_out=tuple(contents.left_out),
    )


def push_folder(folder: str | Path, repo_id: str, *, token: str | None = None, **options: Any) -> CommitInfo:
    """
    Uploads a folder to the Hub in one commit, with a card and with the code that `trust_remote_code=True` loads.

    Args:
        token (`str`, *optional*): token of the Hub. Default: that of `hf auth login`, or HF_TOKEN.
        options: options of [`plan_push`].

    Raises:
        ValueError, OSError: see [`plan_push`] and [`PushPlan.upload`]. Nothing is uploaded then.
    """
    return plan_push(folder, repo_id, **options).upload(token=token)


def _card(
    folder: Path, repo_id: str, repo_type: str, contents: FolderContents, new: bool, facts: dict[str, Any]
) -> PlannedFile:
    """README.md as it is uploaded: the folder's, its metadata completed by the licence, or a new one."""
    card = read_card(folder) if README in contents.files else None
    is_template = card is not None and _BLANK in card.content
    if card is None or ((new or is_template) and repo_type != "space"):
        write: Callable[..., RepoCard] = model_card if repo_type == "model" else samples_card
        note = "a new card; README.md is a template that nobody filled in" if is_template else "a new card"
        return PlannedFile(README, str(write(folder, repo_id=repo_id, **facts)).encode(), note)
    if facts.get("replay") and REPLAY in card.content:
        facts = {**facts, "replay": None}  # it shows the picture already
    for name, option in (("evaluations", "--evaluation"), ("language", "--language"), ("replay", "--replay")):
        if facts.get(name):
            raise ValueError(
                f"{folder} has a README.md, which is uploaded as it is, without what {option} (`{name}`) says: write "
                "it there, or have the card written anew with --new-card (`new_card=True`)."
            )
    found = find_license(folder, card.data.to_dict(), facts["license"]).metadata()
    if all(card.data.get(key) == value for key, value in found.items()):
        return contents.files[README]
    for key, value in found.items():
        card.data[key] = value
    return PlannedFile(README, str(card).encode(), "the licence is added to its metadata")


def _own_adapter(file: PlannedFile, repo_id: str) -> PlannedFile:
    """The settings of an adapter beside its model: on the Hub, transformers looks for the model where they say."""
    values = {**json.loads(file.read()), "base_model_name_or_path": repo_id}
    return PlannedFile(file.path, json_text(values).encode(), "names the repository as the base model")


def _check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: it is not `namespace/name`.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` must be `namespace/name`, such as 'my-name/my-model', but is {repo_id!r}.")


def _check_private(api: HfApi, where: dict[str, Any]) -> None:
    """A repository that is there keeps its visibility, whatever `create_repo` is told."""
    try:
        is_private = api.repo_info(**where).private
    except RepositoryNotFoundError:
        return
    if not is_private:
        raise ValueError(
            f"`private` is asked for, but {where['repo_id']} is there already, and public: make it private in its "
            "settings first, or name another."
        )


def _is_weight(path: str) -> bool:
    return path in (WEIGHTS, INDEX) or fnmatch.fnmatchcase(path, SHARDS)


__all__ = ["PushPlan", "plan_push", "push_folder"]
