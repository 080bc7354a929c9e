"""Missed and absorbed letters, where both are known by construction."""

import pytest
import torch

from llm_wsae.evaluation.monosemanticity.absorption import absorption, main_latents
from llm_wsae.evaluation.monosemanticity.concept_scores import (
    LatentTables,
    ProbedConcepts,
    probe_latents,
    probe_site,
)
from llm_wsae.evaluation.monosemanticity.concepts import Concepts
from llm_wsae.evaluation.monosemanticity.probing import splits
from llm_wsae.evaluation.monosemanticity.unit_tables import DenseTable, SparseTable, Units
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


def probed(speaks, table, without=()):
    x, latents, decoder, asked = case(speaks)
    site = probe_site([asked], [x])
    tables = LatentTables.of([asked], [table(latents)], decoder, (latents > 0).float().mean(0))
    allowed = torch.ones(D_SAE, dtype=torch.bool)
    allowed[list(without)] = False
    return probe_latents([asked], site, tables, allowed)


def sparse(latents):
    unit, column = latents.nonzero(as_tuple=True)
    return SparseTable(unit, column, latents[unit, column], tuple(latents.shape))


@pytest.mark.parametrize("speaks", [True, False])
def test_a_word_that_takes_its_letter_is_found(monkeypatch, speaks):
    """With one main latent; the word's own would be the second."""
    monkeypatch.setattr("llm_wsae.evaluation.monosemanticity.absorption.GAIN", 1.0)
    found = probed(speaks, sparse)
    assert float(found.missed) == pytest.approx(WORD, abs=0.03)
    assert float(found.absorbed) == pytest.approx(WORD if speaks else 0.0, abs=0.03)


def test_a_latent_that_the_probe_needs_is_no_absorber():
    found = probed(True, sparse)
    assert float(found.missed) == pytest.approx(0, abs=0.01)
    assert float(found.absorbed) == 0


def test_a_latent_that_does_not_count_absorbs_nothing():
    """Its letter's own, say, which is dense."""
    found = probed(True, sparse, without=(LETTER_LATENT, WORD_LATENT))
    assert float(found.missed) > 0.5 and float(found.absorbed) == 0


def test_other_units_have_no_absorption():
    found = probed(True, DenseTable)
    assert bool(found.missed.isnan()) and bool(found.absorbed.isnan())


def test_the_number_of_main_latents_follows_what_they_add():
    correlation = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, -0.9]]).repeat(4, 1)
    area = {
        1: torch.tensor([0.90, 0.80, 0.80, 0.80]),
        2: torch.tensor([0.91, 0.90, 0.90, 0.81]),
        5: torch.tensor([0.99, 0.91, 0.99, 0.99]),
    }
    allowed = torch.tensor([True, True, False, True, True, True])
    found = main_latents(correlation, area, allowed)
    assert [row[row >= 0].tolist() for row in found] == [[0], [0, 1], [0, 1, 3, 4], [0]]


def test_a_letter_that_no_probe_recognises_has_no_share():
    x, latents, decoder, asked = case(True)
    (split, _) = asked.splits
    nothing = torch.zeros(1, split.items.shape[1])
    main = torch.tensor([[LETTER_LATENT]])
    every = torch.ones(len(decoder), dtype=torch.bool)
    both = absorption(main, every, sparse(latents), decoder, x[:8].T[:, :1], nothing, split)
    assert all(bool(side.isnan()) for side in both)
