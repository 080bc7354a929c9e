"""A complete study of a tiny model: what it leaves, how it resumes, what it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import SITE, call, content, make_world, works
from evaluation_cases import WordCounts

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
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.lab.studies import first, jobs, runner
from llm_wsae.lab.studies.config import StudyConfig
from llm_wsae.lab.studies.plan import baselines, plan
from llm_wsae.lab.studies.results import read_result
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.config import TrainConfig
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs

PLACE = Site.parse(SITE)
CONFIG = StudyConfig(("variance",), (-0.25,), (4,), (0, 1))
SETTINGS = {
    "training": TrainConfig(expansion=4, batch_size=256, dtype="float32"),
    "fidelity": EvaluateConfig(tokens=500),
    "scoring": MonosemanticConfig(tokens=500, top=3, sample=3, probe_tokens=500),
    "encoder": WordCounts(),
}
NAMES = [
    f"{weights}-k4{seed}"
    for seed, draw in (("", ""), ("-s1", "-d1"))
    for weights in ("uniform", "variance-a-0.25", f"permuted-variance-a-0.25{draw}")
]
FROZEN = [f"uniform-frozen-{half}-k4{s}" for s in ("", "-s1") for half in ("decoder", "encoder")]
RAW = "raw-dimensions-k4"
ALL = [*NAMES, *FROZEN, RAW]
RAW_LABEL, *FROZEN_LABELS = (
    f"topk baseline: {what}" for what in ("raw dimensions", "frozen decoder", "frozen encoder")
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def study(world):
    """Runs a study in a folder."""
    model = LanguageModel.load(str(world / "model"))
    store = ActivationStore.open(world / "store")

    def run(out: Path, config: StudyConfig = CONFIG, **settings):
        text = str(world / "text.jsonl")
        return runner.study(model, store, PLACE, text, out, config, **SETTINGS | settings)

    run.model = model
    return run


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """An unbroken study: its folder and its report."""
    out = tmp_path_factory.mktemp("study") / "out"
    return out, study(out)


@pytest.fixture
def trained(monkeypatch):
    """The arms of every training from here on."""
    calls, original = [], jobs.train

    def train(source, arms, config, out):
        calls.append([arm.name for arm in arms])
        return original(source, arms, config, out)

    monkeypatch.setattr(jobs, "train", train)
    return calls


def results(out: Path) -> dict[str, bytes]:
    return content(out / "results")


def test_every_dictionary_is_trained_measured_and_reported(whole):
    out, report = whole
    assert sorted(results(out)) == sorted(f"{name}.json" for name in ALL)
    assert sorted(p.name for p in (out / "dictionaries").iterdir()) == sorted(ALL)
    assert [r.name for r in report.results][:2] == ["uniform-k4", "uniform-k4-s1"]
    assert len([s for s in report.sentences() if "documents" not in s]) == 1
    assert report.sentences()[0].startswith("variance-a-0.25, k 4: KL ")
    assert not list((out / "training").iterdir())
    for name in ("report.json", "report.md", "report.html", "differences.png"):
        assert (out / name).stat().st_size > 100


def test_a_rule_that_needs_a_first_dictionary_costs_as_many_rows_as_a_plain_one(
    study, trained, tmp_path
):
    """Its own first dictionary for each seed, which is counted."""
    out, config = tmp_path / "out", replace(CONFIG, rules=("participation",), alphas=(0.5,))
    report = study(out, config)
    steps = {
        str(path.parent.relative_to(out)): Dictionary.load(path.parent).info.training["num_steps"]
        for path in out.rglob("wsae.json")
        if path.parent.name != RAW
    }
    of_plain = steps["dictionaries/uniform-k4"]
    assert set(steps.values()) == {of_plain, of_plain // 2}
    assert {name for name, count in steps.items() if count < of_plain} == {
        "first/s0/uniform-k4-s1000",
        "first/s1/uniform-k4-s1001",
        "dictionaries/participation-a0.5-k4",
        "dictionaries/participation-a0.5-k4-s1",
        "dictionaries/permuted-participation-a0.5-k4",
        "dictionaries/permuted-participation-a0.5-d1-k4-s1",
    }
    gammas = [
        Dictionary.load(out / f"dictionaries/participation-a0.5-k4{seed}").extras["gamma"]
        for seed in ("", "-s1")
    ]
    assert not torch.equal(*gammas)
    said = "participation-a0.5 and their controls were trained on half of the rows"
    assert said in report.markdown() and said in report.page()
    assert {r.share for r in report.results if r.label == "uniform"} == {1.0}

    trained.clear()
    assert study(out, config).to_dict() == report.to_dict() and not trained
    more = study(out, replace(config, ks=(8, 4)))  # their first dictionaries are there
    assert {r.k for r in more.results if r.label == "participation-a0.5"} == {4, 8}
    assert len(list((out / "first").glob("*/*/wsae.json"))) == 2
    study(out, replace(config, ks=(8,), seeds=(2, 3)))  # of one label, so after the same k
    assert [path.parent.name for path in out.glob("first/s2/*/wsae.json")] == ["uniform-k4-s1002"]
    given = Dictionary.load(out / "first/s0/uniform-k4-s1000")
    with pytest.raises(LlmWsaeError, match="another first dictionary"):
        study(out, config, dictionary=given)


def test_a_study_that_was_stopped_at_a_first_dictionary_goes_on(study, tmp_path, monkeypatch):
    out, config = tmp_path / "out", replace(CONFIG, rules=("participation",), alphas=(0.5,))
    original = first.train
    for wrong, said in (
        ({"config": replace(config, ks=(65,))}, "k = 65 active latents is more"),
        ({"weigh": WeightConfig(draw=1)}, "draw is 1"),
    ):
        with pytest.raises(UsageError, match=said):
            study(out, **{"config": config} | wrong)
        assert not out.exists()

    def stopped(source, arms, config, out):
        if arms[0].init_seed > 1000:
            raise KeyboardInterrupt
        return original(source, arms, config, out)

    monkeypatch.setattr(first, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        study(out, config)
    assert [path.name for path in (out / "first").iterdir()] == ["s0"]
    monkeypatch.setattr(first, "train", original)
    assert len(study(out, config).results) == len(ALL)


def cells(table: str, label: str) -> list[list[str]]:
    """The rows of a Markdown table that begin with a label."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0].strip() == label]


def test_what_learnt_nothing_stands_beside_the_others(whole, world, study):
    """On every seed, measured alike, and nothing is compared with it."""
    out, report = whole
    beside = {r.name: r for r in report.results if r.is_baseline}
    assert list(beside) == [r.name for r in report.results][-5:]  # below the others
    assert sorted(beside) == sorted([RAW, *FROZEN])
    assert {r.seed for r in beside.values() if r.name != RAW} == {0, 1}
    page = (out / "report.md").read_text()
    for table in (page.split("## Dictionaries")[1], page):
        for label, count in ((RAW_LABEL, 1), (FROZEN_LABELS[0], 2), (FROZEN_LABELS[1], 2)):
            (row,) = cells(table, label)  # so in no table of differences
            own = [r for r in beside.values() if r.label == label]
            assert row[1:3] == ["4", str(count)]
            assert row[5] == f"{sum(r.ce_recovered for r in own) / count:.4f}"
    assert "a measure says little of what was learnt" in page
    assert RAW_LABEL in report.table() and RAW_LABEL in report.page()
    assert "6, on seeds 0, 1, and 5 baselines" in report.page()
    found = json.loads((out / "report.json").read_text())
    assert set(found["verdicts"]) == {"variance-a-0.25, k 4"} and set(beside) < set(
        found["dictionaries"]
    )

    raw = Dictionary.load(out / "dictionaries" / RAW)
    statistics = ActivationStore.open(world / "store").statistics(PLACE)
    spread = statistics.robust_variance.sqrt().float()
    torch.testing.assert_close(raw.W_dec, torch.cat([spread.diag(), -spread.diag()]))
    plain = Dictionary.load(out / "dictionaries/uniform-k4")
    assert raw.sparsity == plain.sparsity and raw.info.store == plain.info.store
    assert raw.info.rule == "raw dimensions" and plain.info.rule == "uniform"
    assert raw.info.massive_threshold == plain.info.massive_threshold
    text = Corpus.open(str(world / "text.jsonl"), "heldout")
    contexts = Packer.for_model(study.model, PackConfig(context_size=16)).contexts(text)
    (again,) = evaluate(
        {RAW: raw}, study.model, contexts, SETTINGS["fidelity"]
    ).dictionaries.values()
    assert beside[RAW].fvu == pytest.approx(again.fvu)


def test_free_lengths_are_asked_only_of_what_can_have_them(study, tmp_path):
    """A frozen half has none, and stands beside dictionaries that have."""
    free = replace(SETTINGS["training"], lengths="free")
    config = CONFIG
    out = tmp_path / "out"
    study(out, config, training=free)
    lengths = {
        name: Dictionary.load(out / "dictionaries" / name).info.training["lengths"]
        for name in ("uniform-k4", *FROZEN)
    }
    assert lengths == dict.fromkeys(FROZEN, "unit") | {"uniform-k4": "free"}
    with pytest.raises(LlmWsaeError, match=r"other settings \(training lengths"):
        study(out, config)
    with pytest.raises(UsageError, match="jumprelu has no free lengths"):
        study(tmp_path / "other", replace(config, architecture="jumprelu"), training=free)
    assert not (tmp_path / "other").exists()


def test_what_is_written_is_what_was_measured(whole, study, world):
    out, report = whole
    names = ("uniform-k4", "permuted-variance-a-0.25-d1-k4-s1")
    loaded = {name: Dictionary.load(out / "dictionaries" / name) for name in names}
    assert [d.info.seed for d in loaded.values()] == [0, 1]
    assert [d.info.training["seed"] for d in loaded.values()] == [0, 1]  # the order of the rows
    text = Corpus.open(str(world / "text.jsonl"), "heldout")
    packing = PackConfig(context_size=16)
    contexts = Packer.for_model(study.model, packing).contexts(text)
    measured = evaluate(loaded, study.model, contexts, SETTINGS["fidelity"]).dictionaries
    for name in names:
        record = json.loads((out / "results" / f"{name}.json").read_text())
        assert record["fidelity"]["ce_spliced"] == pytest.approx(measured[name].ce_spliced)
        found = next(r for r in report.results if r.name == name)
        assert found.kl == pytest.approx(measured[name].kl)
        sums = [round(kl, 2) for kl in measured[name].kl_per_document]
        assert found.values["kl"].documents == pytest.approx(sums)
        means = record["scores"]["latents_not_dense"]["detection"]
        if means["mean"] is not None:
            assert found.values["detection"].mean == pytest.approx(means["mean"])


def test_resamplings_without_any_scored_document_are_read(whole, tmp_path):
    """Of few documents a resampling may lack those that all scored latents depend on."""
    out, _ = whole
    path = tmp_path / "uniform-k4.json"
    record = read_own_json(out / "results" / "uniform-k4.json", "result")
    latents = record["latents"]
    latents["not_dense"]["detection"] = {"mean": 0.7, "variance": 0.01, "n": 8}
    latents["resampled"]["not_dense"] = [0.6, None, 0.8]
    write_json(path, record)
    values = read_result(path).values
    assert values["detection"].resampled == pytest.approx((0.6, None, 0.8))
    share = 8 / record["scores"]["d_sae"]  # the others count as chance
    low, high = (share * v + (1 - share) / 2 for v in (0.6, 0.8))
    assert values["detection_all"].resampled == pytest.approx((low, None, high))


def test_a_finished_study_is_only_read(whole, study, trained, monkeypatch):
    out, _ = whole
    before = content(out)
    monkeypatch.setattr(
        runner, "MonosemanticityEvaluator", lambda *_: pytest.fail("nothing is to be measured")
    )
    study(out)
    assert trained == [] and content(out) == before


def test_a_study_resumes_where_it_stopped(whole, study, trained, monkeypatch, tmp_path):
    """Stopped in a training, between training and measuring, and between two measurements."""
    monkeypatch.setattr(jobs, "_PASS_BYTES", 3 * jobs._BYTES_A_WEIGHT * 2 * 4 * 16**2)
    unbroken, _ = whole
    out = tmp_path / "out"
    for owner, stage, after in (
        (jobs, "train", 1),
        (jobs.FidelityEvaluator, "evaluate", 0),
        (jobs, "record_of", 4),
    ):
        original, calls = getattr(owner, stage), []

        def stop(*args, original=original, calls=calls, after=after):
            calls.append(None)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, stage, stop)
            with pytest.raises(KeyboardInterrupt):
                study(out)
    study(out)
    tried = [name for call in trained for name in call]
    assert sorted(tried) == sorted(NAMES + FROZEN)
    assert all(len(call) in (2, 3) for call in trained)
    assert results(out) == results(unbroken)


def test_other_rules_are_added_and_nothing_is_trained_twice(whole, study, trained, tmp_path):
    unbroken, _ = whole
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    report = study(out, replace(CONFIG, rules=("kurtosis",), alphas=(0.5,)))
    new = ["kurtosis-a0.5-k4", "permuted-kurtosis-a0.5-k4"]
    assert trained == [new, ["kurtosis-a0.5-k4-s1", "permuted-kurtosis-a0.5-d1-k4-s1"]]
    assert {k: v for k, v in results(out).items() if "kurtosis" not in k} == results(unbroken)
    said = [s for s in report.sentences() if "documents" not in s]
    assert [s.split(":")[0] for s in said] == ["kurtosis-a0.5, k 4", "variance-a-0.25, k 4"]


def stopped_in_training(study, out, monkeypatch):
    """A study that is interrupted when its first group begins."""

    def stop(source, arms, config, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            study(out)


def test_a_group_that_was_begun_is_resumed(study, trained, monkeypatch, tmp_path):
    """Also when more is asked for meanwhile, which would make other groups."""
    out = tmp_path / "out"
    stopped_in_training(study, out, monkeypatch)
    study(out, replace(CONFIG, alphas=(-0.25, 0.5)))
    begun = {*NAMES[:3], *FROZEN[:2]}
    assert set(trained[0]) == begun
    assert sorted(name for call in trained[1:] for name in call if "a0.5" not in name) == sorted(
        {*NAMES, *FROZEN} - begun
    )


def test_dictionaries_need_not_be_kept(study, trained, tmp_path):
    config = replace(CONFIG, keep_dictionaries=False)
    study(tmp_path / "out", config)
    assert not list((tmp_path / "out" / "dictionaries").iterdir())
    assert len(trained) == 2
    study(tmp_path / "out", config)
    assert len(trained) == 2


def test_a_dictionary_that_is_half_deleted_is_deleted(study, tmp_path, monkeypatch):
    config = replace(CONFIG, keep_dictionaries=False)
    remove = shutil.rmtree

    def killed(folder, *given, **named):
        if re.fullmatch(r"\.[a-z]+-[^.]+\.\d+\.partial", Path(folder).name):
            next(Path(folder).glob("*.safetensors")).unlink()
            raise KeyboardInterrupt
        remove(folder, *given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        study(tmp_path / "out", config)
    study(tmp_path / "out", config)
    assert not list((tmp_path / "out" / "dictionaries").iterdir())


def test_another_study_in_the_folder_is_refused(whole, study):
    out, _ = whole
    before = content(out)
    other = TrainConfig(expansion=8, batch_size=256, dtype="float32")
    with pytest.raises(LlmWsaeError, match=r"other settings \(training expansion"):
        study(out, training=other)
    with pytest.raises(LlmWsaeError, match=r"other settings \(fidelity tokens"):
        study(out, fidelity=EvaluateConfig(tokens=400))
    with pytest.raises(LlmWsaeError, match=r"other settings \(training architecture"):
        study(out, replace(CONFIG, architecture="jumprelu"))
    assert content(out) == before


def test_another_definition_of_a_measure_is_refused(whole, study, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    path = tmp_path / "out/study.json"
    record = read_own_json(path, "study")
    record["request"]["measures"] = {"detection": 1}
    write_json(path, record)
    with pytest.raises(LlmWsaeError, match=r"other settings \(measures detection"):
        study(tmp_path / "out")


def test_a_damaged_description_is_named(whole, study, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    write_json(tmp_path / "out" / "study.json", {"rows": {}})
    with pytest.raises(LlmWsaeError, match=r"study\.json is not the record of a .* study"):
        study(tmp_path / "out")


def test_a_study_of_another_architecture(study, trained, tmp_path):
    config = StudyConfig(("variance",), (-0.25,), (2, 8), (0, 1), "jumprelu")
    report = study(tmp_path / "out", config)
    names = [f"{name}{seed}" for seed in ("", "-s1") for name in (
        "uniform-jumprelu-k2", "uniform-jumprelu-k8", "variance-a-0.25-jumprelu-k8"
    )]  # fmt: skip
    made = {name for group in trained for name in group}
    assert (
        made.issuperset(names)
        and made.issuperset(n.replace("k4", "k2") for n in FROZEN)
        and len(made) == 12 + 4
    )
    loaded = Dictionary.load(tmp_path / "out" / "dictionaries" / names[-1])
    assert isinstance(loaded.sparsity, JumpReLU)
    few, many = (
        next(r.shares["l0"] for r in report.results if r.name == f"uniform-jumprelu-k{k}")
        for k in (2, 8)
    )
    assert few < many
    assert "jumprelu" in (tmp_path / "out" / "report.md").read_text().splitlines()[0]


def test_planted_features_are_trained_on_and_their_recovery_reported(whole, study, tmp_path):
    plants = PlantConfig(per_cell=1, strengths=(0.5, 1.0), rarest=0.01, commonest=0.05)
    out, config = tmp_path / "out", replace(CONFIG, plant=plants)
    report = study(out, config)
    assert {r.name for r in report.results} == set(ALL)
    other = {r.name: r.fvu for r in whole[1].results}
    for result in report.results:
        planted = read_own_json(out / f"results/{result.name}.json", "result")["planted"]
        assert len(planted["plants"]["f1"]) == 14
        known = [f1 for f1 in planted["plants"]["f1"] if f1 is not None]
        assert result.values["planted_f1"].mean == pytest.approx(sum(known) / len(known))
        loaded = Dictionary.load(out / "dictionaries" / result.name)
        assert loaded.info.store["planted"]["plants"] == 14
        assert other[result.name] != result.fvu  # it was trained on other rows
    (one,) = (one for one in report.compared if one.control)
    assert "planted_f1" in one.verdicts and "F1 of plants" in (out / "report.md").read_text()
    assert study(out, config).to_dict()["verdicts"] == report.to_dict()["verdicts"]
    before = content(out)
    with pytest.raises(LlmWsaeError, match=r"other settings \(.*planted"):
        study(out)
    with pytest.raises(LlmWsaeError, match=r"other settings \(planted seed"):
        study(out, replace(config, plant=replace(plants, seed=1)))
    assert content(out) == before
    assert "plants" not in (whole[0] / "report.md").read_text().split("## Differences")[0]


def test_concepts_are_averaged_over_families_or_letters(whole, tmp_path):
    record = read_own_json(whole[0] / "results/uniform-k4.json", "result")
    none = dict.fromkeys(("best_1", "spill"))
    of = {"letter a": 0.1, "letter b": 0.3, "digit": 0.0, "capital": None}
    families = {"letter": 0.2, "digit": 0.0, "capital": None}
    record["scores"]["concepts_not_dense"] = {
        part: {name: {"selectivity": v, "absorbed": v, **none} for name, v in own.items()}
        for part, own in (("concepts", of), ("families", families))
    }
    write_json(tmp_path / "uniform-k4.json", record)
    values = read_result(tmp_path / "uniform-k4.json").values
    assert values["selectivity"].mean == pytest.approx(0.1)
    assert values["selectivity"].items == {"letter": 0.2, "digit": 0.0}
    assert values["absorbed"].items == {"letter a": 0.1, "letter b": 0.3}
    assert "spill" not in values


def test_a_study_is_verified_file_by_file(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    assert not verify(out).problems
    for path in (out / "study.json", out / "results/uniform-k4.json"):
        good = path.read_bytes()
        path.write_bytes(good.replace(b"a", b"b", 1))
        assert path.name in "; ".join(verify(out).problems)
        path.write_bytes(good)
    shutil.copy(out / "results/uniform-k4.json", out / "results/other.json")
    assert "other.json holds the result of 'u" in "; ".join(verify(out).problems)


def test_a_begun_training_that_nobody_needs_is_cleared_away(whole, study, tmp_path):
    """Another command finished its dictionaries. Kept dictionaries stay, whatever is kept now."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    group = out / "training" / "0123456789ab"
    group.mkdir(parents=True)
    write_json(group / "group.json", {"dictionaries": NAMES[:2]})
    study(out)
    assert not group.exists()
    before = content(out / "dictionaries")
    study(out, replace(CONFIG, keep_dictionaries=False))
    assert len(list((out / "dictionaries").iterdir())) == len(ALL)
    assert content(out / "dictionaries") == before


def test_a_draw_of_its_own_is_refused(study, tmp_path):
    with pytest.raises(UsageError, match="a study draws its controls again for every seed"):
        study(tmp_path / "out", weigh=WeightConfig(draw=1))


def test_a_study_resumes_where_another_processor_rounds_differently(
    whole, study, trained, tmp_path
):
    """The rows of a store that was made anew, and weights from them, differ in their last digits;
    what was measured is good for both."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    assert "sha256" not in json.loads((out / "study.json").read_text())["request"]["rows"]
    path = out / "results/variance-a-0.25-k4.json"
    record = read_own_json(path, "result")
    record["identity"]["gamma_sum"] *= 1.0001
    write_json(path, record)
    study(out)
    assert trained == []


def test_other_weights_under_the_same_name_are_refused(whole, study, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    path = out / "results/variance-a-0.25-k4.json"
    record = read_own_json(path, "result")
    record["identity"]["gamma_sum"] += 1
    write_json(path, record)
    with pytest.raises(LlmWsaeError, match="is the result of other weights with the same name"):
        study(out)
    path.unlink()
    folder = out / "dictionaries/variance-a-0.25-k4"
    dictionary = Dictionary.load(folder)
    dictionary.extras["gamma"] = torch.ones(16)
    dictionary.save(folder)
    with pytest.raises(LlmWsaeError, match="was trained with other weights of the same name"):
        study(out)


def test_a_k_beyond_the_latents_is_refused_before_any_work(study, tmp_path):
    with pytest.raises(UsageError, match="65"):
        study(tmp_path / "out", replace(CONFIG, ks=(2, 65)))
    assert not (tmp_path / "out").exists()


COMMAND = ("--site", SITE, "--alpha", -0.25, "--k", 4, "--seeds", 0, 1,
           "--train.expansion", 4, "--train.tokens", 4096, "--eval-tokens", 300,
           "--score.tokens", 300)  # fmt: skip


def test_the_command(world, tmp_path, monkeypatch):
    monkeypatch.setattr(SentenceEncoder, "load", lambda *_, **__: WordCounts())
    out = tmp_path / "out"
    words = ("study", world / "store", "--model", world / "model", "--corpus",
             world / "text.jsonl", *COMMAND, "--out", out)  # fmt: skip
    result = works(*words, "--json")
    assert list(result.json["verdicts"]) == ["variance-a-0.25, k 4"]
    assert len(result.json["dictionaries"]) == 6 + 5  # baselines
    assert "study: 100%" in result.err
    record = json.loads((out / "command.json").read_text())
    assert record["command"] == "study" and record["config"]["ks"] == [4]
    again = works(*words)
    assert "train" not in again.err and again.out.splitlines()[0].startswith("weights ")
    assert any(line.startswith("variance-a-0.25, k 4: ") for line in again.out.splitlines())
    assert f"report  {out / 'report.html'}" in again.out and "report.md" in again.out


def test_bad_requests_are_one_sentence(world, tmp_path):
    for changes, code, said in (
        (("--rule", "varianse"), 2, "there is no weight rule 'varianse'"),
        (("--seeds", 0), 2, "at least 2 different seeds"),
        (("--eval-tokens", 10**7), 1, "ask for fewer tokens"),
        (("--score.tokens", 10**7), 1, "ask for fewer tokens"),
        (("--score.encoder", "nobody/nothing"), 2, "nobody/nothing"),
    ):
        out = tmp_path / "out"
        result = call("study", world / "store", "--model", world / "model", "--corpus",
                      world / "text.jsonl", *COMMAND, "--out", out, *changes)  # fmt: skip
        assert (result.code, result.out) == (code, "")
        sentence = result.err.splitlines()[-1]
        assert (
            sentence.startswith("llm-wsae: ") and said in sentence and "Traceback" not in result.err
        )
        assert not (out / "study.json").exists()


# --- the plan ---


@pytest.fixture(scope="module")
def inputs():
    draw = torch.Generator().manual_seed(0)
    statistics = Statistics(8, 1, sample_rows=500)
    rows = torch.randn(500, 8, generator=draw) * torch.arange(1, 9)
    statistics.update(rows, torch.zeros(500, dtype=torch.int64))
    return RuleInputs(statistics, fisher=torch.cov(rows.T.double()))


def test_plain_dictionaries_the_rules_and_a_control_each(inputs):
    config = StudyConfig(("uniform", "variance"), (0.5, 0.0, -0.25), (4,), (0, 1))
    planned = plan(inputs, config, WeightConfig())
    assert [p.arm.name for p in planned] == [
        "uniform-k4",
        "variance-a0.5-k4", "permuted-variance-a0.5-k4",
        "variance-a-0.25-k4", "permuted-variance-a-0.25-k4",
        "uniform-k4-s1",
        "variance-a0.5-k4-s1", "permuted-variance-a0.5-d1-k4-s1",
        "variance-a-0.25-k4-s1", "permuted-variance-a-0.25-d1-k4-s1",
    ]  # fmt: skip
    labels = {p.label: p.control for p in planned}
    assert labels == {
        "uniform": None,
        "variance-a0.5": "permuted-variance-a0.5",
        "permuted-variance-a0.5": None,
        "variance-a-0.25": "permuted-variance-a-0.25",
        "permuted-variance-a-0.25": None,
    }
    own, first, second = (
        next(p.arm.weights.gamma for p in planned if p.arm.name == name)
        for name in ("variance-a0.5-k4", *(p.arm.name for p in planned if "permuted-variance-a0.5"
                                           in p.arm.name))
    )  # fmt: skip
    assert not torch.equal(first, second)  # each seed has its own permutation
    ratio = (own / own.norm()).sort().values, (first / first.norm()).sort().values
    torch.testing.assert_close(*ratio)


def test_a_matrix_is_controlled_by_random_directions(inputs):
    config = StudyConfig(("sensitivity",), (0.25,), (4,), (0, 1))
    planned = plan(inputs, config, WeightConfig(place="space"))
    controls = {p.label: p.control for p in planned if p.control}
    assert controls == {"sensitivity-matrix-a0.25-space": "rotated-sensitivity-a0.25-space"}
    rotated = [p.arm.weights.gamma for p in planned if p.label.startswith("rotated")]
    assert len(rotated) == 2 and not torch.allclose(*rotated, atol=0.1)


def test_all_dictionaries_are_of_one_architecture(inputs):
    config = StudyConfig(("variance",), (0.5,), (4,), (0, 1), "jumprelu")
    planned = plan(inputs, config, WeightConfig())
    assert {p.arm.architecture for p in planned} == {"jumprelu"} and len(planned) == 2 * 3
    assert planned[1].arm.name == "variance-a0.5-jumprelu-k4"
    assert planned[1].control == planned[2].label == "permuted-variance-a0.5"


def test_baselines_are_topk_with_one_k_on_every_seed(inputs):
    config = StudyConfig(("variance",), (0.5,), (4, 2), (3, 5))
    for architecture in ("topk", "jumprelu", "frozen-decoder"):
        found = baselines(inputs, replace(config, architecture=architecture))
        wanted = {("raw-dimensions-k4", RAW_LABEL)}
        wanted |= {
            (f"uniform-frozen-{half}-k4-s{seed}", f"topk baseline: frozen {half}")
            for seed in (3, 5)
            for half in ("decoder", "encoder")
            if architecture != f"frozen-{half}"  # which all others are
        }
        assert {(p.name, p.label) for p in found} == wanted and len(found) == len(wanted)
        assert all(p.control is None and p.share == 1 for p in found)
        assert (
            len({p.name for p in found} & {p.name for p in plan(inputs, config, WeightConfig())})
            == 0
        )


def test_plans_that_make_no_sense():
    for wrong, said in (
        ({"seeds": (0,)}, "at least 2 different seeds, not 0"),
        ({"seeds": (3, 3)}, "at least 2 different seeds"),
        ({"seeds": (0, -1)}, "seeds is -1, but must be at least 0"),
        ({"rules": ()}, "at least one of its rules"),
        ({"ks": ()}, "at least one of its ks"),
        ({"architecture": "relu"}, "of the same k, which relu does not have"),
    ):
        with pytest.raises(UsageError, match=said):
            StudyConfig(**wrong)
