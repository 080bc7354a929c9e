"""Damage to every kind of file that the program writes and later reads."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import SITE, works
from evaluation_cases import WordCounts
from fuzzing import blind, frozen
from training_cases import CONFIG, Planted, arms_for

from llm_wsae.artifact.files import json_line
from llm_wsae.commands.verifying import verify
from llm_wsae.data.manifest import (
    MANIFEST,
    Manifest,
    complete_shards,
    read_statistics,
    save_record,
    tokens_path,
)
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import (
    Explanation,
    Score,
    keep_explanations,
    read_explanations,
)
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.explaining import endpoint
from llm_wsae.lab.config import Study, StudyGrid
from llm_wsae.lab.studies import runner
from llm_wsae.lab.studies.results import read_result, study_in
from llm_wsae.machine.processes import Processes
from llm_wsae.model.site import Site
from llm_wsae.pipeline.request import ModelConfig, TextConfig
from llm_wsae.training.arm import Arm
from llm_wsae.training.checkpoint import CHECKPOINT, load_checkpoint, training_in
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.log import LOG, TrainingLog
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.loss_weights import LossWeights

PLACE = Site.parse(SITE)
SHORT = CONFIG.__class__(**{**vars(CONFIG), "tokens": 256 * 60, "log_every": 10})
USUAL = 30
"""Random changes of each file."""


class Kind(NamedTuple):
    """A kind of file: one of it, another one, and how the package reads it."""

    path: Path
    other: Path
    read: Callable[[], Any]


@pytest.fixture(autouse=True)
def in_haste(no_sync):
    """Thousands of files are written; none must outlive a loss of power."""


@pytest.fixture(scope="module")
def kinds(made_world, tmp_path_factory) -> dict[str, Kind]:
    """One of every kind."""
    folder = shutil.copytree(made_world, tmp_path_factory.mktemp("fuzzed") / "world")
    makers = of_dictionaries, of_stores, of_trainings, of_studies, of_others
    return {name: kind for make in makers for name, kind in make(folder).items()}


def of_dictionaries(folder: Path) -> dict[str, Kind]:
    one, other = folder / "trained/uniform-k4", folder / "trained/variance-a0.5-k4"
    for place in (one, other):
        scores = {"detection": Score(0.75, (0.5, 0.9), 40, 38)}
        said = [Explanation(latent, f"word {latent}", "a model", scores) for latent in (3, 5, 8)]
        keep_explanations(place, said)

    def read() -> Any:
        found = Dictionary.load(one)
        return found, found.sparsity, found.info, found.extras

    names = ("cfg.json", "wsae.json", "sae_weights.safetensors", "wsae.safetensors")
    kinds = {f"dictionary, {name}": Kind(one / name, other / name, read) for name in names}
    name = "explanations.jsonl"
    kinds["explanations"] = Kind(one / name, other / name, lambda: read_explanations(one))
    return kinds


def of_stores(folder: Path) -> dict[str, Kind]:
    place, rows = folder / "store", folder / "store" / SITE
    unfinished = shutil.copytree(place, folder / "unfinished")
    manifest = Manifest.load(unfinished)
    for index, record in enumerate(manifest.shards):
        save_record(unfinished, index, record)
    manifest.shards, manifest.statistics, manifest.complete = [], {}, False
    manifest.save(unfinished)
    store = ActivationStore.open(place)
    whole, first, second = (
        rows / f"{name}statistics.safetensors" for name in ("", "00000.", "00001.")
    )

    def read_rows() -> torch.Tensor:
        reader = store.reader(PLACE)
        found = torch.empty(store.num_rows, store.d_in, dtype=reader.dtype)
        reader.read(0, found)
        return found

    def read_shards_statistics() -> Any:
        record = store.manifest.all_files()[f"{SITE}/{first.name}"]
        return read_statistics(first, record).to_tensors()

    def read_shards() -> Any:
        return complete_shards(unfinished, Manifest.load(unfinished))

    def read_tokens() -> Any:
        return ActivationStore.open(place).contexts(0)

    def read_whole() -> Any:
        return store.statistics(PLACE).to_tensors()

    one, third = (rows / f"0000{n}.safetensors" for n in (0, 2))
    records = unfinished / "shards"
    manifests = place / MANIFEST, unfinished / MANIFEST
    return {
        "store, manifest": Kind(*manifests, lambda: Manifest.load(place)),
        "store, record of a shard": Kind(*sorted(records.glob("*.json"))[:2], read_shards),
        "store, rows and their header": Kind(one, third, read_rows),
        "store, tokens": Kind(place / tokens_path(0), place / tokens_path(1), read_tokens),
        "store, statistics": Kind(whole, second, read_whole),
        "store, statistics of a shard": Kind(first, second, read_shards_statistics),
    }


def of_trainings(folder: Path) -> dict[str, Kind]:
    stopped, done = folder / "stopped", folder / "finished"
    with pytest.raises(Interrupted):
        train((source := Planted(stop_after=31)), arms_for(source)[:2], SHORT, stopped)
    shutil.copytree(stopped, done)
    train((source := Planted()), arms_for(source)[:2], SHORT, done)
    read_checkpoint = checkpoint_reader(stopped)
    written, record = read_checkpoint()[0].log, training_in(done).path

    def read_log() -> bytes:
        TrainingLog(stopped, 31, written=written)  # what a resumed training goes on from
        return (stopped / LOG).read_bytes()

    def read_record() -> Any:
        found = training_in(done).read()
        found.files[LOG].check(done / LOG, "delete it")
        return found

    return {
        "training, checkpoint": Kind(stopped / CHECKPOINT, stopped / CHECKPOINT, read_checkpoint),
        "training, record": Kind(record, folder / "trained" / record.name, read_record),
        "training, log": Kind(stopped / LOG, done / LOG, read_log),
        "training, log of a finished one": Kind(done / LOG, stopped / LOG, read_record),
    }


def checkpoint_reader(stopped: Path) -> Callable[[], Any]:
    """Restores fresh arms from the checkpoint: how far it had come, and their state."""
    configs = arms_for(Planted(2000))[:2]
    fresh = [Arm(arm, 16, 64, torch.device("cpu")) for arm in configs]
    start = [{name: t.clone() for name, t in arm.state().items()} for arm in fresh]

    def read() -> Any:
        for arm, state in zip(fresh, start, strict=True):
            arm.load_state({name: tensor.clone() for name, tensor in state.items()})
        reached = load_checkpoint(stopped, fresh, Processes())
        return reached, [arm.state() for arm in fresh]

    return read


def of_studies(folder: Path) -> dict[str, Kind]:
    study = folder / "study"
    asked = Study(
        stores=(folder / "store",),
        site=SITE,
        out=study,
        model=ModelConfig(model=str(folder / "model")),
        corpus=TextConfig(corpus=str(folder / "text.jsonl")),
        compare=StudyGrid(k=(4,), seeds=(0, 1)),
        train=TrainConfig(expansion=2, tokens=512, batch_size=128),
        evaluate=EvaluateConfig(tokens=300),
        score=MonosemanticConfig(tokens=300, top=3, sample=3, probe_tokens=300),
    )
    runner.study(asked, encoder=WordCounts())
    results = sorted(study.glob("results/*.json"))
    basis = study / "study.json"
    return {
        "study, results": Kind(results[0], results[1], lambda: read_result(results[0])),
        "study, description": Kind(basis, results[0], lambda: study_in(study).read().request),
    }


def of_others(folder: Path) -> dict[str, Kind]:
    weights, store = folder / "weights.safetensors", ActivationStore.open(folder / "store")
    other = folder / "variance.safetensors"
    weigh = ("weigh", folder / "store", "--site", SITE, "--rule")
    works(*weigh, "whitening", "--out", weights)
    works(*weigh, "variance", "--out", other)
    measured = store.evidence(PLACE, "second_moment")
    answers, known = folder / "answers.jsonl", {}
    for number in range(4):
        known[f"{number:064}"] = f"answer {number}"
        line = {"question": f"{number:064}", "about": "x", "answer": f"answer {number}"}
        with open(answers, "a") as file:
            file.write(json_line({**line, "tokens_in": 3, "messages": [{"a": "b"}]}))

    def read_measured() -> Any:
        found = measured.read()
        if found is None:
            raise LlmWsaeError("it is measured again")
        return found

    def read_answers() -> Any:
        found, _ = endpoint._read(answers)
        if found.items() < known.items():
            raise LlmWsaeError("the question is asked again")
        return found

    return {
        "weights file": Kind(weights, other, lambda: LossWeights.load(weights)),
        "measurement kept in a store": Kind(measured.path, weights, read_measured),
        "answers": Kind(answers, answers, read_answers),
    }


def test_random_damage(kinds, fuzz):
    for name, kind in kinds.items():
        good, other, whole = kind.path.read_bytes(), kind.other.read_bytes(), frozen(kind.read())
        assert frozen(kind.read()) == whole
        for number, draw in fuzz.cases(name, USUAL):
            done, data = blind(good, draw, other)
            if data != other:  # a whole file, but of something else
                kind.path.write_bytes(data)
                fuzz.reads(name, f"case {number} ({done})", kind.read, whole)
        kind.path.write_bytes(good)


def test_verify_finds_what_random_damage_does(fuzz, made_world, tmp_path):
    places = [shutil.copytree(made_world / name, tmp_path / name) for name in ("store", "trained")]
    for place in places:
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        files = [path for path in files if path.stat().st_size]
        for number, draw in fuzz.cases(f"verify {place.name}", USUAL):
            path, other = draw.choice(files), draw.choice(files)
            good = path.read_bytes()
            done, data = blind(good, draw, other.read_bytes())
            path.write_bytes(data)

            def sees(place=place) -> None:
                found = verify(place)
                if named := [*found.problems, *map(str, found.without_digest)]:
                    raise LlmWsaeError("; ".join(named))

            outcome = fuzz.reads("verify", f"{path.name} {number} ({done})", sees, None)
            assert outcome == "refused" or data == good, f"{path.name} {number} ({done})"
            path.write_bytes(good)
