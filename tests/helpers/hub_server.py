"""A Hub of one's own: a real HTTP server that speaks the Hub's protocol to the real client.

    with HubServer() as hub:
        hub.create("user/repo")
        subprocess.run([...], env=hub.environment(tmp_path, token=WRITER))   # another process
        hub.use(monkeypatch, tmp_path, token=WRITER)                         # or this one

It serves models, to any token. Large files come, by a redirect, from another host ("localhost"
instead of "127.0.0.1"), where a token must never arrive. A commit is a whole mapping from path to
file, so nothing ever changes under a commit. ``spoil`` and ``fail`` change what it answers;
``requests`` lists what it was asked: (method, path).
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER = "hf_writersecret"
_LARGE = re.compile(r"\.(safetensors|bin|pt|pth|gguf)$")  # of .gitattributes


@dataclass(frozen=True)
class File:
    """A file; a large one is kept outside git."""

    content: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's id of it. (That of a large one should be that of a pointer; no client asks.)"""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree API shows it."""
        entry = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        large = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry | ({"lfs": large} if self.large else {})


@dataclass
class Repository:
    """One model repository. It begins with a commit, as on the real Hub."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit({".gitattributes": File(b"*.safetensors filter=lfs\n")})

    def commit(self, tree: dict[str, File], branch: str = "main") -> str:
        """A new commit on a branch."""
        listing = sorted((path, file.oid) for path, file in tree.items())
        commit = hashlib.sha1(json.dumps([len(self.commits), listing]).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = tree, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit id."""
        found = self.branches.get(revision) or self.tags.get(revision)
        return revision if revision in self.commits else found

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.resolve(revision)]


@dataclass
class Said:
    """An answer, which may be changed before it is sent."""

    status: int
    body: Any
    """Bytes, or an iterable of pieces that are sent as they come, until the connection ends."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the answers to the next ``times`` requests that match."""

    asked: str
    """A pattern of ``METHOD path``."""
    change: Callable[[str, Said], object]
    """Changes an answer, by path, before it is sent."""
    times: int
    acts: bool
    """Whether the server does what it was asked for."""

    def strikes(self, asked: str) -> bool:
        found = self.times > 0 and bool(re.search(self.asked, asked))
        self.times -= found
        return found


class HubServer:
    """The server, running from ``__enter__`` to ``__exit__``."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        """By SHA-256."""
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.leaked: list[str] = []
        """Requests that carried a token to the host of large files."""
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool = False) -> Repository:
        self.repositories[name] = Repository(private)
        return self.repositories[name]

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        return self.repositories[name].files(revision)[path].content

    def put(self, name: str, path: str, data: bytes) -> None:
        """Commit one file to ``main`` behind the client's back; the repository may be new."""
        repository = self.repositories.get(name) or self.create(name)
        file = File(data, bool(_LARGE.search(path)))
        self.large[file.sha256] = data
        repository.commit({**repository.files(), path: file})

    def spoil(
        self, asked: str, change: Callable[[str, Said], object], times: int = 999, acts: bool = True
    ) -> None:
        """Change the next answers to requests that match, as the first such ``Fault`` says."""
        self.faults.append(Fault(asked, change, times, acts))

    def fail(self, method: str, path: str, status: int, times: int = 1, code: str = "") -> None:
        """Answer with ``status`` to requests whose path matches."""

        def change(_: str, said: Said) -> None:
            said.status, said.body = status, b'{"error": "something went wrong"}'
            said.headers = {"X-Error-Code": code} if code else {}

        self.spoil(f"{method} .*{path}", change, times, acts=False)

    def count(self, method: str, pattern: str) -> int:
        """How many requests matched so far."""
        return sum(m == method and bool(re.search(pattern, path)) for m, path in self.requests)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The variables that lead a client in another process here; ``home`` holds its cache."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def use(self, monkeypatch: Any, home: Path, token: str | None = None) -> None:
        """Lead the client in this process here; it read its environment when it was imported."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
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


def _refused(status: int, message: str, code: str) -> Said:
    headers = {"X-Error-Message": message, "X-Error-Code": code}
    return Said(status, json.dumps({"error": message}).encode(), headers)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Tests ask ``requests`` instead."""

    def _handle(self) -> None:
        path, asked = urlsplit(self.path).path, f"{self.command} {urlsplit(self.path).path}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, path))
        fault = next((one for one in self.hub.faults if one.strikes(asked)), None)
        said = Said(200, b"")
        if fault is None or fault.acts:
            with self.hub.lock:
                said = self._answer(path)
        if fault is not None:
            fault.change(path, said)
        with contextlib.suppress(OSError):
            self._send(said)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, said: Said) -> None:
        pieces = [said.body] if isinstance(said.body, bytes) else said.body
        lines = [f"HTTP/1.1 {said.status} Said", *(f"{k}: {v}" for k, v in said.headers.items())]
        if isinstance(said.body, bytes):
            lines.append(f"Content-Length: {len(said.body)}")
        else:
            lines.append("Connection: close")
            self.close_connection = True
        self.wfile.write("\r\n".join([*lines, "\r\n"]).encode("ascii", "replace"))
        for piece in pieces if self.command != "HEAD" else ():
            self.wfile.write(piece)

    def _answer(self, path: str) -> Said:
        if stored := re.fullmatch(r"/storage/([^/]+)", path):
            return self._stored(stored[1])
        if path in ("/api/repos/create", "/api/validate-yaml"):
            return self._json(self._create() if "create" in path else {"errors": []})
        match = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?", path)
        repository = self.hub.repositories.get(match[1]) if match else None
        if repository is None:
            return _refused(404, "Repository not found", "RepoNotFound")
        what, *words = (unquote(word) for word in (match[2] or "/")[1:].split("/", 2))
        if what in ("refs", "branch", "info"):
            return self._json(getattr(self, f"_{what}")(repository, *words))
        revision = words[0] if words else "main"
        commit = repository.resolve(revision)
        if commit is None:
            return _refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if what == "resolve":
            said = self._resolve(repository.commits[commit], words[1])
            said.headers["X-Repo-Commit"] = commit
            return said
        if what == "commit":
            return self._commit(match[1], repository, revision, commit)
        if what == "tree":
            listed = sorted(repository.commits[commit].items())
            return self._json([file.entry(name) for name, file in listed])
        if what == "preupload":
            return self._json(self._preupload(repository.commits[commit]))
        own = {"_id": "0", "id": match[1], "sha": commit, "private": repository.private}
        return self._json(own | {"siblings": [], "tags": [], "downloads": 0, "likes": 0})

    def _json(self, value: Any) -> Said:
        return Said(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _create(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        self.hub.create(name, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        return {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}

    def _refs(self, repository: Repository) -> dict[str, Any]:
        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
                for name, commit in names.items()
            ]

        branches, tags = listed("branches", repository.branches), listed("tags", repository.tags)
        return {"branches": branches, "tags": tags, "converts": []}

    def _branch(self, repository: Repository, name: str) -> dict[str, Any]:
        start = json.loads(self.body).get("startingPoint") or "main"
        repository.branches[name] = repository.resolve(start)
        return {}

    def _preupload(self, there: dict[str, File]) -> dict[str, Any]:
        ignored = there[".gitignore"].content.decode().split() if ".gitignore" in there else []
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if _LARGE.search(path) else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, one) for one in ignored),
            }
            for path in (one["path"] for one in json.loads(self.body)["files"])
        ]
        return {"files": files}

    def _info(self, repository: Repository, *_: str) -> dict[str, Any]:
        """LFS batch."""
        wanted = json.loads(self.body)["objects"]
        for asked in wanted:
            if asked["oid"] not in self.hub.large:
                put = f"{self.hub.storage}/storage/{asked['oid']}?X-Signature=secret"
                asked["actions"] = {"upload": {"href": put}}
        return {"transfer": "basic", "objects": wanted}

    def _commit(self, name: str, repository: Repository, branch: str, head: str) -> Said:
        """All operations or none."""
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = next(line["value"] for line in lines if line["key"] == "header")
        if parent.get("parentCommit") not in (None, head):
            return _refused(412, "A commit has happened since.", "")
        tree = dict(repository.commits[head])
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                tree[value["path"]] = File(self.hub.large[value["oid"]], large=True)
            elif key == "deletedFile":
                tree.pop(value["path"])
        commit = repository.commit(tree, branch)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _resolve(self, files: dict[str, File], path: str) -> Said:
        if path not in files:
            return _refused(404, "Entry not found", "EntryNotFound")
        file = files[path]
        if not file.large:
            return self._served(file.content, {"ETag": f'"{file.oid}"'})
        to = f"{self.hub.storage}/storage/{file.sha256}?X-Signature=secret"
        return Said(302, b"", {"X-Linked-Etag": f'"{file.sha256}"', "Location": to})

    def _stored(self, key: str) -> Said:
        """The host of large files: anyone with the address of one may put or get it."""
        if self.headers.get("Authorization"):
            self.hub.leaked.append(self.path)
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != key:
                return _refused(400, "the content does not have the SHA-256 that was announced", "")
            self.hub.large[key] = self.body
            return Said(200, b"")
        return self._served(self.hub.large[key], {"ETag": f'"{key}"'})

    def _served(self, data: bytes, headers: dict[str, str]) -> Said:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None:
            return Said(200, data, headers)
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return Said(206, data[start:], headers)
