"""``llm-wsae inspect`` in its forms: latents alone, with a store, with a model, with a text; and
``evaluate --monosemantic`` and ``--keep``: what is printed, written and kept.
"""

import json
import re
import shutil

import pytest
import torch
from command_line import SITE, call, content, works
from tiny import save_encoder

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site

PLAIN = "trained/uniform-k4"


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    before = content(world)
    yield world
    assert content(world) == before  # looking changes nothing


@pytest.fixture(scope="module")
def dense(world):
    """Which latents fire on the store's rows."""
    store = ActivationStore.open(world / "store")
    rows = store.rows(Site.parse(SITE), 0, store.num_rows).float()
    return Dictionary.load(world / PLAIN).encode(rows)


def change(packing=None, **model):
    """Save a dictionary that says that it is of another model."""
    one = Dictionary.load(PLAIN)
    one.info.model.update(model)
    one.info.store["packing"] = packing or one.info.store["packing"]
    one.save("changed")


def test_latents_alone_and_with_a_store_and_a_model(inside, dense):
    latent = int((dense > 0).sum(0).argmax())
    words = ("inspect", PLAIN, "--latent", latent, "--top", 4)
    (alone,), text = works(*words, "--json").json["latents"], works(*words).out
    assert alone["promotes"] is alone["firing"] is None and alone["examples"] == []
    assert len(alone["neighbours"]) == len(alone["dimensions"]) == 4
    near = alone["neighbours"][0]
    assert text.startswith(f"latent {latent} of uniform-k4 at {SITE}\n")
    assert f"nearest     {near['latent']} {near['cosine']:.2f}" in text
    assert "did not come from the Hub; name the model with --model" in text
    words += ("--store", "store")
    (found,), text = works(*words, "--json").json["latents"], works(*words).out
    best = found["examples"][0]
    assert found["firing"]["density"] == pytest.approx(float((dense[:, latent] > 0).float().mean()))
    assert best["activation"] == pytest.approx(float(dense[:, latent].max()), rel=1e-5)
    where = ActivationStore.open("store").locate(torch.tensor([best["row"]]))
    token = int(where.ids[0, int(where.position)])
    assert f"«<{token}>»" in text  # ids, until the model is named
    words += ("--model", "model")
    result, text = works(*words, "--json"), works(*words).out
    word = result.json["latents"][0]["promotes"][0]
    assert f"promotes    «{word['token']}» {word['logit']:+.2f}" in text
    assert f"«w{token}»" in text.replace("« ", "«") and "other weights" not in result.err


def test_a_sentence(inside):
    words = ("inspect", PLAIN, "--text", "w5 w17 w5", "--model", "model")
    result = works(*words, "--json").json
    assert result["latents"] == [] and [t["id"] for t in result["tokens"]] == [50, 5, 17, 5]
    strongest = result["tokens"][2]["latents"][0]
    text = works(*words, "--latent", strongest["latent"]).out
    assert re.search(rf"«w17» +{strongest['latent']} {strongest['activation']:.2f}", text)
    assert f"\nlatent {strongest['latent']}: " in text and text.startswith("latent ")


def test_a_model_that_is_another_or_not_there(inside, monkeypatch):
    """Without it tokens are not shown. A dictionary may come from anybody, and name a model of any
    size, so it makes none be downloaded."""
    change(weights_sha256="0" * 64)
    result = works("inspect", "changed", "--latent", 0, "--model", "model")
    assert "trained on a model whose weights differ from those of model" in result.err
    refused = call("inspect", "changed", "--latent", 0, "--store", "store")
    assert refused.code == 1 and "(other weights)" in refused.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = "huggingface_hub.HfApi.model_info"
    monkeypatch.setattr(hub, lambda *_, **__: 1 / 0)
    packing = {"drop_positions": "1", "of the future": 2}
    change(packing, name="nobody/not-there", revision="0" * 40)
    shown = works("inspect", "changed", "--latent", 0).out
    assert "writes to" in shown and "--model" in shown
    assert "tokens are not shown: 'nobody/not-there' is neither" in shown
    works("inspect", "changed", "--text", "w5 w6", "--model", "model")
    assert call("inspect", "changed", "--text", "w5").code == 2
    with pytest.raises(ZeroDivisionError):  # the user says so
        call("inspect", "changed", "--text", "w5", "--model", "nobody/not-there")
    shutil.rmtree("changed")


NAMES = ("uniform-k4", "variance-a0.5-k4")
HALF = {"frozen decoder": "uniform-frozen-decoder-k4",
        "frozen encoder": "uniform-frozen-encoder-k4"}  # fmt: skip
UNTRAINED = ("raw dimensions", "frozen random")


@pytest.fixture(scope="module")
def world(world):
    save_encoder(world / "encoder")
    frozen = ("--architecture", "frozen-decoder", "frozen-encoder", "--k", 4, "--expansion", 2)
    works("train", world / "store", "--site", SITE, "--tokens", 4096, *frozen, "--out",
          world / "half")  # fmt: skip
    return world


def asked_of(world, folder, *more):
    """The command, on copies of the dictionaries."""
    for name in NAMES:
        shutil.copytree(world / "trained" / name, folder / name)
    for name in HALF.values():
        shutil.copytree(world / "half" / name, folder / name)
    return ["evaluate", *(folder / name for name in (*NAMES, *HALF.values())), "--model",
            world / "model", "--corpus", world / "text.jsonl", "--tokens", 500, "--bootstraps", 50,
            "--out", folder / "report.json", "--monosemantic", "--score.encoder",
            world / "encoder", *more]  # fmt: skip


def plain(words):
    """The command without scores of latents."""
    return words[: words.index("--monosemantic")]


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory):
    """The folder, its files before, the command, and what it printed."""
    folder = tmp_path_factory.mktemp("kept")
    words = asked_of(world, folder, "--score.tokens", 1500, "--keep")
    before = content(folder)
    return folder, before, words, works(*words, "--json").json


def test_what_is_printed_and_kept(kept):
    folder, before, _, found = kept
    report = json.loads((folder / "report.json").read_text())
    assert found.items() <= report.items() and report["command"] == "evaluate"
    measured = [*NAMES, *HALF.values()]
    scored = found["monosemanticity"]
    assert list(found["dictionaries"]) == list(scored["dictionaries"]) == [*measured, *UNTRAINED]
    assert 1500 <= scored["num_rows"] < 1515
    assert scored["config"]["bootstraps"] == 50 and scored["config"]["tokens"] == 1500
    k = found["dictionaries"][NAMES[0]]["l0"]
    for name in UNTRAINED:
        assert found["dictionaries"][name]["l0"] == pytest.approx(k, rel=0.2)
    different = {name for name, data in content(folder).items() if data != before.get(name)}
    assert different == {"report.json", *(f"{name}/wsae.json" for name in measured)}
    labels = HALF | {name: name for name in UNTRAINED}
    for name in measured:
        metrics = Dictionary.load(folder / name).info.metrics
        assert metrics["training"] == json.loads(before[f"{name}/wsae.json"])["metrics"]["training"]
        assert "latent_density" not in metrics["fidelity"]
        assert metrics["baselines"].keys() == labels.keys()
        beside = {labels[label]: kept for label, kept in metrics["baselines"].items()}
        for row, kept_of in {name: metrics, **beside}.items():
            assert kept_of["fidelity"]["kl"] == found["dictionaries"][row]["kl"]
            check_card(kept_of["monosemanticity"], scored["dictionaries"][row], scored)


def check_card(card, scores, scored):
    purity, means = scores["latents"]["purity"], scored["sites"][scores["site"]]["means"]
    chance = scored["chance"]["purity"]
    assert [*card["purity"].values()] == [purity["mean"], purity["interval"], chance]
    assert 0 <= card["eligible_share"] == scores["eligible_share"] == purity["share"]
    assert card["probe_5"]["value"] == scores["concepts"]["means"]["best_5"]["mean"]
    assert card["probe_5"]["control"] == means["best_5"]
    letters = scores["concepts"]["families"].get("letter", {"selectivity": None})
    assert card["selectivity_letters"] == letters["selectivity"]


def test_another_measurement_replaces_its_own_group_only(kept):
    folder, _, words, _ = kept
    once = content(folder / NAMES[0])
    works(*plain(words), "--keep", "--no-baselines")
    metrics, before = (
        json.loads(one["wsae.json"])["metrics"] for one in (content(folder / NAMES[0]), once)
    )
    assert metrics["baselines"].keys() == HALF.keys()
    same = [key for key in before if metrics[key] == before[key]]
    assert {*before} - {*same} == {"baselines"}  # the same text, the same numbers
    with pytest.raises(UsageError, match="was not saved by this package"):
        keep_measurements(folder, {"fidelity": {}})


def test_a_table_of_text_that_was_not_held_out(world, tmp_path):
    words = asked_of(world, tmp_path, "--score.tokens", 3000, "--part", "all")
    before = content(tmp_path)
    text = works(*words[:3], *words[5:]).out  # without those that are half random
    rows = [line for line in text.splitlines() if line.startswith(NAMES[0])]
    assert len(rows) == 2  # fidelity, monosemanticity
    report = json.loads((tmp_path / "report.json").read_text())["monosemanticity"]
    scores = report["dictionaries"][NAMES[0]]
    assert {"number"} <= report["sites"][scores["site"]]["families"].keys()
    assert f"{100 * scores['eligible_share']:.1f}" in rows[1].split()
    assert text.endswith(f"report  {tmp_path / 'report.json'}\n")
    assert text.count(" tokens of text from ") == 2 and "held-out text from" not in text
    assert "was not read where it is held out: this text may have been seen" in text
    unchanged = content(tmp_path)
    unchanged.pop("report.json")
    assert unchanged == before  # nothing is kept unless asked


def test_what_cannot_be_done_is_said_before_the_work(world, tmp_path):
    words = asked_of(world, tmp_path)

    def fails(match, *more, code=2, asked=words):
        result = call(*asked, *more)
        assert result.code == code and match in result.err, result.err
        assert result.err.rstrip().count("\n") <= 1  # "loading", and the sentence
        assert "evaluate:" not in result.err and not (tmp_path / "report.json").exists()

    fails("is not a sentence encoder", "--score.encoder", world / "model")
    labels = ("--score.tokens", 900, "--score.labels", "nmber")
    fails("no document has a label 'nmber'; did you mean 'number'", *labels)
    needed = "but 1,000,000 tokens in at least 2 contexts are needed"
    fails(needed, "--score.tokens", 1_000_000, code=1)
    fails("--score: tokens is 0, but must be at least 1", "--score.tokens", 0)
    fails("--score.labels: only with --monosemantic; add that", "--score.labels", "number",
          asked=plain(words))  # fmt: skip
    fails("--keep stores what was measured on held-out text", "--keep", "--part", "all")
    (tmp_path / NAMES[1] / "wsae.json").rename(tmp_path / "elsewhere.json")
    fails("was not saved by this package", "--keep")
    (tmp_path / NAMES[1] / "wsae.json").symlink_to(tmp_path / "elsewhere.json")
    fails("wsae.json is only a link", "--keep")
