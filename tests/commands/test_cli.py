"""Every command on a tiny model and real files: its options, what it prints, what it leaves, what a
second call does. Bad input is in test_bad_input.py.

The options are a promise: scripts depend on them. ``flags.txt`` lists them in the order of the
help. After a deliberate change, write it again:
``PYTHONPATH=tests/helpers python tests/commands/test_cli.py > tests/commands/flags.txt``.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command_line import HARVEST, PAIR, SITE, TRAIN, call, cases, content, harvest_more, works
from foreign_folders import WRITERS, place
from matplotlib.image import imread
from refusals import misused
from safetensors.torch import load_file, save_file

from llm_wsae.cli import COMMANDS, _explained, options_of, parse
from llm_wsae.commands.making import page_command
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import names_of
from llm_wsae.evaluation.baselines import HALF_RANDOM
from llm_wsae.model.site import Site
from llm_wsae.pipeline import run as pipeline
from llm_wsae.pipeline.request import ModelConfig, Run, TextConfig
from llm_wsae.training import trainer

RUN = ("--site", SITE, "--tokens", 5000, "--harvest.context-size", 16, "--k", 4,
       "--eval-tokens", 500)  # fmt: skip
HALF_RANDOM_OF_RUN = [f"uniform-{architecture}-k4" for architecture in HALF_RANDOM]


@pytest.fixture(scope="module")
def ran(model_and_corpus, tmp_path_factory):
    """A whole run, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, works("run", *model_and_corpus, *RUN, "--out", out)


def is_figure(path: Path) -> bool:
    return min(imread(path).shape[:2]) > 200


def check_record(path: Path, command: str, **config) -> None:
    record = json.loads(path.read_text())
    assert record["command"] == command and config.items() <= record["config"].items()
    assert record["versions"]["torch"] == version("torch")


def flags() -> str:
    blocks = [[name, *(f"  {flag}" for flag in options_of(name))] for name in COMMANDS]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def test_options_are_those_that_were_promised():
    assert flags() == Path(__file__).with_name("flags.txt").read_text()
    run = f"--model m --corpus c --site {SITE} "
    study = f"store {run}--out o "
    for name, given, short, long in (
        ("run", run, "--tokens 7777 --eval-tokens 8", "--harvest.tokens 7777 --evaluate.tokens 8"),
        ("study", study, "--eval-tokens 88", "--evaluate.tokens 88"),
    ):
        one, other, plain = (parse(name, (given + more).split()).args for more in (short, long, ""))
        assert one == other != plain


def test_help_names_every_command_and_the_version():
    assert call("--version").out == f"llm-wsae {version('llm-wsae')}\n"
    for words in (["--help"], ["-h"]):
        result = call(*words)
        assert result.code == 0 and result.err == ""
        for name, command in COMMANDS.items():
            assert f"  {name:<10}{command.__doc__.splitlines()[0]}" in result.out
    nothing = call()
    assert (nothing.code, nothing.out) == (2, "") and nothing.err.startswith("usage: llm-wsae")


def test_help_shows_what_everybody_needs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in COMMANDS:
        found, every = works(name, "--help").out, works(name, "--help-all").out
        assert len(found.splitlines()) <= 60 and "(default: )" not in found + every
        example = re.search(r"example:\n((?:.*\\\n)*.*)", found)[1].replace("\\\n", " ")
        program, command, *words = shlex.split(example)
        assert (program, command) == ("llm-wsae", name) and parse(name, words)
        missing = re.search(r"missing (.*?);", call(name).err)
        for option in missing[1].split(", ") if missing else ():
            assert f"\n  {option}" in found
        options = re.findall(r"^  (\S+)", found[found.index("options:") :], re.MULTILINE)
        assert {one for one in options if one[0] == "-"} <= {*options_of(name)}
        assert found.endswith(f" options: llm-wsae {name} --help-all\n")


def test_shells_complete_commands_and_options():
    script = call("--completion", "bash").out
    for words, wanted in (("ru", "run"), ("run --si", "--site"), ("pull --re", "--revision")):
        typed = f"COMP_WORDS=(llm-wsae {words}); COMP_CWORD={len(words.split())}; _llm_wsae"
        shell = ["bash", "-c", f"{script}\n{typed}; echo ${{COMPREPLY[@]}}"]
        assert subprocess.check_output(shell, text=True) == f"{wanted}\n"
    assert call("--completion", "zsh").out.endswith(script)
    assert "--completion takes the name of a shell" in call("--completion", "fish").err


def test_a_device_without_memory_is_one_sentence():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs.")
    for error in (full, RuntimeError("can't allocate memory: you tried 9 GiB"), MemoryError()):
        said = str(_explained(error))
        assert said.startswith("the device ran out of memory (") and "\n" not in said
    assert _explained(RuntimeError("shapes differ")) is None


def test_dictionaries_are_named_for_their_folders_however_these_are_given(tmp_path, monkeypatch):
    for name in ("one/plain/inner", "two/plain"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "two/plain")
    monkeypatch.chdir(tmp_path / "one/plain/inner")
    here, above, link, other = Path("."), Path(".."), tmp_path / "latest", tmp_path / "two/plain"
    assert names_of((here, above, link)) == {"inner": here, "plain": above, "latest": link}
    assert names_of((above, other, above)) == {"..": above, str(other): other}
    misused("name at least one dictionary folder", names_of, ())


def test_harvest(made_world, model_and_corpus, tmp_path):
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
    asked = {"model": "model", "corpus": str(made_world / "text.jsonl"), "part": "train"}
    check_record(out / "harvest.json", "harvest", **asked, tokens=5000, dtype="float32")
    again = works(*words)
    assert f"{out} is already complete" in again.err and "harvest:" not in again.err
    assert f"{rows:,} rows of 16 dimensions at each site in {out}" in again.out
    assert content(out) == content(made_world / "store")  # the same command gives the same bytes


def test_several_stores_are_trained_on_as_one(made_world, model_and_corpus, tmp_path):
    more, stores = tmp_path / "more", (made_world / "store", tmp_path / "more")
    harvest_more(made_world, more)
    works("train", *stores, *TRAIN, "--k", 4, "--out", tmp_path / "trained")
    info = Dictionary.load(tmp_path / "trained/uniform-k4").info
    assert info.corpus["name"] == "text.jsonl+more.jsonl"
    weights = tmp_path / "weights.safetensors"
    weigh = ("weigh", *stores, "--site", SITE, *model_and_corpus[:2], "--rule", "sensitivity",
             "--sensitivity-tokens", 200, "--out", weights)  # fmt: skip
    dtype = ActivationStore.open(more).manifest.model["dtype"]  # which is the default
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    wrong = call(*weigh, "--model-dtype", other)
    assert wrong.code == 1 and f"load it with --model-dtype {dtype}" in wrong.err
    works(*weigh)
    check_record(weights.with_suffix(".json"), "weigh", stores=list(map(str, stores)))


def test_weigh(made_world, tmp_path):
    out = tmp_path / "weights.safetensors"
    words = ("weigh", made_world / "store", "--site", SITE, "--out", out, "--alpha", -0.5)
    facts = works(*words, "--json").json
    statistics = ActivationStore.open(made_world / "store").statistics(Site.parse(SITE))
    assert facts["rows"] == statistics.count and facts["dimensions"] == 16
    uniform, inverse = facts["weights"]
    assert (uniform["name"], inverse["name"]) == ("uniform", "variance-a-0.5")
    gamma = load_file(out)["gamma"].double()
    wanted = statistics.variance**-0.5
    torch.testing.assert_close(gamma / gamma.sum(), wanted / wanted.sum(), rtol=1e-5, atol=0)
    assert inverse["gamma_max"] == pytest.approx(float(gamma.max()))
    assert is_figure(tmp_path / "weights.png")
    check_record(tmp_path / "weights.json", "weigh", site=SITE, rule="variance", alpha=-0.5)
    again = works(*words)
    assert f"variance-a-0.5{inverse['effective_dimensions']:>25.1f}" in again.out
    assert again.out.endswith(f"weights  {out}\nfigure   {tmp_path / 'weights.png'}\n")


def test_train(made_world, tmp_path):
    own, out = torch.linspace(1, 2, 16), tmp_path / "trained"
    save_file({"anything": own}, tmp_path / "own.safetensors")
    words = ("train", made_world / "store", *TRAIN, "--rule", "uniform", "variance",
             "--alpha", 0.25, "--weights", tmp_path / "own.safetensors", "--k", 4,
             "--l1", 0.01, "--init-seeds", 0, 7, "--out", out)  # fmt: skip
    result = works(*words, "--json")
    weights = ("uniform", "variance-a0.25", "own")
    names = [
        f"{w}-{s}{seed}" for w in weights for s in ("k4", "relu-l0.01") for seed in ("", "-s7")
    ]
    assert sorted(result.json) == sorted(names)
    rows = ActivationStore.open(made_world / "store").num_rows
    for name, numbers in result.json.items():
        dictionary = Dictionary.load(out / name)
        assert dictionary.d_sae == 64 and str(dictionary.site) == SITE
        assert dictionary.info.training["num_steps"] == rows // 256
        assert 0 < numbers["fvu"] < 1.5 and 0 <= numbers["dead"] <= 1
        assert numbers["l0"] <= 4 if "-k4" in name else numbers["l0"] > 4
    gamma = Dictionary.load(out / "own-k4").extras["gamma"]
    torch.testing.assert_close(gamma / gamma[0], own, rtol=1e-5, atol=0)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == rows // 256 and sorted(log[-1]["arms"]) == sorted(names)
    assert log[-1]["arms"]["uniform-k4"]["fvu"] == result.json["uniform-k4"]["fvu"]
    check_record(out / "train.json", "train", k=[4], l1=[0.01], init_seeds=[0, 7], batch_size=256)
    before = content(out)
    again = works(*words)
    assert content(out) == before and again.err == ""  # no bar: nothing was trained
    fvu = result.json["own-k4-s7"]["fvu"]
    assert re.search(rf"^own-k4-s7 +{fvu:.4f} ", again.out, re.MULTILINE)


def test_verify(made_world, tmp_path):
    for folder in (made_world / "store", made_world / "trained/uniform-k4"):
        assert works("verify", folder).out == f"{folder} is intact\n"
    for layout in ("saelens-topk", "sparsify", "learning-BatchTopKSAE"):
        folder = place(tmp_path, layout)
        WRITERS[layout](folder)
        assert f"{folder} can be read, but there is no" in works("verify", folder).out
    nameless = tmp_path / "nameless"
    WRITERS["sparsify"](nameless)
    assert "does not say where it belongs" in call("verify", nameless).err
    works("verify", nameless, "--site", SITE)
    facts = {"folder": str(made_world / "store"), "ok": True, "without_digest": []}
    assert works("verify", made_world / "store", "--json").json == facts


def test_run_leaves_everything_in_one_folder(ran):
    out, result = ran
    here = out / SITE
    arms = ["uniform-k4", "variance-a0.5-k4", "whitening-a0.5-k4", *HALF_RANDOM_OF_RUN]
    names = {"profile.json", "profile.png", "report.json", "report.html", "log.jsonl"}
    assert {p.name for p in here.iterdir()} == {*names, *arms, "training.json", ".lock"}
    assert is_figure(here / "profile.png")
    assert f"report  {here / 'report.html'}; " in result.out
    report = json.loads((here / "report.json").read_text())
    assert list(report["dictionaries"]) == [*arms, "raw dimensions"]  # baselines come last
    for name, measured in report["dictionaries"].items():
        fvu = measured["fvu"]
        assert 0 < fvu < 1 and re.search(rf"^{name} +{fvu:.3f} ", result.out, re.MULTILINE)
        if name in arms:
            assert Dictionary.load(here / name).info.metrics["fidelity"]["fvu"] == fvu
    assert report["dictionaries"]["raw dimensions"]["l0"] <= 4
    assert list(report["from_plain"]) == ["variance-a0.5-k4", "whitening-a0.5-k4"]
    check_record(out / "run.json", "run", model="model", k=[4], alpha=[0.5])
    stages = re.findall(r"^\[(\d)/4\] (\w+)", result.err, re.MULTILINE)
    assert stages == [("1", "harvest"), ("2", "weigh"), ("3", "train"), ("4", "evaluate")]
    kept = Dictionary.load(here / "uniform-k4").info.metrics["baselines"]
    assert kept.keys() == {"raw dimensions", "frozen decoder", "frozen encoder"}
    for label, name in zip(HALF_RANDOM.values(), HALF_RANDOM_OF_RUN, strict=True):
        assert kept[label]["fidelity"]["kl"] == report["dictionaries"][name]["kl"]
    assert '"group":"half-random"' in (here / "report.html").read_text().replace(": ", ":")


def test_run_again_does_nothing_twice(ran, model_and_corpus):
    out, first = ran
    before = content(out)
    again = works("run", *model_and_corpus, *RUN, "--out", out, "--json")
    assert "already complete" in again.err and "train 5 dictionaries" not in again.err
    assert "harvest: " not in again.err.replace("harvest: 5,000 tokens", "")
    assert content(out) == before
    (site,) = again.json.values()
    assert list(site) == ["folder", "profile", "fidelity"]
    for name, numbers in site["fidelity"].items():
        assert f"{numbers['fvu']:.3f}" in first.out and name in first.out


def test_a_run_is_repeated_from_its_record(ran, model_and_corpus, made_world):
    asked = [str(word) for word in (*model_and_corpus, *RUN, "--out", "x")]
    again = ["--config", str(ran[0] / "run.json"), "--out", "x"]
    request = parse("run", asked).args[1]
    assert parse("run", [*again, *asked[:2]]).args[1] == request
    assert parse("plan", [*again, *asked[:2], "--tokens", "9000"]).args[1] == replace(
        request, harvest=replace(request.harvest, tokens=9000)
    )
    assert (
        "the record holds only the model's name, so say where it is with --model"
        in call("run", *again).err
    )
    store, trained = str(made_world / "store"), made_world / "trained/train.json"
    training = parse("train", ["--config", str(trained), "--out", "x", "--k=9"]).args[1]
    words = ["train", store, *map(str, TRAIN), *map(str, PAIR), "--lengths", "unit", "--k", "9"]
    assert training == parse("train", [*words[1:], "--out", "x"]).args[1]


def test_run_proposes_a_page_that_works(ran, tmp_path):
    lines = [line.strip() for line in ran[1].out.splitlines()]
    (look,) = (shlex.split(line)[1:] for line in lines if line.startswith("llm-wsae "))
    assert not [word for word in look if "frozen" in word]
    assert "open it in a browser" in works(*look, "--out", tmp_path / "page.html").out
    asked = Run(model=ModelConfig(model="x"), corpus=TextConfig(corpus="sotu"), site=(SITE,))
    for model, name in (("owner/name", "name"), ("./x/y.gguf", "y")):
        assert replace(asked, model=ModelConfig(model=model)).folder == Path("runs") / name
    names = ("uniform-k32", "variance-a0.5-k32", "whitening-k32")
    for d_sae, count, options in ((4608, 3, []), (16_384, 3, ["4", "4"]), (32_768, 2, ["3", "3"])):
        words = shlex.split(page_command(tmp_path, dict.fromkeys(names, d_sae), asked))
        assert words[2 : 2 + count] == [str(tmp_path / name) for name in names[:count]]
        assert words[2 + count] == "--store"
        given = [words[i + 1] for i, word in enumerate(words) if word in ("--top", "--bands")]
        assert given == options


def test_run_chooses_how_far_to_whiten(model_and_corpus, tmp_path, monkeypatch):
    def auto(name: str, *words, gain: float = -9.0, rows: int = 4096):
        for setting, value in (("TOKENS", 300), ("ROWS", rows)):
            monkeypatch.setattr(pipeline, f"TRIAL_{setting}", value)
        monkeypatch.setattr(pipeline, "LEAST_GAIN", gain)
        given = ("--architecture", "topk", "--out", tmp_path / name, "--alpha", "auto")
        return call("run", *model_and_corpus, *RUN, *given, *words)

    def arms(name: str) -> set[str]:
        return {path.parent.name for path in (tmp_path / name / SITE).glob("*/wsae.json")}

    result = auto("plain", "--rule", "whitening", gain=0.99, rows=9)  # a batch, at least
    assert "none is worth it" in result.err and arms("plain") == {"uniform-k4"}
    here, asked = tmp_path / "out" / SITE, ("out", "--alpha", "auto", 0.5)
    result = auto(*asked)
    choice = json.loads((here / "alpha.json").read_text())
    assert list(choice["kl"]) == ["0", "0.25", "0.5", "0.75", "1"] and choice["rows"] == 4096
    best = min(choice["kl"], key=choice["kl"].get)
    whitened = set() if best == "0" else {f"whitening-a{best}-k4"}
    assert choice["alpha"] == (None if best == "0" else float(best))
    assert f"chosen: {best}" in result.err or best == "0"
    assert arms("out") == {"uniform-k4", "variance-a0.5-k4"} | whitened
    assert not (here / ".alpha").exists() and "train 5 dictionaries" in result.err
    before = content(here)
    for other, said in (
        (("--train.learning-rate", 0.01), "choice of an exponent in"),
        (("--place", "space"), 'has other settings (weights place: "loss" in the saved choice'),
    ):
        refused = auto(*asked, *other)
        assert refused.code == 1 and said in refused.err
    again = auto(*asked)
    assert again.code == 0 and "train 5 dictionaries" not in again.err and content(here) == before
    (here / "alpha.json").write_text("{}")
    again = auto(*asked)
    assert again.code == 1 and "alpha.json is damaged: its checksum does not" in again.err


REFUSED = """
RUN --out begun --tokens 9000
    on 5,008 tokens; choose another folder for more
RUN --out chosen --tokens 9000
    holds a training of blocks
RUN --out begun --stream
    a training of blocks.1.hook_resid_post on a store; omit --stream to resume it
RUN --alpha auto
    the rule 'variance' needs an alpha that is a number
RUN --alpha auto 1 --rule variance
    whitening, which is not among the rules
RUN --alpha
    the rule 'variance' needs an alpha that is a number
RUN --rule
    there is nothing to train
RUN --init-seeds
    there is nothing to train
RUN --tokens 2000
    2,000 tokens are less than one batch of 2,048
RUN --k
    there is nothing to train
RUN --harvest.context-size 2
    no prediction can be scored
"""


def test_run_refuses_before_the_harvest_what_cannot_be(
    ran, model_and_corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ran[0], tmp_path / "begun")
    shutil.copytree(ran[0], tmp_path / "chosen")  # a choice of α counts as much
    (tmp_path / "chosen" / SITE / "training.json").unlink()
    (tmp_path / "chosen" / SITE / "alpha.json").touch()
    before = content(tmp_path / "begun" / SITE)
    asked = ["run", *model_and_corpus, *RUN, "--out", "x"]
    for words, (said,) in cases(REFUSED, RUN=asked):
        refused = call(*words)
        assert refused.code == 2 and said in refused.err and "harvest:" not in refused.err
    other = call(*asked, "--rule", "kurtosis", "--out", "begun")
    assert other.code == 1 and "has other settings (" in other.err
    assert content(tmp_path / "begun" / SITE) == before and not (tmp_path / "x").exists()


def test_a_training_that_is_interrupted_goes_on(made_world, tmp_path, monkeypatch):
    """Ctrl-C ends it with the exit code that shells know."""
    factor, out = trainer.learning_rate_factor, tmp_path / "out"
    words = ("train", made_world / "store", *TRAIN, *PAIR, "--k", 4, "--lengths", "unit",
             "--out", out)  # fmt: skip

    def interrupted(step, *schedule):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return factor(step, *schedule)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate_factor", interrupted)
        result = call(*words)
    assert (result.code, result.out) == (130, "") and "Traceback" not in result.err
    assert re.search("llm-wsae: stopped after step 4 of .*run the same command", result.err)
    works(*words)
    for name in ("uniform-k4", "variance-a0.5-k4"):
        assert content(out / name) == content(made_world / "trained" / name)


if __name__ == "__main__":
    print(flags(), end="")
