"""Training on planted data: it learns, it resumes bit for bit, it refuses what cannot be."""

import itertools
import shutil
import sys
from dataclasses import replace
from unittest.mock import Mock, call

import pytest
import torch
from training_cases import CONFIG as LONG
from training_cases import CPU, Planted, arms_for, check_same, fvu, log_of

from llm_wsae.artifact.files import folder_lock, load_own_tensors, save_own_tensors
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.checks import plain_beside
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import CHECKPOINT, TrainingLog, is_finished, training_in
from llm_wsae.training.config import TrainConfig, learning_rate_factor
from llm_wsae.training.trainer import Interrupted, Training, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule

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
    arms, record = four_arms(source), training_in(out).path
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    (out / CHECKPOINT).write_bytes(b"of a run killed at the very end")
    (out / ".tmp").mkdir()  # somebody's own
    again = train(source, arms, CONFIG, out)
    assert torch.equal(again["uniform-k4"].W_enc, dictionaries["uniform-k4"].W_enc)
    said = r"learning_rate: 0\.\d+ in the saved training, 0.5 in this command"
    with pytest.raises(LlmWsaeError, match=said):
        train(source, arms, replace(CONFIG, learning_rate=0.5), out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    (out / ".tmp").rmdir()
    lost = shutil.copytree(out, tmp_path / "lost")
    shutil.rmtree(lost / "uniform-k4")
    record = training_in(lost).path
    with pytest.raises(LlmWsaeError, match=rf"uniform-k4 is missing; .*delete {record} and log"):
        train(source, arms, CONFIG, lost)
    record.unlink()
    (lost / "log.jsonl").unlink()
    train(source, arms, CONFIG, lost)
    check_same(lost, out, [arm.name for arm in arms])


def test_a_latent_that_fired_a_step_ago_is_not_dead(tmp_path):
    """In a short training a tenth of the rows may be less than a batch."""
    config, source = replace(CONFIG, tokens=None, batch_size=100), Planted(600)
    assert Training(source, two_arms(source), config, tmp_path, CPU).dead_after == 100


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
        with pytest.raises(LlmWsaeError, match=said):
            train(rows, wanted, CONFIG, out)
    assert not out.exists()
    for settings, said in (
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, not 0.0"),
        ({"tracker": "paper"}, "tracker must be none, tensorboard or wandb, not 'paper'"),
        ({"warmup": 0.6, "decay": 0.5}, "warmup and decay are shares of the steps"),
        ({"tokens": 9}, r"tokens \(9\) must be at least one batch"),
    ):
        with pytest.raises(UsageError, match=said):
            TrainConfig(**settings)
    with folder_lock(out, "training"), pytest.raises(LlmWsaeError, match="is writing the training"):
        train(source, arms, CONFIG, out)


def test_massive_rows_have_no_part():
    source = Planted(20_000, massive=True)
    batch = source.normaliser().batch(source.rows)
    assert int((batch.mask == 0).sum()) == source.statistics().massive_count == 40
    assert not batch.x[batch.mask == 0].any()
    usual = batch.x[batch.mask > 0]
    assert float(usual.var(0).mean()) == pytest.approx(1, rel=0.1)
    assert float(usual.mean(0).abs().max()) < 0.1
    rows = source.rows[1:5].clone()
    rows[1, 2], rows[2, 0] = float("inf"), float("nan")
    broken = source.normaliser().batch(rows)
    assert broken.mask.tolist() == [1, 0, 0, 1] and not broken.x[1:3].any()
    assert torch.equal(broken.x[3], batch.x[4])


def test_the_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(step, 100, 0.1, 0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[50] == 1
    assert factors[75] == pytest.approx(0.5) and factors[99] == pytest.approx(0.02)


# --- The log and its trackers

NUMBERS = {"uniform-k4": {"loss": 0.5, "fvu": 0.4}}


def test_a_full_disk_is_a_sentence(tmp_path):
    log = TrainingLog(tmp_path, 0)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(LlmWsaeError, match=r"cannot write .*log.jsonl: No space left on device"):
        log.write(7, 700, NUMBERS)


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
    sent = [call.log(numbers, step=8), call.finish()]
    if tracker == "tensorboard":
        sent = [*(call.add_scalar(*one, 8) for one in numbers.items()), call.close()]
    assert [run.method_calls for run in runs] == [sent] * 3
    settings = [one.kwargs for one in begin.call_args_list]
    if tracker == "tensorboard":
        assert settings == [{"purge_step": 8}] * 3
    else:
        assert settings[0]["id"] == settings[2]["id"] != settings[1]["id"]
        assert {(one["resume"], one["reinit"]) for one in settings} == {("allow", "create_new")}


def test_trackers_that_cannot_be_started(tmp_path, monkeypatch):
    class UsageError(Exception):
        """Wandb's, which is no error of Python's own."""

    error = UsageError("No API key configured.\nUse `wandb login` to log in.")
    monkeypatch.setitem(sys.modules, "wandb", Mock(init=Mock(side_effect=error)))
    with pytest.raises(LlmWsaeError, match=r"cannot be started \(No API key .*WANDB_API_KEY") as it:
        TrainingLog(tmp_path, 0, "wandb")
    assert "\n" not in str(it.value)
    for tracker, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(LlmWsaeError, match=rf"pip install 'llm-wsae\[{tracker}\]'"):
            TrainingLog(tmp_path, 0, tracker)
