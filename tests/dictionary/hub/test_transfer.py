"""Push, pull and list with the real client against a local Hub: what arrives, what a second call
does. Failures and unsafe repositories are in test_hub_faults.py."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from command_line import call, content, works
from hub_fixtures import HERE, REPO, head, place, sentence
from refusals import fails, misused
from small_dictionaries import SITE, make_dictionary, said_of

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Score, keep_explanations, read_explanations
from llm_wsae.dictionary.folder import WEIGHTS, keep_measurements, read_folder
from llm_wsae.dictionary.hub.transfer import list_dictionaries, pull, push
from llm_wsae.errors import UsageError


def test_push_writes_the_files_and_a_card_in_one_commit(hub, plain, weighted):
    done = push([plain, weighted], REPO)
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2 and not repository.private
    assert done.commit == head(hub) and done.url == f"{hub.endpoint}/{REPO}/commit/{done.commit}"
    assert done.sae_ids == [HERE, f"{SITE}/weighted-k4"]
    for folder, sae_id in zip((plain, weighted), done.sae_ids, strict=True):
        for name, data in content(folder).items():
            assert hub.content(REPO, f"{sae_id}/{name}") == data
    assert sorted(repository.files()) == sorted([".gitattributes", *done.changed])
    card = hub.content(REPO, "README.md").decode()
    assert f"`{HERE}`" in card and f"`{SITE}/weighted-k4`" in card
    hub.requests.clear()
    again = push([plain, weighted], REPO)
    assert (again.changed, again.commit) == ([], done.commit) == ([], head(hub))
    assert again.url == f"{hub.endpoint}/{REPO}"
    assert {method for method, _ in hub.requests} == {"GET"}


def test_only_what_changed_is_written_and_the_card_knows_all(hub, plain, weighted):
    push([weighted], REPO)
    done = push([plain], REPO)
    assert not [path for path in done.changed if "weighted" in path]
    uploads = hub.count("PUT", "/storage/")
    dictionary = Dictionary.load(plain)
    dictionary.info = dataclasses.replace(dictionary.info, metrics={"fidelity": {"fvu": 0.125}})
    dictionary.save(plain)
    done = push([plain, weighted], REPO)
    assert done.changed == ["README.md", f"{HERE}/wsae.json"]
    assert hub.count("PUT", "/storage/") == uploads == 4
    card = hub.content(REPO, "README.md").decode()
    assert "| 0.125 |" in card and "| 0.250 |" in card  # the other one's numbers come from there
    assert [d.sae_id for d in list_dictionaries(REPO)] == [HERE, f"{SITE}/weighted-k4"]


def test_a_branch_is_made_and_main_left_alone(hub, plain, weighted):
    push([plain], REPO)
    before = head(hub)
    done = push([weighted], REPO, revision="try/2")
    assert head(hub) == before and head(hub, "try/2") == done.commit
    assert [d.sae_id for d in list_dictionaries(REPO)] == [HERE]
    assert len(list_dictionaries(REPO, revision="try/2")) == 2
    card = hub.content(REPO, "README.md", "try/2").decode()
    assert 'revision="try/2")' in card and "--revision try/2 --out" in card
    assert push([weighted], REPO, revision="try/2").changed == []
    hub.repositories[REPO].tags["v1"] = before
    for fixed in ("v1", before):
        with pytest.raises(UsageError, match="is not a branch of user/saes") as error:
            push([weighted], REPO, revision=fixed)
        assert "'main', 'try/2'" in sentence(error)


def test_a_push_that_would_not_do_what_was_asked_does_nothing(hub, plain):
    """Weights that a .gitignore leaves out, and what is to be private in a public repository."""
    push([plain], REPO, private=True)
    assert hub.repositories[REPO].private
    assert push([plain], REPO, private=True).changed == []
    for file, how, said in (
        (".gitignore", {}, r"gitignore that excludes .*safetensors, so nothing was pushed"),
        ("README.md", {"private": True}, "exists and is public"),
    ):
        hub.put("user/open", file, b"*.safetensors")
        commits = len(hub.repositories["user/open"].commits)
        fails(said, push, [plain], "user/open", **how)
        assert len(hub.repositories["user/open"].commits) == commits


def test_python_goes_there_and_back(hub, tmp_path):
    dictionary = make_dictionary()
    url = dictionary.push_to_hub(REPO)
    assert url == f"{hub.endpoint}/{REPO}/commit/{head(hub)}"
    x = torch.randn(7, 12)
    for again in (
        Dictionary.from_pretrained(REPO, HERE),
        Dictionary.from_pretrained(REPO),  # the only one
        Dictionary.from_pretrained(REPO, revision=head(hub)),
    ):
        assert torch.equal(again.encode(x), dictionary.encode(x)) and again.info == dictionary.info
    card = hub.content(REPO, "README.md").decode()
    names = {"activations": x}
    exec(re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[0], names)
    assert torch.equal(names["reconstruction"], dictionary(x))
    dictionary.save_pretrained(tmp_path / "saved")
    assert torch.equal(Dictionary.load(tmp_path / "saved").W_dec, dictionary.W_dec)
    make_dictionary("other-k4").push_to_hub(REPO)
    misused("holds 2 dictionaries, so name one", Dictionary.from_pretrained, REPO)


def test_a_pull_of_a_revision_gets_that_one(hub, plain, tmp_path):
    first = push([plain], REPO).commit
    older = content(plain)
    make_dictionary("plain-k4", seed=5).save(plain)
    push([plain], REPO)
    old = pull(REPO, tmp_path / "old", HERE, revision=first)
    new = pull(REPO, tmp_path / "new", HERE)
    assert old == {HERE: tmp_path / "old" / HERE} and content(*old.values()) == older
    assert content(*new.values()) == content(plain)
    assert push(list(new.values()), REPO).changed == []


def test_one_at_the_top_and_one_within_another(hub, plain, weighted, tmp_path):
    wanted = {".": plain, "a": weighted, "a/b": plain}
    for sae_id, source in wanted.items():
        place(hub, sae_id.strip("."), source)
    folders = pull(REPO, tmp_path)
    assert folders == {".": tmp_path / "saes", "a": tmp_path / "a", "a/b": tmp_path / "a/b"}
    assert pull(REPO, tmp_path) == folders
    for sae_id, source in wanted.items():
        assert torch.equal(Dictionary.load(folders[sae_id]).W_enc, Dictionary.load(source).W_enc)


def test_only_the_files_of_a_dictionary_are_fetched(hub, plain, tmp_path):
    place(hub, HERE, plain)
    for name in ("ae.pt", "evil.py", "model.bin", "more.safetensors", "notes.json"):
        hub.put(REPO, f"{HERE}/{name}", b"\x80\x04anything")
    assert content(*pull(REPO, tmp_path / "out").values()) == content(plain)
    fetched = {path.rsplit("/", 1)[1] for _, path in hub.requests if "/resolve/" in path}
    assert fetched == set(content(plain))


def test_a_pull_replaces_nothing_and_adds_what_is_new(hub, plain, tmp_path):
    """Explanations may have been paid for."""
    out, mine = tmp_path / "out", tmp_path / "out" / HERE

    def pulled() -> dict[int, str | None]:
        push([plain], REPO)
        pull(REPO, out)
        return {latent: one.text for latent, one in read_explanations(mine).items()}

    assert pulled() == {} and content(mine) == content(plain)
    (mine / WEIGHTS).write_bytes(b"damaged since")
    assert pulled() == {} and content(mine) == content(plain)
    keep_measurements(mine, {"fidelity": {"kl": 0.25}})
    keep_explanations(mine, [said_of(3, "mine")])
    keep_explanations(plain, [said_of(latent, "theirs") for latent in (3, 4)])
    keep_measurements(plain, {"fidelity": {"kl": 0.5}, "monosemanticity": {"l0": 4.0}})
    assert pulled() == {3: "mine", 4: "theirs"}
    metrics = read_folder(mine).info.metrics
    assert metrics["fidelity"] == {"kl": 0.25} and metrics["monosemanticity"] == {"l0": 4.0}
    assert works("verify", out).out
    make_dictionary("plain-k4", seed=9).save(plain)
    before = content(mine)
    fails("holds another dictionary, or another version", pulled)
    assert content(mine) == before
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    fails(r"is not just a dictionary \(it holds notes.txt\)", pulled)
    assert content(mine) == {"notes.txt": b"mine"}


def test_a_push_keeps_what_others_put_there_about_the_same_weights(hub, plain, tmp_path):
    score = {"fuzzing": Score(0.9, (0.8, 1.0), 10, 10)}
    keep_explanations(plain, [said_of(1, "one", score), said_of(2, "two")])
    push([plain], REPO)
    mine = tmp_path / "mine"
    make_dictionary("plain-k4", metrics={"fidelity": {"fvu": 0.5}}).save(mine)
    keep_explanations(mine, [said_of(latent, "mine") for latent in (2, 3)])
    before = content(mine)
    changed = push([mine], REPO).changed
    assert f"{HERE}/explanations.jsonl" in changed and content(mine) == before
    assert push([mine], REPO).changed == []
    (folder,) = pull(REPO, tmp_path / "out").values()
    found = read_explanations(folder)
    assert [found[latent].text for latent in (1, 2, 3)] == ["one", "mine", "mine"]
    assert found[1].scores == score
    assert read_folder(folder).info.metrics == {"training": {"fvu": 0.3}, "fidelity": {"fvu": 0.5}}
    hub.put(REPO, f"{HERE}/explanations.jsonl", b"torn")
    push([mine], REPO)
    assert set(read_explanations(*pull(REPO, tmp_path / "new").values())) == {2, 3}


def test_commands(hub, plain, weighted, tmp_path, monkeypatch):
    pushed = works("push", plain, weighted, REPO, "--license", "mit", "--json").json
    assert pushed["dictionaries"] == [HERE, f"{SITE}/weighted-k4"]
    assert pushed["commit"] == head(hub) and len(pushed["changed"]) == 9
    again = works("push", plain, weighted, REPO)
    assert again.out == f"already up to date: {hub.endpoint}/{REPO}\n"

    listed = works("list", REPO).out.splitlines()
    assert listed[2].split() == [HERE, "12", "→", "80", "TopK,", "k", "=", "4", "0.250", "0.975"]
    facts = works("list", REPO, "--json").json["dictionaries"]
    assert facts[1]["sae_id"] == f"{SITE}/weighted-k4" and facts[1]["d_sae"] == 80
    assert facts[1]["metrics"]["fidelity"]["kl"] == 0.5

    out = tmp_path / "out"
    result = works("pull", REPO, f"{SITE}/weighted-k4", "--out", out)
    assert result.out == f"{out / SITE / 'weighted-k4'}\n"
    assert content(out / SITE / "weighted-k4") == content(weighted)
    record = json.loads((out / "pull.json").read_text())
    assert record["command"] == "pull" and record["config"]["repo_id"] == REPO
    folders = works("pull", REPO, "--out", out, "--json").json["folders"]
    assert folders == {f"{SITE}/{n}": str(out / SITE / n) for n in ("plain-k4", "weighted-k4")}

    monkeypatch.chdir(tmp_path)  # a folder of the repository's own name is no dictionary
    assert works("pull", REPO, HERE).out == f"dictionaries/{HERE}\n"
    shutil.move("dictionaries", REPO)
    assert works("push", f"{REPO}/{HERE}", REPO).out.startswith("already up to date")

    cfg = json.loads(hub.content(REPO, f"{HERE}/cfg.json")) | {"architecture": "\x1b[2Jx"}
    hub.put(REPO, f"{HERE}/cfg.json", json.dumps(cfg).encode())
    assert r"\x1b[2Jx" in works("list", REPO).out


def test_commands_that_cannot_be(hub, plain, weighted):
    no_repository, no_name = "name dictionary folders and then the repository", "as user/name, not"
    for words, said in (
        (["push"], no_repository),
        (["push", plain], no_repository),
        (["push", plain, weighted], no_repository),
        (["push", plain, "saes"], f"{no_name} 'saes'"),
        (["push", plain, "hub/user/saes"], f"{no_name} 'hub/user/saes'"),
        (["pull", "user/nothing", "--out", "out"], "llm-wsae: there is no repository user/nothing"),
    ):
        assert hub.requests == []
        result = call(*words)
        assert result.code == 2 and result.out == "" and said in result.err
        assert "Traceback" not in result.err
