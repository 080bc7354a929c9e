"""Push, pull and list with the real client against a local Hub: what arrives, what a second call
does. Failures are in test_hub_faults.py, unsafe repositories in
test_hub_safety.py."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from command_line import call, content, works
from foreign_folders import saelens_checkpoint
from hub_fixtures import REPO, head, sentence
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from small_dictionaries import SITE, make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import (
    Explanation,
    Score,
    keep_explanations,
    read_explanations,
)
from llm_wsae.dictionary.folder import EXTRAS, INFO, WEIGHTS, check_folder, keep_measurements
from llm_wsae.dictionary.hub import pulling
from llm_wsae.dictionary.hub.pulling import list_dictionaries, pull
from llm_wsae.dictionary.hub.pushing import push
from llm_wsae.errors import LlmWsaeError, UsageError

# What a push writes


def test_push_writes_the_files_and_a_card_in_one_commit(hub, plain, weighted):
    done = push([plain, weighted], REPO)
    repository = hub.store.repositories[REPO]
    assert len(repository.messages) == 2 and not repository.private
    assert done.commit == head(hub) and done.url == f"{hub.endpoint}/{REPO}/commit/{done.commit}"
    assert done.sae_ids == [f"{SITE}/plain-k4", f"{SITE}/weighted-k4"]
    files = repository.files()
    for folder, sae_id in zip((plain, weighted), done.sae_ids, strict=True):
        for name, data in content(folder).items():
            assert hub.store.content(REPO, f"{sae_id}/{name}") == data
            large = name.endswith(".safetensors")
            assert (files[f"{sae_id}/{name}"].sha256 is not None) == large
    assert sorted([*files]) == sorted([".gitattributes", *done.changed])
    card = hub.store.content(REPO, "README.md").decode()
    assert f"`{SITE}/plain-k4`" in card and f"`{SITE}/weighted-k4`" in card
    hub.requests.clear()
    again = push([plain, weighted], REPO)
    assert again.changed == [] and again.commit == done.commit == head(hub)
    assert again.url == f"{hub.endpoint}/{REPO}"
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_only_what_changed_is_written_and_the_card_knows_all(hub, plain, weighted):
    push([weighted], REPO)
    done = push([plain], REPO)
    assert not [path for path in done.changed if "weighted" in path]
    uploads = hub.count("PUT", "/storage/")
    dictionary = Dictionary.load(plain)
    dictionary.info = dataclasses.replace(dictionary.info, metrics={"fidelity": {"fvu": 0.125}})
    dictionary.save(plain)
    done = push([plain, weighted], REPO)
    assert done.changed == ["README.md", f"{SITE}/plain-k4/wsae.json"]
    assert hub.count("PUT", "/storage/") == uploads == 4
    card = hub.store.content(REPO, "README.md").decode()
    assert "| 0.125 |" in card and "| 0.250 |" in card  # the other one's numbers come from there
    listed = [d.sae_id for d in list_dictionaries(REPO)]
    assert listed == [f"{SITE}/plain-k4", f"{SITE}/weighted-k4"]


def test_what_a_user_wrote_in_the_card_stays(hub, plain):
    hub.create(REPO)
    own = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My own words\n"
    hub.store.put(REPO, "README.md", own.encode())
    push([plain], REPO)
    card = hub.store.content(REPO, "README.md").decode()
    assert "license: mit" in card and "- mine" in card and "- sparse-autoencoder" in card
    assert card.count("# My own words") == 1
    hub.store.put(REPO, "README.md", (card + "\nMore of them.\n").encode())
    push([plain], REPO, license="apache-2.0")
    card = hub.store.content(REPO, "README.md").decode()
    assert "license: apache-2.0" in card and "license: mit" not in card
    assert card.count("# My own words") == card.count("More of them.") == 1
    assert card.count("## Dictionaries") == 1


def test_a_branch_is_made_and_main_left_alone(hub, plain, weighted):
    push([plain], REPO)
    before = head(hub)
    done = push([weighted], REPO, revision="try/2")
    assert head(hub) == before and head(hub, "try/2") == done.commit
    assert [d.sae_id for d in list_dictionaries(REPO)] == [f"{SITE}/plain-k4"]
    assert len(list_dictionaries(REPO, revision="try/2")) == 2
    card = hub.store.content(REPO, "README.md", "try/2").decode()
    assert 'revision="try/2")' in card and "--revision try/2 --out" in card
    assert push([weighted], REPO, revision="try/2").changed == []
    make_dictionary("plain-k4", seed=5).save(plain.parent / "other")
    push([plain.parent / "other"], REPO, revision="try/2")
    push([plain], REPO, revision="try/2")  # the branch has another version, main has this one
    for name in (WEIGHTS, INFO, EXTRAS):
        stored = hub.store.content(REPO, f"{SITE}/plain-k4/{name}", "try/2")
        assert stored == (plain / name).read_bytes()
    HfApi().create_tag(REPO, tag="v1")
    for fixed in ("v1", before):
        with pytest.raises(UsageError, match="is not a branch of user/saes") as error:
            push([weighted], REPO, revision=fixed)
        assert "'main', 'try/2'" in sentence(error)


def test_a_repository_that_ignores_the_weights_gets_nothing(hub, plain):
    push([plain], REPO)
    before = head(hub)
    make_dictionary("plain-k4", seed=5).save(plain.parent / "other")
    hub.ignored = (".safetensors",)
    for revision in (None, "try"):
        with pytest.raises(LlmWsaeError, match=r"gitignore that excludes .*safetensors") as error:
            push([plain.parent / "other"], REPO, revision=revision)
        assert "nothing was pushed" in sentence(error)
    assert head(hub) == before and "try" not in hub.store.repositories[REPO].branches


def test_private_is_private(hub, plain, login):
    push([plain], REPO, private=True)
    assert hub.store.repositories[REPO].private
    assert push([plain], REPO, private=True).changed == []
    hub.create("user/open")
    with pytest.raises(UsageError, match="exists and is public"):
        push([plain], "user/open", private=True)
    assert len(hub.store.repositories["user/open"].messages) == 1


# Bytes there and back


def test_a_round_trip_keeps_every_byte(hub, plain, tmp_path):
    push([plain], REPO)
    folders = pull(REPO, tmp_path / "out")
    assert folders == {f"{SITE}/plain-k4": tmp_path / "out" / SITE / "plain-k4"}
    assert content(folders[f"{SITE}/plain-k4"]) == content(plain)
    assert push(list(folders.values()), REPO).changed == []


def test_python_goes_there_and_back(hub, tmp_path):
    dictionary = make_dictionary()
    url = dictionary.push_to_hub(REPO)
    assert url == f"{hub.endpoint}/{REPO}/commit/{head(hub)}"
    x = torch.randn(7, 12)
    wanted = dictionary.encode_sparse(x)
    for again in (
        Dictionary.from_pretrained(REPO, f"{SITE}/plain-k4"),
        Dictionary.from_pretrained(REPO),  # the only one
        Dictionary.from_pretrained(REPO, revision=head(hub)),
    ):
        found = again.encode_sparse(x)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.values, wanted.values)
        assert again.info == dictionary.info
    dictionary.save_pretrained(tmp_path / "saved")
    assert torch.equal(Dictionary.load(tmp_path / "saved").W_dec, dictionary.W_dec)
    make_dictionary("other-k4").push_to_hub(REPO)
    with pytest.raises(UsageError, match="holds 2 dictionaries, so name one"):
        Dictionary.from_pretrained(REPO)


def test_the_code_in_the_card_runs(hub):
    dictionary = make_dictionary()
    dictionary.push_to_hub(REPO)
    card = hub.store.content(REPO, "README.md").decode()
    code = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[0]
    names = {"activations": torch.randn(5, 12)}
    exec(code, names)
    assert torch.equal(names["reconstruction"], dictionary(names["activations"]))


def test_a_pull_of_a_revision_gets_that_one(hub, plain, tmp_path):
    first = push([plain], REPO).commit
    make_dictionary("plain-k4", seed=5).save(plain)
    push([plain], REPO)
    old = pull(REPO, tmp_path / "old", f"{SITE}/plain-k4", revision=first)
    new = pull(REPO, tmp_path / "new", f"{SITE}/plain-k4")
    assert content(*new.values()) == content(plain) != content(*old.values())
    # Into the same folder: replaced as a whole.
    again = pull(REPO, tmp_path / "old")
    assert content(*again.values()) == content(plain)


def test_a_pull_keeps_every_dictionary_or_says_which_it_cannot(hub, plain, weighted, tmp_path):
    for repo, first, second, said in (
        (REPO, "", "saes/", r"(\.|saes) of user/saes would be copied into the place of (\.|saes)"),
        ("user/deep", "a/", "A/b/", "a of user/deep would be copied into the place of A/b;"),
        ("user/odd", "pull.json/", "a/", r"pull\.json of user/odd .* the record pull\.json;"),
    ):
        hub.create(repo)
        for place, source in ((first, plain), (second, weighted)):
            for name, data in content(source).items():
                hub.store.put(repo, f"{place}{name}", data)
        with pytest.raises(LlmWsaeError, match=said) as error:
            pull(repo, tmp_path / "out")
        assert "pull one dictionary at a time" in sentence(error)
        assert not (tmp_path / "out").exists() and not hub.count("GET", "/storage/")
    for number, (name, one) in enumerate(((".", plain), ("saes", weighted))):
        (folder,) = pull(REPO, tmp_path / str(number), name).values()
        assert content(folder) == content(one)


def test_a_pull_leaves_foreign_folders_alone(hub, plain, tmp_path):
    push([plain], REPO)
    place = tmp_path / "out" / SITE / "plain-k4"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(LlmWsaeError, match=r"is not just a dictionary \(it holds notes.txt\)"):
        pull(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == {f"{SITE}/plain-k4/notes.txt": b"mine"}


def stopped(source, folder):
    shutil.copytree(source, folder)
    raise KeyboardInterrupt


def test_a_pull_replaces_only_what_was_pulled_from_there(
    hub, plain, weighted, tmp_path, monkeypatch
):
    push([plain], REPO)
    out = tmp_path / "out"
    place = out / SITE / "plain-k4"
    make_dictionary("plain-k4", seed=9).save(place)  # trained here
    before = content(place)
    with pytest.raises(LlmWsaeError, match="was not pulled from this repository, or was saved"):
        pull(REPO, out)
    assert content(place) == before
    shutil.rmtree(place)
    pull(REPO, out)
    hub.create("user/others")
    for name, data in content(weighted).items():
        hub.store.put("user/others", f"{SITE}/plain-k4/{name}", data)
    with pytest.raises(LlmWsaeError, match="was not pulled from this repository"):
        pull("user/others", out)
    # Saved again since, it is one's own.
    make_dictionary("plain-k4", seed=9).save(place)
    with pytest.raises(LlmWsaeError, match="or was saved again since"):
        pull(REPO, out)
    shutil.rmtree(out)
    with monkeypatch.context() as patch:  # a kill before the record is complete
        patch.setattr(pulling, "copy_folder", stopped)
        with pytest.raises(KeyboardInterrupt):
            pull(REPO, out)
        shutil.rmtree(place)
        make_dictionary("plain-k4", seed=9).save(place)
        before = content(place)
        with pytest.raises(LlmWsaeError, match="or was saved again since"):
            pull(REPO, out)
        assert content(place) == before
        shutil.rmtree(place)
        with pytest.raises(KeyboardInterrupt):
            pull(REPO, out)
    pull(REPO, out)
    make_dictionary("plain-k4", seed=3).save(plain)
    push([plain], REPO)
    with monkeypatch.context() as patch:  # killed while the older one is still there
        patch.setattr(pulling, "copy_folder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pull(REPO, out)
    pull(REPO, out)
    assert content(place) == content(plain)
    # Of the same weights, what is known here stays, and what the Hub knows more is added.
    keep_measurements(place, {"fidelity": {"kl": 0.25}})
    keep_explanations(place, [Explanation(1, "mine", "m", {})])
    keep_measurements(plain, {"fidelity": {"kl": 0.5}, "monosemanticity": {"l0": 4.0}})
    keep_explanations(plain, [Explanation(1, "yours", "m", {}), Explanation(2, "new", "m", {})])
    push([plain], REPO)
    pull(REPO, out)
    metrics = check_folder(place).metrics
    assert metrics["fidelity"] == {"kl": 0.25} and metrics["monosemanticity"] == {"l0": 4.0}
    said = read_explanations(place)
    assert {latent: one.text for latent, one in said.items()} == {1: "mine", 2: "new"}
    assert works("verify", out).out


def test_explanations_made_here_are_not_replaced_with_the_weights(hub, plain, tmp_path):
    """They may have been paid for; those that a pull brought have newer ones in their place."""
    out = tmp_path / "out"
    place = out / SITE / "plain-k4"

    def made(seed: int, *latents: int) -> None:
        make_dictionary("plain-k4", seed=seed).save(plain)
        keep_explanations(plain, [Explanation(latent, "theirs", "m", {}) for latent in latents])
        push([plain], REPO)

    def said() -> dict[int, str | None]:
        return {latent: one.text for latent, one in read_explanations(place).items()}

    made(1)
    pull(REPO, out)
    made(1, 1)  # added to the folder
    pull(REPO, out)
    assert said() == {1: "theirs"}
    made(2, 2)
    pull(REPO, out)
    assert said() == {2: "theirs"} and content(place) == content(plain)

    keep_explanations(place, [Explanation(3, "mine", "m", {})])
    made(2, 2, 4)  # the same weights: what is new is added, and mine stay mine
    pull(REPO, out)
    assert said() == {2: "theirs", 3: "mine", 4: "theirs"}
    dictionary = Dictionary.load(plain)
    dictionary.extras = {"gamma": torch.ones(dictionary.d_in)}
    dictionary.save(plain)  # of the same weights, but replaced
    keep_explanations(plain, [Explanation(5, "theirs", "m", {})])
    push([plain], REPO)
    pull(REPO, out)
    assert said() == {2: "theirs", 3: "mine", 4: "theirs", 5: "theirs"}
    assert Dictionary.load(place).extras["gamma"].tolist() == [1.0] * dictionary.d_in

    made(6, 1)
    before = content(out)
    with pytest.raises(LlmWsaeError, match="explains the weights that were pulled before") as error:
        pull(REPO, out)
    assert f"{place / 'explanations.jsonl'} explains" in sentence(error)
    assert "move it away" in sentence(error) and content(out) == before
    shutil.move(place / "explanations.jsonl", tmp_path / "mine.jsonl")
    pull(REPO, out)
    assert said() == {1: "theirs"} and content(place) == content(plain)


def test_a_push_keeps_what_others_put_there_about_the_same_weights(hub, plain, tmp_path):
    def said(latent, text, *scores):
        found = {name: Score(0.9, (0.8, 1.0), 10, 10) for name in scores}
        return Explanation(latent, text, "a model", found)

    keep_explanations(plain, [said(1, "one", "fuzzing"), said(2, "two")])
    push([plain], REPO)
    mine = tmp_path / "mine"
    make_dictionary("plain-k4", metrics={"fidelity": {"fvu": 0.5}}).save(mine)
    keep_explanations(mine, [said(1, "one", "detection"), said(2, "zwei"), said(3, "three")])
    before = content(mine)
    changed = push([mine], REPO).changed
    assert f"{SITE}/plain-k4/explanations.jsonl" in changed and content(mine) == before
    assert push([mine], REPO).changed == []
    (folder,) = pull(REPO, tmp_path / "out").values()
    found = read_explanations(folder)
    assert [found[latent].text for latent in (1, 2, 3)] == ["one", "zwei", "three"]
    assert set(found[1].scores) == {"detection", "fuzzing"}
    assert check_folder(folder).metrics == {"training": {"fvu": 0.3}, "fidelity": {"fvu": 0.5}}
    hub.store.put(REPO, f"{SITE}/plain-k4/explanations.jsonl", b"torn")
    push([mine], REPO)
    assert set(read_explanations(*pull(REPO, tmp_path / "new").values())) == {1, 2, 3}


def test_a_checkpoint_of_saelens_has_its_scale_on_the_hub_too(hub, tmp_path):
    saelens_checkpoint(tmp_path / "theirs")
    hub.create(REPO)
    for name, data in content(tmp_path / "theirs").items():
        hub.store.put(REPO, f"one/{name}", data)
    local = Dictionary.load(tmp_path / "theirs")
    (folder,) = pull(REPO, tmp_path / "out").values()
    assert torch.equal(Dictionary.load(folder).W_enc, local.W_enc)
    keep_measurements(folder, {"fidelity": {"kl": 0.25}})
    pull(REPO, tmp_path / "out")  # converted again, to the same
    assert check_folder(folder).metrics["fidelity"] == {"kl": 0.25}
    keep_explanations(folder, [Explanation(1, "mine", "m", {})])
    before = content(tmp_path / "out")
    path = tmp_path / "theirs" / WEIGHTS
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    hub.store.put(REPO, f"one/{WEIGHTS}", path.read_bytes())
    with pytest.raises(LlmWsaeError, match="explains the weights that were pulled before"):
        pull(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_cut_download_goes_on_where_it_broke(hub, tmp_path):
    make_dictionary(d_in=64, d_sae=1024).save(tmp_path / "big")
    push([tmp_path / "big"], REPO)
    hub.cut("GET", "/storage/", after=100_000, times=4)  # the first request is for a small file
    folders = pull(REPO, tmp_path / "out")
    assert content(*folders.values()) == content(tmp_path / "big")
    assert hub.count("GET", "/storage/") == 1 + 4  # so each of the four brought what was missing


# The commands


def test_commands(hub, plain, weighted, tmp_path, monkeypatch):
    pushed = works("push", plain, weighted, REPO, "--license", "mit", "--json").json
    assert pushed["dictionaries"] == [f"{SITE}/plain-k4", f"{SITE}/weighted-k4"]
    assert pushed["commit"] == head(hub) and len(pushed["changed"]) == 9
    again = works("push", plain, weighted, REPO)
    assert again.out == f"already up to date: {hub.endpoint}/{REPO}\n"
    assert "license: mit" in hub.store.content(REPO, "README.md").decode()

    listed = works("list", REPO).out.splitlines()
    assert listed[1].split() == [f"{SITE}/plain-k4", "12", "→", "80", "TopK,", "k", "=", "4",
                                 "0.250", "0.975"]  # fmt: skip
    facts = works("list", REPO, "--json").json["dictionaries"]
    assert facts[1]["sae_id"] == f"{SITE}/weighted-k4" and facts[1]["d_sae"] == 80
    assert facts[1]["metrics"]["fidelity"]["kl"] == 0.5

    out = tmp_path / "out"
    result = works("pull", REPO, f"{SITE}/weighted-k4", "--out", out)
    assert result.out == f"{out / SITE / 'weighted-k4'}\n"
    assert content(out / SITE / "weighted-k4") == content(weighted)
    record = json.loads((out / "pull.json").read_text())
    assert record["command"] == "pull" and record["config"]["repo_id"] == REPO
    assert works("verify", out / SITE / "weighted-k4").code == 0
    folders = works("pull", REPO, "--out", out, "--json").json["folders"]
    assert folders == {f"{SITE}/{n}": str(out / SITE / n) for n in ("plain-k4", "weighted-k4")}

    monkeypatch.chdir(tmp_path)  # a folder of the repository's own name is no dictionary
    assert works("pull", REPO, f"{SITE}/plain-k4").out == f"dictionaries/{SITE}/plain-k4\n"
    shutil.move("dictionaries", REPO)
    assert works("push", f"{REPO}/{SITE}/plain-k4", REPO).out.startswith("already up to date")


def test_what_a_stranger_named_cannot_command_the_terminal(hub, plain):
    push([plain], REPO)
    cfg = json.loads(hub.store.content(REPO, f"{SITE}/plain-k4/cfg.json"))
    cfg["architecture"] = "\x1b[2Jx"
    hub.store.put(REPO, f"{SITE}/plain-k4/cfg.json", json.dumps(cfg).encode())
    assert r"\x1b[2Jx" in works("list", REPO).out


def test_commands_that_cannot_be(hub, plain, weighted, login):
    for words in (("push",), ("push", plain), ("push", plain, weighted)):
        result = call(*words)
        assert result.code == 2 and result.out == ""
        assert "name dictionary folders and then the repository" in result.err
    for name in ("saes", "hub/user/saes"):
        asked = len(hub.requests)
        result = call("push", plain, name)
        assert result.code == 2 and f"as user/name, not '{name}'" in result.err
        assert len(hub.requests) == asked and name not in hub.store.repositories
    result = call("pull", "user/nothing", "--out", "out")
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.startswith("llm-wsae: there is no repository user/nothing")
    login("hf_wröngsecret")
    result = call("--debug", "list", REPO)
    assert result.code == 1 and "secret" not in result.err
    assert "your token holds characters that no token has" in result.err
    login("hf_wrongsecret")
    for words in (("list", REPO), ("pull", REPO, "--out", "out"), ("push", plain, REPO)):
        result = call("--debug", *words)
        assert result.code == 1 and "Traceback" in result.err
        assert "hf_wrongsecret" not in result.err
        assert "llm-wsae: the Hub does not accept your token" in result.err
