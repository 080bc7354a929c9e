"""Trainings by several processes: the dictionaries of one, whoever is stopped or killed."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from command_line import TRAIN, content
from places import ROOT
from several import launched, run
from training_cases import CONFIG, Planted, arms_for, check_same, log_of

from llm_wsae.artifact.files import load_tensors
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import CHECKPOINT
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

SHARDS = ("rows", "latents")
SHORT = replace(CONFIG, tokens=256 * 40, dead_after=300, log_every=10, learning_rate=3e-3)
CLOSE = 1e-5
"""Relative difference of weights and measurements from those of one process after 40 steps in
float32. Sums are added up in another order, and Adam makes more of it."""


def arms():
    """Of every kind of step, one trained in a space, and one with a matrix in the loss."""
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4 + torch.eye(16)
    weights = [
        LossWeights(matrix, RULES["sensitivity"], 0.5, WeightConfig(place="space")),
        LossWeights(matrix.T @ matrix, RULES["sensitivity"], 1.0),
    ]
    kinds = ("topk", "batch-topk", "jumprelu")
    return [*arms_for(Planted(massive=True), architectures=kinds), *make_arms(weights, (2,))]


ALL = tuple(arm.name for arm in arms())
FEW = ("uniform-batch-topk-k2", "uniform-jumprelu-k2", "sensitivity-matrix-a0.5-space-k2")


DIES, FAILURE = signal.SIGKILL, LlmWsaeError("the moon is full")


def happen(what):
    """An error, or a signal to this process."""
    if isinstance(what, Exception):
        raise what
    os.kill(os.getpid(), what)


def make(out, config=SHORT, names=ALL, unlucky=None, what=None):
    """One process's part; something happens to the unlucky one where it reads batch 24."""
    chosen = [arm for arm in arms() if arm.name in names]
    is_unlucky = os.environ.get("RANK", "alone") == str(unlucky)
    stop_after = 24 if is_unlucky else None
    source = Planted(massive=True, stop_after=stop_after, what=partial(happen, what))
    return list(train(source, chosen, config, out))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    make(out)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Unbroken trainings by two processes."""
    outs = {shard: tmp_path_factory.mktemp(shard) for shard in SHARDS}
    for shard, out in outs.items():
        assert run(2, make, out, replace(SHORT, shard=shard)) == [list(ALL)] * 2
    return outs


def check_close(out, alone, names):
    for name in names:
        assert content(out / name).keys() == content(alone / name).keys()
        found, expected = Dictionary.load(out / name), Dictionary.load(alone / name)
        for key, tensor in expected.state_dict().items():
            error = (found.state_dict()[key] - tensor).norm() / tensor.norm()
            assert error < CLOSE, (name, key, float(error))
        assert found.info.metrics["training"] == log_of(out)[-1]["arms"][name]
    assert [line["step"] for line in log_of(out)] == [10, 20, 30, 40]
    for line, expected in zip(log_of(out), log_of(alone), strict=True):
        assert line["rows"] == expected["rows"] and line["arms"].keys() == set(names)
        for name, numbers in line["arms"].items():
            assert numbers == pytest.approx(expected["arms"][name], rel=CLOSE), name


@pytest.mark.parametrize("shard", SHARDS)
def test_several_processes_train_the_dictionaries_of_one(alone, together, shard):
    check_close(together[shard], alone, ALL)
    dead = [numbers["dead"] for line in log_of(alone) for numbers in line["arms"].values()]
    assert sum(share > 0 for share in dead) > len(dead) / 4  # so AuxK had work to do
    before = {p: p.stat().st_mtime_ns for p in together[shard].rglob("*")}
    assert run(2, make, together[shard], replace(SHORT, shard=shard)) == [list(ALL)] * 2
    assert before == {p: p.stat().st_mtime_ns for p in together[shard].rglob("*")}


def test_a_signal_to_one_process_stops_all_and_one_alone_can_go_on(alone, tmp_path):
    config = replace(SHORT, shard="latents")
    for outcome in run(2, make, tmp_path, config, FEW, 1, signal.SIGTERM):
        assert outcome.startswith("Interrupted: stopped after step 24 of 40, saved in")
    assert [line["step"] for line in log_of(tmp_path)] == [10, 20]
    make(tmp_path, SHORT, FEW)
    check_close(tmp_path, alone, FEW)


def test_what_one_process_began_is_ended_by_several(alone, tmp_path):
    with pytest.raises(Interrupted, match="stopped after step 24"):
        make(tmp_path, SHORT, FEW, "alone", signal.SIGTERM)
    outcomes = run(3, make, tmp_path, replace(SHORT, shuffle_seed=1), FEW)
    assert "seed: 0 in the saved training, 1 in this command" in outcomes[0]
    assert run(3, make, tmp_path, SHORT, FEW)[0] == list(FEW)
    check_close(tmp_path, alone, FEW)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("shard, unlucky, what", [("rows", 0, DIES), ("latents", 1, FAILURE)])
def test_a_process_that_is_killed_or_cannot_read_its_rows_ends_all_and_loses_nothing(
    together, tmp_path, shard, unlucky, what
):
    config = replace(SHORT, shard=shard, checkpoint_seconds=0.0)
    outcomes = run(2, make, tmp_path, config, FEW, unlucky, what)
    said = outcomes[1 - unlucky]
    if what == DIES:
        assert outcomes[unlucky] is None and "exited without an error message" in said
        assert "run the same command again to resume" in said
    else:
        assert said.startswith("LlmWsaeError: the moon is full (stopped after step 24 of 40, ")
        assert outcomes == [said] * 2
    tensors, metadata = load_tensors(tmp_path / CHECKPOINT, "checkpoint")
    assert json.loads(metadata["llm_wsae"])["step"] == (23 if what == DIES else 24)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert run(2, make, tmp_path, config, FEW)[0] == list(FEW)
    check_same(tmp_path, together[shard], FEW)


def test_requests_that_cannot_be(tmp_path):
    outcomes = run(3, make, tmp_path, replace(SHORT, shard="latents"))
    assert len(set(outcomes)) == 1
    assert outcomes[0].startswith("UsageError: 64 latents cannot be divided evenly among 3")
    first, second = outcomes = run(2, of_own_rate, tmp_path)
    said = "process 1 has other settings than process 0 (learning_rate: 0.1 in process 0,"
    assert first == second and said in first
    assert not list(tmp_path.iterdir())
    first, second = run(2, make, tmp_path, SHORT, FEW, 1, ZeroDivisionError())
    assert "process 1 ended: ZeroDivisionError()" in first and second is None


def of_own_rate(out):
    return make(out, replace(SHORT, learning_rate=[0.1, 0.2][int(os.environ["RANK"])]), FEW)


def test_interrupting_the_launcher_saves_and_says_so_once(made_world, tmp_path):
    """The command, of which test_two_machines.py trains a whole dictionary."""
    out = tmp_path / "out"
    words = ("train", made_world / "store", *TRAIN, "--k", 4, "--tokens", 10**7, "--out", out,
             "--checkpoint-seconds", 0, "--shard", "latents")  # fmt: skip
    command = subprocess.Popen(launched(2, *words), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    while not (out / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=300)
    assert command.returncode != 0
    assert said.count("llm-wsae: ") == 1 and "llm-wsae: stopped after step" in said
    step = int(said.split("stopped after step ")[1].split()[0])
    _, metadata = load_tensors(out / CHECKPOINT, "checkpoint")
    assert json.loads(metadata["llm_wsae"])["step"] == step > 0
