"""The closed form, the gap and the toy experiment of Cui et al. 2026, and superposition."""

import json
import math
from itertools import permutations

import pytest
import torch
from command_line import call, content, works
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import over
from refusals import misused

from llm_wsae.lab import theory
from llm_wsae.lab.theory import (
    Superposition,
    gap_matrix,
    matched_loss,
    measure,
    recovered,
)


def digon_mixing(singles: int, digons: int) -> torch.Tensor:
    """One feature alone on each of the first dimensions, an antipodal pair on each of the rest."""
    eye = torch.eye(singles + digons, dtype=torch.float64)
    return torch.cat([eye, -eye[:, singles:]], 1)


EXAMPLE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
ANGLES = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
TRIANGLE = torch.stack([ANGLES.cos(), ANGLES.sin()])
DIGONS = digon_mixing(1, 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def features(mixing: torch.Tensor, sparsity: float, rows: int = 2000) -> torch.Tensor:
    return Superposition(mixing, sparsity).features(rows, torch.Generator().manual_seed(7))


def missed(mixing: torch.Tensor, x: torch.Tensor) -> float:
    """Share of the features' energy that the closed form does not recover."""
    return float((x - recovered(mixing, x)).square().sum() / x.square().sum())


def test_features_have_their_frequency_and_strength():
    x = features(digon_mixing(2, 1), 0.8, 100_000)
    active = x > 0
    assert active.double().mean(0).tolist() == pytest.approx([0.2] * 4, abs=0.005)
    for j in range(4):
        strength = x[active[:, j], j]
        assert float(strength.mean()) == pytest.approx(1 / 2, rel=0.02)
        assert float(strength.var()) == pytest.approx(1 / 12, rel=0.03)
        assert float(strength.max()) <= 1
    together = (active[:, 0] & active[:, 1]).double().mean()
    assert float(together) == pytest.approx(0.04, abs=0.003)  # independent
    assert not features(DIGONS, 1.0, 50).any()
    seen = Superposition(digon_mixing(1, 1), 0.5).observe(torch.tensor([[0.5, 0.25, 1.0]]).double())
    assert seen.tolist() == [[0.5, -0.75]]


def test_a_toy_model_learns_antipodal_pairs_and_more_features_than_dimensions():
    """Six features in three dimensions: dense inputs keep three of them, sparse ones keep all."""
    keep_half = torch.cat([torch.eye(3), torch.zeros(3, 3)], dim=1)
    sparse = theory.toy_model(6, 3, 0.95, torch.Generator().manual_seed(4))
    x = features(sparse, 0.95, 20_000)
    assert missed(sparse, x) < 0.12 < missed(keep_half, x)
    gram = sparse.T @ sparse
    assert bool((gram.diagonal() > 0.7).all())  # every feature is represented
    assert float((gram - torch.diag(gram.diagonal())).max()) < 0.1  # and none adds to another
    assert float(gram.min()) < -0.7  # pairs lie opposite each other


def test_the_closed_form_in_the_papers_example_and_on_one_sparse_inputs():
    x = torch.tensor([[0.5, 1.0, 0.8]], dtype=torch.float64)
    expected = torch.tensor([[0.5, 0.2, 0.0]], dtype=torch.float64)  # one shrinks, one vanishes
    torch.testing.assert_close(recovered(EXAMPLE, x), expected, rtol=0, atol=1e-12)
    for mixing in (EXAMPLE, TRIANGLE, DIGONS):
        eye = torch.eye(mixing.shape[1], dtype=torch.float64)
        torch.testing.assert_close(recovered(mixing, 0.7 * eye), 0.7 * eye, rtol=0, atol=1e-12)


@over(sparsity=[0.0, 0.5, 0.9])
def test_digons_are_reconstructed_exactly_and_recovered_in_proportion_to_the_sparsity(sparsity):
    """E min(x₁, x₂)²·P(both) / E x² = (1 − S)/2, for uniform features. Beside an active feature the
    other is active with 1 − S, and stronger half the time."""
    x = features(DIGONS, sparsity)
    torch.testing.assert_close(recovered(DIGONS, x) @ DIGONS.T, x @ DIGONS.T, rtol=0, atol=1e-12)
    mixing = digon_mixing(0, 3)
    error = missed(mixing, features(mixing, sparsity, 60_000))
    assert error == pytest.approx((1 - sparsity) / 2, rel=0.04)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9), st.floats(0, 0.9))
def test_the_gap_is_the_quadratic_form(seed, n_p, n, sparsity):
    """L_WSAE − L_GT = E (x − r)ᵀ (W_pᵀ ΓᵀΓ W_p − I)(x − r)."""
    mixing = normal(n_p, n, seed=seed) / n_p**0.5
    x = features(mixing, sparsity, 50)
    lost = x - recovered(mixing, x)
    for gamma in (None, normal(n_p, seed=seed + 1), normal(n_p, n_p, seed=seed + 2)):
        error = lost @ mixing.T
        if gamma is not None:
            error = error @ (gamma.diag() if gamma.ndim == 1 else gamma).T
        direct = error.square().sum(1).mean() - lost.square().sum(1).mean()
        found = ((lost @ gap_matrix(mixing, gamma)) * lost).sum(1).mean()
        torch.testing.assert_close(found, direct, rtol=1e-10, atol=1e-10)


def test_weights_close_the_gap_where_dimensions_differ_in_scale_and_never_that_of_a_digon():
    """W_pᵀΓ²W_p of a digon is γ²·(1, −1; −1, 1), which is never the identity."""
    scale, digon = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), digon_mixing(0, 1)
    mixing = torch.diag(scale)
    assert gap_matrix(mixing).abs().max() > 0.1
    for weights in (1 / scale, torch.diag(1 / scale)):
        assert gap_matrix(mixing, weights).abs().max() < 1e-12
    for g in (0.0, 0.5**0.5, 1.0, 3.0):
        weights = torch.tensor([g], dtype=torch.float64)
        assert gap_matrix(digon, weights).norm() >= 1 - 1e-12
    assert gap_matrix(digon).tolist() == [[0.0, -1.0], [-1.0, 0.0]]


def test_in_digons_the_optimum_is_inverse_variance():
    """Lone features keep weight 1, a pair gets γ² = ½."""
    mixing = digon_mixing(10, 10)
    weights = mixing.square().sum(1) ** -0.5
    assert float(gap_matrix(mixing).norm()) == pytest.approx(20**0.5)
    assert float(gap_matrix(mixing, weights).norm()) == pytest.approx(10**0.5)
    torch.testing.assert_close(theory.least_gap_weights(mixing), torch.diag(weights))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_no_weights_beat_the_optimum_of_theorem_5(seed, n_p, n, deficient):
    """Over matrices: none drawn at random, and none near the optimum."""
    mixing = normal(n_p, n, seed=seed)
    if deficient:
        mixing[-1] = mixing[0]
    optimum = theory.least_gap_weights(mixing)
    best = float(gap_matrix(mixing, optimum).norm())
    rank = torch.linalg.matrix_rank(mixing).item()
    assert best == pytest.approx(max(0, n - rank) ** 0.5, abs=1e-6)
    for draw in range(10):
        noise = normal(n_p, n_p, seed=seed + draw + 1)
        for gamma in (noise, optimum + 0.01 * noise, optimum + noise):
            assert float(gap_matrix(mixing, gamma).norm()) >= best - 1e-9


def test_a_mixture_of_nothing_is_refused():
    misused("W_p is 0", theory.least_gap_weights, torch.zeros(2, 3))


# The toy experiment.

NAMES = ["uniform", "variance-a0.5", "whitening-a0.5", "random directions", "closed form"]


@pytest.mark.slow
def test_every_dictionary_is_compared_with_the_truth_and_a_finished_one_is_only_read(tmp_path):
    words = ("theory", "--sparsity", 0.99, "--seeds", 0, "--steps", 150, "--out", tmp_path)
    text = works(*words).out
    found = json.loads((tmp_path / "theory.json").read_text())["found"]["0.99"]
    assert list(found) == NAMES and all(name in text for name in NAMES)
    trained, random, best = (found[name][0] for name in ("uniform", *NAMES[-2:]))
    assert random["mmcs"] < trained["mmcs"] < best["mmcs"] == pytest.approx(1, abs=0.01)
    assert trained["l_gt"] < random["l_gt"]
    before = content(tmp_path)
    again = works(*words, "--seeds", 0, 1, "--json").json["found"]["0.99"]
    assert {name: of_seeds[:1] for name, of_seeds in again.items()} == found
    kept = {path: data for path, data in before.items() if "seed0" in str(path)}
    assert kept and kept.items() <= content(tmp_path).items()
    assert "intact" in works("verify", tmp_path).out
    other = call(*words, "--steps", 151)
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


# --- what is measured ---


def test_the_truth_is_found_whole_in_any_order_and_scale_with_spare_latents():
    mixing = digon_mixing(2, 1).float()
    x = features(mixing, 0.7, 4000)
    order, scale = torch.tensor([2, 0, 3, 1]), torch.tensor([3.0, 0.1, 1, 1])
    spare = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for decoder, codes in (
        (mixing.T[order], x[:, order]),
        (torch.cat([mixing.T / scale[:, None], spare]),
         torch.cat([x * scale, torch.zeros(len(x), 2)], 1)),
    ):  # fmt: skip
        found = measure(decoder, codes, mixing, x)
        assert found.l_gt == pytest.approx(0, abs=1e-6)
        assert found.mmcs == pytest.approx(1) and found.recovered == 1
        assert found.features_per_latent == pytest.approx(1, abs=0.01)


def test_directions_count_with_their_sign():
    mixing = digon_mixing(2, 1).float()
    x = features(mixing, 0.7, 4000)
    opposite = measure(-mixing.T[:1], x[:, :1], mixing, x)
    # the cosines of −e₀ with e₀, e₁, e₂, −e₂
    assert opposite.mmcs == pytest.approx((-1 + 0 + 0 + 0) / 4) and opposite.recovered == 0
    tilted = torch.tensor([[1.0, 0.2, 0], [0, 1, 1]])
    assert measure(tilted, x[:, :2], mixing, x).recovered == 0.25  # only e₀, at cosine 0.98


def test_a_feature_without_a_latent_is_missed_whole_and_the_matching_is_the_best_of_all():
    x = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]])
    assert matched_loss(x[:, :2], x) == pytest.approx(9 / 14)
    # One latent for two features can serve one of them: x = (1, 0), (0, 2), z = 1, 2,
    # best for the second: ⟨x₂, z⟩²/‖z‖² = 16/5 of 5.
    both, z = torch.tensor([[1.0, 0], [0, 2.0]]), torch.tensor([[1.0], [2.0]])
    assert matched_loss(z, both) == pytest.approx(1 - 16 / 25)
    g = torch.Generator().manual_seed(1)
    x, codes = torch.rand(50, 4, generator=g), torch.rand(50, 5, generator=g)

    def left(j: int, i: int) -> float:
        scale = x[:, j] @ codes[:, i] / codes[:, i].square().sum()
        return float((x[:, j] - scale * codes[:, i]).square().sum())

    sums = [sum(left(j, i) for j, i in enumerate(own)) for own in permutations(range(5), 4)]
    assert matched_loss(codes, x) == pytest.approx(min(sums) / float(x.square().sum()), abs=1e-5)


def test_latents_count_by_their_variance():
    """What latents that hardly fire correlate with is chance, and looks like a mixture of all."""
    x = features(digon_mixing(2, 1).float(), 0.7, 40_000)
    rows = torch.randint(len(x), (3, 10), generator=torch.Generator().manual_seed(1))
    rare = torch.zeros(len(x), 10).scatter(0, rows, 0.3)  # each on three rows
    assert theory.features_per_latent(rare, x) > 1.5
    assert theory.features_per_latent(torch.cat([x, rare], 1), x) == pytest.approx(1, abs=0.02)
    two = x[:, :1] + x[:, 1:2]
    assert theory.features_per_latent(two, x) == pytest.approx(2, abs=0.05)
    # the second varies twice as much as the first: (1·1 + 2·2) / 3
    of_both = theory.features_per_latent(torch.cat([x[:, :1], two], 1), x)
    assert of_both == pytest.approx(5 / 3, abs=0.03)
    constant = theory.features_per_latent(torch.ones(len(x), 1), x)
    assert constant != constant
