"""Every architecture learns, resumes and is read back, on planted data; the docs' diff adds one."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from looping import over
from places import ROOT
from refusals import misused
from training_cases import CONFIG, CPU, NAMES, Planted, arms_for, check_same, fvu, log_of

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import JumpReLU, TopK
from llm_wsae.errors import LlmWsaeError
from llm_wsae.training.architectures import architecture_names
from llm_wsae.training.arm import Arm, ArmConfig, make_arms
from llm_wsae.training.normaliser import folded
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.rules import RULES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out, source = tmp_path_factory.mktemp("trained"), Planted(massive=True)
    return source, out, train(source, arms_for(source), CONFIG, out)


@over(name=NAMES)
def test_the_planted_directions_are_found(trained, name):
    source, out, dictionaries = trained
    dictionary, rows = dictionaries[name], Planted(5000).rows
    decoder = torch.nn.functional.normalize(dictionary.W_dec, dim=1)
    assert (decoder @ source.directions.T).amax(0).mean() > 0.9
    # TopK gives every row two latents, be there none or five directions in it
    allowed = {"uniform-batch-topk-k2": 0.1, "uniform-jumprelu-k2": 0.1, "uniform-gba-k2": 0.4}
    assert fvu(dictionary, rows) < allowed.get(name, 0.25)
    l0 = float((dictionary.encode(rows) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(2, rel=0.06) or ("relu-l0.1" in name and l0 < 9) or "gba" in name
    assert "gba" not in name or 1 < l0 < 2.2  # no latent is raised to its target
    logged = log_of(out)[-1]["arms"][name]
    assert logged["l0"] == pytest.approx(l0, rel=0.1)
    assert logged["fvu"] == pytest.approx(fvu(dictionary, rows), rel=0.15)


def stepped(config, source, steps):
    """An arm alone after so many steps."""
    arm, normaliser = Arm(config, 16, 64, CPU), source.normaliser()
    for step, rows in zip(range(steps), source.batches(256, 0), strict=False):
        arm.step(normaliser.batch(rows), (step + 1) * 256, 1e-2, 1 / 32, 2000)
    return arm


@over(name=NAMES)
def test_a_saved_dictionary_encodes_as_the_training_did(trained, tmp_path, name):
    """Also where the selection looked at the batch: with that batch's own threshold."""
    source, _, dictionaries = trained
    (config,) = (arm for arm in arms_for(source) if arm.name == name)
    normaliser, arm = source.normaliser(), stepped(config, source, 100)
    rows = source.rows[source.rows.norm(dim=1) < 100][:300]
    inside = arm.evaluate(normaliser.batch(rows))
    threshold = arm.architecture.thresholds()
    if config.architecture in ("batch-topk", "matryoshka"):
        own = inside.observed * 0.99999
        assert 0.8 < float(own / threshold[0]) < 1.25  # the mean over the batches is near it
        threshold = own.expand(64)
    Dictionary(
        **folded(arm.parameters, normaliser.x, normaliser.y, threshold),
        sparsity=arm.architecture.sparsity,
        info=dictionaries[name].info,
    ).save(tmp_path / name)
    loaded = Dictionary.load(tmp_path / name)
    assert torch.equal((loaded.encode(rows) > 0).sum(0), inside.firings.long())
    reconstruction = inside.residual * normaliser.y.scale + rows
    torch.testing.assert_close(loaded(rows), reconstruction, rtol=1e-4, atol=1e-4)
    assert loaded.sparsity == arm.architecture.sparsity
    assert isinstance(loaded.sparsity, JumpReLU) == (threshold is not None)
    told = dictionaries[name].info.training
    assert told["architecture"] == config.architecture
    assert told[config.kind.setting] == config.level


def test_a_terminated_training_resumes_bit_for_bit(tmp_path):
    source, config = Planted(massive=True), replace(CONFIG, tokens=256 * 60, log_every=20)
    space = weights_from_rule("variance", 0.5, source.statistics(), WeightConfig(place="space"))
    arms = [*arms_for(source, architectures=architecture_names()), *make_arms([space], (2,))]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(source, arms, config, whole)
    said = r"stopped after step 33 of 60, .*run the same command"
    with pytest.raises(Interrupted, match=said) as stopped:
        train(Planted(massive=True, stop_after=33), arms, config, broken)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(LlmWsaeError, match=r"other settings .*num_steps"):  # it is farther already
        train(source, arms, replace(config, tokens=256 * 20), broken)
    train(source, arms, config, broken)
    check_same(broken, whole, [arm.name for arm in arms])


@over(half=("encoder", "decoder"))
def test_one_half_stays_and_the_other_learns(half):
    """Directions, that is: free lengths, which there are none of, are no part of what is frozen."""
    source = Planted()
    (config,) = arms_for(source, l1s=(), architectures=(f"frozen-{half}",))
    before, arm = (stepped(config, source, steps) for steps in (0, 40))
    moved = [not torch.equal(*both) for both in zip(before.parameters, arm.parameters, strict=True)]
    assert moved == [half == "decoder", half == "encoder", True, True]
    assert arm.architecture.sparsity == TopK(2) and arm.lengths == "unit"


def test_arms_are_named_and_relu_takes_l1_coefficients_and_the_others_k():
    gamma = LossWeights(torch.ones(16), RULES["variance"], 0.5)
    arms = make_arms([gamma], (4, 8), (0.1,), (0, 3), ("topk", "matryoshka"))
    names = ["k4", "k8", "matryoshka-k4", "matryoshka-k8", "relu-l0.1"]
    expected = [f"variance-a0.5-{name}{seed}" for seed in ("", "-s3") for name in names]
    assert [arm.name for arm in arms] == expected
    gamma = LossWeights(torch.ones(16))
    named = make_arms([gamma], (4,), (0.1,), architectures=("relu", "topk"))
    assert [arm.name for arm in named] == ["own-relu-l0.1", "own-k4"]
    misused("at least one L1 coefficient", make_arms, [gamma], (4,), architectures=("relu",))
    misused("relu needs an L1 coefficient and no k", ArmConfig, gamma, 4, architecture="relu")
    misused("topk needs k and no L1 coefficient", ArmConfig, gamma, l1=0.1)
    misused("topk needs k and no L1 coefficient", ArmConfig, gamma, 4, 0.1)
    gba = ArmConfig(gamma, 4, architecture="gba")
    misused("these have: batch-topk, matryoshka, topk", gba.lengths, "free")


PAGE = ROOT / "docs/adding-an-architecture.md"
ADDED = "llm_wsae/training/architectures/annealed_topk.py"
ITS_TEST = "tests/training/architectures/test_annealed_topk.py"


def test_the_diff_in_the_docs_adds_an_architecture(tmp_path):
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == [ADDED, ITS_TEST]
    for folder in ("llm_wsae", "tests/helpers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "tests/conftest.py", "tests/slow.txt"):
        shutil.copy(ROOT / file, tmp_path / file)

    def run(*words, given=None):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        streams = {"input": given, "capture_output": True, "text": True}
        done = subprocess.run(words, cwd=tmp_path, env=environment, **streams)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("git", "apply", "-", given=diff)
    run(sys.executable, "-m", "ruff", "check", "--select", "E,F,I,UP,B", ADDED, ITS_TEST)
    assert "2 passed" in run(sys.executable, "-m", "pytest", "-o", "addopts=", ITS_TEST)
    assert "annealed-topk" in run(sys.executable, "-m", "llm_wsae", "train", "--help-all")
