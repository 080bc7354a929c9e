"""What is recorded of a dictionary, and how alike those of several seeds are."""

import math
from itertools import permutations

import pytest
import torch
from planted_model import (
    NUM_WORDS,
    PACKING,
    SITE,
    WIDTH,
    one_latent_a_word,
    planted_model,
    planted_text,
)
from torch.nn.functional import normalize

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.evaluation.heldout import HeldoutActivations, HeldoutText
from llm_wsae.evaluation.massive import massive_thresholds
from llm_wsae.evaluation.monosemanticity import seed_consistency
from llm_wsae.evaluation.monosemanticity.concepts.tables import units_of_documents, units_of_tokens
from llm_wsae.evaluation.monosemanticity.latents.firings import FiringCollector
from llm_wsae.evaluation.monosemanticity.recording import Recorder, read_units, record
from llm_wsae.evaluation.monosemanticity.seed_consistency import matched_cosine, pw_mcc
from llm_wsae.model.site import Site

MASSIVE = 3
AT = Site.parse(SITE)


@pytest.fixture(scope="module", params=[None, MASSIVE])
def case(request, tmp_path_factory):
    """Without and with a massive word: model, text, and the rows that count."""
    path = planted_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=20)
    model = planted_model(request.param)
    packer = Packer.for_model(model, PackConfig(**PACKING))
    text = HeldoutText.take(packer.blocks(Corpus.open(str(path), "all"), block_size=8), 1000)
    usable = torch.ones(text.num_rows, dtype=torch.bool)
    if request.param is not None:
        usable = text.token != request.param
    return model, text, usable


def expected(text, usable, units):
    """Share of each word among the rows of each unit."""
    found = torch.zeros(len(units.size), WIDTH)
    for row in range(text.num_rows):
        if units.of_row[row] >= 0 and usable[row]:
            found[units.of_row[row], text.token[row]] += 1
    return found / units.size[:, None]


def test_activations_and_latents_are_averaged_over_units(case):
    model, text, usable = case
    kinds = [units_of_tokens(text, 300, 0), units_of_documents(text, 0)]
    assert len(kinds[0].size) == 300 and not kinds[1].single
    activations = HeldoutActivations(model, text, batch_tokens=64)
    dictionary = one_latent_a_word()
    threshold = massive_thresholds({AT: [dictionary]}, activations.cache)[AT]
    assert threshold == pytest.approx(10)  # most rows have norm 1
    units_x = read_units(activations, {AT: threshold}, kinds)[AT]
    recorder = Recorder(dictionary, collector(text, dictionary), threshold, kinds)
    record(activations, [recorder])
    every = torch.arange(dictionary.d_sae)
    for units, x, table in zip(kinds, units_x, recorder.tables(), strict=True):
        wanted = expected(text, usable, units)
        torch.testing.assert_close(x, wanted)
        torch.testing.assert_close(table.take(every), wanted)
    firings = recorder.firings()
    assert firings.num_rows == int(usable.sum())
    counts = torch.bincount(text.token[usable], minlength=dictionary.d_sae)
    assert torch.equal(firings.counts, counts)


def test_a_recorder_serves_alone(case):
    """Top contexts need no sentence encoder, no concepts and no threshold."""
    model, text, _ = case
    dictionary = one_latent_a_word()
    recorder = Recorder(dictionary, collector(text, dictionary), threshold=float("inf"))
    record(HeldoutActivations(model, text, batch_tokens=64), [recorder])
    top = recorder.firings().top
    assert recorder.tables() == [] and (top.rows[NUM_WORDS:] == -1).all()
    for word in range(NUM_WORDS):
        assert text.token[top.rows[word]].unique().tolist() == [word]
        assert len(text.context[top.rows[word]].unique()) == 4


def collector(text, dictionary):
    windows = text.windows(torch.arange(0, text.num_rows, 50), 2, 2)
    return FiringCollector(text, windows, dictionary.d_sae, top=4, sample=6, seed=0)


def decoder(seed, rows=6):
    return torch.randn(rows, 9, generator=torch.Generator().manual_seed(seed))


def test_a_permuted_and_scaled_copy_agrees_perfectly():
    one = decoder(0, 40)
    other = one[torch.randperm(40, generator=torch.Generator().manual_seed(1))] * 3
    assert pw_mcc([one, other]) == pytest.approx(1, abs=1e-6)
    assert pw_mcc([one, -other]) < 0.7  # a latent is not its opposite


def test_the_matching_is_the_best_of_all():
    one, other = decoder(0), decoder(1)
    cosines = normalize(one, dim=1) @ normalize(other, dim=1).T
    best = max(
        float(cosines[torch.arange(6), list(order)].mean()) for order in permutations(range(6))
    )
    assert matched_cosine(one, other) == pytest.approx(best, abs=1e-6)


def test_of_too_many_rows_some_are_matched(monkeypatch):
    one, other = decoder(0, 60), decoder(1, 60)
    whole = matched_cosine(one, other)
    monkeypatch.setattr(seed_consistency, "_MOST_PAIRS", 600)  # ten rows of sixty
    assert matched_cosine(one, one.flip(0)) == pytest.approx(1, abs=1e-6)
    assert whole < matched_cosine(one, other) < whole + 0.2


def test_it_is_the_mean_over_pairs_of_alive_latents():
    parts = [decoder(seed) for seed in range(3)]
    pairs = [matched_cosine(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pw_mcc(parts) == pytest.approx(sum(pairs) / 3)
    alive = [torch.arange(6) < 4, torch.ones(6, dtype=torch.bool)]
    assert pw_mcc(parts[:2], alive) == pytest.approx(matched_cosine(parts[0][:4], parts[1]))
    assert math.isnan(pw_mcc(parts[:1]))
    assert math.isnan(pw_mcc(parts[:2], [torch.zeros(6, dtype=torch.bool)] * 2))
