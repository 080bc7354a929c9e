"""Where latents fire, and the scores of each that follow from it."""

import math

import evaluation_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import WindowEmbeddings
from llm_wsae.evaluation.monosemanticity import latents as scoring
from llm_wsae.evaluation.monosemanticity.evaluator import latent_means
from llm_wsae.evaluation.monosemanticity.probing import Split, auroc


@pytest.fixture(scope="module")
def text():
    return cases.make_text()


def test_top_contexts_and_samples_equal_brute_force_on_the_dense_matrix(text):
    """Whatever the cut into batches, massive rows left out, and with values that tie. The sample
    follows one random order of all rows; a quantile sample is spread over the ranks of what was
    sampled outside the top contexts."""
    every = (4 * cases.random_codes(text.num_rows)).round()
    every[[3, 200, 201], 0] = 1e4
    found, once = (cases.collected(text, every, step, threshold=1e3) for step in (7, 60))
    assert torch.equal(found.contexts, once.contexts)
    for name in ("rows", "values"):
        for one, other in ((found.top, once.top), (found.sample, once.sample)):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(found.fired, once.fired)
    every[[3, 200, 201]] = 0
    assert found.num_rows == text.num_rows - 3
    assert torch.equal(found.counts, (every > 0).sum(0))
    assert torch.allclose(found.density, (every > 0).double().sum(0) / found.num_rows)
    chosen = found.quantile_sample(3)
    place = torch.randperm(text.num_rows, generator=torch.Generator().manual_seed(0)).tolist()
    for latent in range(cases.D_SAE):
        best, drawn = {}, {}
        for row in every[:, latent].nonzero()[:, 0].tolist():
            context, value = int(text.context[row]), float(every[row, latent])
            if value > best.get(context, (0.0, 0))[0]:
                best[context] = (value, row)
            drawn[context] = min(row, drawn.get(context, row), key=lambda row: place[row])
        assert int(found.contexts[latent]) == len(best)
        expected = sorted(best.values(), key=lambda one: (-one[0], one[1]))[: cases.TOP]
        assert found.top.rows[latent].tolist() == [row for _, row in expected]
        assert found.top.values[latent].tolist() == [value for value, _ in expected]
        rows = found.sample.rows[latent]
        assert rows.tolist() == sorted(drawn.values(), key=lambda row: place[row])[: cases.SAMPLE]
        assert torch.equal(found.sample.values[latent], every[rows, latent])
        top = text.context[found.top.rows[latent]]
        left = rows[~torch.isin(text.context[rows], top)]
        ranked = left[every[left, latent].argsort(descending=True, stable=True)].tolist()
        if len(ranked) >= 3:
            ranked = [ranked[(2 * i + 1) * len(ranked) // 6] for i in range(3)]
        assert [row for row in chosen[latent].tolist() if row >= 0] == ranked


def test_a_latent_with_few_firings_has_few_examples(text):
    codes = torch.zeros(text.num_rows, 2)
    codes[[5, 40], 0] = torch.tensor([2.0, 3.0])
    found = cases.collected(text, codes, 9)
    assert found.top.rows.tolist() == [[40, 5, -1, -1], [-1] * 4]
    assert found.top.values[0].tolist() == [3.0, 2.0, 0.0, 0.0]
    assert sorted(found.sample.rows[0].tolist()) == [-1] * 4 + [5, 40]
    assert (found.sample.rows[1:] == -1).all()
    # a quantile sample of too few is all of them, but those in top contexts
    codes[[5, 40, 80, 120, 160, 200], 0] = torch.arange(1.0, 7.0)
    chosen = cases.collected(text, codes, 9, top=2, sample=6).quantile_sample(5)
    assert chosen[0].tolist() == [120, 80, 40, 5, -1]


def test_silence_is_of_whole_windows(text):
    every = cases.random_codes(text.num_rows, k=1)
    centres = torch.arange(0, text.num_rows, 13)
    found = cases.collected(text, every, 7, text.windows(centres, 2, 1))
    latents = torch.tensor([3, 0, 5])
    silent = found.silent_windows(latents)
    place = torch.stack([text.context, text.document_of], 1)
    for number, centre in enumerate(centres.tolist()):
        near = torch.arange(max(0, centre - 2), min(centre + 2, text.num_rows))
        near = near[(place[near] == place[centre]).all(1)]
        fired = (every[near] > 0).any(0)
        assert torch.equal(found.fired[number], fired)
        at_the_top = (text.context[found.top.rows] == text.context[centre]).any(1)
        assert torch.equal(silent[:, number], (~fired & ~at_the_top)[latents])


def by_pairs(positive, negative):
    """The definition: every positive against every negative."""
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(wins) / len(wins) if wins else math.nan


@settings(max_examples=60, deadline=None)
@given(st.tuples(*(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1),) * 2))
def test_auroc_equals_the_count_of_pairs_ties_and_bystanders_included(sides):
    scores = torch.tensor([[float(s) for side in sides for s, _ in side]])
    counts = torch.tensor([[counted for side in sides for _, counted in side]]).expand(2, -1)
    nothing = torch.zeros(0, 2)
    split = Split(nothing, nothing, torch.zeros_like(counts).long(), counts, len(sides[0]))
    for sign, found in zip((1, -1), auroc(torch.cat([scores, -scores]), split), strict=True):
        expected = by_pairs(*([sign * s for s, counted in side if counted] for side in sides))
        assert float(found) == pytest.approx(expected, nan_ok=True)


def test_purity_by_hand():
    token = torch.tensor([7, 7, 8, 9, 7])
    rows = torch.tensor([[0, 1, 2, 4], [0, 1, 4, -1], [0, 2, 3, -1], [-1, -1, -1, -1]])
    expected = [3 / 4, 1, 1 / 3, math.nan]
    assert scoring.purity(rows, token).tolist() == pytest.approx(expected, nan_ok=True)


def scores_of(text, codes, config, encoder=None):
    """The scorer of a text, and the scores of the latents to which the codes are the rows."""
    encoder = encoder or cases.WordCounts()
    embeddings = WindowEmbeddings(text, cases.Spelling(), encoder, config.before, config.after)
    scorer = scoring.LatentScorer(text, text.token, embeddings, config)
    examples = config.top, config.top + 4 * config.sample
    return scorer, scorer.scores(cases.collected(text, codes, 10, scorer.windows, *examples))


def test_detection_is_within_a_genre_and_beyond_the_documents_of_top_contexts():
    """By hand: every pair of a sampled window and a silent one; of these by document, and by
    resamplings of them; and those without the tokens of top contexts, of which all samples of the
    second latent are."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4), (2, 9), (300,))
    top, sample, random = (
        normalize(torch.randn(*shape, 6, generator=draw), dim=-1) for shape in shapes
    )
    silent = torch.rand(2, 300, generator=draw) > 0.2
    tokens = tuple(torch.randint(12, shape, generator=draw) for shape in shapes)
    tokens[1][1] = tokens[0][1, 0]
    places = [torch.randint(20, shape, generator=draw) for shape in shapes]
    places[1][:, :5] = torch.arange(5) + 14
    places[0][:] = torch.tensor([0, 1, 2, 15])
    genre, drawn = torch.arange(20) % 2, torch.randint(3, (7, 20), generator=draw).float()
    drawn[0] = 1  # the text as it is
    won, every = scoring.wins(top, sample, random), silent[:, None]
    without = scoring.share_won(won, every & scoring.strange_pairs(*tokens))
    fair = scoring.fair_pairs(silent, places, genre)
    found, resampled = scoring.share_won(won, fair), scoring._resampled(won, fair, places, drawn)
    for latent in range(2):
        centroid, known = top[latent].mean(0), set(tokens[0][latent].tolist())
        positive = [
            (float(x @ centroid), int(t), int(p))
            for x, t, p in zip(sample[latent], tokens[1][latent], places[1][latent], strict=True)
        ]
        negative = [
            (float(x @ centroid), int(t), int(p))
            for x, t, p, s in zip(random, tokens[2], places[2], silent[latent], strict=True)
            if s
        ]
        left = [[s for s, t, _ in side if t not in known] for side in (positive, negative)]
        wanted = by_pairs(*left) if len(left[0]) >= 3 else math.nan
        assert float(without[latent]) == pytest.approx(wanted, nan_ok=True)
        wanted, pairs, out = torch.zeros(7), torch.zeros(7), {0, 1, 2, 15}
        for x, _, one in positive:
            for y, _, other in negative:
                if not {one, other} & out and genre[one] == genre[other]:
                    wanted += drawn[:, one] * drawn[:, other] * float(x > y)
                    pairs += drawn[:, one] * drawn[:, other]
        assert torch.allclose(resampled[latent].float(), wanted / pairs, atol=1e-5)
        assert float(found[latent]) == pytest.approx(float(wanted[0] / pairs[0]), abs=1e-5)
    assert not without[0].isnan() and without[1].isnan()


def test_a_resampling_without_any_scored_document_widens_nothing():
    """Its mean detection is no number; the interval is that of the others."""
    detected = torch.tensor([0.6, 0.8, 0.7])
    drawn = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).double()
    gaps = torch.cat([drawn, torch.full((3, 5), torch.nan)], 1)
    every = torch.ones(3, dtype=torch.bool)
    (low, high), same = (
        latent_means({"detection": detected}, every, table, 100, 0)["detection"].interval
        for table in (gaps, drawn)
    )
    squared = drawn.mean(0).var() + detected.var() / 3
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(float(squared)), rel=1e-4)
    assert (low, high) == same


def test_a_latent_of_a_meaning_rather_than_a_token_is_detected_without_tokens():
    """Half of the contexts speak of words 0-14, the others of 15-29; the latent fires in half of
    the former's rows."""
    text = cases.make_text(contexts=200)
    about = text.context % 2 == 0
    token = text.token % 15 + 15 * (~about).long()
    text.token.copy_(token)
    text.ids.view(-1)[text.cell] = token
    draw = torch.Generator().manual_seed(2)
    active = about & (torch.rand(text.num_rows, generator=draw) < 0.5)
    values = (torch.rand(text.num_rows, generator=draw) + 0.1) * active

    class Halves(cases.WordCounts):
        def embed(self, texts):
            counts = super().embed(texts)
            halves = torch.stack([counts[:, :15].sum(1), counts[:, 15:30].sum(1)], 1)
            return normalize(torch.nn.functional.pad(halves, (0, self.width - 2)), dim=1)

    config = MonosemanticConfig(top=3, sample=12, silent=200, before=0, after=0)
    one, scores = scores_of(text, values[:, None], config, Halves())
    assert float(scores["purity"][0]) < 1
    # Silent windows of the other half score below, those of the same half tie: between .5 and 1.
    silent = ~(active[one.random]) & about[one.random]
    others = ~about[one.random]
    expected = (others.sum() + 0.5 * silent.sum()) / (others.sum() + silent.sum())
    assert float(scores["detection"][0]) == pytest.approx(float(expected), abs=0.01)
    assert float(scores["detection_without_tokens"][0]) > 0.7


def test_windows_end_with_context_and_document():
    text = cases.make_text(contexts=20, positions=6, documents=14)
    embeddings = WindowEmbeddings(text, cases.Spelling(), cases.WordCounts(), 3, 1)
    words = [f"w{i}" for i in text.token.tolist()]
    # Row 5 begins the second context; row 8 begins the second document; row 7 is before it.
    ends = {0: words[0:2], 4: words[1:5], 5: words[5:7], 7: words[5:8], 8: words[8:10]}
    assert [one.split() for one in embeddings.texts(torch.tensor([*ends]))] == [*ends.values()]


def test_neighbours_share_a_window_in_which_all_of_them_stand():
    text = cases.make_text(contexts=2, positions=16, documents=2)
    text.document[0, 12:] = 1  # another document begins at position 12
    text.document_of.copy_(text.document.flatten()[text.cell])
    encoder = cases.WordCounts()
    embeddings = WindowEmbeddings(text, cases.Spelling(), encoder, 6, 4)
    rows = torch.arange(text.num_rows)
    cells = embeddings.cells(rows)
    assert (cells == text.cell[:, None]).any(1).all()
    # Positions 1-4, 5-9, 10-14 and 15 of a context of one document; in the other context, 10 and
    # 11 belong to 12, in the middle of five, no more.
    centre = (cells[:, 6] % 16).tolist()
    assert centre[15:] == [2] * 4 + [7] * 5 + [12] * 5 + [15]
    assert centre[:15] == [2] * 4 + [7] * 5 + [10, 11] + [12] * 3 + [15]
    assert torch.equal(embeddings.of(rows[5:9]), embeddings.of(rows[4:5]).expand(4, -1))
    expected = cases.WordCounts().embed(embeddings.texts(rows))
    assert torch.allclose(embeddings.of(rows), expected, atol=1e-3)
    assert encoder.embedded == len(cells.unique(dim=0)) == 10  # each once
