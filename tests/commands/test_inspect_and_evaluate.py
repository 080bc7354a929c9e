"""``llm-wsae inspect`` in its forms: latents alone, with a store, with a model, with a text; and
``evaluate --monosemantic`` and ``--keep``: what is printed, written and kept.
"""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
import torch
from command_line import SITE, call, cases, content, works
from small_dictionaries import make_dictionary
from tiny import save_encoder

from llm_wsae import inspect
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.errors import UsageError
from llm_wsae.model.language_model import LanguageModel
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


@contextmanager
def changed(packing=None, **model):
    """A dictionary that says that it is of another model."""
    one = Dictionary.load(PLAIN)
    one.info.model.update(model)
    one.info.store["packing"] = packing or one.info.store["packing"]
    one.save("changed")
    try:
        yield
    finally:
        shutil.rmtree("changed")


def test_latents_alone_and_with_a_store_and_a_model(inside, dense):
    latent, one = int((dense > 0).sum(0).argmax()), Dictionary.load(PLAIN)
    words = ("inspect", PLAIN, "--latent", latent, "--top", 4)
    (alone,) = works(*words, "--json").json["latents"]
    assert alone["promotes"] is alone["firing"] is None and alone["examples"] == []
    assert len(alone["neighbours"]) == len(alone["dimensions"]) == 4
    at = int(one.W_dec[latent].abs().argmax())
    assert alone["dimensions"][0]["decoder"] == pytest.approx(float(one.W_dec[latent, at]))
    text, near = works(*words).out, alone["neighbours"][0]
    assert text.startswith(f"latent {latent} of uniform-k4 at {SITE}\n")
    assert f"nearest     {near['latent']} {near['cosine']:.2f}" in text
    assert "did not come from the Hub; name the model with --model" in text

    words += ("--store", "store")
    (found,) = works(*words, "--json").json["latents"]
    rows, best = len(dense), found["examples"][0]
    assert found["firing"]["density"] == pytest.approx(float((dense[:, latent] > 0).sum()) / rows)
    assert best["activation"] == pytest.approx(float(dense[:, latent].max()), rel=1e-5)
    where = ActivationStore.open("store").locate(torch.tensor([best["row"]]))
    token = int(where.ids[0, int(where.position)])
    assert f"«<{token}>»" in works(*words).out  # ids, until the model is named

    words += ("--model", "model")
    result = works(*words, "--json")
    (found,), text = result.json["latents"], works(*words).out
    word = found["promotes"][0]
    assert f"promotes    «{word['token']}» {word['logit']:+.2f}" in text
    assert f"«w{token}»" in text.replace("« ", "«") and "other weights" not in result.err


def test_a_sentence(inside):
    words = ("inspect", PLAIN, "--text", "w5 w17 w5", "--model", "model")
    result = works(*words, "--json").json
    model, one = LanguageModel.load("model"), Dictionary.load(PLAIN)
    ids = torch.tensor([[model.bos_token_id, 5, 17, 5]])
    expected = one.encode(model.activations(ids, [one.site])[one.site][0].float())
    assert result["latents"] == [] and [t["id"] for t in result["tokens"]] == ids[0].tolist()
    strongest = result["tokens"][2]["latents"][0]
    assert strongest["latent"] == int(expected[2].argmax())
    text = works(*words, "--latent", strongest["latent"]).out
    assert re.search(rf"«w17» +{strongest['latent']} {strongest['activation']:.2f}", text)
    assert f"\nlatent {strongest['latent']}: " in text and text.startswith("latent ")


def test_a_model_with_other_weights_is_warned_of(inside):
    other = LanguageModel.load("model")
    with changed(weights_sha256="0" * 64):
        result = works("inspect", "changed", "--latent", 0, "--model", "model")
        assert f"trained on a model whose weights differ from those of {other.name}" in result.err
        refused = call("inspect", "changed", "--latent", 0, "--store", "store")
        assert refused.code == 1 and "(other weights)" in refused.err


def test_a_model_that_cannot_be_loaded_hides_the_tokens_only(inside, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    packing = {"drop_positions": "1", "of the future": 2}
    with changed(packing, name="nobody/not-there", revision="x"):
        shown = works("inspect", "changed", "--latent", 0).out
        assert "writes to" in shown and "tokens are not shown: " in shown
        assert "nobody/not-there" in shown
        assert works("inspect", "changed", "--text", "w5 w6", "--model", "model").code == 0
        assert call("inspect", "changed", "--text", "w5").code != 0


def test_a_dictionary_makes_no_model_be_downloaded(inside, monkeypatch):
    """It may come from anybody, and name a model of any size."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = "huggingface_hub.HfApi.model_info"
    monkeypatch.setattr(hub, lambda *_, **__: asked.append(1) or 1 / 0)
    with changed(name="some/model", revision="0" * 40):
        shown = works("inspect", "changed", "--latent", 0).out
        assert "tokens are not shown: 'some/model' is neither" in shown and "--model" in shown
        assert call("inspect", "changed", "--text", "w5").code == 2
        assert not asked
        with pytest.raises(ZeroDivisionError):  # the user says so
            call("inspect", "changed", "--text", "w5", "--model", "some/model")
        assert asked


def test_the_public_verb_takes_folders_or_opened_things(inside, dense):
    latent = int((dense > 0).sum(0).argmax())
    one, store = Dictionary.load(PLAIN), ActivationStore.open("store")
    model = LanguageModel.load("model")
    found = inspect(one, [latent, latent], store=store, model=model, text="w5 w17", top=3)
    assert found == inspect(PLAIN, [latent], store="store", model="model", text="w5 w17", top=3)
    assert len(found.latents) == 1 and len(found.latents[0].examples) == 3
    with pytest.raises(UsageError, match="nothing to inspect"):
        inspect(one)


MISTAKES = """
2 PLAIN --text BYTES --model model
    bytes that are not UTF-8
2 PLAIN --text w1 --model model --store store
    a store shows where latents fire, so name some with --latent
2 PLAIN
    name latents (--latent) or give a --text
2 PLAIN --latent 64
    no latent 64; uniform-k4 has latents 0 to 63
2 PLAIN --latent -1
    no latent -1
2 PLAIN --latent three
    --latent
2 PLAIN --latent 1 --top 0
    top is 0, but must be at least 1
1 nowhere --latent 1
    nowhere is not a folder
1 PLAIN --latent 1 --store nowhere
    no activation store in nowhere
1 PLAIN --latent 1 --store model
    no activation store in model
2 PLAIN --text w1
    reading a text needs the model, but
2 PLAIN --text LONG --model model
    100 tokens are too long
2 PLAIN --latent 1 --model ./no
    there is no model at ./no
2 narrow --latent 1 --model model
    reads 12 dimensions, but model
1 narrow --latent 1 --store store
    rows of 16 dimensions
"""


def test_mistakes_are_one_sentence(world, monkeypatch, subtests):
    monkeypatch.chdir(world)
    make_dictionary().save("narrow")
    words = {"PLAIN": [PLAIN], "BYTES": ["w1 \udcff"], "LONG": ["w1 " * 99]}
    for (code, *command), (said,) in cases(MISTAKES, **words):
        with subtests.test(ascii(command)):
            result = call("inspect", *command)
            assert (result.code, result.out) == (int(code), "") and "Traceback" not in result.err
            (sentence,) = [line for line in result.err.splitlines() if line.startswith("llm-wsae:")]
            assert said in sentence


NAMES = ("uniform-k4", "variance-a0.5-k4")


@pytest.fixture(scope="module")
def world(world):
    save_encoder(world / "encoder")
    return world


@pytest.fixture
def words(world, tmp_path):
    """The command, on copies of the dictionaries."""
    for name in NAMES:
        shutil.copytree(world / "trained" / name, tmp_path / name)
    return ["evaluate", *(tmp_path / name for name in NAMES), "--model", world / "model",
            "--corpus", world / "text.jsonl", "--part", "all", "--tokens", 500,
            "--bootstraps", 50, "--out", tmp_path / "report.json"]  # fmt: skip


def test_latents_are_scored_beside_fidelity(words, tmp_path, world):
    before = content(tmp_path)
    plain = works(*words, "--json").json
    result = works(*words, "--monosemantic", "--score.tokens", 3000, "--json")
    assert {k: v for k, v in result.json.items() if k != "monosemanticity"} == plain
    report = json.loads((tmp_path / "report.json").read_text())
    assert result.json.items() <= report.items() and report["command"] == "evaluate"
    found = result.json["monosemanticity"]
    rows = [*NAMES, "raw dimensions", "frozen random"]
    assert 3000 <= found["num_rows"] < 3015 and list(found["dictionaries"]) == rows
    assert found["config"]["bootstraps"] == 50 and found["config"]["tokens"] == 3000
    assert {"number"} <= found["sites"][found["dictionaries"][NAMES[0]]["site"]]["families"].keys()
    scores = found["dictionaries"][NAMES[0]]
    assert 0 < scores["eligible_share"] <= 1
    assert scores["latents"]["purity"]["share"] == scores["eligible_share"]

    text = works(*words, "--monosemantic", "--score.tokens", 3000).out
    rows = [line for line in text.splitlines() if line.startswith(NAMES[0])]
    assert len(rows) == 2  # fidelity, monosemanticity
    assert f"{100 * scores['eligible_share']:.1f}" in rows[1].split()
    assert f"{scores['latents']['purity']['mean']:.3f}" in rows[1].split()
    assert text.endswith(f"report  {tmp_path / 'report.json'}\n")
    assert text.count(" tokens of text from ") == 2 and "held-out text from" not in text
    assert "was not read where it is held out: this text may have been seen" in text
    unchanged = content(tmp_path)
    unchanged.pop("report.json")
    assert unchanged == before  # nothing is kept unless asked


def test_untrained_baselines_have_rows_of_their_own(words, tmp_path):
    before = {name: content(tmp_path / name) for name in NAMES}
    more = ("--monosemantic", "--score.tokens", 1500, "--keep", "--json")
    words[words.index("all")] = "heldout"
    found = works(*words, *more).json
    rows = [*NAMES, "raw dimensions", "frozen random"]
    assert list(found["dictionaries"]) == rows
    assert list(found["monosemanticity"]["dictionaries"]) == rows
    k = found["dictionaries"][NAMES[0]]["l0"]
    for name in rows[2:]:
        assert found["dictionaries"][name]["l0"] == pytest.approx(k, rel=0.2)
    assert {name for name in NAMES if content(tmp_path / name) != before[name]} == set(NAMES)
    for name in NAMES:
        kept = Dictionary.load(tmp_path / name).info.metrics["baselines"]
        assert list(kept) == rows[2:]
        for row, own in kept.items():
            assert own["fidelity"]["kl"] == found["dictionaries"][row]["kl"]
            scores = found["monosemanticity"]["dictionaries"][row]["latents"]
            assert own["monosemanticity"]["purity"]["value"] == scores["purity"]["mean"]
    works(*words, "--keep", "--no-baselines")  # another measurement, without them
    assert Dictionary.load(tmp_path / NAMES[0]).info.metrics["baselines"] == {}


def test_half_random_dictionaries_are_kept_beside_the_others(words, world, tmp_path):
    half = tmp_path / "half"
    works("train", world / "store", "--site", SITE, "--k", 4, "--tokens", 4096, "--expansion", 2,
          "--architecture", "frozen-decoder", "frozen-encoder", "--out", half)  # fmt: skip
    words[words.index("all")] = "heldout"
    names = {path.name: path for path in half.iterdir() if path.is_dir()}
    found = works(*words[:3], *names.values(), *words[3:], "--keep", "--json").json
    labels = {"frozen decoder": "uniform-frozen-decoder-k4",
              "frozen encoder": "uniform-frozen-encoder-k4"}  # fmt: skip
    for folder in (*(tmp_path / name for name in NAMES), *names.values()):
        kept = Dictionary.load(folder).info.metrics["baselines"]
        assert kept.keys() == {*labels, "raw dimensions", "frozen random"}
        for label, name in labels.items():
            assert kept[label]["fidelity"]["kl"] == found["dictionaries"][name]["kl"]


def test_results_are_kept_with_the_dictionaries(words, tmp_path, world):
    words[words.index("all")] = "heldout"
    before = {name: content(tmp_path / name) for name in NAMES}
    asked = ["--monosemantic", "--keep", "--score.tokens", 1500]
    asked += ["--score.encoder", world / "encoder"]
    report = works(*words, *asked, "--json").json
    for name in NAMES:
        after = content(tmp_path / name)
        changed = [file for file in after if after[file] != before[name][file]]
        assert changed == ["wsae.json"]
        metrics = Dictionary.load(tmp_path / name).info.metrics
        assert metrics["fidelity"]["fvu"] == report["dictionaries"][name]["fvu"]
        assert "latent_density" not in metrics["fidelity"]
        kept = metrics["monosemanticity"]
        scores = report["monosemanticity"]["dictionaries"][name]
        purity = scores["latents"]["purity"]
        assert kept["purity"] == {
            "value": purity["mean"],
            "interval": purity["interval"],
            "control": report["monosemanticity"]["chance"]["purity"],
        }
        dimensions = report["monosemanticity"]["sites"][scores["site"]]["means"]
        assert kept["probe_5"]["value"] == scores["concepts"]["means"]["best_5"]["mean"]
        assert kept["probe_5"]["control"] == dimensions["best_5"]
        assert kept["eligible_share"] == scores["eligible_share"]
        letters = scores["concepts"]["families"].get("letter", {"selectivity": None})
        assert kept["selectivity_letters"] == letters["selectivity"]
        assert metrics["training"] == Dictionary.load(tmp_path / name).info.metrics["training"]
    once = content(tmp_path / NAMES[0])
    works(*words[:3], *words[1:], *asked)  # each of them twice
    assert content(tmp_path / NAMES[0]) == once


def test_what_cannot_be_done_is_said_before_the_work(words, tmp_path, world):
    def fails(match, *more, code=2):
        result = call(*words, *more)
        assert result.code == code and match in result.err, result.err
        assert result.err.rstrip().count("\n") <= 1  # "loading", and the sentence
        assert "evaluate:" not in result.err and not (tmp_path / "report.json").exists()

    asked = ("--score.encoder", world / "encoder", "--monosemantic", "--score.tokens")
    fails("is not a sentence encoder", *asked, 3000, "--score.encoder", world / "model")
    labels = ("--score.labels", "nmber")
    fails("no document has a label 'nmber'; did you mean 'number'", *asked, 3000, *labels)
    fails("but 1,000,000 in at least 2 contexts are needed", *asked, 1_000_000, code=1)
    fails("--score: tokens is 0, but must be at least 1", *asked, 0)
    fails("--score.labels: only with --monosemantic; add that", "--score.labels", "number")
    fails("--score.tokens and --score.encoder: only with", asked[-1], 3000, *asked[:2])
    (tmp_path / NAMES[1] / "wsae.json").rename(tmp_path / "elsewhere.json")
    fails("--keep stores what was measured on held-out text", *asked, 3000, "--keep")
    words[words.index("all")] = "heldout"
    fails("was not saved by this package", *asked, 1500, "--keep")
    (tmp_path / NAMES[1] / "wsae.json").symlink_to(tmp_path / "elsewhere.json")
    fails("wsae.json is only a link", *asked, 1500, "--keep")


def test_a_measurement_replaces_its_own_group_only(world, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(world / "trained" / NAMES[0], folder)
    keep_measurements(folder, {"fidelity": {"fvu": 0.5}})
    keep_measurements(folder, {"monosemanticity": {"purity": 0.7}})
    keep_measurements(folder, {"fidelity": {"kl": 0.1}})
    metrics = Dictionary.load(folder).info.metrics
    assert metrics["fidelity"] == {"kl": 0.1} and metrics["monosemanticity"] == {"purity": 0.7}
    assert (
        metrics["training"]
        == Dictionary.load(world / "trained" / NAMES[0]).info.metrics["training"]
    )
    with pytest.raises(UsageError, match="was not saved by this package"):
        keep_measurements(tmp_path, {"fidelity": {}})
    assert Dictionary.load(folder).info.metrics == metrics
