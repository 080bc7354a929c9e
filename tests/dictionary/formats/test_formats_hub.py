"""Dictionaries of other layouts in a repository on the Hub: listed, fetched, pulled as ours."""

import json

import pytest
import torch
from command_line import content
from foreign_folders import GEMMA, SITE, WRITERS, Expected, gemma_scope
from hub_server import WRITER, HubServer
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub.transfer import list_dictionaries, pull, push
from llm_wsae.errors import LlmWsaeError, UsageError

REPO, SCOPE = "user/mixed", "user/gemma-scope-2b-pt-res"
FOLDERS = {
    "a/topk": "saelens-topk-rescaled",
    "b/trainer_0": "learning-BatchTopKSAE",
    "layers.3": "sparsify",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        server.use(monkeypatch, tmp_path / "home", WRITER)
        yield server


def put(hub: HubServer, repo: str, sae_id: str, folder) -> None:
    if repo not in hub.store.repositories:
        hub.create(repo)
    for name, data in content(folder).items():
        hub.store.put(repo, f"{sae_id}/{name}" if sae_id else name, data)


@pytest.fixture
def mixed(hub, tmp_path) -> dict[str, Expected]:
    """A repository with one dictionary each of three tools and other files."""
    expected = {}
    for sae_id, layout in FOLDERS.items():
        expected[sae_id] = WRITERS[layout](tmp_path / "written" / sae_id)
        put(hub, REPO, sae_id, tmp_path / "written" / sae_id)
    hub.store.put(REPO, "README.md", b"# theirs\n")
    hub.store.put(REPO, "b/trainer_0/checkpoints/ae_100.pt", b"unused")
    return expected


def close(dictionary: Dictionary, expected: Expected) -> None:
    made = dictionary(expected.x).double()
    torch.testing.assert_close(made, expected.reconstruction, atol=1e-5, rtol=1e-5)


def test_they_are_listed_without_their_tensors(hub, mixed):
    found = {d.sae_id: d for d in list_dictionaries(REPO)}
    assert list(found) == sorted(FOLDERS)
    assert [d.info.site for d in found.values()] == [SITE] * 3
    assert [(d.d_in, d.d_sae) for d in found.values()] == [(12, 48)] * 3
    assert [d.sparsity for d in found.values()] == ["TopK, k = 5", "JumpReLU", "TopK, k = 5"]
    assert found["a/topk"].model == "tiny"
    assert hub.count("GET", "/storage/") == 0


def test_from_pretrained_and_pull_make_them_ours(hub, mixed, tmp_path):
    for sae_id, expected in mixed.items():
        close(Dictionary.from_pretrained(REPO, sae_id), expected)
    folders = pull(REPO, tmp_path / "out")
    for sae_id, expected in mixed.items():
        assert (folders[sae_id] / "wsae.json").is_file()
        dictionary = Dictionary.load(folders[sae_id])
        close(dictionary, expected)
        assert dictionary.info.site == SITE
    assert not any("ae_100" in path for _, path in hub.requests)


def test_they_come_from_the_cache_when_there_is_no_network(hub, mixed, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    Dictionary.from_pretrained(REPO, "layers.3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _http.close_session()
    close(Dictionary.from_pretrained(REPO, "layers.3"), mixed["layers.3"])
    with pytest.raises(UsageError, match="the local cache of user/mixed has no dictionary"):
        Dictionary.from_pretrained(REPO, "a/topk")


def test_gemma_scope_takes_model_and_site_from_its_path(hub, tmp_path):
    sae_id = GEMMA.split("/", 1)[1]
    expected = gemma_scope(tmp_path / "written")
    put(hub, SCOPE, sae_id, tmp_path / "written")
    (found,) = list_dictionaries(SCOPE)
    assert (found.sae_id, found.d_sae, found.info.site) == (sae_id, 1024, SITE)
    dictionary = Dictionary.from_pretrained(SCOPE)
    close(dictionary, expected)
    assert dictionary.info.model["name"] == "google/gemma-2-2b"


def test_one_at_the_top_of_a_repository(hub, tmp_path):
    expected = WRITERS["saelens-jumprelu"](tmp_path / "written")
    put(hub, "user/one", "", tmp_path / "written")
    close(Dictionary.from_pretrained("user/one"), expected)
    assert list(pull("user/one", tmp_path / "out")) == ["."]
    close(Dictionary.load(tmp_path / "out" / "one"), expected)


def test_a_card_speaks_only_of_our_own(hub, mixed, tmp_path):
    make_dictionary("plain-k4").save(tmp_path / "ours")
    push([tmp_path / "ours"], REPO)
    card = hub.store.content(REPO, "README.md").decode()
    assert "plain-k4" in card and "# theirs" in card
    assert "trainer_0" not in card and "layers.3" not in card
    assert len(list_dictionaries(REPO)) == 4


def test_a_file_larger_than_announced_is_not_fetched(hub, mixed, tmp_path):
    path = "a/topk/cfg.json"
    cfg = json.loads(hub.store.content(REPO, path))
    hub.store.put(REPO, path, json.dumps(cfg | {"d_in": 2, "d_sae": 3}).encode())
    big = bytes(2 << 20)
    hub.store.put(REPO, "a/topk/sae_weights.safetensors", big)
    with pytest.raises(LlmWsaeError, match="at most 1,048,784 are possible"):
        Dictionary.from_pretrained(REPO, "a/topk")
    assert hub.count("GET", "/storage/") == 0


def test_a_damaged_one_leaves_nothing_behind(hub, mixed, tmp_path):
    hub.store.put(REPO, "layers.3/sae.safetensors", b"not tensors")
    with pytest.raises(LlmWsaeError, match="not a readable weights file") as error:
        pull(REPO, tmp_path / "out", "layers.3")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    hub.corrupt("GET", "trainer_0", times=9)
    with pytest.raises(LlmWsaeError):
        pull(REPO, tmp_path / "out", "b/trainer_0")
    assert not (tmp_path / "out").exists()
