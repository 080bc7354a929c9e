"""Training and whole runs without a store, over several sites, and in several processes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from command_line import SITE, STREAM, call, content, works
from several import run as in_several
from tiny import write_jsonl

from llm_wsae.artifact.files import load_tensors, read_own_json
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.pipeline import planning
from llm_wsae.pipeline import run as pipeline
from llm_wsae.training.checkpoint import CHECKPOINT, training_in

SITES = ("blocks.0.hook_resid_post", SITE)
STORED = ("--harvest.context-size", 16, "--tokens", 2000, "--k", 4, "--eval-tokens", 300,
          "--rule", "uniform", "whitening", "--architecture", "topk",
          "--train.batch-size", 256, "--train.dtype", "float32")  # fmt: skip
RUN = (*STORED, "--stream", "--buffer-tokens", 2048, "--statistics-tokens", 2048)
NAMES = ("uniform-k4", "whitening-a0.5-k4")


def draw_nothing():
    """Figures take longer than runs as small as these."""
    pipeline.plot_profile = lambda *given: given[-1].touch()


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    drawn = pipeline.plot_profile
    draw_nothing()
    yield
    pipeline.plot_profile = drawn


@pytest.fixture(scope="module")
def asked(model_and_corpus):
    """A run without a store, but for its sites and folder."""
    return ("run", *model_and_corpus, *RUN, "--train.checkpoint-seconds", 0)


@pytest.fixture(scope="module")
def ran(asked, tmp_path_factory):
    """It, of two sites, and what it printed."""
    out = tmp_path_factory.mktemp("one") / "out"
    return out, works(*asked, "--site", *SITES, "--out", out)


def check_same(found, expected, but=()):
    """Byte for byte, but for what holds times, and files named."""
    found, expected = content(found), content(expected)
    assert found.keys() == expected.keys()
    different = {Path(name).name for name in found if found[name] != expected[name]}
    assert different <= {"log.jsonl", "training.json", "run.json", "train.json", *but}, different


def test_several_sites_of_a_stream(model_and_corpus, tmp_path):
    """Each as if it were alone, on a model that is spread as on one that is not."""
    given = ("train", *model_and_corpus, *STREAM)
    result = works(*given, "--site", *SITES, "--out", tmp_path / "both", "--json")
    names = {"uniform-k4", "sensitivity-a0.5-k4"}
    assert {site: {*found} for site, found in result.json.items()} == dict.fromkeys(SITES, names)
    works(*given, "--site", SITE, "--device", "spread", "--out", tmp_path / "alone")
    for name in names:
        both = Dictionary.load(tmp_path / "both" / SITE / name)
        assert both.W_dec.equal(Dictionary.load(tmp_path / "alone" / name).W_dec)
        assert str(both.site) == SITE
    shutil.copytree(tmp_path / "both", tmp_path / "kept")
    again = works(*given, "--site", *SITES, "--out", tmp_path / "both")
    assert "statistics" not in again.err and again.out.count("train FVU") == 2
    check_same(tmp_path / "both", tmp_path / "kept")


def test_a_run_without_a_store(ran, asked, model_and_corpus):
    out, result = ran
    assert not (out / "store").exists()
    for site in SITES:
        report = json.loads((out / site / "report.json").read_text())
        assert [*report["dictionaries"]] == [*NAMES, "raw dimensions"]
        assert (out / site / "report.html").exists()
        assert Dictionary.load(out / site / "uniform-k4").info.store["kind"] == "stream"
    harvest, page = (line.strip() for line in result.out.splitlines()[-2:])
    assert harvest.endswith("--context-size 16")  # as trained on
    assert harvest.startswith("llm-wsae harvest") and page.startswith("llm-wsae dashboard")
    assert works("verify", out).out == f"{out} is intact\n"
    before = content(out)
    training = training_in(out / SITES[0])
    record = training.read()
    for record.complete in (False, True):  # it is left as it was
        training.write(record)
        refused = call("run", *model_and_corpus, *STORED, "--site", *SITES, "--out", out)
        assert refused.code == 2 and "harvest:" not in refused.err
        assert f"training of {SITES[0]} on a stream; add --stream to resume it" in refused.err
    assert content(out) == before
    again = works(*asked, "--site", *SITES, "--out", out)
    assert "statistics:" not in again.err and "train 4" not in again.err


def test_a_run_of_several_sites_leaves_the_files_of_a_run_of_each(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "TRIAL_TOKENS", 300)
    monkeypatch.setattr(pipeline, "TRIAL_ROWS", 512)
    works(*asked, "--alpha", "auto", "--site", *SITES, "--out", tmp_path / "both")
    works(*asked, "--alpha", "auto", "--site", SITE, "--out", tmp_path / "alone")
    but = ["report.html"]  # of the first site, it names the page
    check_same(tmp_path / "both" / SITE, tmp_path / "alone" / SITE, but)


def test_a_site_that_cannot_be_evaluated_does_not_cost_the_others_their_reports(
    ran, asked, tmp_path, monkeypatch
):
    out, measure = shutil.copytree(ran[0], tmp_path / "out"), FidelityEvaluator.evaluate_sites
    for name in ("report.json", "report.html"):
        for site in SITES:
            (out / site / name).unlink()

    def broken(evaluator, dictionaries):
        first, second = dictionaries
        yield from measure(evaluator, {second: dictionaries[second]})
        raise LlmWsaeError(f"activations of the model at {first} are NaN")

    monkeypatch.setattr(FidelityEvaluator, "evaluate_sites", broken)
    failed = call(*asked, "--site", *SITES, "--out", out)
    assert failed.code == 1 and failed.err.endswith(f"at {SITES[0]} are NaN\n")
    assert (out / SITE / "report.html").exists()
    assert (out / SITE / "report.json").read_bytes() == (ran[0] / SITE / "report.json").read_bytes()
    assert not (out / SITES[0] / "report.json").exists()


def test_a_folder_of_other_rows_is_refused_before_they_are_measured(
    ran, asked, model_and_corpus, tmp_path
):
    few = (*STREAM, "--tokens", 512, "--rule", "uniform", "--site", SITE)
    train = ("train", *model_and_corpus, *few, "--out", tmp_path / "t")
    works(*train)
    run = (*asked, "--site", *SITES, "--out", ran[0])
    for words, other in ((train, ("--context-size", 8)), (run, ("--harvest.context-size", 8))):
        before = content(words[-1])
        refused = call(*words, *other)
        assert refused.code == 1
        assert "rows packing context_size: 16 in the saved training, 8 in" in refused.err
        assert "statistics" not in refused.err and content(words[-1]) == before


# --- A run in several processes


def part(what, *words):
    """One process's part of a command; ``what`` is done to it first."""
    pipeline.TRIAL_TOKENS, pipeline.TRIAL_ROWS, planning.SECONDS = 300, 512, 0.01
    draw_nothing()
    if what is not None and os.environ["RANK"] == what[0]:
        what[1]()
    return call(*words)


def test_a_text_that_breaks_off_costs_no_step(model_and_corpus, tmp_path):
    """In several processes as in one, and each says how far it came."""
    text = write_jsonl(tmp_path / "broken.jsonl", [20] * 620)  # 512 of nine tenths are read ahead
    with text.open("a") as file:
        file.write("no document\n")
    words = ("train", *model_and_corpus[:2], "--corpus", text, *STREAM, "--rule", "uniform",
             "--tokens", 256 * 40, "--site", *SITES)  # fmt: skip
    reached = []
    for size in (1, 2):
        out = tmp_path / str(size)
        outcomes = in_several(size, part, None, *words, "--out", out)
        assert {outcome.code for outcome in outcomes} == {1}
        (said,) = (outcome.err for outcome in outcomes if "llm-wsae: " in outcome.err)
        found = re.search(r"line 621 is .*\(stopped after step (\d+) of 40, ", said)
        for site in SITES:
            _, metadata = load_tensors(out / site / CHECKPOINT, "checkpoint")
            reached.append(json.loads(metadata["llm_wsae"])["step"])
        assert found and int(found[1]) == reached[-1], said
    assert len(set(reached)) == 1 and 0 < reached[0] < 40


def check_said_once(outcomes, sites):
    """Rank 0 says and prints everything, the others nothing."""
    first, *others = outcomes
    assert all((other.code, other.out, other.err) == (0, "", "") for other in others), others
    assert first.code == 0, first.err
    assert first.err.count("\nin all ") == first.err.count("[4/4] evaluate: ") == 1
    assert first.err.count("[2/4] weigh: ") == first.out.count("CE recovered  share") == sites


def check_close(two, one, site, names):
    """The dictionaries of two processes and of one, and what was measured of them."""
    assert content(two).keys() == content(one).keys()
    reports = [json.loads((out / site / "report.json").read_text()) for out in (two, one)]
    for name in names:
        found, expected = (Dictionary.load(out / site / name) for out in (two, one))
        assert float((found.W_dec - expected.W_dec).abs().max()) < 1e-4, name
        fvus = [report["dictionaries"][name]["fvu"] for report in reports]
        assert fvus[0] == pytest.approx(fvus[1], rel=1e-3)
        assert found.info.metrics["fidelity"]["fvu"] == fvus[0]


@pytest.fixture(scope="module")
def unbroken(asked, tmp_path_factory):
    """The run in two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    check_said_once(in_several(2, part, None, *asked, "--site", *SITES, "--out", out), 2)
    return out


def test_a_run_in_several_processes_without_a_store(ran, unbroken):
    for site in SITES:
        check_close(unbroken, ran[0], site, NAMES)
    assert works("verify", unbroken).out == f"{unbroken} is intact\n"


def test_a_run_in_several_processes_with_a_store(model_and_corpus, tmp_path):
    """What weights need is measured once, and the exponent is chosen once."""
    words = ("run", *model_and_corpus, *STORED, "--rule", "uniform", "whitening", "sensitivity",
             "--alpha", "auto", 0.5, "--site", SITE)  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"
    outcomes = in_several(2, part, None, *words, "--out", two)
    check_said_once(outcomes, 1)
    for said in ("covariance:   0%", "sensitivity:   0%", "whitening, KL of short trainings"):
        assert outcomes[0].err.count(said) == 1, said
    (alone,) = in_several(1, part, None, *words, "--out", one)
    assert alone.code == 0
    choices = [read_own_json(out / SITE / "alpha.json", "choice") for out in (two, one)]
    assert choices[0]["alpha"] == choices[1]["alpha"]
    assert choices[0]["kl"] == pytest.approx(choices[1]["kl"], rel=1e-3)
    check_close(two, one, SITE, [path.parent.name for path in (one / SITE).glob("*/cfg.json")])


def fail(*given, **named):
    raise LlmWsaeError("the moon is full")


def plan_fails():
    pipeline.plan = fail


def evaluation_fails():
    FidelityEvaluator.evaluate_sites = fail


def test_what_fails_on_rank_0_ends_all_with_its_sentence(asked, tmp_path):
    words = (*asked, "--rule", "uniform", "--site", SITE, "--out", tmp_path / "out")
    for what in (plan_fails, evaluation_fails):
        assert not (tmp_path / "out").exists()
        outcomes = in_several(2, part, ("0", what), *words)
        assert [(outcome.code, outcome.out) for outcome in outcomes] == 2 * [(1, "")]
        said = "".join(outcome.err for outcome in outcomes)
        assert said.count("llm-wsae: the moon is full\n") == said.count("llm-wsae: ") == 1


def dies_before_the_evaluation():
    FidelityEvaluator.evaluate_sites = lambda *given: os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_of_several_processes_is_resumed(asked, unbroken, tmp_path):
    out = tmp_path / "out"
    words = (*asked, "--site", *SITES, "--out", out)
    killed, other = in_several(2, part, ("0", dies_before_the_evaluation), *words)
    assert killed is None
    assert other.code == 1 and "run the same command again to resume" in other.err
    outcomes = in_several(2, part, None, *words)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "\nin all " not in outcomes[0].err and "statistics:" not in outcomes[0].err
    check_same(out, unbroken)


def test_most_commands_run_in_one_process(made_world):
    outcomes = in_several(2, call, "evaluate", made_world / "trained/uniform-k4")
    assert [(outcome.code, outcome.out) for outcome in outcomes] == 2 * [(2, "")]
    assert "".join(outcome.err for outcome in outcomes) == (
        "llm-wsae: llm-wsae evaluate runs in one process, and only run, harvest and train in "
        "several; start it without torchrun\n"
    )
