import numpy as np
import pytest
import torch

from llm_wsae.evaluation.monosemanticity.concept_scores import (
    ProbedConcepts,
    falls,
    probe_latents,
    probe_site,
    selectivity,
    spill,
)
from llm_wsae.evaluation.monosemanticity.concepts import Concepts, Units
from llm_wsae.evaluation.monosemanticity.probing import (
    RIDGE_DENSE,
    Exam,
    SelectedColumns,
    best_columns,
    correlations,
    dense_probes,
    sparse_probes,
    splits,
)

UNITS, D_IN, D_SAE = 400, 6, 30


def planted(seed=0):
    """Latents and labels: latent 3 fires for the first concept, 4 or 5 for the second; the third
    concept is pure chance. Half of the units are void for the second."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.rand(UNITS, D_SAE, generator=draw)
    latents *= torch.rand(UNITS, D_SAE, generator=draw) < 0.2
    positive = torch.rand(UNITS, 3, generator=draw) < 0.3
    applies = torch.ones(UNITS, 3, dtype=torch.bool)
    applies[::2, 1] = False
    latents[:, 3] = positive[:, 0] * (1 + torch.rand(UNITS, generator=draw))
    which = torch.rand(UNITS, generator=draw) < 0.5
    latents[:, 4] = (positive[:, 1] & which).float()
    latents[:, 5] = (positive[:, 1] & ~which).float()
    half = torch.rand(UNITS, generator=draw) < 0.5
    names = ["one", "two", "chance"]
    return latents, Concepts(names, ["a", "a", "b"], positive, applies, half)


@pytest.fixture(scope="module")
def case():
    latents, concepts = planted()
    return latents, concepts, splits(concepts, 0)


def test_training_and_testing_share_no_unit(case):
    _, concepts, halves = case
    for split, learn in zip(halves, (concepts.half, ~concepts.half), strict=True):
        for c in range(3):
            learnt = (split.positive + split.negative)[:, c] > 0
            assert torch.equal(learnt, concepts.applies[:, c] & learn)
            assert torch.equal(split.positive[:, c] > 0, learnt & concepts.positive[:, c])
            n = split.num_examples
            for side, truth in ((slice(n), True), (slice(n, None), False)):
                items = split.items[c, side][split.counts[c, side]]
                expected = concepts.applies[:, c] & ~learn & (concepts.positive[:, c] == truth)
                assert items.sort().values.tolist() == expected.nonzero()[:, 0].tolist()


def test_correlations_equal_numpy(case):
    latents, concepts, halves = case
    latents = latents.clone()
    latents[:, 9] = 0
    for table in (latents.T.to_sparse(), latents.T):
        found = correlations(table, halves[0])
        for c in range(3):
            mine = (concepts.applies[:, c] & concepts.half).numpy()
            for column in (0, 3, 4, 17):
                x, y = latents[mine, column].numpy(), concepts.positive[mine, c].numpy()
                expected = np.corrcoef(x.astype(np.float64), y)[0, 1]
                assert float(found[c, column]) == pytest.approx(expected, abs=1e-4)
        assert found[:, 9].tolist() == [0, 0, 0]


def test_best_columns_are_allowed_ones_in_order():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]])
    allowed = torch.tensor([True, False, True, True])
    assert best_columns(score, allowed, 2).tolist() == [[3, 2], [0, 2]]
    assert best_columns(score, allowed, 5).tolist() == [[3, 2, 0, -1, -1], [0, 2, 3, -1, -1]]


def test_a_planted_label_is_found_by_its_latents(case):
    latents, _, halves = case
    table = latents.T.to_sparse()
    for split in halves:
        chosen = best_columns(correlations(table, split).abs(), torch.ones(D_SAE).bool(), 5)
        assert int(chosen[0, 0]) == 3 and set(chosen[1, :2].tolist()) == {4, 5}
        taken = SelectedColumns.of(table, chosen)
        one, two = sparse_probes(taken, split, 1), sparse_probes(taken, split, 2)
        assert float(one[0]) == 1 and 0.65 < float(one[1]) < 0.85 and float(two[1]) == 1
        assert abs(float(sparse_probes(taken, split, 5)[2]) - 0.5) < 0.15


def test_probes_equal_the_discriminant_by_hand(case):
    latents, concepts, halves = case
    x = latents[:, :D_IN] + 0.1 * torch.randn(UNITS, D_IN, generator=torch.Generator())
    directions, scores = dense_probes(x, halves[0])
    for c in range(3):
        mine = concepts.applies[:, c] & concepts.half
        rows, y = x[mine].double().numpy(), concepts.positive[mine, c].numpy()
        mean1, mean0 = rows[y].mean(0), rows[~y].mean(0)
        covariance = np.cov(rows.T, bias=True)
        covariance += RIDGE_DENSE * np.diag(np.diag(covariance))
        direction = np.linalg.solve(covariance, mean1 - mean0)
        assert directions[:, c].numpy() == pytest.approx(direction, rel=1e-4)
        expected = (x[halves[0].items[c]].numpy() - (mean1 + mean0) / 2) @ direction
        assert scores[c].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # A sparse probe of all columns is the same probe, but for the ridge.
    few = SelectedColumns.of(x.T, torch.arange(D_IN).repeat(3, 1))
    assert torch.allclose(sparse_probes(few, halves[0], D_IN), halves[0].test(scores), atol=0.02)


def test_a_probe_without_columns_knows_nothing(case):
    latents, _, halves = case
    taken = SelectedColumns.of(latents.T.to_sparse(), torch.full((3, 2), -1))
    assert sparse_probes(taken, halves[0], 2).tolist() == [0.5, 0.5, 0.5]


def test_falls_equal_probing_what_is_left(case):
    """Subtract the contributions from the activations, and probe them as before."""
    latents, concepts, halves = case
    decoder = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(5))
    x = latents @ decoder + 0.05 * torch.randn(UNITS, D_IN, generator=torch.Generator())
    split = halves[1]
    directions, scores = dense_probes(x, split)
    exam = Exam([], split, directions, scores)
    found = falls(torch.tensor([[3, 7], [4, 5], [11, -1]]), decoder, exam, latents.T.to_sparse())
    thresholds = x[split.items[:, 0]].mul(directions.T).sum(1) - scores[:, 0]

    def accuracy(rows, c):
        score = rows @ directions[:, c] - thresholds[c]
        tested = concepts.applies[:, c] & concepts.half
        truth = concepts.positive[:, c]
        right = [(score[tested & truth] > 0), (score[tested & ~truth] <= 0)]
        return sum(float(one.double().mean()) for one in right) / 2

    for number, removed in enumerate(([3, 7], [4, 5], [11])):
        left = x - latents[:, removed] @ decoder[removed]
        for c in range(3):
            expected = accuracy(x, c) - accuracy(left, c)
            assert float(found[number, c]) == pytest.approx(expected, abs=0.011)
    assert selectivity(torch.ones(1, 1))[1].isnan()  # there are no others
    own, others = selectivity(found)
    assert own.tolist() == found.diagonal().tolist()
    assert float(others[0]) == pytest.approx(float((found[0, 1] + found[0, 2]) / 2))


def test_a_dictionary_of_concepts_is_selective_and_a_rotated_one_is_not():
    latents, concepts = planted()
    draw = torch.Generator().manual_seed(1)
    decoder = torch.linalg.qr(torch.randn(D_SAE, D_SAE, generator=draw)).Q
    x = latents @ decoder + 0.01 * torch.randn(UNITS, D_SAE, generator=draw)
    units = Units(torch.arange(UNITS), torch.ones(UNITS, dtype=torch.long), torch.arange(UNITS))
    site = probe_site([ProbedConcepts(units, concepts, splits(concepts, 0))], [x])
    assert site.columns["dense"][:2].min() > 0.99 and site.columns["accuracy"][:2].min() > 0.95
    assert 0.5 < site.columns["best_1"][1] < site.columns["best_2"][1] < 0.95
    density, every = (latents > 0).double().mean(0), torch.ones(D_SAE, dtype=torch.bool)
    without = every.clone()
    without[3] = False
    table = latents.T.to_sparse()
    good, blind = probe_latents(site, [table], decoder, density, [every, without])
    assert float(good["best_1"][0]) == 1 and float(good["best_2"][1]) == 1
    # (the "latents" of pure chance may be those of anything)
    assert good["own_fall"][:2].min() > 0.4 and good["others_fall"][:2].abs().max() < 0.1
    turn = torch.linalg.qr(torch.randn(D_SAE, D_SAE, generator=draw)).Q
    turned = (latents @ turn.T).T
    (mixed,) = probe_latents(site, [turned], turn @ decoder, density, [every])
    assert mixed["selectivity"][:2].max() < good["selectivity"][:2].min() - 0.1
    assert float(blind["best_1"][0]) < 0.7 and float(blind["own_fall"][0]) < 0.1


def test_no_concept_gives_empty_scores():
    site, every = probe_site([], []), torch.ones(D_SAE, dtype=torch.bool)
    (found,) = probe_latents(site, [], torch.zeros(D_SAE, D_IN), torch.zeros(D_SAE), [every])
    assert {len(values) for values in (*site.columns.values(), *found.values())} == {0}


@pytest.mark.parametrize(
    ("own", "hit", "expected"),
    [
        ((0.03, 0.07, 0.50), (0.01, 0.03, 0.9), 0.02),  # half-way between one latent and two
        ((0.10, 0.20, 0.50), (0.04, 0.90, 0.9), 0.02),  # half-way between none and one
        ((0.01, 0.02, 0.05), (0.00, 0.01, 0.02), 0.02),  # with the last
        ((0.00, 0.01, 0.04), (0.00, 0.00, 0.9), None),  # never
    ],
)
def test_spill_is_read_off_at_the_same_own_drop(own, hit, expected):
    """Of the first concept, beside five that are hit and one that gains."""
    by_size = {}
    for size, own_drop, others in zip((1, 2, 5), own, hit, strict=True):
        by_size[size] = torch.full((7, 7), others, dtype=torch.float64)
        by_size[size][0, 0], by_size[size][0, 6] = own_drop, -1
    found = spill(by_size)[0]
    assert bool(found.isnan()) if expected is None else float(found) == pytest.approx(expected)


def test_spill_needs_five_others():
    by_size = {size: torch.full((5, 5), 0.1, dtype=torch.float64) for size in (1, 2, 5)}
    assert bool(spill(by_size).isnan().all())
