"""Pretrained dictionaries by name: in a clone, from the Hub, and where there are none."""

import shutil

import pytest
import torch
from small_dictionaries import SITE, make_dictionary

import llm_wsae.dictionary.pretrained as pretrained
from llm_wsae import load_pretrained
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError

pytest_plugins = ("hub_fixtures",)
NAME = f"tiny/{SITE}/plain-k4"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with two dictionaries, beside which the package is not."""
    root = tmp_path / "clone"
    make_dictionary().save(root / "checkpoints" / NAME)
    make_dictionary("other-k4", seed=1).save(root / f"checkpoints/tiny/{SITE}/other-k4")
    (root / "checkpoints/tiny/not/one").mkdir(parents=True)
    (root / "checkpoints/tiny/not/one/wsae.json").write_text("{}")
    (root / "llm_wsae").mkdir()
    (root / "llm_wsae/__init__.py").touch()
    monkeypatch.setattr(pretrained, "_PACKAGE", tmp_path / "site-packages" / "llm_wsae")
    monkeypatch.chdir(tmp_path)
    return root


def test_beside_an_editable_installation(clone, monkeypatch):
    monkeypatch.setattr(pretrained, "_PACKAGE", clone / "llm_wsae")
    found = load_pretrained(NAME)
    assert torch.equal(found.W_enc, make_dictionary().W_enc)


def test_in_a_clone_that_one_works_in(clone, monkeypatch):
    (clone / "notebooks").mkdir()
    for folder in (clone, clone / "notebooks"):
        monkeypatch.chdir(folder)
        assert torch.equal(load_pretrained(NAME).W_dec, make_dictionary().W_dec)
    with pytest.raises(UsageError, match=rf"no pretrained dictionary 'tiny/{SITE}/pla'; did you"):
        load_pretrained(f"tiny/{SITE}/pla")
    for name in ("../clone/checkpoints/" + NAME, "tiny/not/one", "", "/" + NAME):
        with pytest.raises(UsageError, match="no pretrained dictionary"):
            load_pretrained(name)
    with pytest.raises(UsageError, match="name it with repo_id"):
        load_pretrained(NAME, revision="main")


def test_an_installed_package_says_where_they_are(clone, monkeypatch):
    said = r"in checkpoints/ of llm-wsae's repository, .* work in a clone of it, or name a"
    with pytest.raises(LlmWsaeError, match=said):
        load_pretrained(NAME)
    shutil.rmtree(clone / "llm_wsae")  # somebody else's folder of that name
    monkeypatch.chdir(clone)
    with pytest.raises(LlmWsaeError, match=said):
        load_pretrained(NAME)


def test_from_a_repository_on_the_hub(clone, hub):
    make_dictionary().push_to_hub("user/tiny-saes")
    found = load_pretrained(NAME, repo_id="user/tiny-saes")
    assert torch.equal(found.W_enc, make_dictionary().W_enc)
    with pytest.raises(UsageError, match=r"no dictionary 'blocks.1.hook_resid_post/plan-k4'"):
        load_pretrained(f"tiny/{SITE}/plan-k4", repo_id="user/tiny-saes")


def test_ours_open_offline():
    names = list(pretrained._known())
    sites = {name.split("/")[1] for name in names}
    assert {"blocks.9.hook_resid_post", "blocks.20.hook_resid_post"} <= sites
    for site in sites:
        rules = {load_pretrained(n).info.rule for n in names if f"/{site}/" in n}
        assert {"uniform", "variance"} <= rules
    for name in names:
        found: Dictionary = load_pretrained(name)
        assert (found.d_in, found.d_sae) == (576, 4608) and found.info.site in name
        assert found.info.metrics["fidelity"]["ce_recovered"] > 0.9
        assert found.info.training["command"].startswith("llm-wsae run --model ")
        assert "wiki" in found.info.corpus["name"] and "sotu" in found.info.corpus["name"]
    root = pretrained._PACKAGE.parent / "checkpoints"
    assert sum(path.stat().st_size for path in root.rglob("*")) <= 60e6
    index = (root / "README.md").read_text(encoding="utf-8")
    assert all(name in index for name in names)
