"""Probes of concepts, and what latents are to them: removed, missing, absorbing."""

import math

import numpy as np
import pytest
import torch
from looping import over

from llm_wsae.evaluation.monosemanticity import probing
from llm_wsae.evaluation.monosemanticity.concepts import Concepts
from llm_wsae.statistics.measures import LETTER

UNITS, D_IN, D_SAE = 400, 6, 30
EVERY = torch.ones(D_SAE, dtype=torch.bool)


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
    return latents, Concepts(["one", "two", "chance"], ["a", "a", "b"], positive, applies, half)


@pytest.fixture(scope="module")
def case():
    latents, concepts = planted()
    return latents, concepts, probing.splits_of(concepts, 0)


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
        found = probing.correlations(table, halves[0])
        for c in range(3):
            mine = (concepts.applies[:, c] & concepts.half).numpy()
            for column in (0, 3, 4, 17):
                x, y = latents[mine, column].numpy(), concepts.positive[mine, c].numpy()
                expected = np.corrcoef(x.astype(np.float64), y)[0, 1]
                assert float(found[c, column]) == pytest.approx(expected, abs=1e-4)
        assert found[:, 9].tolist() == [0, 0, 0]


def test_best_columns_are_allowed_ones_in_order_as_many_as_are_needed():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]])
    allowed = torch.tensor([True, False, True, True])
    assert probing.best_columns(score, allowed).tolist() == [[3, 2, 0, -1, -1], [0, 2, 3, -1, -1]]
    best = torch.tensor([[0, 1, 3, 4, -1]]).repeat(4, 1)
    area = torch.tensor(
        [[0.90, 0.80, 0.80, 0.80], [0.91, 0.90, 0.90, 0.81], [0.99, 0.91, 0.99, 0.99]]
    )
    found = probing.main_latents(best, area)  # by how much they add
    assert [row[row >= 0].tolist() for row in found] == [[0], [0, 1], [0, 1, 3, 4], [0]]


def test_probes_equal_the_discriminant_by_hand(case):
    latents, concepts, halves = case
    x = latents[:, :D_IN] + 0.1 * torch.randn(UNITS, D_IN, generator=torch.Generator())
    directions, scores = probing.dense_probes(x, halves[0])
    for c in range(3):
        mine = concepts.applies[:, c] & concepts.half
        rows, y = x[mine].double().numpy(), concepts.positive[mine, c].numpy()
        mean1, mean0 = rows[y].mean(0), rows[~y].mean(0)
        covariance = np.cov(rows.T, bias=True)
        covariance += probing.RIDGE_DENSE * np.diag(np.diag(covariance))
        direction = np.linalg.solve(covariance, mean1 - mean0)
        assert directions[:, c].numpy() == pytest.approx(direction, rel=1e-4)
        expected = (x[halves[0].items[c]].numpy() - (mean1 + mean0) / 2) @ direction
        assert scores[c].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # A sparse probe of all columns is the same probe, but for the ridge.
    few = probing.select(x.T, torch.arange(D_IN).repeat(3, 1))
    assert torch.allclose(
        probing.sparse_probes(few, halves[0], D_IN), probing.auroc(scores, halves[0]), atol=0.02
    )
    none = probing.select(latents.T.to_sparse(), torch.full((3, 2), -1))
    assert probing.sparse_probes(none, halves[0], 2).tolist() == [0.5, 0.5, 0.5]


def test_falls_equal_probing_what_is_left(case):
    """Subtract the contributions from the activations, and probe them as before."""
    latents, concepts, halves = case
    decoder = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(5))
    x = latents @ decoder + 0.05 * torch.randn(UNITS, D_IN, generator=torch.Generator())
    split = halves[1]
    directions, scores = probing.dense_probes(x, split)
    exam = probing.Exam([], split, directions, scores)
    found = probing.falls(
        torch.tensor([[3, 7], [4, 5], [11, -1]]), decoder, exam, latents.T.to_sparse()
    )
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


def test_a_dictionary_of_concepts_is_selective_and_a_rotated_one_is_not():
    latents, concepts = planted()
    draw = torch.Generator().manual_seed(1)
    decoder = torch.linalg.qr(torch.randn(D_SAE, D_SAE, generator=draw)).Q
    x = latents @ decoder + 0.01 * torch.randn(UNITS, D_SAE, generator=draw)
    site = probing.probe_site([concepts], [x], 0)
    assert site.columns["dense"][:2].min() > 0.99 and site.columns["accuracy"][:2].min() > 0.95
    assert 0.5 < site.columns["best_1"][1] < site.columns["best_2"][1] < 0.95
    without = EVERY.clone()
    without[3] = False
    table = latents.T.to_sparse()
    good, blind = probing.probe_latents(site, [table], decoder, [EVERY, without])
    assert float(good["best_1"][0]) == 1 and float(good["best_2"][1]) == 1
    # (the "latents" of pure chance may be those of anything)
    assert good["own_fall"][:2].min() > 0.4 and good["others_fall"][:2].abs().max() < 0.1
    turn = torch.linalg.qr(torch.randn(D_SAE, D_SAE, generator=draw)).Q
    turned = (latents @ turn.T).T
    (mixed,) = probing.probe_latents(site, [turned], turn @ decoder, [EVERY])
    assert mixed["selectivity"][:2].max() < good["selectivity"][:2].min() - 0.1
    assert float(blind["best_1"][0]) < 0.7 and float(blind["own_fall"][0]) < 0.1
    site = probing.probe_site([], [], 0)  # no concept
    (found,) = probing.probe_latents(site, [], torch.zeros(D_SAE, D_IN), [EVERY])
    assert {len(values) for values in (*site.columns.values(), *found.values())} == {0}


@over(
    case=(
        ((0.03, 0.07, 0.50), (0.01, 0.03, 0.9), 0.02),  # half-way between one latent and two
        ((0.10, 0.20, 0.50), (0.04, 0.90, 0.9), 0.02),  # half-way between none and one
        ((0.01, 0.02, 0.05), (0.00, 0.01, 0.02), 0.02),  # with the last
        ((0.00, 0.01, 0.04), (0.00, 0.00, 0.9), math.nan),  # never
    )
)
def test_spill_is_read_off_at_the_same_own_drop(case):
    """Of the first concept, beside five that are hit and one that gains; it needs five."""
    by_size = {}
    for size, own_drop, others in zip((1, 2, 5), *case[:2], strict=True):
        by_size[size] = torch.full((7, 7), others, dtype=torch.float64)
        by_size[size][0, 0], by_size[size][0, 6] = own_drop, -1
    assert float(probing.spill(by_size)[0]) == pytest.approx(case[2], nan_ok=True)
    few = {size: falls[:5, :5] for size, falls in by_size.items()}
    assert bool(probing.spill(few).isnan().all())


LETTER_LATENT, WORD_LATENT = 3, 7  # those from 10 on fire by chance
WORD = 0.2
"""Share of the letter's tokens that are one word."""


def letter_and_word(speaks: bool):
    """Units whose letter is dimension 0 and whose word is dimension 1. The letter's latent is
    silent on the word; that of the word contains the letter if it ``speaks``."""
    draw = torch.Generator().manual_seed(0)
    letter = torch.rand(6000, generator=draw) < 0.3
    word = letter & (torch.rand(6000, generator=draw) < WORD)
    x = 0.1 * torch.randn(6000, 8, generator=draw)
    x[letter, 0] += 1
    x[word, 1] += 1
    latents = torch.rand(6000, D_SAE, generator=draw)
    latents *= latents < 0.2
    latents[:, :10] = 0
    latents[letter & ~word, LETTER_LATENT] = 1
    latents[word, WORD_LATENT] = 1
    decoder = torch.zeros(D_SAE, 8)
    decoder[10:, 3] = 1
    decoder[LETTER_LATENT, 0] = 1
    decoder[WORD_LATENT, :2] = torch.tensor([1.0 if speaks else 0.0, 1.0])
    half = torch.rand(6000, generator=draw) < 0.5
    asked = [f"{LETTER} s"], [LETTER], letter[:, None], torch.ones_like(letter)[:, None], half
    return x, latents.T, decoder, Concepts(*asked)


def probed(speaks, is_sparse=True, without=(), seen=1):
    x, table, decoder, asked = letter_and_word(speaks)
    allowed = EVERY.clone()
    allowed[list(without)] = False
    site = probing.probe_site([asked], [seen * x], 0)
    (found,) = probing.probe_latents(
        site, [table.to_sparse() if is_sparse else table], decoder, [allowed]
    )
    return float(found["missed"]), float(found["absorbed"])


def test_a_word_that_takes_its_letter_is_found(monkeypatch):
    """By one other latent that counts: not one that the probe needs, nor one that is left out; and
    not where units are several rows, or nothing is seen of the letter."""
    missed, absorbed = probed(True)
    assert missed == pytest.approx(0, abs=0.01) and absorbed == 0
    missed, absorbed = probed(True, without=(LETTER_LATENT, WORD_LATENT))
    assert missed > 0.5 and absorbed == 0
    assert all(map(math.isnan, probed(True, is_sparse=False)))
    assert all(map(math.isnan, probed(True, seen=0)))  # no example is recognised
    # with one main latent; the word's own would be the second
    monkeypatch.setattr("llm_wsae.evaluation.monosemanticity.probing.GAIN", 1.0)
    assert probed(True) == pytest.approx((WORD, WORD), abs=0.03)
    assert probed(False) == pytest.approx((WORD, 0.0), abs=0.03)
