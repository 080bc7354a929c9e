"""What a server in HF_ENDPOINT answers, to the real client: listings, revisions, ETags, sizes,
bodies, encodings, redirects; and repositories whose files are damaged.

Each case ends in a sentence or in the dictionary that was asked for; nothing is written, changed or
deleted but in the folder that was named and in the cache, and there only files of the right names.
"""

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from command_line import content
from fuzzing import Fuzz, blind, change, frozen, places
from hub_fixtures import HERE, REPO
from hub_server import WRITER, Said
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub.transfer import list_dictionaries, pull, push

CACHED = re.compile(
    r"hub/models--user--saes/(blobs/([0-9a-f]{40}|[0-9a-f]{64})(\.incomplete)?|\.llm-wsae\.lock"
    r"|refs/main|snapshots/[0-9a-f]{40}/.+)"
)
VALUES = (None, True, 0, -1, 1, 7, 2**63, 10**400, 1.5, float("nan"), "", "x", "\ud800", "a\0b",
          "main", "0" * 39, "0" * 40, "A" * 40, "0" * 64, "g" * 64, [], {}, [[]], {"sha": 1},
          )  # fmt: skip
HEADERS = ("ETag", "X-Linked-Etag", "X-Repo-Commit", "X-Linked-Size", "Location",
           "Content-Length", "Content-Encoding", "Content-Range", "Content-Type", "X-Error-Code",
           "X-Error-Message", "X-HF-Warning", "Transfer-Encoding", "Set-Cookie")  # fmt: skip
STATUSES = (200, 204, 206, 300, 304, 400, 401, 403, 404, 416, 429, 500, 503)
WRITES = "/(preupload|commit|create|branch|validate-yaml|lfs)"  # the client reads these answers
WHERE = ("/api/models/user/saes$", "/tree/", "/resolve/", "/storage/", "/api/", ".")


def names(victims: Path) -> list[str]:
    """Where a server would like to write: a file that is there, and one that is not."""
    own = [victims / "thesis.tex", victims / "new.py", victims]
    ups = [f"{'../' * n}victims/{name}" for n in range(1, 9) for name in ("thesis.tex", "new.py")]
    return [*map(str, own), *ups, "..", ".", "/", "~/.bashrc", "a\\..\\b", "x" * 300]


class Twist:
    """One lie, decided by ``draw``, told in all or the first of the answers that match."""

    def __init__(self, number: int, draw: random.Random, victims: Path, files: list[bytes]):
        self.number, self.draw, self.files = number, draw, files
        self.where, self.times = draw.choice(WHERE), draw.choice((1, 99))
        self.hostile = names(victims)
        self.way = draw.choice((*(self.value, self.header) * 2, self.body, self.status))
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
        found = list(places(said))
        for inside, key in self.draw.sample(found, min(len(found), self.draw.choice((1, 1, 9)))):
            inside[key] = self.odd()
        if self.draw.random() < 0.3:
            self.done += f" {change(said, self.draw)}"
        answer.body = json.dumps(said).encode("utf-8", "surrogatepass")

    def header(self, path: str, answer: Said) -> None:
        name, value = self.draw.choice(HEADERS), self.odd()
        if name == "Location":
            answer.status = self.draw.choice((301, 302, 303, 307, 308))
            value = self.draw.choice(
                (value, path, f"file://{value}", "http://[", "//", "http://a b/")
            )
        elif name == "X-Error-Message":
            value = f"\x1b[2J {WRITER} {value}"
        elif name.endswith(("Encoding", "Type")):
            value = self.draw.choice(("gzip", "br", "deflate", "chunked", "utf-16", value))
        text = str(value).encode("utf-8", "replace").decode().replace("\0", "").replace("\n", "")
        answer.headers |= {name: text}
        answer.body = [answer.body]
        self.done += f" {name}: {text}"

    def body(self, path: str, answer: Said) -> None:
        body = answer.body
        ways = {
            "deep": lambda: b"[" * 10**6,
            "utf-16": lambda: body.decode("latin").encode("utf-16"),
            "latin": lambda: b'{"sha": "\xe9"}',
            "empty": lambda: b"",
            "cut": lambda: [body[: len(body) // 2]],
            "more": lambda: [body, b"x" * self.draw.choice((1, 10**6))],
            "gzip": lambda: [gzip.compress(body)],
            "blind": lambda: blind(body, self.draw, self.files[0])[1],
            "other": lambda: self.draw.choice(self.files),
            "html": lambda: b"<html>\x1b[2J" + WRITER.encode(),
        }
        way = self.draw.choice(list(ways))
        self.done += f" {way}"
        answer.body = ways[way]()
        if way == "gzip":
            answer.headers["Content-Encoding"] = "gzip"

    def status(self, path: str, answer: Said) -> None:
        answer.status = self.draw.choice(STATUSES)
        self.done += f" {answer.status}"


CASES = {"list": 25, "pull": 30, "from_pretrained": 30, "push": 15}
"""Of a long run; a quarter in a short one."""


@pytest.mark.parametrize("action", CASES)
def test_answers_of_a_hub(there, tmp_path, monkeypatch, fuzz: Fuzz, action):
    there.server.handle_error = lambda *_: None  # of a client that has had enough
    make_dictionary("other-k4").save(tmp_path / "mine")
    whole = frozen(Dictionary.load(tmp_path / "plain"))
    files = sorted(content(tmp_path / "plain").values())
    repository, good = there.repositories[REPO], there.repositories[REPO].branches["main"]
    repository.tags |= dict.fromkeys(names(tmp_path / "victims"), good)  # it answers for these
    for folder in ("victims", "work"):
        (tmp_path / folder).mkdir()
    (tmp_path / "victims/thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path / "work")
    out, home = tmp_path / "out/of", tmp_path / "home"
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

    def read():
        assert act() in (None, [], [whole])

    for number, draw in fuzz.cases(kind, CASES[action] // (4 if fuzz.times == 1 else 1)):
        twist = Twist(number, draw, tmp_path / "victims", files)
        if draw.random() < 0.8:
            shutil.rmtree(home, ignore_errors=True)
        there.spoil(".", twist)
        fuzz.reads(kind, twist, read, None)
        there.faults.clear()
        repository.branches["main"] = good
        left = surroundings(tmp_path)
        here = [path for path in home.rglob("*") if path.is_symlink() or not path.is_dir()]
        odd = {path for path in here if not CACHED.fullmatch(str(path.relative_to(home)))}
        odd |= {path for path in here if not path.resolve().is_relative_to(home)}
        if lost := odd | (left.items() ^ around.items()):
            fuzz.count(kind, "lost", twist, lost)
            around = left
        for found in out.rglob("wsae.json"):
            assert frozen(Dictionary.load(found.parent)) == whole, str(twist)
        shutil.rmtree(out, ignore_errors=True)


def test_damaged_repositories(there, tmp_path, fuzz: Fuzz):
    """Checksums of the Hub match what is damaged; the dictionary's own do not."""
    whole, files = frozen(Dictionary.load(tmp_path / "plain")), content(tmp_path / "plain")

    def read() -> bool:
        list_dictionaries(REPO)
        (folder,) = pull(REPO, tmp_path / "out").values()
        return frozen(Dictionary.load(folder)) == whole

    for number, draw in fuzz.cases("repository", 20):
        name = draw.choice(sorted(files))
        done, data = blind(files[name], draw, draw.choice(sorted(files.values())))
        there.put(REPO, f"{HERE}/{name}", data)
        fuzz.reads("repository", f"{number} ({name}: {done})", read, frozen(True))
        there.put(REPO, f"{HERE}/{name}", files[name])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def surroundings(place: Path) -> dict[str, bytes]:
    """All files but those of the cache and of the folder that was named."""
    found = content(place).items()
    return {name: data for name, data in found if not name.startswith(("home/", "out/of/"))}
