"""A Hub on this machine: the part of its HTTP API that uploads, and downloads of what was uploaded."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers
import yaml
from huggingface_hub import constants


TOKEN = "hf_of_the_fake"
LARGE = (".safetensors", ".jsonl")  # what goes through LFS


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        """A commit on a branch; its id."""
        name = hashlib.sha1(f"{branch}{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = Commit(message, files)
        self.branches[branch] = name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)].files


class FakeHub(ThreadingHTTPServer):
    """
    Repositories by type and name (`"model"`, `"me/stories"`), and the requests that came, as `"POST /api/..."`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        return self.repositories[repo_type, repo_id].files(revision)

    def commits(self, repo_id: str, repo_type: str = "model") -> list[Commit]:
        """Oldest first, the empty one of the creation included."""
        return list(self.repositories[repo_type, repo_id].commits.values())


class _Refusal(Exception):
    """An answer other than 200, with the Hub's code of the error."""

    def __init__(self, status: int, message: str, code: str = "", **values: str) -> None:
        super().__init__(message)
        self.status, self.code, self.values = status, code, values


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            self._send(200, *self._route([unquote(part) for part in url.path.strip("/").split("/")]))
        except _Refusal as refusal:
            text = json.dumps(
                {"error": str(refusal), "errors": [{"message": str(refusal)}], **refusal.values}
            ).encode()
            self._send(refusal.status, text, {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, parts: list[str]) -> tuple[bytes, dict[str, str]]:
        if parts[0] == "lfs":
            self.server.large_files[parts[1]] = self.body
            return b"", {}
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._json(self._batch())
        if "resolve" in parts:
            return self._resolve(parts)
        if parts == ["api", "validate-yaml"]:
            return self._json(self._validate())
        self._check_token()
        if parts == ["api", "whoami-v2"]:
            return self._json({"name": "me", "type": "user", "orgs": []})
        if parts == ["api", "repos", "create"]:
            return self._json(self._create())
        repo_type, repo_id = parts[1].removesuffix("s"), "/".join(parts[2:4])
        action, rest = (parts[4], parts[5:]) if len(parts) > 4 else ("info", ["main"])
        return self._json(getattr(self, f"_{action}")(self._repository(repo_type, repo_id), *rest))

    def _json(self, value: Any) -> tuple[bytes, dict[str, str]]:
        return json.dumps(value).encode(), {"Content-Type": "application/json"}

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, "Invalid credentials in Authorization header")

    def _repository(self, repo_type: str, repo_id: str) -> Repository:
        if (repo_type, repo_id) not in self.server.repositories:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[repo_type, repo_id]

    def _create(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        repo_type = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        url = f"{self.server.url}/{prefix}{repo_id}"
        if repo_id.startswith("others/"):
            raise _Refusal(403, "You don't have the rights to create a model under the namespace others")
        if (repo_type, repo_id) in self.server.repositories:
            raise _Refusal(409, "You already created this repo", url=url)
        repository = Repository(
            wanted.get("visibility") == "private" or wanted.get("private") is True, wanted.get("sdk")
        )
        repository.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[repo_type, repo_id] = repository
        return {"url": url, "id": repo_id}

    def _validate(self) -> dict[str, Any]:
        """The checks of the Hub that a card of ours could fail."""
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
        data = yaml.safe_load(content.split("---\n")[1])
        for name in ("license", "library_name", "pipeline_tag"):
            if name in data and not isinstance(data[name], str):
                raise _Refusal(400, f'"{name}" must be a string')
        if data.get("license") == "no-such-licence":
            raise _Refusal(400, '"license" must be one of [apache-2.0, mit, ...]')
        for result in [result for entry in data.get("model-index", []) for result in entry["results"]]:
            if not result["task"]["type"] or not result["dataset"]["type"] or not result["dataset"]["name"]:
                raise _Refusal(400, '"model-index[0].results[0]" is incomplete')
            if not all(metric["type"] and "value" in metric for metric in result["metrics"]):
                raise _Refusal(400, '"model-index[0].results[0].metrics" is incomplete')
        return {"warnings": [], "errors": []}

    def _info(self, repository: Repository, revision: str) -> dict[str, Any]:
        commit = self._commit_of(repository, revision)
        files = [{"rfilename": name} for name in repository.files(commit)]
        name = "/".join(urlsplit(self.path).path.split("/")[3:5])
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.private,
            "siblings": files,
            "tags": [],
        }

    _revision = _info

    def _commit_of(self, repository: Repository, revision: str) -> str:
        if revision not in repository.branches and revision not in repository.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.branches.get(revision, revision)

    def _branch(self, repository: Repository, name: str) -> dict[str, Any]:
        if name in repository.branches:
            raise _Refusal(409, "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        return {}

    def _tree(self, repository: Repository, revision: str, *folder: str) -> list[dict[str, Any]]:
        files = repository.files(self._commit_of(repository, revision))
        prefix = "".join(f"{part}/" for part in folder)
        found = [name for name in files if name.startswith(prefix)]
        if folder and not found:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        return [{"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])} for name in found]

    def _preupload(self, repository: Repository, revision: str) -> dict[str, Any]:
        self._commit_of(repository, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        return {
            "files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
        }

    def _batch(self) -> dict[str, Any]:
        wanted = json.loads(self.body)["objects"]
        return {
            "transfer": "basic",
            "objects": [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}} for one in wanted
            ],
        }

    def _commit(self, repository: Repository, revision: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.files(self._commit_of(repository, revision)))
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, f"unknown operation {key}")
        branch = "refs/pr/1" if self.query.get("create_pr") else revision
        commit = repository.add(branch, lines[0]["value"]["summary"], files)
        name = "/".join(urlsplit(self.path).path.split("/")[3:5])
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit}
        return {**answer, "pullRequestUrl": f"{self.server.url}/{name}/discussions/1"}

    def _resolve(self, parts: list[str]) -> tuple[bytes, dict[str, str]]:
        at = parts.index("resolve")
        repo_type = parts[0].removesuffix("s") if at == 3 else "model"
        repository = self._repository(repo_type, "/".join(parts[at - 2 : at]))
        commit = self._commit_of(repository, parts[at + 1])
        name, files = "/".join(parts[at + 2 :]), repository.files(commit)
        if repository.private:
            self._check_token()
        if name not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        return files[name], {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": commit}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def environment(hub: FakeHub, folder: Path) -> dict[str, str]:
    """Of another process that takes the fake for the Hub, with a cache of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The fake, which this process takes for the Hub, with a token."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # which knows the address of its first call
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
