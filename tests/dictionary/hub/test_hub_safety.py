"""Nothing unsafe comes in from a Hub: paths, sizes, kinds of files, checksums, nonsense."""

import contextlib
import json
import threading
from contextlib import contextmanager

import pytest
from command_line import call, content
from hub_server import WRITER, HubServer
from safetensors.torch import load, save
from small_dictionaries import SITE, make_dictionary

from llm_wsae.artifact import digests
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import OWN_DIGEST
from llm_wsae.dictionary.hub import client, repository
from llm_wsae.dictionary.hub.pulling import list_dictionaries, pull
from llm_wsae.dictionary.hub.pushing import push
from llm_wsae.errors import LlmWsaeError

REPO = "user/saes"
HERE = f"{SITE}/plain-k4"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one good dictionary, ready to be spoilt."""
    with HubServer(tmp_path / "hub") as server:
        server.use(monkeypatch, tmp_path / "home", WRITER)
        make_dictionary("plain-k4").save(tmp_path / "plain")
        server.create(REPO)
        for name, data in content(tmp_path / "plain").items():
            server.store.put(REPO, f"{HERE}/{name}", data)
        yield server


@pytest.fixture
def refused(hub, tmp_path):
    """What comes of pulling: one sentence, and nothing on disk."""

    def check() -> str:
        with pytest.raises(LlmWsaeError) as error:
            pull(REPO, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(LlmWsaeError):
            Dictionary.from_pretrained(REPO)
        assert "\n" not in str(error.value)
        return str(error.value)

    return check


def edit(hub: HubServer, name: str, **changes) -> None:
    """Change keys of one of the dictionary's JSON files on the Hub, with valid checksums."""
    text = hub.store.content(REPO, f"{HERE}/{name}").decode()
    values = json.loads(text)
    key = OWN_DIGEST if values.pop(OWN_DIGEST, None) else None
    data = digests.json_text({**values, **changes}, key).encode()
    hub.store.put(REPO, f"{HERE}/{name}", data)


@contextmanager
def spoilt(hub: HubServer, case: object):
    """Undo what the block does to the repository; a failure names the case."""
    repository = hub.store.repositories[REPO]
    good = repository.branches["main"]
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {case!r}"[:200])
        raise
    finally:
        repository.branches["main"] = good


def downloads(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and "/storage/" in path]


def lying(headers=None, sha=None, body=None, size=None):
    """A twist of a server that wants a file of the user's: its path, or the bytes that it sends."""

    def twist(path, answer):
        if sha and path == f"/api/models/{REPO}":
            answer.body = json.dumps(json.loads(answer.body) | {"sha": sha}).encode()
        if size is not None and "/tree/" in path:
            entries = json.loads(answer.body)
            answer.body = json.dumps([one | {"size": size} for one in entries]).encode()
        if "/resolve/" in path or "/storage/" in path:
            answer.headers |= headers or {}
            answer.body = body or answer.body

    return twist


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("way", ["etag", "sha"])
def test_a_server_names_no_file_outside(hub, tmp_path, way, there, damaged):
    """By the ETag or the revision, which the client makes names of files in its cache."""
    target = tmp_path / "home" / "sitecustomize.py"
    target.parent.mkdir()
    if there:
        target.write_text("mine")
    before = content(target.parent)
    repository = hub.store.repositories[REPO]
    repository.tags[str(target)] = repository.branches["main"]  # so it answers for that, too
    quoted = {"ETag": f'"{target}"', "X-Linked-Etag": f'"{target}"'}
    hub.twist = lying(
        quoted if way == "etag" else None,
        str(target) if way == "sha" else None,
        b"import os" if damaged else None,
    )
    for action in (
        lambda: list_dictionaries(REPO),
        lambda: pull(REPO, tmp_path / "out"),
        lambda: Dictionary.from_pretrained(REPO),
        lambda: push([tmp_path / "plain"], REPO),
    ):
        with contextlib.suppress(LlmWsaeError):
            action()
        left = {name: data for name, data in content(target.parent).items() if name[:4] != "hub/"}
        assert left == before


def test_a_download_ends_at_the_size_that_was_listed(hub, refused, tmp_path):
    def more():
        for sent in range(100):
            most.append(sent)
            yield b" " * (1 << 20)

    most: list[int] = []
    hub.twist = lying(body=more())
    assert "sends more for" in refused() and max(most) < 20  # MiB; what the connection holds
    hub.twist = lying(size=2**50)
    assert "is not read: it has 1,125,899,906,842,624 bytes" in refused()


def test_a_list_without_an_end_is_not_read(hub, refused, monkeypatch):
    def twist(path, answer):
        if "/tree/" in path:
            answer.headers["Link"] = '<http://127.0.0.1:9/x?cursor=7>; rel="next"'

    hub.twist = twist
    monkeypatch.setattr(repository, "_MOST_PAGES", 9)
    assert "lists files without an end" in refused()


@pytest.mark.parametrize("headless", [False, True])
def test_an_answer_that_hardly_comes_is_given_up(hub, refused, monkeypatch, headless):
    def twist(path, answer):
        answer.headless = headless
        answer.body = (b"x: "[pause.wait(0.05) :] for _ in range(2000))

    pause = threading.Event()
    monkeypatch.setattr(client, "LONGEST_ANSWER", 0.4)
    hub.twist = twist
    assert "answers too slowly" in refused()


def test_a_traceback_shows_no_token(hub, tmp_path, monkeypatch):
    def twist(path, answer):
        answer.status, answer.headers["X-Error-Message"] = 418, f"\x1b[2J {token} of yours"

    hub.twist = twist
    for token in (WRITER, "a-mirrors-own-token"):
        monkeypatch.setenv("HF_TOKEN", token)
        result = call("--debug", "list", REPO)
        assert result.code == 1 and "Traceback" in result.err and "of yours" in result.err
        assert token not in result.err and "\x1b" not in result.err


PATHS = ("../evil.json", "/etc/evil.json", f"{SITE}/../../evil", "a//b", "./a", "a\\..\\b", "c:x",
         "a/\x00b", "a\nb")  # fmt: skip


def test_a_path_that_leaves_the_folder_is_refused(hub, refused, tmp_path):
    before = content(tmp_path)
    for path in PATHS:
        with spoilt(hub, path):
            hub.store.put(REPO, path, b"{}")
            hub.store.put(REPO, f"{path}/wsae.json", b"{}")
            said = refused()
            assert repr(path)[1:-1] in said and "nothing of it is read" in said
            with pytest.raises(LlmWsaeError, match="nothing of it is read"):
                push([tmp_path / "plain"], REPO)
    assert content(tmp_path) == before


def test_only_the_files_of_a_dictionary_are_fetched(hub, tmp_path):
    for name in ("ae.pt", "evil.py", "model.bin", "more.safetensors", "notes.json"):
        hub.store.put(REPO, f"{HERE}/{name}", b"\x80\x04anything")
    hub.requests.clear()
    folders = pull(REPO, tmp_path / "out")
    assert content(*folders.values()) == content(tmp_path / "plain")
    fetched = {path.rsplit("/", 1)[1] for _, path in hub.requests if "/resolve/" in path}
    assert fetched == set(content(tmp_path / "plain"))


def test_json_is_read_up_to_a_size(hub, refused):
    hub.store.put(REPO, f"{HERE}/wsae.json", b" " * ((16 << 20) + 1))
    assert "wsae.json of user/saes is not read: it has 16,777,217 bytes" in refused()
    assert downloads(hub) == []


def test_a_file_that_is_not_the_one_saved_is_refused(hub, refused):
    """The Hub's checksum is right; the dictionary's own is not, or is missing."""
    good = hub.store.content(REPO, f"{HERE}/sae_weights.safetensors")
    with spoilt(hub, "weights"):
        tensors = load(good)
        tensors["b_dec"] += 1
        hub.store.put(REPO, f"{HERE}/sae_weights.safetensors", save(tensors))
        assert "sae_weights.safetensors changed since it was saved" in refused()
    for table in (None, [], {}, {"sae_weights.safetensors": 7}):
        with spoilt(hub, table):
            edit(hub, "wsae.json", sha256=table)
            assert "json" in refused()


def test_a_file_damaged_on_its_way_is_noticed_and_fetched_again(hub, tmp_path, monkeypatch):
    for number, pattern in enumerate((r"/storage/", r"/resolve/.*/cfg.json", r"/resolve/.*wsae.j")):
        hub.use(monkeypatch, tmp_path / f"home {number}", WRITER)  # an empty cache
        out = tmp_path / f"out {number}"
        hub.corrupt("GET", pattern)
        with pytest.raises(LlmWsaeError, match="arrived damaged") as error:
            pull(REPO, out)
        assert "run the same command again" in str(error.value) and not out.exists(), pattern
        assert content(*pull(REPO, out).values()) == content(tmp_path / "plain"), pattern


def test_a_connection_that_keeps_breaking_loses_nothing(hub, tmp_path):
    place = pull(REPO, tmp_path / "out")[HERE]
    before = content(tmp_path / "out")
    make_dictionary("plain-k4", seed=7).save(tmp_path / "plain")
    push([tmp_path / "plain"], REPO)
    hub.cut("GET", "/storage/", after=0, times=99)
    with pytest.raises(LlmWsaeError, match="the connection to the Hub"):
        pull(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == before
    hub.faults.clear()
    pull(REPO, tmp_path / "out")
    assert content(place) == content(tmp_path / "plain")


NONSENSE = (b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}", b"[" * 200_000, b'{"format": 7}',
            b'{"a":' * 100_000, b"1" * 10_000)  # fmt: skip


def test_nonsense_is_one_sentence(hub, refused):
    for name in ("cfg.json", "wsae.json"):
        for nonsense in NONSENSE:
            with spoilt(hub, (name, nonsense[:20])):
                hub.store.put(REPO, f"{HERE}/{name}", nonsense)
                assert "json" in refused()
    repository = hub.store.repositories[REPO]
    tree = {path: file for path, file in repository.files().items() if "cfg.json" not in path}
    repository.branches["main"] = repository.add(tree, None, "lose one")
    assert "is not a complete dictionary of this package: it lacks cfg.json" in refused()


def test_someone_elses_nonsense_does_not_stop_a_push(hub, tmp_path, capsys):
    hub.store.put(REPO, f"{HERE}/wsae.json", NONSENSE[1])
    hub.store.put(REPO, "a`b/wsae.json", b"{}")  # a name that a card could not hold
    make_dictionary("other-k4").save(tmp_path / "other")
    assert push([tmp_path / "other"], REPO).sae_ids == [f"{SITE}/other-k4"]
    assert f"the card omits {HERE}: " in capsys.readouterr().err
    card = hub.store.content(REPO, "README.md").decode()
    assert "other-k4" in card and "plain-k4" not in card and "a`b" not in card


def test_a_site_that_is_none_is_refused(hub, refused):
    edit(hub, "wsae.json", site="../../somewhere")
    assert "'../../somewhere' is not a site of the residual stream" in refused()
    assert list_dictionaries(REPO)[0].info.site == ""


def test_a_dictionary_at_the_top_of_its_repository(hub, tmp_path):
    hub.create("user/single")
    for name, data in content(tmp_path / "plain").items():
        hub.store.put("user/single", name, data)
    assert pull("user/single", tmp_path / "out") == {".": tmp_path / "out" / "single"}
    assert content(tmp_path / "out" / "single") == content(tmp_path / "plain")
    assert Dictionary.from_pretrained("user/single").d_sae == 80


def test_answers_that_no_hub_gives(hub, tmp_path):
    for status in (200, 404, 418, 500):
        for pattern in ("/api/models/user/saes$", "/tree/", "/resolve/"):
            hub.fail("GET", pattern, status, times=99)
            with pytest.raises(LlmWsaeError) as error:
                list_dictionaries(REPO)
            hub.faults.clear()
            said = str(error.value)
            assert "\n" not in said and "saes" in said, (status, pattern, said)
