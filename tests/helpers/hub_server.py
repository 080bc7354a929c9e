"""A Hub of one's own: a real HTTP server that speaks the Hub's protocol to the real client.

    with HubServer(tmp_path) as hub:
        hub.create("user/repo")
        subprocess.run([...], env=hub.environment(tmp_path, token=WRITER))   # another process
        hub.use(monkeypatch, tmp_path, token=WRITER)                         # or this one

What it knows of models: create a repository, model info, the list of files (in pages), refs, create
and delete branches, tags, preupload, LFS batch with uploads, commits, and
downloads by revision with ETag, Range and the redirect of large files to another host ("localhost"
instead of "127.0.0.1"), where a token must never arrive.

Every repository belongs to ``user``. Three tokens: ``WRITER`` (of ``user``), ``READER`` (of
``user``, may not write), ``STRANGER`` (another user); any other is a wrong one.

Faults are ordered by ``fail`` (an answer with some status), ``cut`` (the connection ends in the
middle of a body) and ``corrupt`` (a byte of the body is changed); each strikes the next ``times``
requests that match. ``requests`` lists what was asked: (method, path).
"""

import base64
import json
import re
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_http import Answer, Fault, Said, Storage
from hub_store import File, Repository, Store, is_large

WRITER, READER, STRANGER = "hf_writersecret", "hf_readersecret", "hf_strangersecret"
_USERS = {WRITER: ("user", "write"), READER: ("user", "read"), STRANGER: ("stranger", "write")}


class HubServer:
    """The server, running from ``__enter__`` to ``__exit__``. ``store`` is what it holds."""

    def __init__(self, folder: Path):
        self.store = Store(Path(folder) / "lfs")
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.leaked: list[str] = []
        """Requests that carried a token to the host of large files."""
        self.ignored: tuple[str, ...] = ()
        """How the names end of files that its repositories' .gitignore leaves out."""
        self.twist: Callable[[str, Said], None] | None = None
        """Changes answers, by path, before they are sent."""
        self.page_size = 1000
        """Entries in a page of a tree."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, name: str, private: bool = False) -> Repository:
        """A new repository."""
        self.store.repositories[name] = Repository(name, private)
        return self.store.repositories[name]

    def fail(self, method: str, pattern: str, status: int, times: int = 1, message: str = ""):
        """Answer with ``status`` to requests whose path matches."""
        self.faults.append(Fault("fail", method, pattern, times, status, message=message))

    def cut(self, method: str, pattern: str, after: int, times: int = 1) -> None:
        """End the connection after some bytes of the body, sent or received."""
        self.faults.append(Fault("cut", method, pattern, times, after=after))

    def corrupt(self, method: str, pattern: str, times: int = 1) -> None:
        """Change the first byte of the body, sent or received."""
        self.faults.append(Fault("corrupt", method, pattern, times))

    def count(self, method: str, pattern: str) -> int:
        """How many requests matched so far."""
        return sum(m == method and bool(re.search(pattern, path)) for m, path in self.requests)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The variables that lead a client in another process here; ``home`` holds its cache."""
        found = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return found | ({"HF_TOKEN": token} if token else {})

    def use(self, monkeypatch: Any, home: Path, token: str | None = None) -> None:
        """Lead the client in this process here; it read its environment when it was imported."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        values = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between attempts
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        _http.close_session()
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)


class _Handler(Storage):
    """What the Hub answers."""

    hub: HubServer

    # Who may what

    def _user(self) -> tuple[str, str] | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        user = _USERS.get(header.removeprefix("Bearer "))
        if user is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, name: str, write: bool = False) -> Repository:
        user = self._user()
        found = self.hub.store.repositories.get(name)
        owner = name.split("/")[0]
        if user is None and (write or found is None or found.private):
            raise Answer(401, "Invalid username or password.", "RepoNotFound")
        if found is None or (found.private and user and user[0] != owner):
            raise Answer(404, "Repository not found", "RepoNotFound")
        if write and user != (owner, "write"):
            raise Answer(403, f"You don't have the rights to write to {name}")
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision or "main")
        if commit is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The API

    def create_repository(self) -> None:
        user, wanted = self._user(), self._json()
        if user is None:
            raise Answer(401, "Invalid username or password.")
        owner = wanted.get("organization") or user[0]
        if user != (owner, "write"):
            raise Answer(403, f'You don\'t have the rights to create a model under "{owner}"')
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{name}"
        with self.hub.store.lock:
            if name in self.hub.store.repositories:
                raise Answer(409, "You already created this model repo", url=url)
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.create(name, bool(private))
        self._ok({"url": url, "name": name, "id": name})

    def validate_yaml(self) -> None:
        content = self._json()["content"]
        valid = content.startswith("---\n") and "\n---\n" in content
        self._ok({"errors": [], "warnings": [] if valid else [{"message": "empty metadata"}]})

    def model_info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        commit = self._commit(repository, revision)
        files = repository.commits[commit]
        facts = {"_id": "0", "id": name, "modelId": name, "author": name.split("/")[0]}
        facts |= {"sha": commit, "private": repository.private, "gated": False, "disabled": False}
        facts |= {"tags": [], "downloads": 0, "likes": 0}
        facts["siblings"] = [{"rfilename": path} for path in files]
        self._ok(facts)

    def tree(self, name: str, revision: str) -> None:
        """All files, in pages."""
        repository = self._repository(name)
        files = repository.commits[self._commit(repository, revision)]
        found = [file.entry(path) for path, file in sorted(files.items())]
        start, size = int(self.query.get("cursor", ["0"])[0]), self.hub.page_size
        headers = {}
        if start + size < len(found):
            here = self.hub.endpoint + self.path.split("?")[0]
            headers["Link"] = f'<{here}?recursive=true&cursor={start + size}>; rel="next"'
        self._ok(found[start : start + size], **headers)

    def refs(self, name: str) -> None:
        repository = self._repository(name)

        def listed(kind: str, names: dict[str, str]) -> list[dict]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()
            ]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        self._ok({"branches": branches, "tags": tags, "converts": []})

    def reference(self, name: str, kind: str, label: str) -> None:
        """Create or delete a branch; create a tag at the revision ``label``."""
        repository, wanted = self._repository(name, write=True), self._json()
        if self.command == "DELETE":
            del getattr(repository, "branches" if kind == "branch" else "tags")[label]
        elif kind == "tag":
            repository.tags[wanted["tag"]] = self._commit(repository, label)
        elif label in repository.branches:
            raise Answer(409, f"Reference already exists: refs/heads/{label}")
        else:
            start = wanted.get("startingPoint") or "main"
            repository.branches[label] = self._commit(repository, start)
        self._ok({})

    # Uploads

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        files = repository.commits[self._commit(repository, revision)]
        answers = []
        for asked in self._json()["files"]:
            path, large = asked["path"], is_large(asked["path"], asked["size"])
            answer = {"path": path, "shouldIgnore": path.endswith(self.hub.ignored)}
            answer["uploadMode"] = "lfs" if large else "regular"
            if path in files:
                answer["oid"] = files[path].sha256 or files[path].oid
            answers.append(answer)
        self._ok({"files": answers})

    def batch(self, name: str) -> None:
        self._repository(name, write=True)
        wanted = self._json()["objects"]
        for asked in wanted:
            if not self.hub.store.large(asked["oid"]).exists():
                put = f"{self.hub.storage}/storage/{asked['oid']}?X-Signature=secret"
                asked["actions"] = {"upload": {"href": put}}
        self._ok({"transfer": "basic", "objects": wanted})

    def commit(self, name: str, revision: str) -> None:
        """All operations or none."""
        repository = self._repository(name, write=True)
        lines = [json.loads(line) for line in self._body().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.store.lock:
            if revision not in repository.branches:
                raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repository.branches[revision]
            if header.get("parentCommit") not in (None, head):
                raise Answer(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repository.commits[head])
            for line in lines:
                self._apply(tree, line["key"], line["value"])
            commit = repository.add(tree, head, header["summary"])
            repository.branches[revision] = commit
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._ok({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _apply(self, tree: dict[str, File], key: str, value: dict) -> None:
        if key == "file":
            content = base64.b64decode(value["content"])
            tree[value["path"]] = File(len(content), content)
        elif key == "lfsFile":
            place = self.hub.store.large(value["oid"])
            if not place.exists():
                raise Answer(400, f"LFS pointer of {value['path']} points to no file")
            tree[value["path"]] = File(place.stat().st_size, sha256=value["oid"])
        elif key == "deletedFile":
            tree.pop(value["path"])

    # Downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        commit = self._commit(repository, revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        file = repository.commits[commit].get(path)
        if file is None:
            raise Answer(404, "Entry not found", "EntryNotFound")
        if file.content is not None:
            self._serve(file.content, headers | {"ETag": f'"{file.oid}"'})
            return
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        headers["Location"] = f"{self.hub.storage}/storage/{file.sha256}?X-Signature=secret"
        self._send(302, b"", headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_Handler.routes = [
    ("POST", r"/api/repos/create", _Handler.create_repository),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST|DELETE", rf"/api/models/{_NAME}/(branch|tag)/([^/]+)", _Handler.reference),
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.model_info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/([^/]+)", _Handler.upload),
    ("GET|HEAD", r"/storage/([^/]+)", _Handler.download),
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
