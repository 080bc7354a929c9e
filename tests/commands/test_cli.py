"""Every command on a tiny model and real files: what it prints, what it leaves, what a second call
does. Bad input is in test_bad_input.py."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command_line import HARVEST, SITE, TRAIN, call, content, harvest_more, works
from foreign_folders import WRITERS, place
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

import llm_wsae.cli
import llm_wsae.pipeline.run
from llm_wsae.cli import COMMANDS
from llm_wsae.commands.making import page_command
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.baselines import HALF_RANDOM
from llm_wsae.model.site import Site
from llm_wsae.pipeline import site_weights
from llm_wsae.pipeline.request import ModelConfig, Run, TextConfig
from llm_wsae.training import trainer

RUN = ("--site", SITE, "--tokens", 5000, "--harvest.context-size", 16, "--k", 4,
       "--eval-tokens", 500)  # fmt: skip
HALF_RANDOM_OF_RUN = [f"uniform-{architecture}-k4" for architecture in HALF_RANDOM]


@pytest.fixture(scope="module")
def world(made_world):
    return made_world


@pytest.fixture(scope="module")
def model_and_corpus(world):
    return ("--model", world / "model", "--corpus", world / "text.jsonl")


@pytest.fixture(scope="module")
def ran(model_and_corpus, tmp_path_factory):
    """A whole run, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, works("run", *model_and_corpus, *RUN, "--out", out)


def is_figure(path: Path) -> bool:
    height, width, _ = imread(path).shape
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and min(height, width) > 200


def check_record(path: Path, command: str, **config) -> None:
    record = json.loads(path.read_text())
    assert record["command"] == command
    assert config.items() <= record["config"].items()
    assert record["versions"]["torch"] == version("torch")


def test_help_names_every_command_and_the_version():
    assert call("--version").out == f"llm-wsae {version('llm-wsae')}\n"
    for words in (["--help"], ["-h"]):
        result = call(*words)
        assert result.code == 0 and result.err == ""
        for name, command in COMMANDS.items():
            assert f"  {name:<10}{command.__doc__.splitlines()[0]}" in result.out
    nothing = call()
    assert (nothing.code, nothing.out) == (2, "") and nothing.err.startswith("usage: llm-wsae")


def test_a_device_without_memory_is_one_sentence(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs.")

    monkeypatch.setattr(llm_wsae.cli, "parse", lambda *_: full)
    result = call("list", "user/saes")
    assert (result.code, result.out) == (1, "") and len(result.err.splitlines()) == 1
    assert "ran out of memory (CUDA out of memory. Tried to allocate 2 GiB.)" in result.err


def test_harvest(world, model_and_corpus, tmp_path):
    out = tmp_path / "store"
    words = ("harvest", *model_and_corpus, *HARVEST, "--out", out, "--dtype", "float32")
    result = works(*words, "--json")
    tokens = [load_file(path) for path in sorted((out / "tokens").iterdir())]
    assert len(tokens) == 5 and sum(len(t["ids"]) for t in tokens) == 313  # 5000 / 16, rounded up
    rows = sum(int((t["ids"][:, 1:] < 50).sum()) for t in tokens)  # special tokens give none
    size = ActivationStore.open(out).text_size()
    documents = {"documents": size.documents, "effective_documents": size.effective}
    facts = {"store": str(out), "rows": rows, "d_in": 16, "massive": {SITE: 0}}
    assert result.json == facts | documents
    assert "harvest: 100%" in result.err and "loading" in result.err
    check_record(
        out / "harvest.json",
        "harvest",
        model="model",
        corpus=str(world / "text.jsonl"),
        part="train",
        tokens=5000,
        dtype="float32",
    )
    assert content(out) == content(world / "store")  # the same command gives the same bytes

    again = works(*words)
    assert f"{out} is already complete" in again.err and "harvest:" not in again.err
    assert f"{rows:,} rows of 16 dimensions at each site in {out}" in again.out
    assert content(out) == content(world / "store")


def test_several_stores_are_trained_on_as_one(world, model_and_corpus, tmp_path):
    more, stores = tmp_path / "more", (world / "store", tmp_path / "more")
    harvest_more(world, more)
    works("train", *stores, *TRAIN, "--k", 4, "--out", tmp_path / "trained")
    info = Dictionary.load(tmp_path / "trained/uniform-k4").info
    assert info.corpus["name"] == "text.jsonl+more.jsonl"
    weights = tmp_path / "weights.safetensors"
    works("weigh", *stores, "--site", SITE, "--model", world / "model", "--rule", "sensitivity",
          "--out", weights)  # fmt: skip
    check_record(weights.with_suffix(".json"), "weigh", stores=list(map(str, stores)))
    heldout = tmp_path / "heldout"
    works("harvest", *model_and_corpus, *HARVEST, "--dtype", "float32", "--tokens", 1000,
          "--part", "heldout", "--out", heldout)  # fmt: skip
    refused = call("train", more, heldout, *TRAIN, "--k", 4, "--out", tmp_path / "both")
    assert refused.code == 1 and not (tmp_path / "both").exists()
    assert f"{heldout} does not fit {more} (" in refused.err
    assert 'part: "train" in the first store, "heldout" in this one' in refused.err


def test_weigh(world, tmp_path):
    out = tmp_path / "weights.safetensors"
    words = ("weigh", world / "store", "--site", SITE, "--out", out, "--alpha", -0.5)
    result = works(*words, "--json")
    facts = result.json
    statistics = ActivationStore.open(world / "store").statistics(Site.parse(SITE))
    assert facts["rows"] == statistics.count and facts["dimensions"] == 16
    uniform, inverse = facts["weights"]
    assert (uniform["name"], inverse["name"]) == ("uniform", "variance-a-0.5")
    gamma = load_file(out)["gamma"].double()
    wanted = statistics.variance**-0.5
    torch.testing.assert_close(gamma / gamma.sum(), wanted / wanted.sum(), rtol=1e-5, atol=0)
    assert inverse["gamma_max"] == pytest.approx(float(gamma.max()))
    share = gamma**2 * statistics.robust_variance
    effective = float(share.sum() ** 2 / (share**2).sum())
    assert inverse["effective_dimensions"] == pytest.approx(effective)
    assert is_figure(tmp_path / "weights.png")
    check_record(tmp_path / "weights.json", "weigh", site=SITE, rule="variance", alpha=-0.5)
    again = works(*words)
    assert f"variance-a-0.5{effective:>25.1f}" in again.out
    assert again.out.endswith(f"weights  {out}\nfigure   {tmp_path / 'weights.png'}\n")


def test_a_store_remembers_the_number_format_of_its_model(world, model_and_corpus, tmp_path):
    """Another machine may choose another one by itself."""
    for dtype in ("float32", "bfloat16"):
        store = tmp_path / dtype
        works("harvest", *model_and_corpus, *HARVEST, "--model-dtype", dtype, "--out", store)
        assert ActivationStore.open(store).manifest.model["dtype"] == dtype
        words = ("weigh", store, "--site", SITE, "--rule", "sensitivity", "--form", "diagonal",
                 "--model", world / "model", "--sensitivity-tokens", 200)  # fmt: skip
        other = "float32" if dtype == "bfloat16" else "bfloat16"
        wrong = call(*words, "--model-dtype", other, "--out", tmp_path / "w.safetensors")
        assert wrong.code == 1 and f"load it with --model-dtype {dtype}" in wrong.err
        works(*words, "--out", tmp_path / f"{dtype}.safetensors")


def test_train(world, tmp_path):
    own = torch.linspace(1, 2, 16)
    save_file({"anything": own}, tmp_path / "own.safetensors")
    out = tmp_path / "trained"
    words = ("train", world / "store", *TRAIN, "--rule", "uniform", "variance",
             "--alpha", 0.25, "--weights", tmp_path / "own.safetensors", "--k", 4,
             "--l1", 0.01, "--init-seeds", 0, 7, "--out", out)  # fmt: skip
    result = works(*words, "--json")
    weights = ("uniform", "variance-a0.25", "own")
    names = [
        f"{w}-{s}{seed}" for w in weights for s in ("k4", "relu-l0.01") for seed in ("", "-s7")
    ]
    assert sorted(result.json) == sorted(names)
    rows = ActivationStore.open(world / "store").num_rows
    for name, numbers in result.json.items():
        dictionary = Dictionary.load(out / name)
        assert dictionary.d_sae == 64 and str(dictionary.site) == SITE
        assert dictionary.info.training["num_steps"] == rows // 256
        assert 0 < numbers["fvu"] < 1.5 and 0 <= numbers["dead"] <= 1
        assert numbers["l0"] <= 4 if "-k4" in name else numbers["l0"] > 4
    gamma = Dictionary.load(out / "own-k4").extras["gamma"]
    torch.testing.assert_close(gamma / gamma[0], own, rtol=1e-5, atol=0)
    made = tmp_path / "made.safetensors"
    works("weigh", world / "store", "--site", SITE, "--rule", "variance", "--out", made)
    wrong = call("train", world / "store", *TRAIN, "--k", 4, "--weights", made, "--place", "space",
                 "--out", tmp_path / "x")  # fmt: skip
    assert wrong.code == 2 and "the rule variance made for the place loss" in wrong.err
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == rows // 256 and sorted(log[-1]["arms"]) == sorted(names)
    assert log[-1]["arms"]["uniform-k4"]["fvu"] == result.json["uniform-k4"]["fvu"]
    check_record(out / "train.json", "train", k=[4], l1=[0.01], init_seeds=[0, 7], batch_size=256)

    before = content(out)
    again = works(*words)
    assert content(out) == before and again.err == ""  # no bar: nothing was trained
    fvu = result.json["own-k4-s7"]["fvu"]
    assert re.search(rf"^own-k4-s7 +{fvu:.4f} ", again.out, re.MULTILINE)


def test_train_makes_the_plain_dictionary_unless_told_otherwise(world, tmp_path, monkeypatch):
    """And Ctrl-C stops it with the exit code that shells know."""
    out, words = tmp_path / "trained", ("train", world / "store", *TRAIN, "--k", 4)
    factor = trainer.learning_rate_factor

    def interrupted(step, *schedule):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return factor(step, *schedule)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate_factor", interrupted)
        result = call(*words, "--out", out)
    assert (result.code, result.out) == (130, "")
    assert re.search("llm-wsae: stopped after step 4 of .*run the same command", result.err)
    assert list(works(*words, "--out", out, "--json").json) == ["uniform-k4"]


def test_train_every_architecture(world, model_and_corpus, tmp_path):
    out, kinds = tmp_path / "trained", ("topk", "batch-topk", "matryoshka", "jumprelu")
    words = ("train", world / "store", *TRAIN, "--rule", "uniform", "--k", 4)
    result = works(*words, "--architecture", *kinds, "--out", out, "--json")
    names = ["uniform-k4", *(f"uniform-{kind}-k4" for kind in kinds[1:])]
    assert list(result.json) == names
    check_record(out / "train.json", "train", k=[4], architecture=list(kinds))
    written = [json.loads((out / name / "cfg.json").read_text())["architecture"] for name in names]
    assert written == ["topk", "jumprelu", "jumprelu", "jumprelu"]
    folders = [out / name for name in names]
    measured = works("evaluate", *folders, *model_and_corpus, "--tokens", 500,
                     "--out", tmp_path / "report.json", "--json").json["dictionaries"]  # fmt: skip
    for name in names:  # on other text
        assert measured[name]["l0"] == pytest.approx(result.json[name]["l0"], rel=0.2)
        assert measured[name]["fvu"] == pytest.approx(result.json[name]["fvu"], abs=0.1)
    assert measured["uniform-batch-topk-k4"]["l0"] == pytest.approx(4, rel=0.2)


def test_evaluate(world, model_and_corpus, tmp_path):
    out = tmp_path / "report.json"
    plain, weighted = world / "trained/uniform-k4", world / "trained/variance-a0.5-k4"
    words = ("evaluate", plain, weighted, *model_and_corpus, "--tokens", 500, "--out", out)
    result = works(*words, "--json")
    report = json.loads(out.read_text())
    assert result.json.items() <= report.items()
    assert report["command"] == "evaluate" and report["versions"]["torch"] == version("torch")
    rows = ["uniform-k4", "variance-a0.5-k4", "raw dimensions", "frozen random"]
    assert list(report["dictionaries"]) == rows
    measured = report["dictionaries"]["uniform-k4"]
    assert 500 <= measured["rows"] < 515 and 0 < measured["l0"] <= 4
    trained = Dictionary.load(plain).info.metrics["training"]["fvu"]
    assert measured["fvu"] == pytest.approx(trained, abs=0.1)  # the same text, other documents
    before = out.read_bytes()
    again = works(*words)
    assert out.read_bytes() == before
    assert re.search(rf"^uniform-k4 +{measured['fvu']:.3f} ", again.out, re.MULTILINE)
    assert again.out.endswith(f"report  {out}\n")


def test_verify(world):
    for folder, kind in ((world / "store", "store"), (world / "trained/uniform-k4", "dictionary")):
        assert works("verify", folder).out == f"{folder}: {kind} is intact\n"
        result = works("--json", "verify", folder)
        assert result.json == {
            "folder": str(folder), "kind": kind, "ok": True, "without_digest": []
        }  # fmt: skip


def test_verify_knows_every_layout_that_is_read(tmp_path):
    for layout in ("saelens-topk", "sparsify", "learning-BatchTopKSAE"):
        folder = place(tmp_path, layout)
        WRITERS[layout](folder)
        assert f"{folder}: dictionary can be read, but there is no" in works("verify", folder).out
    nameless = tmp_path / "nameless"
    WRITERS["sparsify"](nameless)
    assert "does not say where it belongs" in call("verify", nameless).err
    works("verify", nameless, "--site", SITE)


def test_run_leaves_everything_in_one_folder(ran):
    out, result = ran
    here = out / SITE
    arms = ["uniform-k4", "variance-a0.5-k4", "whitening-a0.5-k4", *HALF_RANDOM_OF_RUN]
    names = {"profile.json", "profile.png", "report.json", "report.html", "fidelity.png"}
    names |= {"log.jsonl"}
    assert {p.name for p in here.iterdir()} == {*names, *arms, "training.json", ".lock"}
    assert is_figure(here / "profile.png") and is_figure(here / "fidelity.png")
    report = json.loads((here / "report.json").read_text())["dictionaries"]
    for name in arms:
        metrics = Dictionary.load(here / name).info.metrics
        assert metrics["fidelity"]["fvu"] == report[name]["fvu"] < 1
        assert re.search(rf"^{name} +{report[name]['fvu']:.3f} ", result.out, re.MULTILINE)
        assert str(here / name) in result.out
    check_record(out / "run.json", "run", model="model", k=[4], alpha=[0.5])
    stages = re.findall(r"^\[(\d)/4\] (\w+)", result.err, re.MULTILINE)
    assert stages == [("1", "harvest"), ("2", "weigh"), ("3", "train"), ("4", "evaluate")]
    for name in names:
        assert str(here / name) in result.out


def test_run_shows_baselines_beside_its_dictionaries(ran):
    out, result = ran
    report = json.loads((out / SITE / "report.json").read_text())
    assert list(report["dictionaries"])[-3:] == [*HALF_RANDOM_OF_RUN, "raw dimensions"]
    raw = report["dictionaries"]["raw dimensions"]
    assert raw["l0"] <= 4 and 0 < raw["fvu"] < 1
    assert re.search(rf"^raw dimensions +{raw['fvu']:.3f} ", result.out, re.MULTILINE)
    assert list(report["from_plain"]) == ["variance-a0.5-k4", "whitening-a0.5-k4"]
    kept = Dictionary.load(out / SITE / "uniform-k4").info.metrics["baselines"]
    assert kept.keys() == {"raw dimensions", "frozen decoder", "frozen encoder"}
    for label, name in zip(HALF_RANDOM.values(), HALF_RANDOM_OF_RUN, strict=True):
        assert kept[label]["fidelity"]["kl"] == report["dictionaries"][name]["kl"]
    assert '"group":"half-random"' in (out / SITE / "report.html").read_text().replace(": ", ":")
    look = result.out.splitlines()[-1]
    assert "variance-a0.5-k4" in look and "frozen" not in look


def test_run_has_a_folder_for_every_model():
    for model, name in (("owner/name", "name"), ("./x/y.gguf", "y")):
        model, text = ModelConfig(model=model), TextConfig(corpus="sotu")
        assert Run(model=model, corpus=text, site=(SITE,)).folder == Path("runs") / name


def test_run_proposes_commands_that_work(ran, tmp_path):
    _, result = ran
    lines = [line.strip() for line in result.out.splitlines()]
    measure, look = (shlex.split(line)[1:] for line in lines if line.startswith("llm-wsae "))
    measure[measure.index("--tokens") + 1] = "100"
    measure[measure.index("--out") + 1] = str(tmp_path / "report.json")
    assert "uniform-k4" in works(*measure).out
    look[look.index("--out") + 1] = str(tmp_path / "page.html")
    assert "open it in a browser" in works(*look).out


def test_the_page_that_run_proposes_has_room_for_its_dictionaries(tmp_path):
    model, names = (
        ModelConfig(model="a/model"),
        ("uniform-k32", "variance-a0.5-k32", "whitening-k32"),
    )
    text = TextConfig(corpus="sotu")
    request = Run(model=model, corpus=text, site=(SITE,), out=tmp_path)
    for d_sae, count, options in ((4608, 3, []), (16_384, 3, ["4", "4"]), (32_768, 2, ["3", "3"])):
        words = shlex.split(page_command(tmp_path, dict.fromkeys(names, d_sae), request))
        assert words[2 : 2 + count] == [str(tmp_path / name) for name in names[:count]]
        assert words[2 + count] == "--store"
        given = [words[i + 1] for i, word in enumerate(words) if word in ("--top", "--bands")]
        assert given == options


def test_run_again_does_nothing_twice(ran, model_and_corpus):
    out, first = ran
    before = content(out)
    again = works("run", *model_and_corpus, *RUN, "--out", out, "--json")
    assert "already complete" in again.err
    assert "harvest: " not in again.err.replace("harvest: 5,000 tokens", "")
    assert "train 3 arms" not in again.err
    after = content(out)
    assert after == before
    (site,) = again.json.values()
    assert list(site) == ["folder", "profile", "fidelity"]
    for name, numbers in site["fidelity"].items():
        assert f"{numbers['fvu']:.3f}" in first.out and name in first.out


@pytest.fixture
def short_trials(monkeypatch):
    """Sets how much a trial must gain."""
    monkeypatch.setattr(llm_wsae.pipeline.run, "TRIAL_TOKENS", 300)

    def of(gain: float, rows: int = 4096) -> None:
        monkeypatch.setattr(site_weights, "LEAST_GAIN", gain)
        monkeypatch.setattr(site_weights, "TRIAL_ROWS", rows)

    return of


def test_run_trains_the_plain_dictionary_if_whitening_alone_is_not_worth_it(
    model_and_corpus, tmp_path, short_trials
):
    short_trials(0.99, rows=9)  # less than a batch: it is one then
    asked = (*model_and_corpus, *RUN, "--rule", "whitening", "--alpha", "auto")
    works("run", *asked, "--out", tmp_path / "out")
    arms = {path.parent.name for path in (tmp_path / "out" / SITE).glob("*/wsae.json")}
    assert arms == {"uniform-k4", *HALF_RANDOM_OF_RUN}


@pytest.mark.parametrize("gain", [-9.0, 0.99])
def test_run_chooses_how_far_to_whiten_or_that_it_is_not_worth_it(
    model_and_corpus, tmp_path, short_trials, gain
):
    short_trials(gain)
    asked = (*model_and_corpus, *RUN, "--alpha", "auto", 0.5, "--out", tmp_path / "out")
    here = tmp_path / "out" / SITE
    result = works("run", *asked)
    choice = json.loads((here / "alpha.json").read_text())["choice"]
    assert list(choice["kl"]) == ["0", "0.25", "0.5", "0.75", "1"] and choice["rows"] == 4096
    best = min(choice["kl"], key=choice["kl"].get)
    if gain > 0 or best == "0":
        assert choice["alpha"] is None and "none is worth it" in result.err
    else:
        assert choice["alpha"] == float(best) and f"chosen: {best}" in result.err
    arms = {path.parent.name for path in here.glob("*/wsae.json")}
    whitened = set() if choice["alpha"] is None else {f"whitening-a{best}-k4"}
    assert arms == {"uniform-k4", "variance-a0.5-k4", *HALF_RANDOM_OF_RUN} | whitened
    assert not (here / ".alpha").exists()
    before = content(tmp_path / "out")
    assert "train 5 arms" in result.err and "train 5 arms" not in works("run", *asked).err
    assert content(tmp_path / "out") == before
    other = call("run", *asked, "--train.learning-rate", 0.01)
    assert other.code == 1 and "was chosen for other rows or settings" in other.err
    other = call("run", *asked, "--place", "space")
    assert other.code == 1 and 'weights place: "loss" in that choice' in other.err
    assert content(tmp_path / "out") == before
    (here / "alpha.json").write_text("{}")
    again = call("run", *asked)
    assert again.code == 1 and "checksum does not match; delete it to choose again" in again.err


def test_run_refuses_before_the_harvest_what_cannot_be(ran, model_and_corpus, tmp_path):
    out, _ = ran
    before = content(out)
    more = call("run", *model_and_corpus, *RUN, "--tokens", 9000, "--out", out)
    assert more.code == 2 and "on 5,008 tokens; choose another folder for more" in more.err
    assert content(out) == before and "harvest" not in more.err
    other = call("run", *model_and_corpus, *RUN, "--stream", "--out", out)
    assert other.code == 2 and content(out) == before
    assert f"a training of {SITE} on a store; omit --stream to resume it" in other.err
    begun = tmp_path / "begun"
    shutil.copytree(out, begun)  # a choice of α counts as much
    (begun / SITE / "training.json").unlink()
    (begun / SITE / "alpha.json").touch()
    more = call("run", *model_and_corpus, *RUN, "--tokens", 9000, "--out", begun)
    assert more.code == 2 and "holds a training of blocks" in more.err
    for words, said in {
        ("--alpha", "auto"): "the rule 'variance' needs an alpha that is a number",
        ("--alpha", "auto", 1, "--rule", "variance"): "whitening, which is not among the rules",
        ("--alpha",): "the rule 'variance' needs an alpha that is a number",
        ("--rule",): "there is nothing to train",
        ("--k",): "there is nothing to train",
        ("--init-seeds",): "there is nothing to train",
    }.items():
        wrong = call("run", *model_and_corpus, *RUN, *words, "--out", tmp_path / "x")
        assert wrong.code == 2 and said in wrong.err
    short = call(
        "run", *model_and_corpus, *RUN, "--harvest.context-size", 2, "--out", tmp_path / "x"
    )
    assert short.code == 2 and "no prediction can be scored" in short.err
    few = call("run", *model_and_corpus, *RUN, "--tokens", 2000, "--out", tmp_path / "x")
    assert few.code == 2 and "2,000 tokens are less than one batch of 2,048" in few.err
    assert not (tmp_path / "x").exists()


def test_run_goes_on_after_an_interruption(ran, model_and_corpus, tmp_path, monkeypatch):
    whole, _ = ran
    out = tmp_path / "out"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm_wsae.pipeline.run, "train_sites", interrupted)
        result = call("run", *model_and_corpus, *RUN, "--out", out)
    assert result.code == 130 and "run the same command again to resume" in result.err
    assert "Traceback" not in result.err
    works("run", *model_and_corpus, *RUN, "--out", out)
    for name in ("uniform-k4", "variance-a0.5-k4"):
        assert content(out / SITE / name) == content(whole / SITE / name)


def test_a_refused_run_leaves_what_the_folder_says_of_its_dictionaries(
    ran, model_and_corpus, tmp_path
):
    out = shutil.copytree(ran[0], tmp_path / "out")
    before = content(out / SITE)
    refused = call("run", *model_and_corpus, *RUN, "--rule", "kurtosis", "--out", out)
    assert refused.code == 1 and "has other settings (" in refused.err
    assert content(out / SITE) == before


def test_json_in_a_process_of_its_own(world):
    found = subprocess.run(
        [sys.executable, "-m", "llm_wsae", "verify", world / "store", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout)["ok"] is True and found.stdout.count("\n") == 1
