"""What can go wrong with the Hub: each failure is one sentence without a token, leaves repository
and disk as they were, and is over when its cause is."""

import dataclasses

import pytest
import torch
from command_line import content
from hub_fixtures import REPO, head, sentence
from hub_server import READER, STRANGER
from huggingface_hub import HfApi, constants
from small_dictionaries import SITE, make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub.pulling import pull
from llm_wsae.dictionary.hub.pushing import push
from llm_wsae.errors import LlmWsaeError, UsageError


def test_the_cache_answers_without_a_network(hub, plain, weighted, tmp_path, monkeypatch):
    push([plain, weighted], REPO)
    sae_id = f"{SITE}/plain-k4"
    wanted = Dictionary.from_pretrained(REPO, sae_id)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(Dictionary.from_pretrained(REPO, sae_id).W_enc, wanted.W_enc)
    assert len(hub.requests) == asked
    with pytest.raises(UsageError) as error:
        Dictionary.from_pretrained(REPO, f"{SITE}/weighted-k4")
    assert "the local cache of user/saes has no dictionary" in sentence(error)
    with pytest.raises(LlmWsaeError) as error:
        Dictionary.from_pretrained("user/never-seen")
    assert "HF_HUB_OFFLINE is set" in sentence(error) and "user/never-seen" in sentence(error)
    with pytest.raises(LlmWsaeError, match="HF_HUB_OFFLINE is set"):
        push([plain], REPO)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fail("GET", "/api/models/", 503, times=2)
    assert torch.equal(Dictionary.from_pretrained(REPO, sae_id).W_enc, wanted.W_enc)
    with pytest.raises(LlmWsaeError, match="the Hub answered with status 503"):
        Dictionary.from_pretrained("user/never-seen")

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert torch.equal(Dictionary.from_pretrained(REPO, sae_id).W_enc, wanted.W_enc)
    folders = pull(REPO, tmp_path / "out", sae_id)
    assert content(*folders.values()) == content(plain)
    with pytest.raises(LlmWsaeError) as error:
        push([plain], REPO)
    assert "the connection to the Hub (http://127.0.0.1:9) failed" in sentence(error)


BREAKS = {
    "preupload": ("fail", "POST", "/preupload/", 503, "the Hub answered with status 503"),
    "batch": ("fail", "POST", "/objects/batch", 500, "the Hub answered with status 500"),
    "upload": ("fail", "PUT", "/storage/", 503, "the Hub answered with status 503"),
    "upload cut": ("cut", "PUT", "/storage/", 100, "the connection to the Hub"),
    "upload damaged": ("corrupt", "PUT", "/storage/", 0, "the content does not have the SHA-256"),
    "commit": ("fail", "POST", "/commit/", 500, "the Hub answered with status 500"),
    "limit": ("fail", "POST", "/commit/", 429, "the Hub answered with status 429"),
    "forbidden": ("fail", "POST", "/commit/", 403, "your token may not do that with user/saes"),
}


def test_a_push_that_breaks_leaves_the_repository_as_it_was(hub, plain, weighted):
    push([plain], REPO)
    before, messages = head(hub), list(hub.store.repositories[REPO].messages)
    for how, (kind, method, pattern, number, said) in BREAKS.items():
        {"fail": hub.fail, "cut": hub.cut}.get(kind, lambda *a: hub.corrupt(*a[:2], times=99))(
            method, pattern, number, *([99] if kind != "corrupt" else [])
        )
        with pytest.raises(LlmWsaeError) as error:
            push([weighted], REPO)
        assert said in sentence(error), how
        assert head(hub) == before and hub.store.repositories[REPO].messages == messages, how
        hub.faults.clear()
    assert f"{SITE}/weighted-k4/wsae.json" in push([weighted], REPO).changed
    assert len(hub.store.repositories[REPO].messages) == len(messages) + 1


def test_a_push_that_breaks_leaves_no_new_branch(hub, plain, weighted):
    push([plain], REPO)
    hub.fail("POST", "/commit/", 403)
    with pytest.raises(LlmWsaeError):
        push([weighted], REPO, revision="try")
    assert list(hub.store.repositories[REPO].branches) == ["main"]


def test_a_failure_that_passes_is_waited_for(hub, plain):
    hub.fail("POST", "/preupload/", 503, times=2)
    hub.cut("PUT", "/storage/", after=100, times=2)
    assert len(push([plain], REPO).changed) == 5


def test_someone_else_pushes_in_between(hub, plain, weighted, monkeypatch):
    push([plain], REPO)
    upload = HfApi.preupload_lfs_files

    def slow(self, repo_id, additions, **options):
        hub.store.put(REPO, "theirs.txt", b"quicker")
        return upload(self, repo_id, additions, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "preupload_lfs_files", slow)
        with pytest.raises(LlmWsaeError) as error:
            push([weighted], REPO)
    assert "was changed by someone else" in sentence(error)
    assert "theirs.txt" in hub.store.repositories[REPO].files()
    push([weighted], REPO)
    assert {"theirs.txt", f"{SITE}/weighted-k4/cfg.json"} < set(
        hub.store.repositories[REPO].files()
    )


WHO = {  # token: the sentence on pulling from and on pushing to a private repository of user
    None: ("on the Hub that you may see; check the name", "log in (`hf auth login`"),
    "hf_wrongsecret": ("does not accept your token", "does not accept your token"),
    STRANGER: ("that you may see", "your token may not do that"),
    READER: (None, "your token may not do that"),
}


def test_who_may_what(hub, plain, weighted, tmp_path, login):
    push([plain], REPO, private=True)
    before = head(hub)
    for token, (pulling, pushing) in WHO.items():
        login(token)
        if pulling is None:
            assert content(*pull(REPO, tmp_path / "out").values()) == content(plain)
        else:
            with pytest.raises(LlmWsaeError) as error:
                pull(REPO, tmp_path / "out")
            assert pulling in sentence(error), token
            assert not (tmp_path / "out").exists(), token
        with pytest.raises(LlmWsaeError) as error:
            push([weighted], REPO)
        assert pushing in sentence(error), token
        assert head(hub) == before, token


def test_names_that_are_not_there(hub, plain, tmp_path):
    push([plain], REPO)
    out = tmp_path / "out"
    with pytest.raises(UsageError) as error:
        pull(REPO, out, f"{SITE}/plian-k4")
    assert f"user/saes has no dictionary '{SITE}/plian-k4'; did you mean" in sentence(error)
    assert f"'{SITE}/plain-k4'?" in sentence(error)
    with pytest.raises(UsageError) as error:
        pull(REPO, out, revision="v9")
    assert "user/saes has no revision 'v9'; look at its branches" in sentence(error)
    with pytest.raises(UsageError) as error:
        pull("user/nothing", out)
    assert "there is no repository user/nothing" in sentence(error)
    with pytest.raises(UsageError) as error:
        pull("no name/at all", out)
    assert "'no name/at all' cannot be the name of a repository" in sentence(error)
    hub.create("user/empty")
    with pytest.raises(LlmWsaeError, match="user/empty holds no dictionary of a layout"):
        pull("user/empty", out)
    assert not out.exists()


def test_another_models_dictionary_is_not_replaced(hub, plain, tmp_path):
    push([plain], REPO)
    before, commit = hub.store.repositories[REPO].files(), head(hub)
    other = make_dictionary("plain-k4", seed=9)
    other.info = dataclasses.replace(other.info, model={"name": "someone/else"})
    other.save(tmp_path / "other")
    with pytest.raises(UsageError, match=r"another dictionary named .*/other is for someone/else"):
        push([tmp_path / "other"], REPO)
    assert (hub.store.repositories[REPO].files(), head(hub)) == (before, commit)
    theirs, mine = make_dictionary("new-k4", seed=1), make_dictionary("new-k4", seed=2)
    theirs.info = dataclasses.replace(theirs.info, model={"name": "someone/else"})
    theirs.save(tmp_path / "theirs")
    mine.save(tmp_path / "mine")
    for name in ("cfg.json", "sae_weights.safetensors"):  # as SAELens writes it
        data = (tmp_path / "theirs" / name).read_bytes()
        hub.store.put(REPO, f"{SITE}/new-k4/{name}", data)
    with pytest.raises(UsageError, match=r"new-k4, for the model someone/else, and .*/mine is for"):
        push([tmp_path / "mine"], REPO)
    newer = make_dictionary("plain-k4", seed=9)
    newer.save(tmp_path / "newer")
    assert push([tmp_path / "newer"], REPO).changed  # of the same model: a new version


def test_what_cannot_be_pushed(hub, plain, tmp_path):
    with pytest.raises(UsageError, match="name at least one dictionary folder"):
        push([], REPO)
    make_dictionary("plain-k4", seed=9).save(tmp_path / "twin")
    with pytest.raises(UsageError, match=f"are both named {SITE}/plain-k4"):
        push([plain, tmp_path / "twin"], REPO)
    with pytest.raises(LlmWsaeError, match="is not a folder"):
        push([tmp_path / "nowhere"], REPO)
    weights = plain / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LlmWsaeError, match=r"sae_weights.safetensors changed since it was saved"):
        push([plain], REPO)
    assert hub.requests == []  # all of it was found out here
