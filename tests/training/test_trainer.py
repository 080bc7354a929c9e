"""Training on planted data: it learns, it resumes bit for bit, it refuses what cannot be."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_wsae.artifact.files import folder_lock
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.checks import plain_beside
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training import one_site
from llm_wsae.training.arm import Arm, ArmConfig, make_arms
from llm_wsae.training.checkpoint import CHECKPOINT, is_finished, training_in
from llm_wsae.training.config import TrainConfig, learning_rate_factor
from llm_wsae.training.export import folded
from llm_wsae.training.log import TrainingLog
from llm_wsae.training.normaliser import Normaliser
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.choosing import choose_weights
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

D_IN, CONTEXT = 16, 32
CONFIG = TrainConfig(
    expansion=4, tokens=256 * 60, batch_size=256, learning_rate=1e-2, log_every=20, device="cpu"
)


class MemorySource:
    """An ActivationSource over rows in memory: sparse sums of random directions, off centre."""

    d_in = D_IN
    site = Site.parse("blocks.3.hook_resid_post")

    def __init__(self, num_rows=20_000, stop_after=None):
        generator = torch.Generator().manual_seed(7)
        directions = torch.nn.functional.normalize(
            torch.randn(32, D_IN, generator=generator), dim=1
        )
        codes = torch.rand(num_rows, 32, generator=generator)
        codes *= torch.rand(num_rows, 32, generator=generator) < 0.08
        self.rows = 3 * codes @ directions + torch.linspace(-2, 2, D_IN)
        self.num_rows = num_rows
        self.stop_after = stop_after

    def batches(self, batch_size, seed, start=0):
        number = start
        while True:
            if number == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            yield self.rows[torch.randint(self.num_rows, (batch_size,), generator=generator)]
            number += 1

    def statistics(self):
        positions = torch.arange(self.num_rows) % CONTEXT
        return Statistics(D_IN, CONTEXT).update(self.rows, positions)

    def identity(self):
        return {"kind": "memory", "model": {"name": "planted"}, "num_rows": self.num_rows}


def arms_for(source, rules=("uniform", "variance"), ks=(4,), **more):
    return make_arms(choose_weights(source.statistics(), rules, (0.5,)), ks, **more)


def fvu(dictionary, rows):
    return float((rows - dictionary(rows)).square().sum() / (rows - rows.mean(0)).square().sum())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    source = MemorySource()
    return source, out, train(source, arms_for(source, l1s=(0.02,)), CONFIG, out)


def test_every_arm_learns_and_is_saved_in_the_models_own_units(trained):
    source, out, dictionaries = trained
    assert list(dictionaries) == [
        "uniform-k4",
        "uniform-relu-l0.02",
        "variance-a0.5-k4",
        "variance-a0.5-relu-l0.02",
    ]
    for name, dictionary in dictionaries.items():
        assert fvu(dictionary, source.rows) < 0.25, name
        norms = dictionary.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        again = Dictionary.load(out / name)
        assert torch.equal(again(source.rows[:50]), dictionary(source.rows[:50]))
        assert again.info.rule in name and again.info.model == {"name": "planted"}
        torch.testing.assert_close(again.extras["mean"], source.rows.mean(0), rtol=1e-4, atol=1e-4)
    assert not (out / "checkpoint.safetensors").exists()


def test_the_log_tells_what_happened(trained):
    _, out, dictionaries = trained
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    for name, dictionary in dictionaries.items():
        numbers = [line["arms"][name] for line in lines]
        assert numbers[-1]["fvu"] < numbers[0]["fvu"]
        assert set(numbers[0]) == {"loss", "fvu", "l0", "dead"}
        if name.endswith("k4"):
            assert numbers[-1]["l0"] == pytest.approx(4, abs=0.5)
        assert dictionary.info.metrics["training"] == numbers[-1]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert lines[0]["seconds_left"] > 0 and lines[-1]["seconds_left"] == 0


def test_logged_fvu_is_that_of_the_saved_dictionary(trained):
    source, out, dictionaries = trained
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["arms"]["uniform-k4"]
    assert last["fvu"] == pytest.approx(fvu(dictionaries["uniform-k4"], source.rows), rel=0.1)


def test_arms_in_one_pass_equal_arms_alone(trained, tmp_path):
    source, _, together = trained
    alone = train(source, arms_for(source, rules=("variance",)), CONFIG, tmp_path)
    found, expected = alone["variance-a0.5-k4"], together["variance-a0.5-k4"]
    assert torch.equal(found.W_enc, expected.W_enc) and torch.equal(found.b_dec, expected.b_dec)


def test_a_space_has_twice_the_usual_learning_rate(tmp_path):
    source = MemorySource()
    places = [WeightConfig(place=place) for place in ("loss", "space")]
    weights = [
        one
        for config in places
        for one in choose_weights(source.statistics(), ("variance",), (0.5,), config=config)
    ]
    arms = make_arms(weights, (4,))
    usual = replace(CONFIG, learning_rate=None, tokens=256 * 4)

    def rates(folder, **settings):
        found = train(source, arms, replace(usual, **settings), tmp_path / folder)
        return [dictionary.info.training["learning_rate"] for dictionary in found.values()]

    assert rates("free") == [4e-3, 8e-3]
    assert rates("unit", lengths="unit") == [4e-3] * 2
    assert rates("asked", learning_rate=0.01) == [0.01] * 2
    # each is compared with the plain one beside it all the same
    arms = [*arms, *make_arms(choose_weights(source.statistics(), ("uniform",), ()), (4,))]
    found = plain_beside(train(source, arms, usual, tmp_path / "beside"))
    assert found == {arm.name: "uniform-k4" for arm in arms[:2]}
    others = {arm.name: Dictionary.load(tmp_path / "beside" / arm.name) for arm in arms}
    for one in others.values():
        one.info.store.clear()  # as another tool's, which says nothing of its rows
    assert plain_beside(others) == {}
    # the rate that is written is the one it is trained with
    (twice,) = train(
        source, arms[1:2], replace(usual, learning_rate=8e-3), tmp_path / "twice"
    ).values()
    same = Dictionary.load(tmp_path / "free" / arms[1].name)
    assert torch.equal(same.W_enc, twice.W_enc)


def test_a_terminated_training_resumes_bit_for_bit(trained, tmp_path):
    source, out, _ = trained
    arms = arms_for(source, l1s=(0.02,))
    sentence = r"stopped after step 23 of 60, .*run the same command"
    with pytest.raises(Interrupted, match=sentence) as stopped:
        train(MemorySource(stop_after=23), arms, CONFIG, tmp_path)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    shorter = replace(CONFIG, tokens=20 * CONFIG.batch_size)  # it has come farther already
    with pytest.raises(LlmWsaeError, match=r"other settings .*num_steps"):
        train(source, arms, shorter, tmp_path)
    train(source, arms, CONFIG, tmp_path)
    for name in (a.name for a in arms):
        file = "sae_weights.safetensors"
        assert (tmp_path / name / file).read_bytes() == (out / name / file).read_bytes(), name
    ours, theirs = ((p / "log.jsonl").read_text().splitlines() for p in (tmp_path, out))
    for one, other in zip(ours, theirs, strict=True):
        assert json.loads(one)["arms"] == json.loads(other)["arms"]


KILLED = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
from test_trainer import *
class Slow(MemorySource):
    def batches(self, batch_size, seed, start=0):
        for rows in super().batches(batch_size, seed, start):
            time.sleep(0.02)
            yield rows
source = Slow()
config = TrainConfig(**{{**vars(CONFIG), "checkpoint_seconds": 0.0}})
train(source, arms_for(source), config, Path({out!r}))
"""


def test_a_killed_training_resumes_bit_for_bit(trained, tmp_path):
    source, out, _ = trained
    program = KILLED.format(path=sys.path, out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert not is_finished(tmp_path)
    train(source, arms_for(source), CONFIG, tmp_path)
    file = "uniform-k4/sae_weights.safetensors"
    assert (tmp_path / file).read_bytes() == (out / file).read_bytes()


def test_a_finished_training_is_read_back_and_other_settings_are_refused(trained, tmp_path):
    source, out, dictionaries = trained
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    (out / CHECKPOINT).write_bytes(b"of a run killed at the very end")
    (out / ".tmp").mkdir()  # somebody's own
    again = train(source, arms_for(source, l1s=(0.02,)), CONFIG, out)
    assert torch.equal(again["uniform-k4"].W_enc, dictionaries["uniform-k4"].W_enc)
    other = TrainConfig(**{**vars(CONFIG), "learning_rate": 0.5})
    with pytest.raises(
        LlmWsaeError, match=r"learning_rate: 0\.\d+ in the saved training, 0.5 in this command"
    ):
        train(source, arms_for(source, l1s=(0.02,)), other, out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    (out / ".tmp").rmdir()


def test_the_way_out_of_a_lost_dictionary_leads_out(trained, tmp_path):
    source, out, dictionaries = trained
    arms = arms_for(source)
    shutil.copytree(out, tmp_path / "t")
    shutil.rmtree(tmp_path / "t" / "uniform-k4")
    record = training_in(tmp_path / "t").path
    with pytest.raises(LlmWsaeError, match=rf"uniform-k4 is not a .*; .*delete {record} and log"):
        train(source, arms_for(source, l1s=(0.02,)), CONFIG, tmp_path / "t")
    record.unlink()
    (tmp_path / "t" / "log.jsonl").unlink()
    again = train(source, arms, CONFIG, tmp_path / "t")
    assert torch.equal(again["uniform-k4"].W_enc, dictionaries["uniform-k4"].W_enc)


def test_what_fired_a_step_ago_is_never_dead(tmp_path):
    """In a short training a tenth of the rows may be less than a batch."""
    source = MemorySource(600)
    train(source, arms_for(source), replace(CONFIG, tokens=None, batch_size=100), tmp_path)
    assert training_in(tmp_path).read().request["dead_after"] == 100


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Those of a latent that never fires do not show in the loss."""
    source, made = MemorySource(600), one_site.dictionary_of

    def spoilt(*given):
        dictionary = made(*given)
        with torch.no_grad():
            dictionary.W_dec[3, 0] = float("nan")
        return dictionary

    monkeypatch.setattr(one_site, "dictionary_of", spoilt)
    with pytest.raises(LlmWsaeError, match="uniform-k4 has weights that are not finite; lower"):
        train(source, arms_for(source), replace(CONFIG, tokens=None, batch_size=100), tmp_path)
    assert not list(tmp_path.rglob("cfg.json")) and not is_finished(tmp_path)


def test_a_signal_in_the_last_step_is_obeyed(trained, tmp_path, monkeypatch):
    _, _, expected = trained
    advance = one_site.Training.advance

    def stopped(training, rows, bar):
        advance(training, rows, bar)
        if training.reached == 60:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(one_site.Training, "advance", stopped)
    with pytest.raises(Interrupted, match="stopped after step 60 of 60"):
        train(MemorySource(), arms_for(MemorySource()), CONFIG, tmp_path)
    again = train(MemorySource(), arms_for(MemorySource()), CONFIG, tmp_path)
    assert torch.equal(again["uniform-k4"].W_enc, expected["uniform-k4"].W_enc)


def test_what_was_trained_is_saved_whatever_the_rows_fail_with(tmp_path):
    class Failing(MemorySource):
        def batches(self, batch_size, seed, start=0):
            yield from itertools.islice(super().batches(batch_size, seed, start), 7)
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(Failing(), arms_for(MemorySource()), CONFIG, tmp_path)
    assert (tmp_path / CHECKPOINT).exists()


def test_memory_that_runs_out_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch):
    source = MemorySource(stop_after=5)
    with pytest.raises(Interrupted):
        train(source, arms_for(source), CONFIG, tmp_path)

    def full(arm, tensors):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Arm, "load_state", full)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        train(MemorySource(), arms_for(source), CONFIG, tmp_path)


def test_a_finished_training_needs_no_arms(trained, tmp_path, monkeypatch):
    source, out, expected = trained
    monkeypatch.setattr(one_site, "Arm", None)
    again = train(source, arms_for(source, l1s=(0.02,)), CONFIG, out)
    assert list(again) == list(expected)


def test_a_folder_in_use_is_refused(trained, tmp_path):
    source = trained[0]
    with (
        folder_lock(tmp_path, "training"),
        pytest.raises(LlmWsaeError, match="another process is writing the training"),
    ):
        train(source, arms_for(source), CONFIG, tmp_path)


def test_impossible_settings_are_refused(tmp_path):
    source = MemorySource(300)
    with pytest.raises(UsageError, match=r"k = 100 .* more than the dictionary's 64 latents"):
        train(source, arms_for(source, ks=(100,)), CONFIG, tmp_path)
    with pytest.raises(UsageError, match="the arms must be different"):
        train(source, arms_for(source) * 2, CONFIG, tmp_path)
    with pytest.raises(UsageError, match="300 rows are fewer than one batch"):
        train(source, arms_for(source), TrainConfig(batch_size=512), tmp_path)
    for name, value, said in (
        ("batch_size", 0, "batch-size is 0, but must be at least 1"),
        ("dead_after", 0, "dead-after is 0, but must be at least 1"),
        ("shuffle_seed", -1, "shuffle-seed is -1, but must be at least 0"),
        ("checkpoint_seconds", float("nan"), "checkpoint-seconds is nan, but must be a number"),
        ("learning_rate", float("nan"), "learning-rate is nan, but must be a number"),
        ("learning_rate", float("inf"), "learning-rate is inf, but must be at most"),
        ("learning_rate", 0.0, "learning_rate must be a number above 0, not 0.0"),
        ("learning_rate", -0.01, "learning_rate must be a number above 0, not -0.01"),
        ("dtype", "int8", "dtype must be auto, bfloat16 or float32"),
        ("tracker", "paper", "tracker must be none, tensorboard or wandb"),
    ):
        with pytest.raises(UsageError, match=said):
            TrainConfig(**{name: value})
    with pytest.raises(UsageError, match="warmup and decay are shares of the steps"):
        TrainConfig(warmup=0.6, decay=0.5)
    with pytest.raises(UsageError, match=r"aux-coefficient is -1\.0, but must be at least 0"):
        TrainConfig(aux_coefficient=-1.0)
    with pytest.raises(UsageError, match=r"tokens \(9\) must be at least one batch"):
        TrainConfig(tokens=9)
    assert not list(tmp_path.glob("*.safetensors"))


def test_rows_and_weights_that_nothing_can_be_learnt_from_are_refused(tmp_path):
    """Also weights that nobody chose for the site; before a folder is made."""
    source, space = MemorySource(), WeightConfig(place="space")
    still, endless = MemorySource(), MemorySource()
    still.rows = torch.ones_like(still.rows)
    endless.rows = endless.rows * 1e18
    plain, nothing = torch.ones(16), torch.zeros(16)
    for rows, weights, sentence in (
        (still, LossWeights(plain), "nothing to learn: apart from a few, the rows do not vary"),
        (endless, LossWeights(plain), "most rows are longer than 1e"),
        (source, LossWeights(plain[:9]), "for 9 dimensions, but the site has 16; make them from"),
        (source, LossWeights(plain * torch.nan), "must be finite and not negative"),
        (source, LossWeights(plain / 0), "must be finite and not negative"),
        (source, LossWeights(-plain), "must be finite and not negative"),
        (source, LossWeights(nothing), "leave no dimension in the loss"),
        (
            source,
            LossWeights(torch.ones(16, 16), config=space),
            "choose_weights refuses such weights",
        ),
        (
            source,
            LossWeights(1 - torch.eye(16)[0], config=space),
            "choose_weights refuses such weights",
        ),
    ):
        with pytest.raises(LlmWsaeError, match=sentence):
            train(rows, make_arms([weights], ks=(4,)), CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverging_loss_stops_the_training(tmp_path):
    source = MemorySource()
    config = TrainConfig(**{**vars(CONFIG), "learning_rate": 1e15})
    with pytest.raises(LlmWsaeError, match=r"the loss of uniform-k4 is \w+ at step \d+; lower"):
        train(source, arms_for(source, rules=("uniform",)), config, tmp_path)


def test_dead_latents_are_counted_and_revived():
    source = MemorySource()
    normaliser = Normaliser(source.statistics(), torch.device("cpu"), torch.float32)
    config = ArmConfig(LossWeights(torch.ones(D_IN), RULES["uniform"]), k=4)
    shares = {}
    for aux in (0.0, 1 / 32):
        arm = Arm(config, D_IN, 64, torch.device("cpu"))
        arm.parameters.encoder[:48] *= 0.02  # too faint ever to be among the k largest
        for step, rows in zip(range(400), source.batches(256, 0), strict=False):
            arm.step(normaliser.batch(rows), (step + 1) * 256, 1e-2, aux, 2000)
        shares[aux] = float(arm.dead(400 * 256, 2000)[:48].double().mean())
    assert shares[0.0] > 0.8
    assert shares[1 / 32] < 0.5 * shares[0.0]


def test_massive_rows_have_no_part():
    source = MemorySource()
    source.rows[::500] *= 1000
    statistics = source.statistics()
    normaliser = Normaliser(statistics, torch.device("cpu"), torch.float32)
    batch = normaliser.batch(source.rows)
    assert int((batch.mask == 0).sum()) == statistics.massive_count == 40
    assert not batch.x[batch.mask == 0].any()
    usual = batch.x[batch.mask > 0]
    assert float(usual.var(0).mean()) == pytest.approx(1, rel=0.1)
    assert float(usual.mean(0).abs().max()) < 0.1


def test_folding_gives_the_same_reconstruction():
    source = MemorySource()
    normaliser = Normaliser(source.statistics(), torch.device("cpu"), torch.float32)
    config = ArmConfig(LossWeights(torch.ones(D_IN), RULES["uniform"]), k=4)
    arm = Arm(config, D_IN, 64, torch.device("cpu"))
    arm.parameters.encoder_bias.normal_()
    arm.parameters.decoder_bias.normal_()
    rows = source.rows[:200]
    inside = arm.evaluate(normaliser.batch(rows))
    reconstruction = inside.residual * normaliser.scale + rows
    weights = folded(arm.parameters, normaliser.mean, normaliser.scale)
    pre = rows @ weights["W_enc"] + weights["b_enc"]
    best = pre.topk(4)
    latents = torch.zeros_like(pre).scatter_(1, best.indices, best.values.relu())
    torch.testing.assert_close(
        latents @ weights["W_dec"] + weights["b_dec"], reconstruction, rtol=1e-4, atol=1e-4
    )


def test_the_schedule_rises_stays_and_falls():
    factors = [learning_rate_factor(step, 100, 0.1, 0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[50] == 1
    assert factors[75] == pytest.approx(0.5) and factors[99] == pytest.approx(0.02)


NUMBERS = {"uniform-k4": {"loss": 0.5, "fvu": 0.4}}


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_lines_of_a_lost_run_are_cut_off(tmp_path):
    log = TrainingLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(step, 100 * step, NUMBERS, tokens_per_second=5.0)
        if step == 20:
            written = log.written
    log.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"step": 4')  # a process killed in the middle of a line
    log = TrainingLog(tmp_path, 20, written=written)
    assert steps(tmp_path) == [10, 20]
    log.write(30, 3000, NUMBERS)
    log.close()
    assert steps(tmp_path) == [10, 20, 30]


def test_a_tracker_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path)
            written.append(purge_step)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TrainingLog(tmp_path, 0, "tensorboard")
    log.write(7, 700, NUMBERS)
    log.close()
    numbers = [("uniform-k4/loss", 0.5, 7), ("uniform-k4/fvu", 0.4, 7), "closed"]
    assert written == [1, *numbers]
    TrainingLog(tmp_path, 7, "tensorboard").close()  # resumed: what was written later is hidden
    assert written[4:] == [8, "closed"]


def test_a_folder_is_one_run_of_wandb(tmp_path, monkeypatch):
    started, sent = [], []

    class Run:
        def log(self, numbers, step):
            sent.append((step, numbers))

        def finish(self):
            sent.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (7, 8):
        log = TrainingLog(tmp_path, step, "wandb")
        log.write(step, 700, NUMBERS)
        log.close()
    assert started[0] == started[1] and started[0]["id"] and started[0]["resume"] == "allow"
    assert sent[0] == (7, {"uniform-k4/loss": 0.5, "uniform-k4/fvu": 0.4})
    assert sent[1] == sent[3] == "finished"


def test_folders_are_runs_of_wandb_side_by_side(tmp_path, monkeypatch):
    """As of several sites that are streamed: without reinit, wandb's init returns the first run."""
    runs = []

    class Run:
        def __init__(self):
            self.sent = []

        def log(self, numbers, step):
            self.sent.append(numbers)

        def finish(self):
            self.sent.append("finished")

    def init(reinit="return_previous", **settings):
        if not (runs and reinit == "return_previous"):
            runs.append(Run())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    sites = [tmp_path / "blocks.0.hook_resid_post", tmp_path / "blocks.1.hook_resid_post"]
    for site in sites:
        site.mkdir()
    logs = [TrainingLog(site, 0, "wandb") for site in sites]
    for number, log in enumerate(logs):
        log.write(7, 700, {"uniform-k4": {"loss": float(number)}})
    for log in logs:
        log.close()
    assert [run.sent for run in runs] == [
        [{"uniform-k4/loss": 0.0}, "finished"],
        [{"uniform-k4/loss": 1.0}, "finished"],
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_sentence(tmp_path):
    log = TrainingLog(tmp_path, 0)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(LlmWsaeError, match=r"cannot write .*log.jsonl: No space left on device"):
        log.write(7, 700, NUMBERS)


def test_a_tracker_without_its_key(tmp_path, monkeypatch):
    class UsageError(Exception):
        """Wandb's, which is no error of Python's own."""

    def init(**settings):
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(LlmWsaeError, match=r"cannot be started \(No API key .*WANDB_API_KEY") as it:
        TrainingLog(tmp_path, 0, "wandb")
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LlmWsaeError, match=rf"pip install 'llm-wsae\[{tracker}\]'"):
        TrainingLog(tmp_path, 0, tracker)
