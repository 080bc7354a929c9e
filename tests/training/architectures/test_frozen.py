"""Half-trained baselines: TopK whose encoder or decoder stays random."""

from dataclasses import replace

import pytest
import torch
from training_cases import CONFIG, Planted, arms_for, log_of

from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.training.trainer import Interrupted, train

HALVES = ("encoder", "decoder")


def arms(source, half):
    return arms_for(source, l1s=(), architectures=("topk", f"frozen-{half}"))


def directions(dictionary, half):
    """Rows of a half at length 1: how long they are is not what is frozen, once they are folded."""
    rows = dictionary.W_enc.T if half == "encoder" else dictionary.W_dec
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("half", HALVES)
def test_one_half_stays_and_the_other_learns(tmp_path, half):
    source = Planted()
    found = train(source, arms(source, half), CONFIG, tmp_path)
    frozen, learnt = found[f"uniform-frozen-{half}-k2"], found["uniform-k2"]
    assert frozen.sparsity == TopK(2)
    assert frozen.info.training["architecture"] == f"frozen-{half}"
    other = HALVES[half == "encoder"]
    start = train(source, arms(source, half), replace(CONFIG, tokens=256), tmp_path / "one step")
    first = start[f"uniform-frozen-{half}-k2"]
    assert torch.allclose(directions(frozen, half), directions(first, half), atol=1e-6)
    moved = (directions(frozen, other) * directions(first, other)).sum(1)
    assert moved.mean() < 0.95
    last = log_of(tmp_path)[-1]["arms"]
    assert last[f"uniform-frozen-{half}-k2"]["fvu"] > 1.3 * last["uniform-k2"]["fvu"]
    closest = [
        (directions(one, "decoder") @ source.directions.T).amax(0).mean()
        for one in (frozen, learnt)
    ]
    assert closest[0] < closest[1] - 0.05


@pytest.mark.parametrize("half", HALVES)
def test_it_resumes_with_the_same_half(tmp_path, half):
    name, source = f"uniform-frozen-{half}-k2", Planted()
    whole = train(source, arms(source, half), CONFIG, tmp_path / "whole")[name]
    with pytest.raises(Interrupted):
        train(Planted(stop_after=40), arms(source, half), CONFIG, tmp_path / "broken")
    resumed = train(source, arms(source, half), CONFIG, tmp_path / "broken")[name]
    assert torch.equal(resumed.W_enc, whole.W_enc) and torch.equal(resumed.W_dec, whole.W_dec)
