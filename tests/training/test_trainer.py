"""Training on planted data: it learns, resumes bit for bit, refuses what cannot be; in weights that
act as a space, folded back at the end; with weights that are annealed; and by several processes,
which train the dictionaries of one, whoever is stopped or killed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from command_line import TRAIN, content
from looping import over
from places import ROOT
from refusals import fails, misused
from several import launched, run
from training_cases import CONFIG as LONG
from training_cases import CPU, Planted, arms_for, check_same, error, fvu, log_of

from llm_wsae.artifact.files import folder_lock, load_own_tensors, load_tensors, save_own_tensors
from llm_wsae.data.rows import ArrayRows
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.checks import plain_beside
from llm_wsae.training.architecture import squared
from llm_wsae.training.arm import Arm, ArmConfig, make_arms
from llm_wsae.training.checkpoint import CHECKPOINT, TrainingLog, is_finished, training_in
from llm_wsae.training.config import TrainConfig, learning_rate_factor
from llm_wsae.training.normaliser import folded
from llm_wsae.training.trainer import Interrupted, Training, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.rules import RULES
from llm_wsae.weights.scoring import RuleInputs

CONFIG = replace(LONG, tokens=256 * 60, log_every=20, dtype="auto")
PAIR = ("uniform", "variance")


def four_arms(source):
    return arms_for(source, PAIR, (4,), (0.02,), ("topk",))


def two_arms(source, rules=PAIR):
    return arms_for(source, rules, (4,), (), ("topk",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out, source = tmp_path_factory.mktemp("trained"), Planted()
    return source, out, train(source, four_arms(source), CONFIG, out)


def test_every_arm_is_logged_and_saved_in_the_models_own_units(trained):
    source, out, dictionaries = trained
    names = ["uniform-k4", "uniform-relu-l0.02", "variance-a0.5-k4", "variance-a0.5-relu-l0.02"]
    assert list(dictionaries) == names
    lines = log_of(out)
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert lines[0]["seconds_left"] > 0 and lines[-1]["seconds_left"] == 0
    for name, dictionary in dictionaries.items():
        assert fvu(dictionary, source.rows) < 0.25, name
        norms = dictionary.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        again = Dictionary.load(out / name)
        assert torch.equal(again(source.rows[:50]), dictionary(source.rows[:50]))
        assert again.info.rule in name and again.info.store == source.identity()
        torch.testing.assert_close(again.extras["mean"], source.rows.mean(0), rtol=1e-4, atol=1e-4)
        first, last = lines[0]["arms"][name], lines[-1]["arms"][name]
        assert last["fvu"] < first["fvu"] and set(first) == {"loss", "fvu", "l0", "dead"}
        assert again.info.metrics["training"] == last


def test_a_space_has_twice_the_usual_learning_rate(tmp_path):
    source, usual = Planted(), replace(CONFIG, learning_rate=None, tokens=256 * 4)
    loss, space = (
        make_arms([weights_from_rule("variance", 0.5, source.statistics(), WeightConfig(one))], [4])
        for one in ("loss", "space")
    )
    arms = [*loss, *space, *two_arms(source, ("uniform",))]
    # in a short training a tenth of the rows is less than a batch, but what fired there isn't dead
    assert Training(source, arms, usual, tmp_path, CPU).dead_after == 256
    for settings, rates in (
        ({"lengths": "unit"}, [4e-3] * 3),
        ({"learning_rate": 8e-3}, [8e-3] * 3),
        ({}, [4e-3, 8e-3, 4e-3]),
    ):
        training = Training(source, arms, replace(usual, **settings), tmp_path, CPU)
        assert list(training.rates.values()) == rates
    found = train(source, arms, usual, tmp_path)
    assert [one.info.training["learning_rate"] for one in found.values()] == rates
    # each is compared with the plain one beside it all the same
    assert plain_beside(found) == {arm.name: "uniform-k4" for arm in arms[:2]}


def test_a_finished_training_is_read_back_and_other_settings_are_refused(trained, tmp_path):
    """And a lost dictionary can be trained again as the error says."""
    source, out, dictionaries = trained
    arms = four_arms(source)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    (out / CHECKPOINT).write_bytes(b"of a run killed at the very end")
    (out / ".tmp").mkdir()  # somebody's own
    again = train(source, arms, CONFIG, out)
    assert torch.equal(again["uniform-k4"].W_enc, dictionaries["uniform-k4"].W_enc)
    said = r"learning_rate: 0\.\d+ in the saved training, 0.5 in this command"
    fails(said, train, source, arms, replace(CONFIG, learning_rate=0.5), out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    (out / ".tmp").rmdir()
    lost = shutil.copytree(out, tmp_path / "lost")
    shutil.rmtree(lost / "uniform-k4")
    record = training_in(lost).path
    fails(rf"uniform-k4 is missing; .*delete {record} and log", train, source, arms, CONFIG, lost)
    record.unlink()
    (lost / "log.jsonl").unlink()
    train(source, arms, CONFIG, lost)
    check_same(lost, out, [arm.name for arm in arms])


def test_numbers_that_are_not_finite_stop_the_training(tmp_path):
    """Weights of a latent that never fires do not show in the loss."""
    source, config = Planted(), replace(CONFIG, aux_coefficient=0.0, lengths="unit")
    path = tmp_path / CHECKPOINT
    with pytest.raises(Interrupted):
        train(Planted(stop_after=23), two_arms(source), config, tmp_path)
    tensors, facts = load_own_tensors(path, "checkpoint")
    tensors["uniform-k4/encoder_bias"][3] = -1e6
    tensors["uniform-k4/decoder"][3, 0] = torch.nan
    save_own_tensors(path, tensors, facts)
    with pytest.raises(LlmWsaeError, match="uniform-k4 has weights that are not finite; lower"):
        train(source, two_arms(source), config, tmp_path)
    assert not list(tmp_path.rglob("cfg.json")) and not is_finished(tmp_path)
    with pytest.raises(LlmWsaeError, match=r"the loss of uniform-k4 is \w+ at step \d+; lower"):
        train(source, two_arms(source), replace(CONFIG, learning_rate=1e15), tmp_path / "steep")


def test_what_was_trained_is_saved_whatever_the_rows_fail_with(trained, tmp_path):
    class Failing(Planted):
        def batches(self, *given):
            yield from itertools.islice(super().batches(*given), 7)
            raise OSError("the disk is gone")

    arms = two_arms(trained[0])
    with pytest.raises(OSError, match="the disk is gone"):
        train(Failing(), arms, CONFIG, tmp_path)
    assert load_own_tensors(tmp_path / CHECKPOINT, "checkpoint")[1]["step"] == 7
    train(trained[0], arms, CONFIG, tmp_path)
    check_same(tmp_path, trained[1], [arm.name for arm in arms])


def test_a_memory_map_is_trained_on_as_the_tensor(tmp_path):
    """To the last bit, also when it is stopped and goes on; other rows are refused."""
    rows, arms = Planted().rows, two_arms(Planted())
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")

    class Stopped(ArrayRows):
        def batches(self, *given):
            yield from itertools.islice(super().batches(*given), 7)
            os.kill(os.getpid(), signal.SIGTERM)
            yield rows[:256]

    with pytest.raises(Interrupted, match="stopped after step 7 of 60"):
        train(Stopped(mapped), arms, CONFIG, tmp_path / "mapped")
    stopped = shutil.copytree(tmp_path / "mapped", tmp_path / "stopped")
    said = r"\(rows sha256: .* in the saved training, .* in this command"
    fails(said, train, rows + 1, arms, CONFIG, stopped)
    train(mapped, arms, CONFIG, tmp_path / "mapped")
    found = train(rows, arms, CONFIG, tmp_path / "tensor")
    check_same(tmp_path / "mapped", tmp_path / "tensor", found)
    assert found["uniform-k4"].info.store["kind"] == "array"


def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(tmp_path):
    source, still, endless, out = Planted(), Planted(), Planted(), tmp_path / "out"
    still.rows = torch.ones_like(still.rows)
    endless.rows = endless.rows * 1e18
    arms, short = two_arms(source), make_arms([LossWeights(torch.ones(9))], ks=(4,))
    for rows, wanted, said in (
        (source, [], "there is nothing to train: give at least one rule"),
        (source, arms * 2, "the arms must be different, but uniform-k4 is listed twice"),
        (source, arms_for(source, ks=(65,)), r"k = 65 .* than the dictionary's 64 latents"),
        (source, short, "for 9 dimensions, but the site has 16; make them from"),
        (still, arms, "nothing to learn: apart from a few, the rows do not vary"),
        (endless, arms, "most rows are longer than 1e"),
    ):
        fails(said, train, rows, wanted, CONFIG, out)
    assert not out.exists()
    misused("learning-rate must be a number above 0, not 0.0", TrainConfig, learning_rate=0.0)
    misused("tracker must be none, tensorboard or wandb, not 'paper'", TrainConfig, tracker="paper")
    misused("warmup and decay are shares of the steps", TrainConfig, warmup=0.6, decay=0.5)
    misused(r"tokens \(9\) must be at least one batch", TrainConfig, tokens=9)
    with folder_lock(out, "training"), pytest.raises(LlmWsaeError, match="is writing the training"):
        train(source, arms, CONFIG, out)


def test_massive_rows_have_no_part():
    source = Planted(20_000, massive=True)
    normaliser = source.normaliser()
    batch = normaliser.batch(source.rows)
    assert int((batch.mask == 0).sum()) == source.statistics().massive_count == 40
    assert not batch.x[batch.mask == 0].any()
    usual = batch.x[batch.mask > 0]
    assert float(usual.var(0).mean()) == pytest.approx(1, rel=0.1)
    assert float(usual.mean(0).abs().max()) < 0.1
    rows = source.rows[1:5].clone()
    rows[1, 2], rows[2, 0] = float("inf"), float("nan")
    broken = normaliser.batch(rows)
    assert broken.mask.tolist() == [1, 0, 0, 1] and not broken.x[1:3].any()
    assert torch.equal(broken.x[3], batch.x[4])


def test_the_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(step, 100, 0.1, 0.5) for step in (0, 9, 50, 75, 99)]
    assert factors == pytest.approx([0.1, 1, 1, 0.5, 0.02])


# --- The log and its trackers

NUMBERS = {"uniform-k4": {"loss": 0.5, "fvu": 0.4}}


def test_a_full_disk_is_a_sentence(tmp_path):
    log = TrainingLog(tmp_path, 0)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    fails(r"cannot write .*log.jsonl: No space left on device", log.write, 7, 700, NUMBERS)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_gets_the_same_numbers(tmp_path, monkeypatch, tracker):
    """A resumed training goes on in the same run, and hides what a lost one wrote later. Folders
    are runs side by side: without reinit, wandb's init returns the first run."""
    runs = [Mock(), Mock(), Mock()]
    begin = Mock(side_effect=runs)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=begin))
    monkeypatch.setitem(sys.modules, "wandb", Mock(init=begin))
    for folder in (tmp_path, tmp_path / "other", tmp_path):
        log = TrainingLog(folder, 7, tracker)
        log.write(8, 700, NUMBERS)
        log.close()
    numbers = {"uniform-k4/loss": 0.5, "uniform-k4/fvu": 0.4}
    settings = [one.kwargs for one in begin.call_args_list]
    if tracker == "tensorboard":
        sent = [*(call.add_scalar(*one, 8) for one in numbers.items()), call.close()]
        assert settings == [{"purge_step": 8}] * 3
    else:
        sent = [call.log(numbers, step=8), call.finish()]
        assert settings[0]["id"] == settings[2]["id"] != settings[1]["id"]
        assert {(one["resume"], one["reinit"]) for one in settings} == {("allow", "create_new")}
    assert [run.method_calls for run in runs] == [sent] * 3


def test_trackers_that_cannot_be_started(tmp_path, monkeypatch):
    error = Exception("No API key configured.\nUse `wandb login` to log in.")
    monkeypatch.setitem(sys.modules, "wandb", Mock(init=Mock(side_effect=error)))
    said = r"cannot be started \(No API key .*WANDB_API_KEY"
    fails(said, TrainingLog, tmp_path, 0, "wandb")
    for tracker, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        fails(rf"pip install 'llm-wsae\[{tracker}\]'", TrainingLog, tmp_path, 0, tracker)


# --- In a space, and with annealed weights

WIDTH = 16
SPACE = WeightConfig(place="space")
SHORT = replace(CONFIG, learning_rate=None, dtype="float32")


@pytest.fixture(scope="module")
def massive():
    return Planted(6000, massive=True)


@pytest.fixture(scope="module")
def inputs(massive):
    half = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    return RuleInputs(massive.statistics(), fisher=(half @ half.T).double())


@over(seed=range(5), diagonal=(True, False), threshold=(True, False))
def test_folding_back_changes_nothing(massive, seed, diagonal, threshold):
    """For any parameters and any Γ that stretches by 0.03 to 30: the same codes (in units of x),
    and Γ(x̂ − μ)/scale is the reconstruction in the space."""
    generator = torch.Generator().manual_seed(seed)
    gamma = 10 ** (3 * torch.rand(WIDTH, generator=generator) - 1.5)
    if not diagonal:
        turn, other = torch.linalg.qr(torch.randn(2, WIDTH, WIDTH, generator=generator)).Q
        gamma = turn @ gamma.diag() @ other
    arm = Arm(ArmConfig(LossWeights(gamma, config=SPACE), k=4, init_seed=1), WIDTH, 32, CPU)
    for parameter in arm.parameters:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    limit = torch.rand(32, generator=generator) if threshold else None
    normaliser = massive.normaliser()
    units = normaliser.x
    scale, mean = units.scale, units.mean
    tensors = folded(arm.parameters, units, units, limit, gamma)

    rows = massive.rows[1:200]
    batch = arm.space.enter(normaliser.batch(rows))
    there = batch.x @ arm.parameters.encoder.T + arm.parameters.encoder_bias
    here = rows @ tensors["W_enc"] + tensors["b_enc"]
    torch.testing.assert_close(here, scale * there, rtol=1e-3, atol=1e-3 * float(there.abs().max()))
    if threshold:
        torch.testing.assert_close(tensors["threshold"], scale * limit)
    in_space = there.relu() @ arm.parameters.decoder + arm.parameters.decoder_bias
    back = (scale * there.relu()) @ tensors["W_dec"] + tensors["b_dec"]
    assert error(arm.space.leave(in_space) * scale + mean, back) < 1e-4
    assert error(arm.space.leave(batch.x), normaliser.batch(rows).x) < 1e-4


def test_arms_that_share_a_space_share_the_product(massive, inputs, tmp_path):
    weights = [weights_from_rule("sensitivity", alpha, inputs, SPACE) for alpha in (0.25, 0.5)]
    training = Training(massive, make_arms(weights, [2, 4]), SHORT, tmp_path, CPU)
    spaces = [arm.space for arm in training.arms]
    assert spaces[0] is spaces[1] is not spaces[2] is spaces[3]
    batch = massive.normaliser(torch.bfloat16).batch(massive.rows[:600])
    entered = spaces[2].enter(batch)
    torch.testing.assert_close(entered.x, batch.x @ weights[1].gamma.T)
    assert entered.x_fast.dtype == torch.bfloat16
    assert int((batch.mask == 0).sum()) == 2 and not entered.x[batch.mask == 0].any()


def test_every_architecture_trains_in_a_space(massive, inputs, tmp_path):
    """The saved dictionary has the FVU that was logged, which is that of x and not of Γx. It
    remembers its weights."""
    settings = WeightConfig(place="space", clip=8.0, draw=1)
    weights = [
        weights_from_rule("rotated:sensitivity", 0.25, inputs, settings),
        weights_from_rule("variance", -0.5, inputs, SPACE),
    ]
    names = ("topk", "batch-topk", "matryoshka", "jumprelu")
    arms = make_arms(weights, [4], [0.02], architectures=names)
    rows = massive.rows[massive.rows.norm(dim=1) < 500]
    for name, dictionary in train(massive, arms, SHORT, tmp_path / "out").items():
        found = fvu(dictionary, rows)
        assert found == pytest.approx(dictionary.info.metrics["training"]["fvu"], rel=0.25), name
        assert found < 0.6, name
        norms = dictionary.W_dec.norm(dim=1)
        assert float(norms.max() / norms.min()) > 1.05  # of norm 1 in the space only
    name = "rotated-sensitivity-a0.25-c8-space-d1-jumprelu-k4"
    dictionary = Dictionary.load(tmp_path / "out" / name)
    assert torch.equal(dictionary.extras["gamma"], weights[0].gamma)
    assert dictionary.info.rule == "rotated:sensitivity" and dictionary.info.alpha == 0.25
    assert WeightConfig(**dictionary.info.weights) == settings


@over(form=("diagonal", "matrix"))
def test_annealing_ends_at_one(massive, inputs, form):
    weights = weights_from_rule("sensitivity", 0.5, inputs, WeightConfig(anneal=0.5, form=form))
    arm = Arm(ArmConfig(weights, k=4), WIDTH, 32, CPU)
    one = torch.ones(WIDTH) if form == "diagonal" else torch.eye(WIDTH)
    variance = massive.statistics().robust_covariance
    for done, left in ((0.0, 1.0), (0.125, 0.75), (0.3, 0.4), (0.5, 0.0), (1.0, 0.0)):
        arm.anneal(done)
        torch.testing.assert_close(arm.gamma, left * weights.gamma + (1 - left) * one)
        assert torch.equal(arm.metric, squared(arm.gamma))
        gamma = arm.gamma.double()
        gamma = gamma.diag() if form == "diagonal" else gamma
        share = float((gamma @ variance @ gamma.T).trace() / variance.trace())
        assert 0.5 < share < 1.01  # no more than the plain loss has, and not much less
    assert torch.equal(arm.gamma, one)


def test_an_annealed_training_is_neither_of_its_ends(massive, inputs, tmp_path):
    weights = [
        weights_from_rule("variance", 0.5, inputs),
        weights_from_rule("variance", 0.5, inputs, WeightConfig(anneal=0.5)),
        weights_from_rule("uniform", 1.0, inputs),
    ]
    always, annealed, plain = train(massive, make_arms(weights, [4]), SHORT, tmp_path).values()
    assert annealed.info.name == "variance-a0.5-n0.5-k4"
    for other in (always, plain):
        assert not torch.allclose(annealed.W_dec, other.W_dec, atol=1e-3)


# --- By several processes

SHARDS = ("rows", "latents")
BRIEF = replace(LONG, tokens=256 * 40, dead_after=300, log_every=10, learning_rate=3e-3)
CLOSE = 1e-5
"""Relative difference of weights and measurements from those of one process after 40 steps in
float32. Sums are added up in another order, and Adam makes more of it."""


def all_arms():
    """Of every kind of step, one trained in a space, and one with a matrix in the loss."""
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4 + torch.eye(16)
    weights = [
        LossWeights(matrix, RULES["sensitivity"], 0.5, WeightConfig(place="space")),
        LossWeights(matrix.T @ matrix, RULES["sensitivity"], 1.0),
    ]
    kinds = ("topk", "batch-topk", "jumprelu")
    return [*arms_for(Planted(massive=True), architectures=kinds), *make_arms(weights, (2,))]


ALL = tuple(arm.name for arm in all_arms())
FEW = ("uniform-batch-topk-k2", "uniform-jumprelu-k2", "sensitivity-matrix-a0.5-space-k2")


DIES, FAILURE = signal.SIGKILL, LlmWsaeError("the moon is full")


def happen(what):
    """An error, or a signal to this process."""
    if isinstance(what, Exception):
        raise what
    os.kill(os.getpid(), what)


def make(out, config=BRIEF, names=ALL, unlucky=None, what=None):
    """One process's part; something happens to the unlucky one where it reads batch 24."""
    chosen = [arm for arm in all_arms() if arm.name in names]
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
        assert run(2, make, out, replace(BRIEF, shard=shard)) == [list(ALL)] * 2
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
    assert run(2, make, together[shard], replace(BRIEF, shard=shard)) == [list(ALL)] * 2
    assert before == {p: p.stat().st_mtime_ns for p in together[shard].rglob("*")}


def test_a_signal_to_one_process_stops_all_and_one_alone_can_go_on(alone, tmp_path):
    config = replace(BRIEF, shard="latents")
    for outcome in run(2, make, tmp_path, config, FEW, 1, signal.SIGTERM):
        assert outcome.startswith("Interrupted: stopped after step 24 of 40, saved in")
    assert [line["step"] for line in log_of(tmp_path)] == [10, 20]
    make(tmp_path, BRIEF, FEW)
    check_close(tmp_path, alone, FEW)


def test_what_one_process_began_is_ended_by_several(alone, tmp_path):
    with pytest.raises(Interrupted, match="stopped after step 24"):
        make(tmp_path, BRIEF, FEW, "alone", signal.SIGTERM)
    outcomes = run(3, make, tmp_path, replace(BRIEF, shuffle_seed=1), FEW)
    assert "seed: 0 in the saved training, 1 in this command" in outcomes[0]
    assert run(3, make, tmp_path, BRIEF, FEW)[0] == list(FEW)
    check_close(tmp_path, alone, FEW)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("shard, unlucky, what", [("rows", 0, DIES), ("latents", 1, FAILURE)])
def test_a_process_that_is_killed_or_cannot_read_its_rows_ends_all_and_loses_nothing(
    together, tmp_path, shard, unlucky, what
):
    config = replace(BRIEF, shard=shard, checkpoint_seconds=0.0)
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
    outcomes = run(3, make, tmp_path, replace(BRIEF, shard="latents"))
    assert len(set(outcomes)) == 1
    assert outcomes[0].startswith("UsageError: 64 latents cannot be divided evenly among 3")
    first, second = outcomes = run(2, of_own_rate, tmp_path)
    said = "process 1 has other settings than process 0 (learning_rate: 0.1 in process 0,"
    assert first == second and said in first
    assert not list(tmp_path.iterdir())
    first, second = run(2, make, tmp_path, BRIEF, FEW, 1, ZeroDivisionError())
    assert "process 1 ended: ZeroDivisionError()" in first and second is None


def of_own_rate(out):
    return make(out, replace(BRIEF, learning_rate=[0.1, 0.2][int(os.environ["RANK"])]), FEW)


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
