"""A complete study of a tiny model: what it leaves, how it resumes, what it refuses."""

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import SITE, call, content, works
from refusals import fails, misused
from tiny import save_encoder

from llm_wsae.artifact.files import read_own_json, write_json
from llm_wsae.commands.verifying import verify
from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import JumpReLU
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.evaluation.fidelity.evaluator import evaluate
from llm_wsae.lab import upstream
from llm_wsae.lab.config import PlantConfig, Study, StudyGrid, UpstreamConfig
from llm_wsae.lab.studies import runner
from llm_wsae.lab.studies.runner import baselines, items_of, over_latents, plan
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site
from llm_wsae.pipeline.request import ModelConfig, TextConfig
from llm_wsae.statistics.measures import STUDIED
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.config import TrainConfig
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.scoring import RuleInputs

GRID = StudyGrid(rule=("variance",), alpha=(-0.25,), k=(4,), seeds=(0, 1))
AFTER_FIRST = replace(GRID, rule=("participation",), alpha=(0.5,))
TRAIN = TrainConfig(expansion=4, batch_size=256, dtype="float32")
FIDELITY = EvaluateConfig(tokens=500, bootstraps=50)
SCORE = MonosemanticConfig(tokens=500, top=3, sample=3, probe_tokens=500, bootstraps=50)
PLANTS = PlantConfig(per_cell=1, strengths=(0.5, 1.0), rarest=0.01, commonest=0.05)
NAMES = [
    f"{weights}-k4{seed}"
    for seed, draw in (("", ""), ("-s1", "-d1"))
    for weights in ("uniform", "variance-a-0.25", f"permuted-variance-a-0.25{draw}")
]
FROZEN = [f"uniform-frozen-{half}-k4{s}" for s in ("", "-s1") for half in ("decoder", "encoder")]
RAW = "raw-dimensions-k4"
ALL = [*NAMES, *FROZEN, RAW]
LABELS = [f"topk baseline: {what}" for what in ("raw dimensions", "frozen decoder",
                                                "frozen encoder")]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def study(made_world, encoder):
    """Runs a study in a folder."""
    model, loaded = (
        LanguageModel.load(str(made_world / "model")),
        SentenceEncoder.load(str(encoder)),
    )
    request = Study(
        stores=(made_world / "store",),
        site=SITE,
        out=made_world,
        model=ModelConfig(model=str(made_world / "model")),
        corpus=TextConfig(corpus=str(made_world / "text.jsonl")),
        compare=GRID,
        train=TRAIN,
        evaluate=FIDELITY,
        score=replace(SCORE, encoder=str(encoder)),
    )

    def run(out: Path, compare: StudyGrid = GRID, **changes):
        asked = replace(request, out=out, compare=compare, **changes)
        return runner.study(asked, model, loaded)

    return run


@pytest.fixture(scope="module")
def command(made_world, encoder):
    """The words of the command that is the same study, but for its folder."""
    return ("study", made_world / "store", "--model", made_world / "model", "--corpus",
            made_world / "text.jsonl", "--site", SITE, "--rule", "variance", "--alpha", -0.25,
            "--k", 4, "--seeds", 0, 1, "--train.expansion", 4, "--train.batch-size", 256,
            "--train.dtype", "float32", "--eval-tokens", 500, "--evaluate.bootstraps", 50,
            "--score.tokens", 500, "--score.top", 3, "--score.sample", 3,
            "--score.probe-tokens", 500, "--score.bootstraps", 50,
            "--score.encoder", encoder)  # fmt: skip


@pytest.fixture(scope="module")
def printed(command, tmp_path_factory):
    """An unbroken study by the command: its folder, and what was printed."""
    out = tmp_path_factory.mktemp("study") / "out"
    return out, works(*command, "--out", out, "--json")


@pytest.fixture(scope="module")
def whole(study, printed):
    """Its folder, and its report, which is read."""
    return printed[0], study(printed[0])


@pytest.fixture
def out(whole, tmp_path):
    """A copy of the unbroken study."""
    return shutil.copytree(whole[0], tmp_path / "out")


@pytest.fixture
def new(tmp_path):
    """Where there is no study yet."""
    return tmp_path / "new"


def results(out: Path) -> dict[str, bytes]:
    return content(out / "results")


def trained(out: Path) -> dict[str, int]:
    """When the dictionaries of a study were written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "dictionaries").glob("[!.]*")}


def test_every_dictionary_is_trained_measured_reported_and_then_only_read(whole, study, out):
    _, report = whole
    assert sorted(results(out)) == sorted(f"{name}.json" for name in ALL)
    assert sorted(trained(out)) == sorted(ALL)
    assert [r.name for r in report.results][:2] == ["uniform-k4", "uniform-k4-s1"]
    assert len([s for s in report.sentences() if "documents" not in s]) == 1
    assert report.sentences()[0].startswith("variance-a-0.25, k 4: KL ")
    assert not list((out / "training").iterdir())
    assert json.loads((out / "command.json").read_text())["config"]["k"] == [4]
    before, there = content(out), trained(out)
    study(out)
    assert content(out) == before and trained(out) == there


def test_a_rule_may_need_a_first_dictionary_and_a_frozen_half_no_free_lengths(whole, study, new):
    misused("needs a first dictionary of the site; train a plain one", study, new, AFTER_FIRST)
    assert not new.exists()
    first = whole[0] / "dictionaries/uniform-k4-s1"
    free = replace(TRAIN, lengths="free")
    report = study(new, AFTER_FIRST, dictionary=first, train=free)
    labels = {r.label: r.control for r in report.results if not r.is_baseline}
    control = "permuted-participation-a0.5"
    assert labels == {"uniform": None, "participation-a0.5": control, control: None}
    with pytest.raises(LlmWsaeError, match="from another first dictionary"):
        study(new, AFTER_FIRST, dictionary=whole[0] / "dictionaries/uniform-k4", train=free)
    lengths = {
        name: Dictionary.load(new / "dictionaries" / name).info.training["lengths"]
        for name in ("uniform-k4", *FROZEN)
    }
    assert lengths == dict.fromkeys(FROZEN, "unit") | {"uniform-k4": "free"}


def test_baselines_stand_beside_the_others(whole, made_world):
    """On every seed, and nothing is compared with them."""
    out, report = whole
    beside = {r.name: r for r in report.results if r.is_baseline}
    assert list(beside) == [r.name for r in report.results][-5:]  # below the others
    assert sorted(beside) == sorted([RAW, *FROZEN])
    for label, count in zip(LABELS, (1, 2, 2), strict=True):
        (line,) = [one for one in report.table().splitlines() if one.startswith(label)]
        row = line.removeprefix(label).split()  # so in no table of differences
        own = [r for r in beside.values() if r.label == label]
        assert row[:2] == ["4", str(count)]
        assert row[4] == f"{sum(r.ce_recovered for r in own) / count:.4f}"
    for said in ("a measure says little of what was learnt", LABELS[0], "0, 1, and 5 baselines"):
        assert said in report.page()
    assert set(report.to_dict()["verdicts"]) == {"variance-a-0.25, k 4"}

    raw = Dictionary.load(out / "dictionaries" / RAW)
    statistics = ActivationStore.open(made_world / "store").statistics(Site.parse(SITE))
    spread = statistics.robust_variance.sqrt().float()
    torch.testing.assert_close(raw.W_dec, torch.cat([spread.diag(), -spread.diag()]))
    plain = Dictionary.load(out / "dictionaries/uniform-k4")
    assert raw.sparsity == plain.sparsity and raw.info.store == plain.info.store
    assert raw.info.rule == "raw dimensions" and plain.info.rule == "uniform"
    assert raw.info.massive_threshold == plain.info.massive_threshold


def test_what_is_written_is_what_was_measured(whole, made_world):
    out, report = whole
    names = ("uniform-k4", "permuted-variance-a-0.25-d1-k4-s1", RAW)
    loaded = {name: Dictionary.load(out / "dictionaries" / name) for name in names}
    trained = [one.info for one in loaded.values()][:2]
    assert [one.seed for one in trained] == [0, 1]
    assert [one.training["seed"] for one in trained] == [0, 1]  # the order of the rows
    model = LanguageModel.load(str(made_world / "model"))
    text = Corpus.open(str(made_world / "text.jsonl"), "heldout")
    contexts = Packer.for_model(model, PackConfig(context_size=16)).contexts(text)
    for name, measured in evaluate(loaded, model, contexts, FIDELITY).dictionaries.items():
        record = json.loads((out / "results" / f"{name}.json").read_text())
        assert record["fidelity"]["ce_spliced"] == pytest.approx(measured.ce_spliced)
        found = next(r for r in report.results if r.name == name)
        assert found.values["kl"].mean == pytest.approx(measured.kl)
        sums = [round(kl, 2) for kl in measured.kl_per_document]
        assert found.values["kl"].documents == pytest.approx(sums)
        scores = record["scores"]
        means = scores["latents"]["detection"]
        if means["mean"] is not None and not scores["dense_share"]:
            assert found.values["detection"].mean == pytest.approx(means["mean"])


def test_a_result_is_means_over_latents_families_and_letters():
    column = torch.tensor([0.6, 0.8, torch.nan, torch.nan])
    drawn = torch.tensor([[0.5, torch.nan, 0.7], [0.7, torch.nan, 0.9], 3 * [torch.nan]])
    value = over_latents(STUDIED["detection"], column, 8, drawn)
    assert value.mean == pytest.approx(0.7)
    assert value.resampled == pytest.approx((0.6, None, 0.8))  # one lacks all scored documents
    value = over_latents(STUDIED["detection_all"], column, 8, drawn)  # the others count as chance
    assert value.mean == pytest.approx(0.7 / 4 + 0.5 * 3 / 4)
    assert value.resampled == pytest.approx((0.6 / 4 + 0.375, None, 0.8 / 4 + 0.375))
    assert over_latents(STUDIED["purity"], column[1:], 8, None) is None
    of = {"letter a": 0.1, "letter b": 0.3, "digit": 0.0, "capital": None}
    families = {"letter": 0.2, "digit": 0.0, "capital": None}
    summary = {
        part: {name: {"selectivity": v, "absorbed": v} for name, v in own.items()}
        for part, own in (("concepts", of), ("families", families))
    }
    assert items_of(STUDIED["selectivity"], summary) == families
    assert items_of(STUDIED["absorbed"], summary) == {"letter a": 0.1, "letter b": 0.3}


def killed(work: Callable[..., object], *args: object, when: Callable[[], object]) -> None:
    """Begin some work in a process of its own, and kill it as soon as something is there."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    while process.is_alive() and not when():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_study_resumes_where_it_was_killed(whole, study, new):
    """In a training, between training and measuring, and between two measurements."""
    there: dict[str, int] = {}
    for pattern, count in (("training/*", 1), ("dictionaries/uniform-*", 1), ("results/*", 3)):
        killed(study, new, when=lambda p=pattern, n=count: len(list(new.glob(p))) >= n)
        assert there.items() <= trained(new).items()  # nothing is trained twice
        there = trained(new)
    study(new)
    assert len(there) > 2 and there.items() <= trained(new).items()
    assert results(new) == results(whole[0])


def test_other_rules_are_added_and_nothing_is_trained_twice(whole, study, out):
    before = trained(out)
    report = study(out, replace(GRID, rule=("kurtosis",), alpha=(0.5,)))
    new = {"kurtosis-a0.5-k4", "permuted-kurtosis-a0.5-k4"}
    new |= {"kurtosis-a0.5-k4-s1", "permuted-kurtosis-a0.5-d1-k4-s1"}
    assert trained(out).keys() - before.keys() == new and before.items() <= trained(out).items()
    assert {k: v for k, v in results(out).items() if "kurtosis" not in k} == results(whole[0])
    said = [s for s in report.sentences() if "documents" not in s]
    assert [s.split(":")[0] for s in said] == ["kurtosis-a0.5, k 4", "variance-a-0.25, k 4"]


def test_dictionaries_need_not_be_kept(study, out):
    """One that a kill left half deleted is deleted, and what was measured is not trained again."""
    shutil.rmtree(out / "dictionaries")
    (out / "dictionaries/.uniform-k4-s0.1234567.partial").mkdir(parents=True)
    (out / "results/uniform-k4.json").unlink()
    study(out, replace(GRID, keep_dictionaries=False))
    assert not list((out / "dictionaries").iterdir()) and len(results(out)) == len(ALL)
    assert not list((out / "training").iterdir())


def test_another_study_in_the_folder_is_refused(study, out):
    before = content(out)
    for asked, said in (
        ({"train": replace(TRAIN, expansion=8)}, r"training expansion"),
        ({"train": replace(TRAIN, lengths="free")}, r"training lengths"),
        ({"evaluate": replace(FIDELITY, tokens=400)}, r"fidelity tokens"),
        ({"compare": replace(GRID, architecture="jumprelu")}, r"training architecture"),
        ({"plant": True, "planted": PLANTS}, ".*planted"),
        ({"plant_upstream": True, "upstream": UpstreamConfig(block=0)}, ".*upstream"),
    ):
        fails(rf"other settings \({said}", study, out, **asked)
        assert content(out) == before
    path = out / "study.json"
    record = read_own_json(path, "study")
    record["request"]["measures"] = {"detection": 1}
    write_json(path, record)
    fails(r"other settings \(measures detection", study, out)


def test_a_study_of_another_architecture(study, new):
    report = study(new, replace(GRID, k=(2, 8), architecture="jumprelu"))
    names = [f"{name}{seed}" for seed in ("", "-s1") for name in (
        "uniform-jumprelu-k2", "uniform-jumprelu-k8", "variance-a-0.25-jumprelu-k8"
    )]  # fmt: skip
    made = trained(new).keys()
    assert made >= {*names, *(n.replace("k4", "k2") for n in FROZEN)} and len(made) == 12 + 4 + 1
    assert isinstance(Dictionary.load(new / "dictionaries" / names[-1]).sparsity, JumpReLU)
    few, many = (
        next(r.shares["l0"] for r in report.results if r.name == f"uniform-jumprelu-k{k}")
        for k in (2, 8)
    )
    assert few < many
    assert f"Study of weights at {SITE}, jumprelu" in report.page()


def test_planted_features_are_trained_on_and_their_recovery_reported(whole, study, new):
    asked = {"plant": True, "planted": PLANTS}
    report = study(new, **asked)
    assert {r.name for r in report.results} == set(ALL)
    other = {r.name: r.fvu for r in whole[1].results}
    for result in report.results:
        f1 = read_own_json(new / f"results/{result.name}.json", "result")["planted"]["plants"]["f1"]
        known = [one for one in f1 if one is not None]
        assert len(f1) == 14
        assert result.values["planted_f1"].mean == pytest.approx(sum(known) / len(known))
        loaded = Dictionary.load(new / "dictionaries" / result.name)
        assert loaded.info.store["planted"]["plants"] == 14
        assert other[result.name] != result.fvu  # it was trained on other rows
    (one,) = (one for one in report.compared if one.control)
    assert "planted_f1" in one.verdicts and "F1 of plants" in report.table()
    assert study(new, **asked).to_dict()["verdicts"] == report.to_dict()["verdicts"]
    fails(r"other settings \(planted seed", study, new, plant=True, planted=replace(PLANTS, seed=1))
    assert "plants" not in whole[1].table()


def test_features_planted_upstream_are_looked_for_at_the_site(study, new, capsys, monkeypatch):
    monkeypatch.setattr(upstream, "LEAST_EFFECT", 0)  # a random model's predictions hardly change
    plants = UpstreamConfig(
        block=0, per_strength=6, strengths=(1.0,), rarest=0.03, commonest=0.1, heldout_tokens=2500
    )
    report = study(new, plant_upstream=True, upstream=plants)
    measured = read_own_json(new / "upstream/plants.json", "plants")["plants"]
    counting = [one for one in measured if upstream.MeasuredPlant(**one).counts]
    assert 0 < len(counting) <= len(measured) == 6
    assert f"{len(counting)} of 6 features count" in capsys.readouterr().err
    for result in report.results:
        assert len(result.values["planted_f1"].items) == len(counting)
        loaded = Dictionary.load(new / "dictionaries" / result.name)
        assert "planted" in loaded.info.model  # it was trained on other rows
    assert "F1 of plants" in report.table()


def test_a_study_is_verified_file_by_file(out, study):
    assert not verify(out).problems
    for path in (out / "study.json", out / "results/uniform-k4.json"):
        good = path.read_bytes()
        path.write_bytes(good.replace(b"a", b"b", 1))
        assert path.name in "; ".join(verify(out).problems)
        path.write_bytes(good)
    shutil.copy(out / "results/uniform-k4.json", out / f"results/{NAMES[1]}.json")
    said = f"{NAMES[1]}.json holds the result of 'uniform-k4'; delete it"
    assert said in "; ".join(verify(out).problems)
    fails("is the result of other weights with the same", study, out)


def test_another_processor_may_round_differently_but_weights_must_be_the_same(out, study):
    """The rows of a store that was made anew, and weights from them, differ in their last digits;
    what was measured is good for both."""
    assert "sha256" not in json.loads((out / "study.json").read_text())["request"]["rows"]
    path, before = out / "results/variance-a-0.25-k4.json", trained(out)
    record = read_own_json(path, "result")
    sum_ = record["identity"]["gamma_sum"]
    record["identity"]["gamma_sum"] = 1.0001 * sum_
    write_json(path, record)
    study(out)
    assert trained(out) == before
    record["identity"]["gamma_sum"] = 1 + sum_
    write_json(path, record)
    fails("is the result of other weights with the same name", study, out)
    path.unlink()
    folder = out / "dictionaries/variance-a-0.25-k4"
    dictionary = Dictionary.load(folder)
    dictionary.extras["gamma"] = torch.ones(16)
    dictionary.save(folder)
    fails("was trained with other weights of the same name", study, out)


def test_requests_that_cannot_be_are_refused_before_any_work(study, new):
    free = replace(TRAIN, lengths="free")
    for wrong, said in (
        ({"compare": replace(GRID, k=(2, 65))}, "65"),
        ({"compare": replace(GRID, architecture="jumprelu"), "train": free}, "has no free lengths"),
    ):
        misused(said, study, new, **wrong)
        assert not new.exists()
    with pytest.raises(UsageError, match="a study draws its controls again for every seed"):
        study(new, weigh=WeightConfig(draw=1))
    misused("at least 2 different seeds, not 0", StudyGrid, seeds=(0,))
    misused("at least 2 different seeds", StudyGrid, seeds=(3, 3))
    misused("seeds is -1, but must be at least 0", StudyGrid, seeds=(0, -1))
    misused("at least one rule", StudyGrid, rule=())
    misused("at least one k", StudyGrid, k=())
    misused("of the same k, which relu does not have", StudyGrid, architecture="relu")


def test_the_command(printed, command, tmp_path):
    out, first = printed
    for changes, code, said in (
        (("--rule", "varianse"), 2, "there is no weight rule 'varianse'"),
        (("--eval-tokens", 10**7), 1, "ask for fewer tokens"),
        (("--score.tokens", 10**7), 1, "ask for fewer tokens"),
        (("--score.encoder", "nobody/nothing"), 1, "nobody/nothing"),
    ):
        result = call(*command, "--out", tmp_path / "new", *changes)
        sentence = result.err.splitlines()[-1]
        assert (result.code, result.out) == (code, "") and said in sentence
        assert "Traceback" not in result.err and not (tmp_path / "new/study.json").exists()
    assert list(first.json["verdicts"]) == ["variance-a-0.25, k 4"]
    assert len(first.json["dictionaries"]) == len(ALL)
    assert "study: 100%" in first.err
    again = works(*command, "--out", out)
    assert "train" not in again.err and again.out.splitlines()[0].startswith("weights ")
    assert any(line.startswith("variance-a-0.25, k 4: ") for line in again.out.splitlines())
    assert f"report  {out / 'report.html'}" in again.out


# --- the arms ---


@pytest.fixture(scope="module")
def inputs():
    statistics = Statistics(8, 1, sample_rows=500)
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    statistics.update(rows, torch.zeros(500, dtype=torch.int64))
    return RuleInputs(statistics, fisher=torch.cov(rows.T.double()))


def test_plain_dictionaries_the_rules_and_a_control_each(inputs):
    grid = replace(GRID, rule=("uniform", "variance"), alpha=(0.5, 0.0, -0.25))
    planned = plan(inputs, grid, WeightConfig())
    assert [p.arm.name for p in planned] == [
        "uniform-k4",
        "variance-a0.5-k4", "permuted-variance-a0.5-k4",
        "variance-a-0.25-k4", "permuted-variance-a-0.25-k4",
        "uniform-k4-s1",
        "variance-a0.5-k4-s1", "permuted-variance-a0.5-d1-k4-s1",
        "variance-a-0.25-k4-s1", "permuted-variance-a-0.25-d1-k4-s1",
    ]  # fmt: skip
    controls = {p.label: p.control for p in planned}
    pairs = {f"variance-a{alpha}": f"permuted-variance-a{alpha}" for alpha in (0.5, -0.25)}
    assert controls == dict.fromkeys(["uniform", *pairs.values()]) | pairs
    own, first, second = (planned[number].arm.weights.gamma for number in (1, 2, 7))
    assert not torch.equal(first, second)  # each seed has its own permutation
    ratio = (own / own.norm()).sort().values, (first / first.norm()).sort().values
    torch.testing.assert_close(*ratio)
    grid = replace(GRID, rule=("sensitivity",), alpha=(0.25,))  # a matrix, by random directions
    planned = plan(inputs, grid, WeightConfig(place="space"))
    controls = {p.label: p.control for p in planned if p.control}
    assert controls == {"sensitivity-matrix-a0.25-space": "rotated-sensitivity-a0.25-space"}
    rotated = [p.arm.weights.gamma for p in planned if p.label.startswith("rotated")]
    assert len(rotated) == 2 and not torch.allclose(*rotated, atol=0.1)


def test_baselines_are_topk_with_one_k_on_every_seed(inputs):
    """But not those that all others are."""
    for architecture in ("topk", "jumprelu", "frozen-decoder"):
        grid = replace(GRID, k=(4, 2), seeds=(3, 5), architecture=architecture)
        found = {p.name: p.label for p in baselines(inputs, grid)}
        assert found == {"raw-dimensions-k4": LABELS[0]} | {
            f"uniform-frozen-{half}-k4-s{seed}": f"topk baseline: frozen {half}"
            for half in ("decoder", "encoder") if architecture != f"frozen-{half}"
            for seed in (3, 5)
        }  # fmt: skip
        planned = plan(inputs, grid, WeightConfig())
        assert {p.arm.architecture for p in planned} == {architecture}
