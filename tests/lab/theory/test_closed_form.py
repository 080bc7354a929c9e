"""Theorems 1–5 of Cui et al. 2026, each as far as it goes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_wsae.errors import UsageError
from llm_wsae.lab.theory.closed_form import (
    check_assumptions,
    loss_gap,
    losses,
    recovered,
    relative_error,
    sae_loss,
    sparsity_for_error,
    truth_loss,
)
from llm_wsae.lab.theory.optimum import (
    best_scalar,
    best_scaled_gap_norm,
    gap_matrix,
    gap_norms,
    least_gap_norm,
    least_gap_weights,
)
from llm_wsae.lab.theory.superposition import Superposition, digon_mixing

EXAMPLE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
ANGLES = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
TRIANGLE = torch.stack([ANGLES.cos(), ANGLES.sin()])
DIGONS = digon_mixing(1, 2).double()  # one lone feature, two digons: n = 5, n_p = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def features(mixing: torch.Tensor, sparsity: float, rows: int = 2000) -> torch.Tensor:
    return Superposition(mixing, sparsity).features(rows, generator(7))


def one_sparse(n: int) -> torch.Tensor:
    """Rows in which one feature is active, at three strengths."""
    eye = torch.eye(n, dtype=torch.float64)
    return torch.cat([0.3 * eye, 0.7 * eye, eye])


def descend(start: torch.Tensor, x_p: torch.Tensor, steps: int = 800) -> torch.Tensor:
    """Where Adam ends on L_SAE from a dictionary."""
    w = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([w], lr=0.02)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimiser.zero_grad()
        sae_loss(w, x_p).backward()
        optimiser.step()
    return w.detach()


# Theorem 1: the closed form, shrinking and vanishing.


def test_the_papers_example():
    x = torch.tensor([[0.5, 1.0, 0.8]], dtype=torch.float64)
    expected = torch.tensor([[0.5, 0.2, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(recovered(EXAMPLE, x), expected, rtol=0, atol=1e-12)
    found = losses(EXAMPLE, x)
    assert found.shrunk.tolist() == [0, 1, 0]
    assert found.vanished.tolist() == [0, 0, 1]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_digons_are_reconstructed_exactly_at_any_sparsity(sparsity):
    """Though the true features are not recovered; spare latents stay silent."""
    x = features(DIGONS, sparsity)
    dictionary = torch.cat([DIGONS.T, DIGONS.new_zeros(3, 3)])  # (W_p, 0)ᵀ
    codes = (x @ DIGONS.T @ dictionary.T).relu()
    torch.testing.assert_close(codes[:, :5], recovered(DIGONS, x), rtol=0, atol=1e-12)
    assert codes[:, 5:].abs().max() == 0
    assert float(sae_loss(dictionary, x @ DIGONS.T)) < 1e-28
    assert sparsity > 0.8 or float(relative_error(DIGONS, x)) > 0.1


@pytest.mark.parametrize("size", [0.01, 0.1, 0.5])
def test_a_digon_optimum_is_lost_by_perturbation_and_found_again_by_descent(size):
    x_p = features(DIGONS, 0.5) @ DIGONS.T
    best = DIGONS.T
    direction = normal(5, 3, seed=3)
    moved = best + size * direction / direction.norm()
    lost = float(sae_loss(moved, x_p))
    assert lost > 1e-3 * size**2
    assert float(sae_loss(descend(moved, x_p), x_p)) < 1e-6 * lost


def test_descent_stays_at_the_digon_optimum_and_never_beats_it():
    x_p = features(DIGONS, 0.5, 500) @ DIGONS.T
    w = DIGONS.T.clone().requires_grad_()
    best = sae_loss(w, x_p)
    best.backward()
    assert w.grad.abs().max() < 1e-12
    ends = [float(sae_loss(descend(normal(5, 3, seed=s), x_p, 1500), x_p)) for s in (1, 2)]
    assert min(ends) >= float(best.detach()) and min(ends) < 1e-3


def test_on_dense_inputs_a_triangle_is_not_the_optimum_though_its_position_is_allowed():
    assert check_assumptions(TRIANGLE).hold and not check_assumptions(TRIANGLE).only_digons
    x_p = features(TRIANGLE, 0.0) @ TRIANGLE.T
    at_closed_form = float(sae_loss(TRIANGLE.T, x_p))
    better = float(sae_loss(descend(TRIANGLE.T, x_p), x_p))
    assert at_closed_form > 0.03
    assert better < 0.95 * at_closed_form


def test_positive_interference_breaks_recovery_even_of_single_features():
    mixing = torch.tensor([[1.0, 0.5], [0.0, math.sqrt(0.75)]], dtype=torch.float64)
    assert not check_assumptions(mixing).hold
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(recovered(mixing, x), x + torch.tensor([[0.0, 0.5]]).double())
    assert float(sae_loss(mixing.T, x @ mixing.T)) > 0.2


# Theorem 2: recovery becomes exact as S → 1.


@pytest.mark.parametrize("mixing", [EXAMPLE, TRIANGLE, DIGONS], ids=["pair", "triangle", "digons"])
def test_one_sparse_inputs_are_recovered_exactly(mixing):
    x = one_sparse(mixing.shape[1])
    torch.testing.assert_close(recovered(mixing, x), x, rtol=0, atol=1e-12)
    assert float(sae_loss(mixing.T, x @ mixing.T)) < 1e-28
    found = losses(mixing, x)
    assert found.shrunk.max() == 0 and found.vanished.max() == 0


def test_recovery_of_digons_improves_in_proportion_to_the_sparsity():
    """E min(x₁, x₂)²·P(both) / E x² = (1 − S)/2, for uniform features."""
    mixing = digon_mixing(0, 3).double()
    for sparsity in (0.0, 0.5, 0.9):
        error = float(relative_error(mixing, features(mixing, sparsity, 60_000)))
        assert error == pytest.approx((1 - sparsity) / 2, rel=0.04)


def test_shrinking_and_vanishing_of_digons_have_their_probabilities():
    """Beside an active feature the other is active with 1 − S, and stronger half the time."""
    mixing = digon_mixing(1, 1).double()
    found = losses(mixing, features(mixing, 0.4, 60_000))
    assert found.shrunk.tolist() == pytest.approx([0, 0.3, 0.3], abs=0.01)
    assert found.vanished.tolist() == pytest.approx([0, 0.3, 0.3], abs=0.01)


def test_the_sparsity_for_an_error():
    digons = digon_mixing(0, 3).double()
    for bound in (0.05, 0.2):
        found = sparsity_for_error(digons, bound, generator(1), rows=40_000)
        assert found == pytest.approx(1 - 2 * bound, abs=0.01)
    assert sparsity_for_error(torch.eye(3, dtype=torch.float64), 0.01, generator()) == 0.0
    assert sparsity_for_error(0.5 * digons, 0.05, generator()) is None  # shrinks to a quarter
    thirds = TRIANGLE.mT @ TRIANGLE  # a column's interference with another one is −½: none appears
    assert bool((thirds.tril(-1) <= 0).all())
    assert sparsity_for_error(TRIANGLE, 0.05, generator(), rows=64) is not None
    near = torch.tensor([[1.0, 0.6], [0.0, 0.8]], dtype=torch.float64)  # both appear for either
    for rows in (2, 64, 1000):  # whatever the sample happens to hold
        assert sparsity_for_error(near, 0.6**2 - 1e-9, generator(), rows) is None
        assert sparsity_for_error(near, 0.6**2 + 1e-9, generator(), rows) is not None
    few = [sparsity_for_error(digons, 0.05, generator(seed), rows=64) for seed in range(4)]
    assert None not in few  # where a small sample has no active feature there is no error


# Theorem 3: uniqueness.


def test_a_digon_alone_has_one_optimum_up_to_order():
    mixing = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    x_p = features(mixing, 0.8, 500) @ mixing.T
    for start in ([0.2, -1.7], [-0.4, 0.3], [2.0, -0.1]):
        end = descend(torch.tensor(start, dtype=torch.float64)[:, None], x_p)
        assert sorted(end[:, 0].tolist()) == pytest.approx([-1, 1], abs=1e-4)


def test_several_digons_have_a_continuum_of_optima():
    q = torch.linalg.qr(normal(3, 3, seed=5)).Q
    frame = torch.cat([q, -q])
    mixing = digon_mixing(0, 3).double()
    x = features(mixing, 0.5)
    assert float(sae_loss(frame, x @ mixing.T)) < 1e-28
    assert (frame @ mixing).amax(0).max() < 0.999  # with none of the true directions
    dense = normal(3, 9, seed=6)  # and whatever W_p is
    assert float(sae_loss(frame, features(dense, 0.0) @ dense.T)) < 1e-26


def test_a_triangle_has_a_second_optimum_on_one_sparse_inputs():
    x_p = one_sparse(3) @ TRIANGLE.T
    antipodes = -math.sqrt(2) * TRIANGLE.T
    assert float(sae_loss(TRIANGLE.T, x_p)) < 1e-28
    assert float(sae_loss(antipodes, x_p)) < 1e-28


# Theorems 4 and 5: the gap.


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9), st.floats(0, 0.9))
def test_the_gap_is_the_quadratic_form(seed, n_p, n, sparsity):
    mixing = normal(n_p, n, seed=seed) / n_p**0.5
    x = features(mixing, sparsity, 50)
    seen = x @ mixing.T
    for weights in (None, normal(n_p, seed=seed + 1), normal(n_p, n_p, seed=seed + 2)):
        direct = sae_loss(mixing.T, seen, weights) - truth_loss(mixing, x)
        torch.testing.assert_close(loss_gap(mixing, x, weights), direct, rtol=1e-10, atol=1e-10)


def test_weights_close_the_gap_where_dimensions_differ_in_scale_and_never_that_of_a_digon():
    """W_pᵀΓ²W_p of a digon is γ²·(1, −1; −1, 1), which is never the identity."""
    scale = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    mixing = torch.diag(scale)
    x = features(mixing, 0.2, 200)
    assert abs(float(loss_gap(mixing, x))) > 0.01
    assert abs(float(loss_gap(mixing, x, 1 / scale))) < 1e-12
    for weights in (1 / scale, torch.diag(1 / scale)):
        assert gap_matrix(mixing, weights).abs().max() < 1e-12
    digon = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    for g in (0.0, 0.5**0.5, 1.0, 3.0):
        assert gap_matrix(digon, torch.tensor([g], dtype=torch.float64)).norm() >= 1 - 1e-12
    assert gap_matrix(digon).tolist() == [[0.0, -1.0], [-1.0, 0.0]]


def test_in_digon_position_the_gap_does_not_depend_on_the_weights():
    """What is lost of two opposite features, equally of both, is invisible: W_p(x − r) = 0."""
    x = features(DIGONS, 0.3)
    lost = -float(truth_loss(DIGONS, x))
    assert lost < -0.1
    for weights in (None, normal(3, seed=1), normal(3, 3, seed=2)):
        assert float(loss_gap(DIGONS, x, weights)) == pytest.approx(lost, rel=1e-12)


def test_in_digons_the_optimum_is_inverse_variance():
    """Lone features keep weight 1, a pair gets γ² = ½. One number does most of it, and the paper's
    rule is worse than one number: n − (tr G)²/‖G‖² with G = γ²(1, −1; −1, 1) for each pair."""
    mixing = digon_mixing(10, 10).double()
    variance = mixing.square().sum(1)
    found = gap_norms(mixing, {"half": variance.sqrt(), "paper": variance, "gap": variance**-0.5})
    assert found.none == pytest.approx(20**0.5)
    assert found.best_scalar == pytest.approx((30 - 30**2 / 50) ** 0.5)
    assert found.weights["half"] == pytest.approx((30 - 50**2 / 170) ** 0.5)
    assert found.weights["paper"] == pytest.approx((30 - 90**2 / 650) ** 0.5)
    assert found.weights["gap"] == found.whitening == pytest.approx(10**0.5) == found.bound
    torch.testing.assert_close(least_gap_weights(mixing), torch.diag(variance**-0.5))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_no_weights_beat_the_optimum_of_theorem_5(seed, n_p, n, deficient):
    """Over matrices: none drawn at random, and none near the optimum."""
    mixing = normal(n_p, n, seed=seed)
    if deficient:
        mixing[-1] = mixing[0]
    best = float(gap_matrix(mixing, least_gap_weights(mixing)).norm())
    assert best == pytest.approx(least_gap_norm(mixing), abs=1e-6)
    assert best == pytest.approx(
        max(0, n - torch.linalg.matrix_rank(mixing).item()) ** 0.5, abs=1e-6
    )
    optimum = least_gap_weights(mixing)
    for draw in range(10):
        noise = normal(n_p, n_p, seed=seed + draw + 1)
        for gamma in (noise, optimum + 0.01 * noise, optimum + noise):
            assert float(gap_matrix(mixing, gamma).norm()) >= best - 1e-9
            assert best_scaled_gap_norm(mixing, gamma) >= best - 1e-9


def test_descent_over_all_matrices_ends_at_the_optimum():
    mixing = normal(4, 9, seed=3)
    free = torch.eye(4, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = gap_matrix(mixing, free).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    torch.testing.assert_close(
        free.detach().T @ free.detach(), torch.linalg.inv(mixing @ mixing.T), rtol=1e-4, atol=1e-5
    )
    assert float(gap_matrix(mixing, free.detach()).norm()) == pytest.approx(5**0.5, rel=1e-6)


def test_for_equal_independent_features_the_optimum_whitens():
    mixing = normal(3, 7, seed=8)
    x = features(mixing, 0.5, 20_000)
    covariance = torch.cov((x @ mixing.T).T)
    gamma = least_gap_weights(mixing)
    white = gamma @ covariance @ gamma.T
    off = white / white.diagonal().mean() - torch.eye(3, dtype=torch.float64)
    assert float(off.abs().max()) < 0.05


@pytest.mark.parametrize("weights", [None, "diagonal", "matrix"])
def test_the_best_scale_is_the_best(weights):
    mixing = normal(3, 6, seed=1)
    gamma = {None: torch.eye(3).double(), "diagonal": normal(3, seed=2).abs(),
             "matrix": normal(3, 3, seed=2)}[weights]  # fmt: skip
    given = None if weights is None else gamma
    scale, best = best_scalar(mixing, given), best_scaled_gap_norm(mixing, given)
    assert float(gap_matrix(mixing, scale * gamma).norm()) == pytest.approx(best)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert float(gap_matrix(mixing, factor * scale * gamma).norm()) > best
    assert best_scaled_gap_norm(mixing, 7 * gamma) == pytest.approx(best)


def test_weights_that_see_nothing_and_a_mixture_of_nothing():
    assert best_scalar(EXAMPLE, torch.zeros(2).double()) == 0
    assert best_scaled_gap_norm(EXAMPLE, torch.zeros(2).double()) == pytest.approx(3**0.5)
    with pytest.raises(UsageError, match="W_p is 0"):
        least_gap_weights(torch.zeros(2, 3))


# The assumptions.


def test_the_assumptions_are_read_off_the_matrix():
    found = check_assumptions(DIGONS)
    assert found.hold and found.only_digons
    assert found.groups == ((0,), (1, 2), (3, 4))
    assert check_assumptions(TRIANGLE).groups == ((0, 1, 2),)
    longer = check_assumptions(2 * DIGONS)
    assert not longer.hold and longer.largest_norm_error == pytest.approx(1)
    padded = check_assumptions(torch.cat([torch.zeros(3, 4).double(), DIGONS], dim=1))
    assert padded.hold and padded.groups == ((4,), (5, 6), (7, 8))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_more_than_two_per_dimension_cannot_avoid_positive_interference(seed, n_p):
    columns = normal(n_p, 2 * n_p + 1, seed=seed)
    found = check_assumptions(columns / columns.norm(dim=0))
    assert not found.hold and found.largest_interference > 1e-6
    # Twice n_p do fit: the axes and their opposites.
    assert check_assumptions(digon_mixing(0, n_p).double()).hold
