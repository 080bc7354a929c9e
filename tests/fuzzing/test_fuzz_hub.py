"""What a server in HF_ENDPOINT answers, to the real client: listings, revisions, ETags, sizes,
bodies, encodings, redirects, answers that never end or hardly begin.

Each case ends in a sentence or in the dictionary that was asked for; nothing is written, changed or
deleted but in the folder that was named and in the cache, and there only files of the right names.
"""

import gzip
import itertools
import json
import random
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import content
from fuzzing import Fuzz, blind, change, frozen
from hub_fixtures import REPO
from hub_http import Said
from hub_server import WRITER, HubServer
from small_dictionaries import SITE, make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub import client
from llm_wsae.dictionary.hub.pulling import list_dictionaries, pull
from llm_wsae.dictionary.hub.pushing import push

CACHED = re.compile(
    r"hub/models--user--saes/(blobs/([0-9a-f]{40}|[0-9a-f]{64})(\.incomplete)?|\.llm-wsae\.lock"
    r"|refs/main|snapshots/[0-9a-f]{40}/.+)"
)
VALUES = (None, True, 0, -1, 1, 7, 2**63, 10**400, 1.5, float("nan"), "", "x", "\ud800", "a\0b",
          "main", "0" * 39, "0" * 40, "A" * 40, "0" * 64, "g" * 64, [], {}, [[]], {"sha": 1},
          )  # fmt: skip
HEADERS = ("ETag", "X-Linked-Etag", "X-Repo-Commit", "X-Linked-Size", "Location", "Link",
           "Content-Length", "Content-Encoding", "Content-Range", "Content-Type", "X-Error-Code",
           "X-Error-Message", "X-HF-Warning", "Transfer-Encoding", "Set-Cookie")  # fmt: skip
BODIES = ("deep", "utf-16", "latin", "empty", "cut", "more", "endless", "slow", "silent", "gzip",
          "bomb", "blind", "other", "endless head", "slow head", "html")  # fmt: skip
STATUSES = (200, 204, 206, 300, 304, 400, 401, 403, 404, 416, 429, 500, 503)
PAUSE = threading.Event()  # never set: ``time.sleep`` does nothing here
WRITES = "/(preupload|commit|create|branch|validate-yaml|lfs)"  # the client reads these answers
WHERE = ("/api/models/user/saes$", "/tree/", "/resolve/", "/storage/", "/api/", ".")


def names(victims: Path) -> list[str]:
    """Where a server would like to write: a file that is there, and one that is not."""
    places = [victims / "thesis.tex", victims / "new.py", victims]
    ups = [
        "../" * n + f"victims/{place}" for n in range(1, 9) for place in ("thesis.tex", "new.py")
    ]
    return [*map(str, places), *ups, "..", ".", "/", "~/.bashrc", "a\\..\\b", "x" * 300]


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece


def slowly(piece: bytes) -> Iterator[bytes]:
    for _ in range(200):
        yield piece[:1]
        PAUSE.wait(0.05)


class Twist:
    """One lie, decided by ``draw``, told in all or the first of the answers that match."""

    def __init__(self, number: int, draw: random.Random, victims: Path, files: list[bytes]):
        self.number, self.draw, self.files = number, draw, files
        self.where, self.times = draw.choice(WHERE), draw.choice((1, 99))
        self.hostile, self.counted = names(victims), itertools.count(1)
        ways = (self.value, self.header) * 2
        self.way = draw.choice((*ways, self.body, self.status, self.pages))
        self.done = self.way.__name__

    def __str__(self) -> str:
        return f"{self.number} ({self.where} {self.done})"

    def __call__(self, path: str, answer: Said) -> None:
        if self.times and re.search(self.where, path) and not re.search(WRITES, path):
            self.times -= 1
            self.way(path, answer)

    def odd(self) -> object:
        return self.draw.choice(self.draw.choice((self.hostile, VALUES)))

    def value(self, path: str, answer: Said) -> None:
        """Some value of a JSON answer."""
        try:
            said = json.loads(answer.body)
        except ValueError:
            return self.header(path, answer)
        places = list(_places(said))
        for inside, key in self.draw.sample(places, min(len(places), self.draw.choice((1, 1, 9)))):
            inside[key] = self.odd()
        if self.draw.random() < 0.3:
            self.done += f" {change(said, self.draw)}"
        answer.body = json.dumps(said).encode("utf-8", "surrogatepass")

    def header(self, path: str, answer: Said) -> None:
        name = self.draw.choice(HEADERS)
        value = self.odd()
        if name == "Location":
            answer.status = self.draw.choice((301, 302, 303, 307, 308))
            value = self.draw.choice(
                (value, path, f"file://{value}", "http://[", "//", "http://a b/")
            )
        elif name == "Link":
            value = f'<{self.odd()}>; rel="next"'
        elif name == "X-Error-Message":
            value = f"\x1b[2J {WRITER} {value}"
        elif name.endswith(("Encoding", "Type")):
            value = self.draw.choice(("gzip", "br", "deflate", "chunked", "utf-16", value))
        text = str(value).encode("utf-8", "replace").decode().replace("\0", "").replace("\n", "")
        answer.headers = {k: v for k, v in answer.headers.items() if k != name} | {name: text}
        answer.body = [answer.body]
        self.done += f" {name}: {text}"

    def body(self, path: str, answer: Said) -> None:
        way = self.draw.choice(BODIES)
        self.done += f" {way}"
        body = answer.body
        if way.endswith("head"):
            answer.headless = True
            pieces = endless(b"x" * 4096) if way == "endless head" else slowly(b"x")
            answer.body = (b"\r\nX-%d: %s" % (n, piece) for n, piece in enumerate(pieces))
            return
        answer.body = {
            "deep": lambda: b"[" * 10**6,
            "utf-16": lambda: body.decode("latin").encode("utf-16"),
            "latin": lambda: b'{"sha": "\xe9"}',
            "empty": lambda: b"",
            "cut": lambda: [body[: len(body) // 2]],
            "more": lambda: [body, b"x" * self.draw.choice((1, 10**6))],
            "endless": lambda: endless(self.draw.choice((b"x" * 65536, b"[{},", b" " * 65536))),
            "slow": lambda: slowly(body),
            "silent": lambda: (b""[PAUSE.wait(1) :] for _ in range(2)),
            "gzip": lambda: [gzip.compress(body)],
            "bomb": lambda: [gzip.compress(b" " * (64 << 20))],
            "blind": lambda: blind(body, self.draw, self.files[0])[1],
            "other": lambda: self.draw.choice(self.files),
            "html": lambda: b"<html>\x1b[2J" + WRITER.encode(),
        }[way]()
        if way in ("gzip", "bomb"):
            answer.headers["Content-Encoding"] = "gzip"

    def status(self, path: str, answer: Said) -> None:
        answer.status = self.draw.choice(STATUSES)
        self.done += f" {answer.status}"

    def pages(self, path: str, answer: Said) -> None:
        """A listing that goes on for ever."""
        self.where, self.times = "/tree/", -1
        cursor = self.draw.choice((0, next(self.counted)))
        answer.headers["Link"] = f'<http://x/?cursor={cursor}>; rel="next"'
        answer.body = self.draw.choice((b"[]", answer.body))


def _places(value: object) -> Iterator[tuple]:
    """(container, key) of everything in a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@pytest.fixture
def hub(tmp_path_factory, tmp_path, monkeypatch):
    """A Hub with a dictionary, that answers within a third of a second or is late."""
    monkeypatch.setattr(client, "LONGEST_ANSWER", 0.3)
    monkeypatch.setattr(client, "TIMEOUT", 0.2)
    monkeypatch.setattr(client, "SLOWEST", 10**7)
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.use(monkeypatch, tmp_path / "home", WRITER)
        server.create(REPO)
        server._server.handle_error = lambda *_: None  # of a client that has had enough
        yield server


CASES = {"list": 25, "pull": 30, "from_pretrained": 30, "push": 15}
"""Of a long run; a quarter in a short one."""


@pytest.mark.parametrize("action", CASES)
def test_answers_of_a_hub(hub, tmp_path, monkeypatch, fuzz: Fuzz, capfd, action):
    make_dictionary("plain-k4").save(tmp_path / "plain")
    make_dictionary("other-k4").save(tmp_path / "mine")
    whole = frozen(Dictionary.load(tmp_path / "plain"))
    files = content(tmp_path / "plain")
    for name, data in files.items():
        hub.store.put(REPO, f"{SITE}/plain-k4/{name}", data)
    repository, good = hub.store.repositories[REPO], hub.store.repositories[REPO].branches["main"]
    repository.tags |= dict.fromkeys(names(tmp_path / "victims"), good)  # it answers for these
    (tmp_path / "victims").mkdir()
    (tmp_path / "victims/thesis.tex").write_text("years of work")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    out = tmp_path / "out/of"
    actions = {
        "list": lambda: list_dictionaries(REPO) and None,
        "pull": lambda: [frozen(Dictionary.load(one)) for one in pull(REPO, out).values()],
        "from_pretrained": lambda: [frozen(Dictionary.from_pretrained(REPO))],
        "push": lambda: push([tmp_path / "mine"], REPO) and None,
    }
    kind, act = f"answer of a Hub, {action}", actions[action]
    actions["pull"]()  # as it should be
    act()
    repository.branches["main"] = good
    shutil.rmtree(out)
    around = surroundings(tmp_path)
    for number, draw in fuzz.cases(kind, CASES[action] // (4 if fuzz.times == 1 else 1)):
        hub.twist = twist = Twist(number, draw, tmp_path / "victims", sorted(files.values()))
        if draw.random() < 0.8:
            shutil.rmtree(tmp_path / "home", ignore_errors=True)

        def read():
            assert act() in (None, [], [whole])

        fuzz.reads(kind, twist, read, None)
        hub.twist = None
        repository.branches["main"] = good
        if (left := surroundings(tmp_path)) != around:
            fuzz.count(kind, "lost", twist, set(left.items()) ^ set(around.items()))
            around = left
        home = tmp_path / "home"
        here = [path for path in home.rglob("*") if path.is_symlink() or not path.is_dir()]
        odd = [path for path in here if not CACHED.fullmatch(str(path.relative_to(home)))]
        odd += [path for path in here if not path.resolve().is_relative_to(home)]
        if odd:
            fuzz.count(kind, "lost", twist, odd)
        if out.exists():
            for found in out.rglob("wsae.json"):
                assert frozen(Dictionary.load(found.parent)) == whole, str(twist)
            shutil.rmtree(out)
    said = "".join(capfd.readouterr())
    for sign in (WRITER, "Traceback", "\x1b[2J"):
        assert sign not in said, said[max(0, said.index(sign) - 500) :][:1500]


def test_damaged_repositories(hub, tmp_path, fuzz: Fuzz):
    """Checksums of the Hub match what is damaged; the dictionary's own do not."""
    make_dictionary("plain-k4").save(tmp_path / "plain")
    whole, files = frozen(Dictionary.load(tmp_path / "plain")), content(tmp_path / "plain")
    for name, data in files.items():
        hub.store.put(REPO, f"{SITE}/plain-k4/{name}", data)
    repository, out = hub.store.repositories[REPO], tmp_path / "out"
    good = repository.branches["main"]

    def read():
        list_dictionaries(REPO)
        return [frozen(Dictionary.load(folder)) for folder in pull(REPO, out).values()] == [whole]

    for number, draw in fuzz.cases("repository", 20):
        name = draw.choice(sorted(files))
        done, data = blind(files[name], draw, draw.choice(sorted(files.values())))
        hub.store.put(REPO, f"{SITE}/plain-k4/{name}", data)
        fuzz.reads("repository", f"{number} ({name}: {done})", read, frozen(True))
        repository.branches["main"] = good
        shutil.rmtree(out, ignore_errors=True)


def surroundings(place: Path) -> dict[str, bytes]:
    """All files but those of the cache and of the folder that was named."""
    return {
        name: data
        for name, data in content(place).items()
        if not name.startswith(("home/", "out/of/"))
    }
