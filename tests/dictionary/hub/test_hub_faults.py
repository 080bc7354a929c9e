"""What can go wrong with the Hub, and what a hostile one can try: each failure is one sentence
without a token, leaves repository and disk as they were, and is over when its cause is."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from command_line import call, content
from hub_fixtures import HERE, REPO, head, sentence
from hub_server import WRITER, Said
from huggingface_hub import constants
from looping import over
from refusals import fails, misused
from small_dictionaries import SITE, make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub.transfer import list_dictionaries, pull, push
from llm_wsae.errors import LlmWsaeError


@pytest.fixture
def refused(there, tmp_path):
    """What comes of pulling, after which the repository is whole again: one sentence, and nothing
    on disk."""
    repository = there.repositories[REPO]
    good = repository.branches["main"]

    def check() -> str:
        with pytest.raises(LlmWsaeError) as error:
            pull(REPO, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        there.faults.clear()
        repository.branches["main"] = good
        return sentence(error)

    return check


# Networks and servers that fail


def test_the_cache_answers_without_a_network(hub, plain, weighted, tmp_path, monkeypatch):
    push([plain, weighted], REPO)
    wanted = Dictionary.from_pretrained(REPO, HERE)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(Dictionary.from_pretrained(REPO, HERE).W_enc, wanted.W_enc)
    for repo, sae_id, said in (
        (REPO, f"{SITE}/weighted-k4", "the local cache of user/saes has no dictionary"),
        ("user/never-seen", None, "HF_HUB_OFFLINE is set.*user/never-seen"),
    ):
        with pytest.raises(LlmWsaeError, match=said) as error:
            Dictionary.from_pretrained(repo, sae_id)
        sentence(error)
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fail("GET", "/api/models/", 503, times=2)
    assert torch.equal(Dictionary.from_pretrained(REPO, HERE).W_enc, wanted.W_enc)
    fails("the Hub answered with status 503", Dictionary.from_pretrained, "user/never-seen")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert content(*pull(REPO, tmp_path / "out", HERE).values()) == content(plain)
    fails(r"connection to the Hub .http://127.0.0.1:9. failed", push, [plain], REPO)


BREAKS = (  # method, path, status, code, the sentence
    ("GET", "/api/models/user/saes$", 404, "RepoNotFound", "on the Hub that you may see; check"),
    ("GET", "/api/models/user/saes$", 401, "", "does not accept your token, or needs one"),
    ("GET", "/tree/", 403, "GatedRepo", "is gated: accept its terms"),
    ("POST", "/preupload/", 503, "", "the Hub answered with status 503"),
    ("POST", "/objects/batch", 500, "", "the Hub answered with status 500"),
    ("PUT", "/storage/", 503, "", "the Hub answered with status 503"),
    ("POST", "/commit/", 429, "", "the Hub answered with status 429"),
    ("POST", "/commit/", 403, "", "your token may not do that with user/saes"),
    ("POST", "/commit/", 412, "", "was changed by someone else in the meantime"),
)


def test_a_push_that_breaks_leaves_the_repository_as_it_was(hub, plain, weighted):
    push([plain], REPO)
    before, commits = head(hub), len(hub.repositories[REPO].commits)
    for method, path, status, code, said in BREAKS:
        hub.fail(method, path, status, times=99, code=code)
        if code == "RepoNotFound":
            hub.fail("POST", "/create", 403, times=99)
            said = "your token may not do that"
        with pytest.raises(LlmWsaeError) as error:
            push([weighted], REPO)
        assert said in sentence(error), path
        assert head(hub) == before and len(hub.repositories[REPO].commits) == commits, path
        hub.faults.clear()
    hub.fail("POST", "/preupload/", 503, times=2)  # that passes, and is waited for
    assert f"{SITE}/weighted-k4/wsae.json" in push([weighted], REPO).changed


def test_a_pull_that_may_not_leaves_nothing(there, refused):
    for method, path, status, code, said in BREAKS[:3]:
        there.fail(method, path, status, times=99, code=code)
        assert said in refused(), path


def test_someone_else_pushes_in_between(hub, plain, weighted):
    push([plain], REPO)
    hub.spoil("/preupload/", lambda *_: hub.put(REPO, "theirs", b"quicker"), times=1)
    with pytest.raises(LlmWsaeError) as error:
        push([weighted], REPO)
    assert "was changed by someone else" in sentence(error)
    push([weighted], REPO)
    assert {"theirs", f"{SITE}/weighted-k4/cfg.json"} < set(hub.repositories[REPO].files())


def cut(after: int):
    """The connection ends after some bytes of the body."""

    def change(path: str, said: Said) -> None:
        said.headers["Content-Length"] = str(len(said.body))
        said.body = [said.body[:after]]

    return change


def test_a_cut_download_goes_on_where_it_broke(hub, tmp_path):
    make_dictionary(d_in=64, d_sae=1024).save(tmp_path / "big")
    push([tmp_path / "big"], REPO)
    hub.spoil("GET /storage/", cut(100_000), times=4)  # the first request is for a small file
    folders = pull(REPO, tmp_path / "out")
    assert content(*folders.values()) == content(tmp_path / "big")
    assert hub.count("GET", "/storage/") == 1 + 4  # so each of the four brought what was missing
    make_dictionary(d_in=64, d_sae=1024, seed=7).save(tmp_path / "big")
    push([tmp_path / "big"], REPO)
    hub.spoil("GET /storage/", cut(0))
    fails("the connection to the Hub", pull, REPO, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def corrupt(path: str, said: Said) -> None:
    said.body = bytes([said.body[0] ^ 255]) + said.body[1:]


def test_a_file_damaged_on_its_way_is_noticed_and_fetched_again(there, refused, plain, tmp_path):
    for pattern in ("GET .*/resolve/.*/cfg.json", "GET /storage/"):
        there.spoil(pattern, corrupt, times=1)
        assert "arrived damaged" in (said := refused()) and "run the same command again" in said
    assert content(*pull(REPO, tmp_path / "out").values()) == content(plain)


# Requests that cannot be


def test_names_that_are_not_there(there, tmp_path):
    there.create("user/empty")
    for repo, sae_id, revision, said in (
        (REPO, f"{SITE}/plian-k4", None, f"user/saes has no dictionary '{SITE}/plian-k4'; did you"),
        (REPO, None, "v9", "user/saes has no revision 'v9'; look at its branches"),
        (REPO, None, "../x", "'../x' cannot be a branch, tag or commit"),
        ("user/nothing", None, None, "there is no repository user/nothing"),
        ("no name/at all", None, None, "'no name/at all' cannot be the name of a repository"),
        ("user/empty", None, None, "user/empty holds no dictionary of a layout"),
    ):
        with pytest.raises(LlmWsaeError) as error:
            pull(repo, tmp_path / "out", sae_id, revision=revision)
        assert said in sentence(error)
    assert not (tmp_path / "out").exists()


@over(name=["plain-k4", "new-k4"])
def test_another_models_dictionary_is_not_replaced(there, tmp_path, name):
    mine, theirs = make_dictionary(name, seed=2), make_dictionary(name, seed=1)
    theirs.info = dataclasses.replace(theirs.info, model={"name": "someone/else"})
    mine.save(tmp_path / "mine")
    theirs.save(tmp_path / "theirs")
    pushed = "theirs"
    if name == "new-k4":  # theirs is there as SAELens writes it
        pushed = "mine"
        for file in ("cfg.json", "sae_weights.safetensors"):
            there.put(REPO, f"{SITE}/{name}/{file}", (tmp_path / "theirs" / file).read_bytes())
    before = head(there)
    misused(f"another dictionary named {SITE}/{name}, for the", push, [tmp_path / pushed], REPO)
    assert head(there) == before


def test_what_cannot_be_pushed(hub, plain, tmp_path):
    make_dictionary("plain-k4", seed=9).save(tmp_path / "twin")
    make_dictionary("plain-k4").save(tmp_path / "damaged")
    weights = tmp_path / "damaged/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for folders, said in (
        ([], "name at least one dictionary folder"),
        ([plain, tmp_path / "twin"], f"are both named {SITE}/plain-k4"),
        ([tmp_path / "nowhere"], "is not a folder"),
        ([tmp_path / "damaged"], "sae_weights.safetensors changed since it was saved"),
    ):
        fails(said, push, folders, REPO)
    assert hub.requests == []  # all of it was found out here


# A server or a repository that means harm


DOWNLOADS = "/(resolve|storage)/"


@over(way=["etag", "sha"], exists=[False, True], damaged=[False, True])
def test_a_server_names_no_file_outside(there, plain, tmp_path, way, exists, damaged):
    """By the ETag or the revision, which the client makes names of files in its cache."""
    target = tmp_path / "home" / "sitecustomize.py"
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    if exists:
        target.write_text("mine")
    repository = there.repositories[REPO]
    repository.tags[str(target)] = repository.branches["main"]  # so it answers for that, too
    quoted = {"ETag": f'"{target}"', "X-Linked-Etag": f'"{target}"'}

    def lie(path: str, said: Said) -> None:
        if way == "sha" and path == f"/api/models/{REPO}":
            said.body = json.dumps(json.loads(said.body) | {"sha": str(target)}).encode()
        if re.search(DOWNLOADS, path):
            said.headers |= quoted if way == "etag" else {}
            said.body = b"import os" if damaged else said.body

    there.faults.clear()
    there.spoil(".", lie)
    for action in (
        lambda: list_dictionaries(REPO),
        lambda: pull(REPO, tmp_path / "out"),
        lambda: Dictionary.from_pretrained(REPO),
        lambda: push([plain], REPO),
    ):
        with contextlib.suppress(LlmWsaeError):
            action()
        left = {name for name in content(target.parent) if name[:4] != "hub/"}
        assert left == ({target.name} if exists else set())
        assert not exists or target.read_text() == "mine"


def test_a_download_ends_at_the_size_that_was_listed(there, refused):
    def more(_: str, said: Said) -> None:
        said.body = (most.append(sent) or b" " * (1 << 20) for sent in range(100))

    most: list[int] = []
    there.spoil(DOWNLOADS, more)
    assert "sends more for" in refused() and max(most) < 40  # MiB; what the connection holds


def test_lists_without_an_end_and_of_huge_files_are_not_read(there, refused):
    def endless(path: str, said: Said) -> None:
        said.headers["Link"] = f'<{there.endpoint}{path}?cursor=7>; rel="next"'
        said.body = b"[" + b",".join([said.body[1:-1]] * 12_000) + b"]"

    def huge(_: str, said: Said) -> None:
        said.body = json.dumps([one | {"size": 2**50} for one in json.loads(said.body)]).encode()

    there.spoil("/tree/", endless)
    assert "lists files without an end" in refused()
    there.spoil("/tree/", huge)
    assert "is not read: it has 1,125,899,906,842,624 bytes" in refused()
    there.put(REPO, f"{HERE}/wsae.json", b" " * ((16 << 20) + 1))
    assert "wsae.json of user/saes is not read: it has 16,777,217 bytes" in refused()


PATHS = ("../evil.json", "/etc/evil.json", f"{SITE}/../../evil", "a//b", "./a", "a\\..\\b", "c:x",
         "a/\x00b", "a\nb")  # fmt: skip


def test_a_path_that_leaves_the_folder_is_refused(there, refused, plain, tmp_path):
    before = content(tmp_path)
    for path in PATHS:
        there.put(REPO, path, b"{}")
        said = refused()
        assert repr(path)[1:-1] in said and "nothing of it is read" in said
    there.put(REPO, PATHS[0], b"{}")
    fails("nothing of it is read", push, [plain], REPO)
    assert content(tmp_path) == before


NONSENSE = (b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}", b"[" * 200_000, b'{"format": 7}',
            b"1" * 10_000)  # fmt: skip


@over(name=["cfg.json", "wsae.json"], nonsense=NONSENSE)
def test_nonsense_is_one_sentence(there, refused, name, nonsense):
    there.put(REPO, f"{HERE}/{name}", nonsense)
    assert name in refused()


def test_an_incomplete_dictionary_is_refused(there, refused):
    repository = there.repositories[REPO]
    repository.commit({p: file for p, file in repository.files().items() if "cfg.json" not in p})
    assert "is not a complete dictionary of this package: it lacks cfg.json" in refused()


def test_someone_elses_nonsense_does_not_stop_a_push(there, weighted, capfd):
    there.put(REPO, f"{HERE}/wsae.json", b"{")
    there.put(REPO, "a`b/wsae.json", b"{}")  # a name that a card could not hold
    assert push([weighted], REPO).sae_ids == [f"{SITE}/weighted-k4"]
    assert f"the card omits {HERE}: " in capfd.readouterr().err
    card = there.content(REPO, "README.md").decode()
    assert "weighted-k4" in card and "plain-k4" not in card and "a`b" not in card


def test_a_traceback_shows_no_token(there, monkeypatch):
    def repeat(_: str, said: Said) -> None:
        said.status, said.headers["X-Error-Message"] = 418, f"\x1b[2J {token} of yours"

    there.spoil(".", repeat)
    for token in (WRITER, "a-mirrors-own-token"):
        monkeypatch.setenv("HF_TOKEN", token)
        result = call("--debug", "list", REPO)
        assert result.code == 1 and "Traceback" in result.err and "of yours" in result.err
        assert token not in result.err and "\x1b" not in result.err
    monkeypatch.setenv("HF_TOKEN", "hf_wröngsecret")
    result = call("--debug", "list", REPO)
    assert result.code == 1 and "secret" not in result.err
    assert "your token holds characters that no token has" in result.err
