import itertools

import pytest
import torch

from llm_wsae.dictionary.sparsity import (
    SPARSITIES,
    JumpReLU,
    ReLU,
    TopK,
    sparsity_from_settings,
    to_dense,
)
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.sparse.codes import Codes


def test_topk_keeps_the_k_largest_and_clips_negative_ones():
    for d_sae, k in itertools.product((7, 64, 240), (1, 3, 7)):
        pre = torch.randn(50, d_sae, generator=torch.Generator().manual_seed(k)) - 1
        kth = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
        expected = torch.where(pre >= kth, pre, 0.0).clamp(min=0)
        codes = TopK(k).select(pre)
        assert codes.indices.shape == (50, k), (d_sae, k)
        assert torch.equal(to_dense(codes, d_sae), expected), (d_sae, k)


def test_relu_keeps_every_positive_entry():
    pre = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    pre[3] = -1.0
    codes = ReLU().select(pre)
    assert codes.indices.shape[1] == int((pre > 0).sum(1).max())
    assert torch.equal(to_dense(codes, 40), pre.clamp(min=0))
    assert torch.equal(to_dense(ReLU().select(pre[3:4]), 40), torch.zeros(1, 40))


def test_jumprelu_keeps_what_is_above_its_latents_threshold():
    draw = torch.Generator().manual_seed(0)
    pre, threshold = torch.randn(50, 40, generator=draw), torch.rand(40, generator=draw)
    threshold[:3] = torch.tensor([-0.5, 0.0, 9.0])
    pre[3], pre[4] = -1.0, threshold  # what equals its threshold is not above it
    codes = JumpReLU().select(pre, threshold)
    expected = pre.clamp(min=0) * (pre > threshold)
    assert codes.indices.shape[1] == int((expected > 0).sum(1).max())
    assert torch.equal(to_dense(codes, 40), expected)
    assert not expected[3].any() and not expected[4].any() and not expected[:, 2].any()
    assert expected[:, 0].any() and not (expected < 0).any()
    assert all(len(set(row)) == len(row) for row in codes.indices.tolist())
    zeros = torch.zeros(40)
    assert torch.equal(
        to_dense(JumpReLU().select(pre, zeros), 40), to_dense(ReLU().select(pre), 40)
    )


def test_unused_slots_leave_other_latents_alone():
    codes = Codes(torch.tensor([[0, 0, 3]]), torch.tensor([[2.0, 0.0, 0.0]]))
    assert to_dense(codes, 4).tolist() == [[2, 0, 0, 0]]


def test_settings_lead_back_to_the_same_sparsity():
    for sparsity in (TopK(5), ReLU(), JumpReLU()):
        cfg = {"architecture": sparsity.architecture, **sparsity.settings()}
        assert sparsity_from_settings(cfg) == sparsity
    assert {"topk", "standard", "jumprelu"} == set(SPARSITIES)


def test_unknown_architecture_names_the_known_ones():
    with pytest.raises(LlmWsaeError, match=r"'gated'.*'topk'.*'standard'.*'jumprelu'"):
        sparsity_from_settings({"architecture": "gated"})


def test_bad_k_in_a_file():
    for k in (None, 0, -1, 2.5, "3", True):
        with pytest.raises(LlmWsaeError, match=f"k is {k!r}, but .* needs a positive integer"):
            sparsity_from_settings({"architecture": "topk", "k": k})


def test_impossible_k():
    with pytest.raises(UsageError, match="at least 1"):
        TopK(0)
    with pytest.raises(UsageError, match="more than the dictionary's 8 latents"):
        TopK(9).check(8)
    TopK(8).check(8)
