"""Missed and absorbed letters, where both are known by construction."""

import math

import pytest
import torch

from llm_wsae.evaluation.monosemanticity.concept_scores import (
    ProbedConcepts,
    absorption,
    main_latents,
    probe_latents,
    probe_site,
)
from llm_wsae.evaluation.monosemanticity.concepts import Concepts, Units
from llm_wsae.evaluation.monosemanticity.probing import Exam, splits
from llm_wsae.statistics.measures import LETTER

UNITS, D_IN, D_SAE = 6000, 8, 20
LETTER_LATENT, WORD_LATENT, OTHERS = 3, 7, range(10, D_SAE)
WORD = 0.2
"""Share of the letter's tokens that are one word."""


def case(speaks: bool):
    """Units whose letter is dimension 0 and whose word is dimension 1. The letter's latent is
    silent on the word; that of the word contains the letter if it ``speaks``."""
    draw = torch.Generator().manual_seed(0)
    letter = torch.rand(UNITS, generator=draw) < 0.3
    word = letter & (torch.rand(UNITS, generator=draw) < WORD)
    x = 0.1 * torch.randn(UNITS, D_IN, generator=draw)
    x[letter, 0] += 1
    x[word, 1] += 1
    latents = torch.zeros(UNITS, D_SAE)
    latents[letter & ~word, LETTER_LATENT] = 1
    latents[word, WORD_LATENT] = 1
    chance = torch.rand(UNITS, len(OTHERS), generator=draw)
    latents[:, list(OTHERS)] = chance * (chance < 0.2)
    decoder = torch.zeros(D_SAE, D_IN)
    decoder[LETTER_LATENT, 0] = 1
    decoder[WORD_LATENT, :2] = torch.tensor([1.0 if speaks else 0.0, 1.0])
    decoder[list(OTHERS), 3] = 1
    half = torch.rand(UNITS, generator=draw) < 0.5
    one = torch.ones(UNITS, 1, dtype=torch.bool)
    concepts = Concepts([f"{LETTER} s"], [LETTER], letter[:, None], one, half)
    units = Units(torch.arange(UNITS), torch.ones(UNITS, dtype=torch.long), torch.arange(UNITS))
    return x, latents, decoder, ProbedConcepts(units, concepts, splits(concepts, 0))


def probed(speaks, is_sparse=True, without=()):
    x, latents, decoder, asked = case(speaks)
    table = latents.T.to_sparse() if is_sparse else latents.T
    allowed = torch.ones(D_SAE, dtype=torch.bool)
    allowed[list(without)] = False
    density = (latents > 0).float().mean(0)
    (found,) = probe_latents(probe_site([asked], [x]), [table], decoder, density, [allowed])
    return float(found["missed"]), float(found["absorbed"])


@pytest.mark.parametrize("speaks", [True, False])
def test_a_word_that_takes_its_letter_is_found(monkeypatch, speaks):
    """With one main latent; the word's own would be the second."""
    monkeypatch.setattr("llm_wsae.evaluation.monosemanticity.concept_scores.GAIN", 1.0)
    expected = (WORD, WORD if speaks else 0.0)
    assert probed(speaks) == pytest.approx(expected, abs=0.03)


def test_only_one_other_latent_that_counts_absorbs():
    """Not one that the probe needs, nor one that is left out because it is dense, say."""
    missed, absorbed = probed(True)
    assert missed == pytest.approx(0, abs=0.01) and absorbed == 0
    missed, absorbed = probed(True, without=(LETTER_LATENT, WORD_LATENT))
    assert missed > 0.5 and absorbed == 0


def test_units_of_several_rows_have_no_absorption():
    assert all(map(math.isnan, probed(True, is_sparse=False)))


def test_the_number_of_main_latents_follows_what_they_add():
    correlation = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, -0.9]]).repeat(4, 1)
    area = torch.tensor(
        [[0.90, 0.80, 0.80, 0.80], [0.91, 0.90, 0.90, 0.81], [0.99, 0.91, 0.99, 0.99]]
    )
    allowed = torch.tensor([True, True, False, True, True, True])
    found = main_latents(correlation, area, allowed)
    assert [row[row >= 0].tolist() for row in found] == [[0], [0, 1], [0, 1, 3, 4], [0]]


def test_a_letter_that_no_probe_recognises_has_no_share():
    x, latents, decoder, asked = case(True)
    split = asked.splits[0]
    exam = Exam([LETTER], split, x[:8].T[:, :1], torch.zeros(1, split.items.shape[1]))
    correlation, every = torch.eye(len(decoder))[[LETTER_LATENT]], torch.ones(len(decoder)).bool()
    table = latents.T.to_sparse()
    both = absorption(exam, table, correlation, torch.ones(3, 1), every, decoder)
    assert bool(both.isnan().all())
