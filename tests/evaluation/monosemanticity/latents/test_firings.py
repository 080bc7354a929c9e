import pytest
import torch
from heldout_cases import D_SAE, SAMPLE, TOP, collected, dense, make_text, random_codes

from llm_wsae.evaluation.monosemanticity.latents.firings import (
    FiringCollector,
    quantile_sample,
    silent_windows,
)
from llm_wsae.sparse.codes import Codes


@pytest.fixture(scope="module")
def text():
    return make_text()


def test_top_contexts_equal_brute_force_on_the_dense_matrix(text):
    codes = random_codes(text.num_rows)
    encoded = torch.ones(text.num_rows, dtype=torch.bool)
    encoded[[3, 200, 201]] = False
    found = collected(text, codes, 7, encoded)
    every = dense(codes) * encoded[:, None]
    assert found.num_rows == text.num_rows - 3
    assert torch.equal(found.counts, (every > 0).sum(0))
    assert torch.allclose(found.density, (every > 0).double().sum(0) / found.num_rows)
    for latent in range(D_SAE):
        best = {}
        for row in every[:, latent].nonzero()[:, 0].tolist():
            context, value = int(text.context[row]), float(every[row, latent])
            if value > best.get(context, (0.0, 0))[0]:
                best[context] = (value, row)
        assert int(found.contexts[latent]) == len(best)
        expected = sorted(best.values(), reverse=True)[:TOP]
        assert found.top.rows[latent].tolist() == [row for _, row in expected]
        assert found.top.values[latent].tolist() == pytest.approx([value for value, _ in expected])


def test_the_sample_is_of_firings_in_different_contexts_and_has_their_values(text):
    codes = random_codes(text.num_rows)
    found, every = collected(text, codes, 7), dense(codes)
    for latent in range(D_SAE):
        rows = found.sample.rows[latent]
        assert (rows >= 0).all() and len(text.context[rows].unique()) == SAMPLE
        assert torch.equal(found.sample.values[latent], every[rows, latent])
        assert (every[rows, latent] > 0).all()


def test_the_sample_is_uniform():
    """Over many seeds, each of a latent's ten firings is drawn equally often."""
    text = make_text(contexts=10, positions=3)
    codes = Codes(torch.zeros(20, 1, dtype=torch.long), torch.zeros(20, 1))
    codes.values[::2] = torch.arange(1.0, 11.0)[:, None]
    drawn = torch.zeros(20)
    for seed in range(400):
        collector = FiringCollector(text, text.windows(torch.tensor([0]), 0, 0), 1, 1, 3, seed)
        collector.add(codes, slice(0, 10), torch.ones(20, dtype=torch.bool))
        drawn[collector.firings().sample.rows[0]] += 1
    assert drawn[1::2].sum() == 0
    # 400 draws of 3 out of 10: 120 each, with a standard deviation of 9.2
    assert (drawn[::2] - 120).abs().max() < 4 * 9.2


def test_the_cut_into_batches_does_not_matter(text):
    codes = random_codes(text.num_rows)
    codes.values.mul_(4).round_()  # so that many values tie
    one, other = collected(text, codes, 60), collected(text, codes, 1)
    for first, second in zip(one, other, strict=True):
        if isinstance(first, int):
            assert first == second
        else:
            pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [
                (first, second)
            ]  # fmt: skip
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_latent_with_few_firings_has_few_examples(text):
    codes = Codes(torch.zeros(text.num_rows, 1, dtype=torch.long), torch.zeros(text.num_rows, 1))
    codes.values[[5, 40]] = torch.tensor([[2.0], [3.0]])
    found = collected(text, codes, 9)
    assert found.top.rows[0].tolist() == [40, 5, -1, -1]
    assert found.top.values[0].tolist() == [3.0, 2.0, 0.0, 0.0]
    assert sorted(found.sample.rows[0].tolist()) == [-1] * 4 + [5, 40]
    assert (found.top.rows[1:] == -1).all() and (found.sample.rows[1:] == -1).all()


def test_silence_is_of_whole_windows(text):
    codes = random_codes(text.num_rows, k=1)
    centres = torch.arange(0, text.num_rows, 13)
    windows = text.windows(centres, 2, 1)
    found, every = collected(text, codes, 7, windows=windows), dense(codes)
    silent = silent_windows(found, text, windows)
    for number, centre in enumerate(centres.tolist()):
        near = [
            row
            for row in range(centre - 2, centre + 2)
            if 0 <= row < text.num_rows
            and text.context[row] == text.context[centre]
            and text.document_of[row] == text.document_of[centre]
        ]
        fired = (every[near] > 0).any(0)
        assert torch.equal(found.fired[number], fired)
        at_the_top = (text.context[found.top.rows] == text.context[centre]).any(1)
        assert torch.equal(silent[:, number], ~fired & ~at_the_top)


def test_a_quantile_sample_is_spread_over_the_ranks_and_leaves_out_top_contexts(text):
    codes = random_codes(text.num_rows)
    found = collected(text, codes, 7, sample=40)
    chosen = quantile_sample(found, text, 5)
    for latent in range(D_SAE):
        top = set(text.context[found.top.rows[latent]].tolist())
        left = [
            (float(value), int(row))
            for value, row in zip(
                found.sample.values[latent], found.sample.rows[latent], strict=True
            )
            if row >= 0 and int(text.context[row]) not in top
        ]
        ranked = sorted(left, reverse=True)
        expected = [ranked[(2 * i + 1) * len(ranked) // 10] for i in range(5)]
        assert chosen.rows[latent].tolist() == [row for _, row in expected]
        assert chosen.values[latent].tolist() == pytest.approx([value for value, _ in expected])


def test_a_quantile_sample_of_too_few_is_all_of_them(text):
    values = torch.zeros(text.num_rows, 1)
    values[[5, 40, 80, 120, 160, 200]] = torch.arange(1.0, 7.0)[:, None]
    codes = Codes(torch.zeros(text.num_rows, 1, dtype=torch.long), values)
    found = collected(text, codes, 9, top=2, sample=6)
    chosen = quantile_sample(found, text, 5)
    assert chosen.rows[0].tolist() == [120, 80, 40, 5, -1]
    assert chosen.values[0].tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
