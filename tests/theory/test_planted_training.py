"""Tied TopK dictionaries: the gradient by hand, pairing, annealing, and that they learn."""

import pytest
import torch

from llm_wsae.theory.recovery import measure
from llm_wsae.theory.superposition import digon_mixing, planted
from llm_wsae.theory.tied import Schedule, encode_tied, tied_gradient, train_tied

DATA = planted(digon_mixing(3, 2), 0.7)  # n = 7, n_p = 5


def schedule(steps: int = 40, rate: float = 0.01) -> Schedule:
    return Schedule(num_latents=10, k=2, steps=steps, batch=64, learning_rate=rate)


def trained(gamma: torch.Tensor, annealed: list[bool], scale=None, steps: int = 40) -> torch.Tensor:
    scale = torch.ones_like(gamma) if scale is None else scale
    return train_tied(DATA, gamma, torch.tensor(annealed), scale, schedule(steps), seed=3)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_gradient_is_autograds(k):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 10, 5, generator=g).requires_grad_()
    x = torch.randn(3, 50, 5, generator=g)
    gamma = torch.rand(3, 1, 5, generator=g)
    pre = torch.bmm(x, w.transpose(1, 2)).relu()
    kept = torch.zeros_like(pre).scatter(-1, pre.topk(k, -1).indices, 1.0)
    loss = ((x - torch.bmm(pre * kept, w)) * gamma).square().sum(2).mean(1).sum()
    loss.backward()
    found = tied_gradient(w.detach(), x, gamma.square(), k)
    torch.testing.assert_close(found, w.grad, rtol=1e-4, atol=1e-5)


def test_codes_are_the_k_largest_positive():
    w = torch.eye(4)
    x = torch.tensor([[3.0, 1, 2, -5], [-1, -2, -3, -4], [0, 0, 5, 0]])
    expected = [[3.0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 5, 0]]
    assert encode_tied(w, x, 2).tolist() == expected
    assert encode_tied(w, x, 4).tolist() == [[3.0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 5, 0]]


def test_an_arm_does_not_depend_on_its_neighbours():
    g = torch.Generator().manual_seed(1)
    gamma = torch.rand(7, 5, generator=g)
    together = trained(gamma, [False, True, False, True, False, False, True])
    alone = trained(gamma[5:6], [False])
    torch.testing.assert_close(together[5], alone[0], rtol=1e-3, atol=1e-4)
    assert (together[5] - together[4]).abs().max() > 0.01


def test_arms_of_a_seed_start_and_see_the_same():
    same = trained(torch.ones(2, 5), [False, True])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-6)


def test_weights_count_until_they_are_annealed_away():
    gamma = torch.tensor([[1.0, 1, 1, 1, 0.01]])
    fixed = trained(gamma, [False], steps=400)[0]
    moved = trained(gamma, [True], steps=400)[0]
    x = DATA.features(4000, torch.Generator().manual_seed(5))
    observed = DATA.observe(x)

    def missed(w: torch.Tensor) -> torch.Tensor:
        return (observed - encode_tied(w, observed, 2) @ w).square().sum(0) / observed.square().sum(
            0
        )

    assert missed(fixed)[4] > 0.5  # nothing in the loss asked for dimension 4
    assert missed(moved)[4] < 0.5 * missed(fixed)[4]


def test_standardising_undoes_an_outlier_exactly():
    """Training in a scaled space is training on scaled data."""
    scale = torch.tensor([[1.0, 1, 20, 1, 1]])
    from_plain = trained(torch.ones(1, 5), [False], scale)
    loud = planted(scale.T * DATA.mixing, 0.7)
    from_loud = train_tied(
        loud, torch.ones(1, 5), torch.tensor([False]), torch.ones(1, 5), schedule(), seed=3
    )
    torch.testing.assert_close(from_plain, from_loud, rtol=1e-3, atol=1e-3)


def test_sparse_digons_are_learned():
    data = planted(digon_mixing(3, 2), 0.9)
    plan = Schedule(num_latents=10, k=1, steps=600, batch=128, learning_rate=0.02)
    one = torch.ones(1, 5)
    w = train_tied(data, one, torch.tensor([False]), one, plan, seed=1)[0]
    x = data.features(4000, torch.Generator().manual_seed(2))
    found = measure(w, encode_tied(w, data.observe(x), 1), data.mixing, x)
    assert found.mmcs > 0.98 and found.recovered == 1
    assert found.l_gt < 0.3  # k = 1 misses the second feature where two are active
