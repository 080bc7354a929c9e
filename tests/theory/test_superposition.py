"""Planted data is what it says it is, and the measures that compare a dictionary with it."""

import math
from itertools import permutations

import pytest
import torch

from llm_wsae.theory.closed_form import check_assumptions, recovered
from llm_wsae.theory.entanglement import absorbed, merged
from llm_wsae.theory.recovery import features_per_latent, matched_losses, measure
from llm_wsae.theory.superposition import (
    OUTLIER_DIMENSIONS,
    OUTLIER_FACTOR,
    REGIMES,
    Hierarchy,
    Relations,
    alone,
    digon_mixing,
    low_coherence,
    mixed_mixing,
    more_frequent,
    planted,
    rotated,
    stronger,
    toy_model,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_features_have_their_frequency_and_strength():
    data = stronger(planted(digon_mixing(2, 1), 0.8), torch.tensor([1]), 3.0)
    x = data.features(100_000, generator())
    active = x > 0
    assert active.float().mean(0).tolist() == pytest.approx([0.2] * 4, abs=0.005)
    for j, amplitude in enumerate([1, 3, 1, 1]):
        strength = x[active[:, j], j]
        assert float(strength.mean()) == pytest.approx(amplitude / 2, rel=0.02)
        assert float(strength.var()) == pytest.approx(amplitude**2 / 12, rel=0.03)
        assert float(strength.max()) <= amplitude
    assert data.mean_active == pytest.approx(0.8)
    together = (active[:, 0] & active[:, 1]).float().mean()
    assert float(together) == pytest.approx(0.04, abs=0.003)  # independent


def test_features_of_probability_0_are_never_active():
    data = planted(digon_mixing(1, 1), 1.0)
    alone = Hierarchy(data.mixing, data.probability, data.amplitude, torch.tensor([-1, 0, 0]))
    for never in (data, alone):
        assert never.features(50, generator()).eq(0).all()


def test_observation_is_the_mixing():
    data = planted(digon_mixing(1, 1), 0.0)
    x = torch.tensor([[0.5, 1.0, 0.25]])
    assert data.observe(x).tolist() == [[0.5, 0.75]]
    assert data.monosemanticity.tolist() == [1.0, 0.5]


def test_the_digon_mixture():
    mixing = digon_mixing()
    assert mixing.shape == (20, 30)
    found = check_assumptions(mixing)
    assert found.only_digons and sorted(map(len, found.groups)) == [1] * 10 + [2] * 10


def test_the_mixed_mixture():
    mixing = mixed_mixing(generator())
    assert mixing.shape == (20, 38)
    assert (mixing.norm(dim=0) - 1).abs().max() < 1e-6
    assert sorted(map(len, check_assumptions(mixing).groups)) == [1] * 8 + [2] * 6 + [18]
    truth = planted(mixing, 0.5).monosemanticity
    assert truth[:14].tolist() == pytest.approx([1] * 8 + [0.5] * 6)
    assert truth[14:].max() < 0.25
    assert alone(planted(mixing, 0.5)).tolist() == list(range(8))


def test_low_coherence_is_near_the_bound():
    """No 18 unit vectors in 6 dimensions are all below Welch's √((n − d)/(d(n − 1))) = 0.343."""
    columns = low_coherence(6, 18, generator(2))
    cosine = (columns.T @ columns - torch.eye(18)).abs()
    assert math.sqrt(12 / (6 * 17)) <= float(cosine.max()) < 0.45
    random = torch.randn(6, 18, generator=generator(2))
    random /= random.norm(dim=0)
    assert (random.T @ random - torch.eye(18)).abs().max() > 0.6


def test_a_rotation_keeps_the_features_and_hides_the_axes():
    plain = planted(digon_mixing(), 0.5)
    turned = rotated(plain, generator(1))
    torch.testing.assert_close(
        turned.mixing.T @ turned.mixing, plain.mixing.T @ plain.mixing, rtol=0, atol=1e-5
    )
    assert float(plain.monosemanticity.max()) == 1
    assert float(turned.monosemanticity.max()) < 0.3


def test_frequencies_are_at_most_one():
    data = more_frequent(planted(digon_mixing(1, 1), 0.5), torch.tensor([0]), 3.0)
    assert data.probability.tolist() == [1.0, 0.5, 0.5]


def test_every_regime_is_reproducible_and_observed_in_twenty_dimensions():
    for name, build in REGIMES.items():
        if name.startswith("toy"):
            continue
        data = build(0.7, generator(3))
        assert len(data.mixing) == 20
        assert bool((data.mixing == build(0.7, generator(3)).mixing).all()), name
    scale = (
        REGIMES["outliers"](0.7, generator(3)).mixing / REGIMES["mixed"](0.7, generator(3)).mixing
    )
    for dimension in range(20):
        expected = OUTLIER_FACTOR if dimension in OUTLIER_DIMENSIONS else 1.0
        values = scale[dimension][scale[dimension].isfinite()]
        torch.testing.assert_close(values, torch.full_like(values, expected))
    frequent = REGIMES["frequent"](0.7, generator(3))
    assert frequent.probability[:9].tolist() == pytest.approx([0.9] * 8 + [0.3])
    strong = REGIMES["strong"](0.7, generator(3))
    assert strong.amplitude[:9].tolist() == [2.0] * 8 + [1.0]


def test_a_sparse_toy_model_learns_antipodal_pairs():
    """Six features in three dimensions: dense inputs keep three of them, sparse ones keep all."""

    def missed(mixing: torch.Tensor, sparsity: float) -> float:
        x = planted(mixing, sparsity).features(20_000, generator(9))
        return float((x - recovered(mixing, x)).square().sum() / x.square().sum())

    keep_half = torch.cat([torch.eye(3), torch.zeros(3, 3)], dim=1)
    sparse = toy_model(6, 3, 0.95, generator(4))
    assert missed(sparse, 0.95) < 0.12 < missed(keep_half, 0.95)
    gram = sparse.T @ sparse
    assert bool((gram.diagonal() > 0.7).all())  # every feature is represented
    assert float((gram - torch.diag(gram.diagonal())).max()) < 0.1  # and none adds to another
    assert float(gram.min()) < -0.7  # pairs lie opposite each other


def test_a_large_toy_model_is_better_than_twenty_features():
    mixing = toy_model(200, 20, 0.98, generator(5), steps=300)
    assert mixing.shape == (20, 200)
    x = planted(mixing, 0.98).features(4000, generator(6))
    missed = float((x - recovered(mixing, x)).square().sum() / x.square().sum())
    assert missed < 0.8 < 0.9  # 0.9 = 180 of 200 features lost
    assert int((mixing.norm(dim=0) > 0.5).sum()) > 40


def features(rows: int = 4000, sparsity: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    data = planted(digon_mixing(2, 1), sparsity)
    return data.mixing, data.features(rows, torch.Generator().manual_seed(0))


def test_the_truth_itself_is_found_whole():
    mixing, x = features()
    order = torch.tensor([2, 0, 3, 1])
    found = measure(mixing.T[order], x[:, order], mixing, x)
    assert found.l_gt == pytest.approx(0, abs=1e-6)
    assert found.mmcs == pytest.approx(1) and found.recovered == 1
    assert found.features_per_latent == pytest.approx(1, abs=0.01)
    assert found.fvu == pytest.approx(0, abs=1e-10)


def test_scale_and_spare_latents_do_not_count_against_a_dictionary():
    mixing, x = features()
    codes = torch.cat([x * torch.tensor([3.0, 0.1, 1, 1]), torch.zeros(len(x), 2)], dim=1)
    decoder = torch.cat(
        [mixing.T / torch.tensor([[3.0], [0.1], [1], [1]]), torch.randn(2, 4)[:, :3]]
    )
    found = measure(decoder, codes, mixing, x)
    assert found.l_gt == pytest.approx(0, abs=1e-6) and found.fvu == pytest.approx(0, abs=1e-9)
    assert found.features_per_latent == pytest.approx(1, abs=0.01)


def test_a_feature_without_a_latent_is_missed_whole():
    x = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]])
    assert matched_losses(x[:, :2], x)[0] == pytest.approx(9 / 14)
    # One latent for two features can serve one of them: x = (1, 0), (0, 2), z = 1, 2.
    both = torch.tensor([[1.0, 0], [0, 2.0]])
    z = torch.tensor([[1.0], [2.0]])
    # best for the second: ⟨x₂, z⟩²/‖z‖² = 16/5 of 5
    assert matched_losses(z, both)[0] == pytest.approx(1 - 16 / 25)


def test_the_matching_is_the_best_of_all():
    g = torch.Generator().manual_seed(1)
    x, codes = torch.rand(50, 4, generator=g), torch.rand(50, 5, generator=g)
    best = min(
        sum(
            float(
                (x[:, j] - codes[:, i] * (x[:, j] @ codes[:, i]) / codes[:, i].square().sum())
                .square()
                .sum()
            )
            for j, i in enumerate(chosen)
        )
        for chosen in permutations(range(5), 4)
    ) / float(x.square().sum())
    assert matched_losses(codes, x)[0] == pytest.approx(best, abs=1e-5)


def test_one_scale_for_all_counts_relative_strength():
    """Latents of half and twice a feature are a perfect match each, and not together: at scale c
    (1 − c/2)² + (1 − 2c)² is least at c = (½ + 2)/(¼ + 4)."""
    x = torch.tensor([[1.0, 0], [0, 1]])
    assert matched_losses(3 * x, x) == pytest.approx((0, 0))
    fitted, one = matched_losses(x * torch.tensor([0.5, 2]), x)
    assert fitted == pytest.approx(0)
    assert one == pytest.approx(1 - (2.5**2 / 4.25) / 2)
    nothing = matched_losses(torch.zeros(2, 3), x)
    assert nothing == (1, 1)


def test_one_scale_is_the_best_of_all_matchings_and_scales():
    g = torch.Generator().manual_seed(2)
    x, codes = torch.rand(50, 4, generator=g), 3 * torch.rand(50, 5, generator=g)
    product, power = x.T @ codes, codes.square().sum(0)
    best = 0.0
    for chosen in permutations(range(5), 4):  # with fewer pairs too: a pair may be left out
        a = torch.stack([product[j, i] for j, i in enumerate(chosen)])
        b = power[list(chosen)]
        for used in range(1, 16):
            keep = torch.tensor([bool(used >> j & 1) for j in range(4)])
            best = max(best, float(a[keep].sum() ** 2 / b[keep].sum()))
    fitted, one = matched_losses(codes, x)
    assert one == pytest.approx(1 - best / float(x.square().sum()), abs=1e-5)
    assert fitted <= one


def test_children_need_their_parent_and_keep_their_frequency():
    data = REGIMES["hierarchy"](0.9, generator(1))
    relations = data.relations()
    children = (relations.parent >= 0).nonzero()[:, 0]
    assert len(children) == 16 and len(relations.parent[children].unique()) == 8
    x = data.features(100_000, generator(2))
    active = x > 0
    assert not bool((active[:, children] & ~active[:, relations.parent[children]]).any())
    assert active.float().mean(0).tolist() == pytest.approx(data.probability.tolist(), abs=0.01)
    assert data.probability[children].tolist() == pytest.approx([0.1] * 16)
    assert data.probability[relations.parent[children]].tolist() == pytest.approx([0.2] * 16)
    sizes = relations.group.bincount(minlength=38)
    assert sorted(sizes[sizes > 0].tolist()) == [1] * 14 + [3] * 8
    off = REGIMES["hierarchy-off"](0.9, generator(1))
    assert off.relations().parent.tolist() == relations.parent.tolist()
    loose = off.features(100_000, generator(2)) > 0
    assert loose.float().mean(0).tolist() == pytest.approx(data.probability.tolist(), abs=0.01)
    together = loose[:, children] & loose[:, relations.parent[children]]
    assert together.float().mean(0).tolist() == pytest.approx([0.02] * 16, abs=0.005)


def test_groups_are_active_together_and_features_alone_are_as_ever():
    data = REGIMES["correlated"](0.9, generator(1))
    group = data.relations().group
    assert data.relations().parent is None
    assert sorted(group.bincount().tolist()) == [2] + [4] * 9
    x = data.features(100_000, generator(2))
    active = (x > 0).double()
    assert active.mean(0).tolist() == pytest.approx([0.1] * 38, abs=0.01)
    assert float(x[x > 0].mean()) == pytest.approx(0.5, abs=0.01)
    together = active.T @ active / len(x)
    same = (group == group[:, None]) & ~torch.eye(38, dtype=torch.bool)
    # P(both normal numbers in the lower tenth) at correlation 0.8, and of independent ones
    assert float(together[same].mean()) == pytest.approx(0.0548, abs=0.003)
    assert float(together[~same & ~torch.eye(38, dtype=torch.bool)].mean()) == pytest.approx(
        0.01, abs=0.001
    )
    off = REGIMES["correlated-off"](0.9, generator(1)).features(100_000, generator(2)) > 0
    off_together = off.double().T @ off.double() / len(off)
    assert float(off_together[same].mean()) == pytest.approx(0.01, abs=0.001)


def test_absorption_is_a_hole_where_the_child_is():
    parent = torch.tensor([-1, 0, -1])
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert absorbed(x, x, parent) == 0
    hole = x.clone()
    hole[2:4, 0] = 0
    assert absorbed(hole, x, parent) == 1
    hole[2, 0] = 1
    assert absorbed(hole, x, parent) == 0.5
    # A latent of both is the parent's wherever the parent is: merged, not absorbed.
    assert absorbed(x[:, :1] + x[:, 1:2], x, parent) == 0
    never = x.clone()
    never[:, 1] = 0
    assert math.isnan(absorbed(never, never, parent))


def test_merged_features_share_a_latent():
    _, x = features()
    group = torch.tensor([0, 0, 1, 2])
    assert merged(x, x, group) == 0
    together = torch.cat([x[:, :1] + x[:, 1:2], x[:, 2:]], 1)
    assert merged(together, x, group) == 1
    stranger = torch.cat([x[:, :1] + x[:, 2:3], x[:, 1:2], x[:, 3:]], 1)
    assert merged(stranger, x, group) == 0  # a latent shared with no relative
    found = measure(torch.zeros(4, 3), x, features()[0], x, Relations(group))
    assert found.merged == 0 and found.absorbed is None


def test_directions_count_with_their_sign():
    mixing, x = features()
    opposite = measure(-mixing.T[:1], x[:, :1], mixing, x)
    # the cosines of −e₀ with e₀, e₁, e₂, −e₂
    assert opposite.mmcs == pytest.approx((-1 + 0 + 0 + 0) / 4) and opposite.recovered == 0
    tilted = torch.tensor([[1.0, 0.2, 0], [0, 1, 1]])
    found = measure(tilted, x[:, :2], mixing, x)
    assert found.recovered == 0.25  # only e₀, at cosine 0.98


def test_spare_latents_that_hardly_fire_do_not_count():
    """What they correlate with is chance, and looks like a mixture of everything."""
    _, x = features()
    rows = torch.randint(len(x), (3, 10), generator=torch.Generator().manual_seed(1))
    rare = torch.zeros(len(x), 10).scatter(0, rows, 0.3)  # each on three rows
    assert features_per_latent(rare, x) > 1.5
    assert features_per_latent(torch.cat([x, rare], 1), x) == pytest.approx(1, abs=0.02)


def test_a_latent_for_two_features_counts_two():
    _, x = features(40_000)
    assert features_per_latent(x[:, :1] + x[:, 1:2], x) == pytest.approx(2, abs=0.05)
    # the second varies twice as much as the first: (1·1 + 2·2) / 3
    assert features_per_latent(torch.cat([x[:, :1], x[:, :1] + x[:, 1:2]], 1), x) == pytest.approx(
        5 / 3, abs=0.03
    )
    constant = features_per_latent(torch.ones(len(x), 1), x)
    assert constant != constant


def test_fvu_is_of_the_observed_rows():
    mixing, x = features()
    observed = x @ mixing.T
    found = measure(mixing.T, torch.zeros(len(x), 4), mixing, x)
    variance = (observed - observed.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(observed.square().sum() / variance))
    assert found.l_gt == 1
