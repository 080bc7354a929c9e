"""Damage to files that the program writes and later reads: one kind for each way to prove bytes.

JSON and tensors with digests of their own, in which every bit counts (test_proof_of_bytes.py), are
not repeated here for each file that is written so.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import SITE
from fuzzing import blind, frozen
from training_cases import CONFIG, Planted, arms_for

from llm_wsae.commands.verifying import verify
from llm_wsae.data.manifest import tokens_path
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import (
    Explanation,
    Score,
    keep_explanations,
    read_explanations,
)
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import Processes
from llm_wsae.model.site import Site
from llm_wsae.training.arm import Arm
from llm_wsae.training.checkpoint import CHECKPOINT, LOG, TrainingLog, load_checkpoint
from llm_wsae.training.trainer import Interrupted, train

PLACE = Site.parse(SITE)
SHORT = CONFIG.__class__(**{**vars(CONFIG), "tokens": 256 * 60, "log_every": 10})
USUAL = 30
"""Random changes of each file."""


class Kind(NamedTuple):
    """A kind of file: one of it, another one, and how the package reads it."""

    path: Path
    other: Path
    read: Callable[[], Any]


@pytest.fixture(scope="module")
def kinds(made_world, tmp_path_factory) -> dict[str, Kind]:
    folder = shutil.copytree(made_world, tmp_path_factory.mktemp("fuzzed") / "world")
    return {**of_dictionaries(folder), **of_stores(folder), **of_trainings(folder)}


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
    store = ActivationStore.open(place)

    def read_rows() -> torch.Tensor:
        reader = store.reader(PLACE)
        found = torch.empty(store.num_rows, store.d_in, dtype=reader.dtype)
        reader.read(0, found)
        return found

    def read_tokens() -> Any:
        return ActivationStore.open(place).contexts(0)

    def read_statistics() -> Any:
        return store.statistics(PLACE).to_tensors()

    first, third, whole, own = (
        rows / f"{name}.safetensors"
        for name in ("00000", "00002", "statistics", "00001.statistics")
    )
    tokens = place / tokens_path(0), place / tokens_path(1)
    return {
        "store, rows and their header": Kind(first, third, read_rows),
        "store, tokens": Kind(*tokens, read_tokens),
        "store, statistics": Kind(whole, own, read_statistics),
    }


def of_trainings(folder: Path) -> dict[str, Kind]:
    stopped = folder / "stopped"
    with pytest.raises(Interrupted):
        train((source := Planted(stop_after=31)), arms_for(source)[:2], SHORT, stopped)
    fresh = [Arm(arm, 16, 64, torch.device("cpu")) for arm in arms_for(Planted(2000))[:2]]
    start = [{name: t.clone() for name, t in arm.state().items()} for arm in fresh]

    def read_checkpoint() -> Any:
        """Restores fresh arms: how far the training had come, and their state."""
        for arm, state in zip(fresh, start, strict=True):
            arm.load_state({name: tensor.clone() for name, tensor in state.items()})
        reached = load_checkpoint(stopped, fresh, Processes())
        return reached, [arm.state() for arm in fresh]

    written = read_checkpoint()[0].log

    def read_log() -> bytes:
        TrainingLog(stopped, 31, written=written)  # what a resumed training goes on from
        return (stopped / LOG).read_bytes()

    checkpoint, log = stopped / CHECKPOINT, folder / "trained" / LOG
    return {
        "training, checkpoint": Kind(checkpoint, checkpoint, read_checkpoint),
        "training, log": Kind(stopped / LOG, log, read_log),
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
