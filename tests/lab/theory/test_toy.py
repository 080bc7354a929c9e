"""The toy experiment, small, with the ordinary trainer."""

import json
from itertools import islice

import pytest
import torch
from command_line import call, content, works

from llm_wsae.data.shuffling import ActivationSource, MemorySource
from llm_wsae.lab.theory import toy
from llm_wsae.model.site import Site

SITE = Site.parse("blocks.0.hook_resid_post")
NAMES = ["uniform", "variance-a0.5", "whitening-a0.5", "random directions", "closed form"]


@pytest.fixture
def small(monkeypatch):
    for name, size in {"_TRAIN_ROWS": 4000, "_TEST_ROWS": 2000, "_MODEL_STEPS": 100}.items():
        monkeypatch.setattr(toy, name, size)


def test_rows_in_memory_are_a_source():
    rows = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    source = MemorySource(rows, SITE)
    assert isinstance(source, ActivationSource) and source.num_rows == 3000
    first, second, third = islice(source.batches(1000, 7), 3)
    every = torch.cat([first, second, third])
    assert torch.equal(every.sort(dim=0).values, rows.sort(dim=0).values)
    assert not torch.equal(every, rows)
    assert torch.equal(next(source.batches(1000, 7, start=2)), third)
    assert source.statistics().count == 3000
    covariance = source.second_moment().covariance()
    torch.testing.assert_close(covariance, rows.double().T.cov(correction=0), rtol=1e-3, atol=1e-4)
    assert source.identity() == MemorySource(rows.double(), SITE).identity()
    assert source.identity() != MemorySource(rows + 1, SITE).identity()


@pytest.mark.slow
def test_every_dictionary_is_compared_with_the_truth_and_a_finished_one_is_only_read(
    small, tmp_path
):
    words = ("theory", "--sparsity", 0.99, "--seeds", 0, "--steps", 150, "--out", tmp_path)
    text = works(*words).out
    report = json.loads((tmp_path / "theory.json").read_text())
    found = report["found"]["0.99"]
    assert list(found) == NAMES and all(name in text for name in NAMES)
    trained, random, best = (found[name][0] for name in ("uniform", *NAMES[-2:]))
    assert random["mmcs"] < trained["mmcs"] < best["mmcs"] == pytest.approx(1, abs=0.01)
    assert trained["l_gt"] < random["l_gt"]
    before = content(tmp_path)
    again = works("theory", "--sparsity", 0.99, "--seeds", 0, 1, "--steps", 150,
                  "--out", tmp_path, "--json").json  # fmt: skip
    assert {name: of_seeds[0] for name, of_seeds in again["found"]["0.99"].items()} == {
        name: of_seeds[0] for name, of_seeds in found.items()
    }
    kept = {path: data for path, data in before.items() if "seed0" in str(path)}
    assert kept and kept.items() <= content(tmp_path).items()
    assert "intact" in works("verify", tmp_path).out
    other = call("theory", "--sparsity", 0.99, "--seeds", 0, "--steps", 151, "--out", tmp_path)
    assert other.code == 1 and "num_steps" in other.err.replace(" ", "_")


def test_what_cannot_be_run_is_refused(tmp_path):
    for words, said in (
        (("--sparsity", 1), "there is no feature to find"),
        (("--sparsity", 1.5), "sparsity"),
        (("--rule", "sensitivity"), "cannot measure what the rule sensitivity reads"),
        (("--rule", "varance"), "varance"),
        (("--steps", 0), "steps"),
    ):
        result = call("theory", *words, "--out", tmp_path / "out")
        assert result.code == 2 and said in result.err and not (tmp_path / "out").exists()
