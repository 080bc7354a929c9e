"""The whole measurement on a model whose latents are known."""

import dataclasses
import json
import math

import pytest
import torch
from evaluation_cases import (
    NUM_WORDS,
    PACKING,
    SITE,
    WIDTH,
    WordMeanings,
    dictionary,
    one_latent_a_word,
    one_latent_for_four_words,
    planted_model,
    planted_text,
)
from looping import over
from scipy import stats

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.checks import common_packing
from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import ActivationCache, HeldoutText
from llm_wsae.evaluation.monosemanticity.concepts import units_of_documents, units_of_tokens
from llm_wsae.evaluation.monosemanticity.evaluator import (
    MonosemanticityEvaluator,
    card_numbers,
    mean_of_families,
)
from llm_wsae.evaluation.monosemanticity.latents import Firings, read_units
from llm_wsae.model.site import Site

CONFIG = MonosemanticConfig(
    tokens=3000, batch_tokens=256, top=5, sample=5, silent=200, before=2, after=2,
    probe_tokens=2000, bootstraps=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus.open(str(planted_text(tmp_path_factory.mktemp("text") / "text.jsonl")), "all")


def scored(dictionaries, model, corpus, config=CONFIG):
    packing = common_packing(dictionaries, model.max_context)
    evaluator = MonosemanticityEvaluator(model, corpus, packing, config, WordMeanings())
    return evaluator.score(dictionaries)


def both():
    return {"words": one_latent_a_word(), "four": one_latent_for_four_words()}


@pytest.fixture(scope="module")
def report(model, corpus):
    return scored(both(), model, corpus)


def test_latents_of_one_word_are_monosemantic_and_those_of_four_are_not(report):
    assert 3000 <= report.num_rows < 3000 + 15 and report.num_rows == 15 * report.num_contexts
    assert report.num_documents == 80 and report.notes == []
    assert 0.2 <= report.chance["purity"] < 0.33  # five of some thirty words
    found = report.dictionaries["words"]
    assert (found.d_sae, found.rows, found.massive_rows) == (WIDTH, report.num_rows, 0)
    assert found.site == SITE and found.l0 == pytest.approx(1)
    # Every word is found in enough contexts; eight latents never fire.
    assert found.eligible_share == 1 - found.dead_share == pytest.approx(NUM_WORDS / WIDTH)
    assert found.dense_share == 0
    mean = found.latents["purity"]
    assert (mean.mean, mean.interval, mean.count) == (1, (1, 1), NUM_WORDS)
    assert found.latents["detection"].mean > 0.97  # windows of five words, one of them its own
    assert found.latents["coherence"].mean > 0.1
    # Nothing is left of a word's latent without that word.
    nothing = found.latents["detection_without_tokens"]
    assert math.isnan(nothing.mean) and (nothing.count, nothing.share) == (0, 0)
    # Latents of four words are not.
    words, four = found.latents, report.dictionaries["four"].latents
    assert report.dictionaries["four"].eligible_share == 1
    assert 0.35 < four["purity"].mean < 0.7  # the most frequent of four words among five
    assert four["purity"].interval[0] < four["purity"].mean < four["purity"].interval[1]
    for name in ("coherence", "detection"):
        assert four[name].interval[1] < words[name].interval[0]


def test_concepts_are_found_where_they_were_planted(report):
    site = report.sites[SITE]
    names = {f"letter {x}" for x in "abcdefghij"} | {"capital", "sentence start", "era=early"}
    assert set(site["concepts"]) == names
    assert site["concepts"]["letter a"]["dense"] == 1
    assert site["concepts"]["era=early"]["dense"] > 0.97
    words = report.dictionaries["words"].concepts
    assert words.families.keys() == {"letter", "capital", "sentence start", "era"}
    # At the first site, the dimensions are the words too. One of four words: half of a half.
    for of_one in (words.concepts["letter a"], site["concepts"]["letter a"]):
        assert of_one["best_1"] == pytest.approx(0.625, abs=0.03)
        assert of_one["best_2"] == pytest.approx(0.75, abs=0.03)
        assert of_one["best_5"] == 1
    # A latent of the four-word dictionary has one word of "a", and three of 36 others.
    four = report.dictionaries["four"].concepts
    best = 0.5 + (1 / 4 - 3 / 36) / 2
    assert four.concepts["letter a"]["best_1"] == pytest.approx(best, abs=0.04)
    # Without its four latents, a letter's rows are 0, and its examples look like all others.
    assert words.concepts["letter a"]["own_fall"] == pytest.approx(0.5, abs=0.02)
    assert abs(words.concepts["letter a"]["others_fall"]) < 0.05
    assert words.families["letter"]["selectivity"] > four.families["letter"]["selectivity"] + 0.3
    assert words.means["selectivity"].count == 13
    letters = card_numbers(report, "words")["selectivity_letters"]
    assert letters == words.families["letter"]["selectivity"]


def test_a_mean_over_families_counts_each_once():
    values = torch.tensor([1.0, 3.0, math.nan, 10.0], dtype=torch.float64)
    mean = mean_of_families(values, ["a", "a", "a", "b"])
    assert (mean.mean, mean.count, mean.share) == (6.0, 3, 0.75)
    expected = stats.ttest_1samp([2.0, 10.0], 0.0).confidence_interval()
    assert mean.interval == pytest.approx(tuple(expected))
    alone = mean_of_families(values[:3], ["a"] * 3)
    expected = stats.ttest_1samp([1.0, 3.0], 0.0).confidence_interval()
    assert alone.mean == 2.0 and alone.interval == pytest.approx(tuple(expected))
    single = mean_of_families(values[:1], ["a"])
    assert single.mean == 1.0 and math.isnan(single.interval[0])
    assert math.isnan(mean_of_families(values[2:3], ["a"]).mean)


def test_dense_latents_are_left_out_where_it_says_so(model, corpus):
    """One latent for the words of five letters fires on more than a tenth of the rows."""
    directions = torch.eye(NUM_WORDS, WIDTH)
    directions[0, :20] = 2
    found = scored({"x": dictionary(directions, "x")}, model, corpus).dictionaries["x"]
    assert found.dense_share == pytest.approx(1 / NUM_WORDS)
    every, without = found.concepts.concepts, found.concepts_not_dense.concepts
    assert without["letter a"]["best_1"] < every["letter a"]["best_1"]
    assert without["letter j"] == every["letter j"]


def test_together_or_one_by_one(model, corpus, report):
    encoder = WordMeanings()
    evaluator = MonosemanticityEvaluator(model, corpus, PackConfig(**PACKING), CONFIG, encoder)
    for name, one in both().items():
        alone = evaluator.score({name: one}).dictionaries[name]
        assert json.dumps(alone.to_dict()) == json.dumps(report.dictionaries[name].to_dict())
    known = encoder.embedded
    evaluator.score(both())
    assert encoder.embedded == known  # every window once


def test_a_dictionary_that_never_fires_has_no_scores(model, tmp_path):
    """Here on text without labels, which has concepts of tokens only."""
    lines = planted_text(tmp_path / "labelled.jsonl").read_text().splitlines()
    bare = [json.dumps({"text": json.loads(line)["text"]}) for line in lines]
    (tmp_path / "bare.jsonl").write_text("\n".join(bare))
    silent = {"silent": dictionary(torch.zeros(5, WIDTH), "silent")}
    asked = dataclasses.replace(CONFIG, tokens=2000)
    report = scored(silent, model, Corpus.open(str(tmp_path / "bare.jsonl"), "all"), asked)
    assert "era=early" not in report.sites[SITE]["concepts"] and "silent" in report.table()
    found = report.dictionaries["silent"]
    assert (found.eligible_share, found.dead_share, found.l0) == (0, 1, 0)
    assert found.to_dict()["latents"]["purity"] == {
        "mean": None, "interval": [None, None], "count": 0, "share": 0
    }  # fmt: skip
    means = found.concepts.means
    assert means["best_1"].mean == 0.5 and means["selectivity"].mean == 0


def test_what_cannot_be_scored_is_explained_in_a_sentence(model, corpus):
    good, narrow = {"x": one_latent_a_word()}, {"x": dictionary(torch.eye(4, 8), "x")}
    for error, match, dictionaries, settings in (
        (UsageError, "there is no dictionary to score; name at least one", {}, {}),
        (LlmWsaeError, "text holds .* but 10,000,000", good, {"tokens": 10_000_000}),
        (UsageError, "no document has a label 'eara'; did you mean 'era'", good,
         {"labels": ("eara",)}),
        (UsageError, "dictionary 'x' has 8 dimensions, but planted has 48", narrow, {}),
        (UsageError, "top is 1, but must be at least 2", good, {"top": 1}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            scored(dictionaries, model, corpus, dataclasses.replace(CONFIG, **settings))


def test_the_report_is_json_and_a_table(report):
    written = report.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    words = written["dictionaries"]["words"]
    assert words["latents"]["purity"] == {
        "mean": 1.0, "interval": [1.0, 1.0], "count": NUM_WORDS, "share": NUM_WORDS / WIDTH,
    }  # fmt: skip
    assert words["per_latent"]["purity"] == [1.0] * NUM_WORDS + [None] * (WIDTH - NUM_WORDS)
    table, detection = report.table(), report.dictionaries["four"].latents["detection"]
    (row,) = (line for line in table.splitlines() if line.startswith("four "))
    low, high = detection.interval
    assert f"{detection.mean:.3f} [{low:.3f}, {high:.3f}]" in row
    assert f"{report.num_rows:,} tokens of held-out text" in table
    assert f"the purity of random contexts is {report.chance['purity']:.3f}." in table


AT = Site.parse(SITE)


@over(massive=(None, 3))
def test_activations_and_latents_are_averaged_over_units(massive, corpus):
    """Without and with a massive word, whose rows do not count."""
    model, packing = planted_model(massive), PackConfig(**PACKING)
    text = HeldoutText.take(Packer.for_model(model, packing).blocks(corpus, block_size=8), 1000)
    usable = torch.ones(text.num_rows).bool() if massive is None else text.token != massive
    kinds = [units_of_tokens(text, 300, 0), units_of_documents(text, 0)]
    assert len(kinds[0].size) == 300 and not kinds[1].single
    activations = ActivationCache(model, text.ids, text.keep, batch_tokens=64)
    one = one_latent_a_word()
    threshold = activations.massive_threshold(AT, [one])
    assert threshold == pytest.approx(10)  # most rows have norm 1
    units_x = read_units(activations, {AT: threshold}, kinds)[AT]
    windows = text.windows(torch.arange(0, text.num_rows, 50), 2, 2)
    firings = Firings(one, threshold, text, windows, (4, 6), 0, kinds)
    for batch in activations.rows([AT]):
        firings.add(batch)
    for units, x, table in zip(kinds, units_x, firings.tables(), strict=True):
        wanted = torch.zeros(len(units.size), WIDTH)  # share of each word among the rows
        here = usable & (units.of_row >= 0)
        wanted.index_put_((units.of_row[here], text.token[here]), torch.ones(1), accumulate=True)
        wanted /= units.size[:, None]
        torch.testing.assert_close(x, wanted)
        torch.testing.assert_close(table.to_dense().T, wanted)
    assert firings.num_rows == int(usable.sum())
    counts = torch.bincount(text.token[usable], minlength=one.d_sae)
    assert torch.equal(firings.counts, counts)
