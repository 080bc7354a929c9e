"""What a Hub keeps: repositories with branches, tags and commits, and their large files on disk.

A commit is a whole mapping from path to file and its id a hash of that mapping, so nothing ever
changes under a commit; a branch is a name for one. ``hub_server.py`` speaks HTTP over it.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

LARGE = re.compile(r"\.(safetensors|npz|npy|bin|pt|pth|msgpack|gguf)$")  # of .gitattributes
LARGE_BYTES = 10 << 20


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file outside git."""
    return bool(LARGE.search(path)) or size > LARGE_BYTES


def git_hash(data: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A small file with its ``content``, or a large one that is known by its ``sha256``."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        assert self.sha256 is not None
        head = "version https://git-lfs.github.com/spec/v1\n"
        return f"{head}oid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        return git_hash(self.pointer if self.content is None else self.content)

    def entry(self, path: str) -> dict:
        """The file as the tree API shows it."""
        entry = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256 is not None:
            large = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
            entry["lfs"] = large
        return entry


Tree = dict[str, File]


@dataclass
class Repository:
    """One model repository. It begins with a commit, as on the real Hub."""

    name: str
    private: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    """Of every commit, in order: how many there are, and why."""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        first = {".gitattributes": File(len(attributes), attributes)}
        self.branches["main"] = self.add(first, None, "initial commit")

    def add(self, tree: Tree, parent: str | None, message: str) -> str:
        """A new commit; no branch points to it yet."""
        listing = sorted((path, file.oid) for path, file in tree.items())
        text = json.dumps([parent, message, len(self.messages), listing])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(tree)
        self.messages.append(message)
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit id."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)

    def files(self, revision: str = "main") -> Tree:
        """What is there at a revision that exists."""
        commit = self.resolve(revision)
        assert commit is not None
        return self.commits[commit]


class Store:
    """All repositories, by name, and the large files, by SHA-256, in a folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()

    def large(self, sha256: str) -> Path:
        """Where a large file lies, if it is there."""
        return self.folder / sha256

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file."""
        file = self.repositories[name].files(revision)[path]
        return self.large(file.sha256).read_bytes() if file.content is None else file.content

    def put(self, name: str, path: str, data: bytes) -> None:
        """Commit one file to ``main`` behind the client's back."""
        repository = self.repositories[name]
        file = File(len(data), data)
        if is_large(path, len(data)):
            file = File(len(data), sha256=hashlib.sha256(data).hexdigest())
            self.large(file.sha256).write_bytes(data)
        head = repository.branches["main"]
        tree = {**repository.files(), path: file}
        repository.branches["main"] = repository.add(tree, head, f"put {path}")
