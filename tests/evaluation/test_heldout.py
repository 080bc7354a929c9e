"""Held-out text, and one definition of its massive rows for fidelity and for monosemanticity."""

import dataclasses
import json

import pytest
import torch
from evaluation_cases import WordMeanings, one_latent_a_word, planted_model, planted_text
from looping import over
from refusals import fails
from tiny import tiny_model, words

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.evaluation.fidelity.evaluator import evaluate
from llm_wsae.evaluation.heldout import ActivationCache, HeldoutText
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
from llm_wsae.model.site import Site

SIZE = 16  # positions of a context; 15 of them are rows, less the separators


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def take(model, folder, documents, tokens, labels=()):
    """Held-out text of documents given as (words, labels)."""
    path = folder / "text.jsonl"
    rows = [{"text": words(i, n), **own} for i, (n, own) in enumerate(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packer = Packer.for_model(model, PackConfig(context_size=SIZE))
    blocks = packer.blocks(Corpus.open(str(path), "all", text_column="text"), block_size=4)
    return HeldoutText.take(blocks, tokens, labels)


def test_labelled_documents_have_half_of_the_rows_as_far_as_they_go(model, tmp_path):
    some = [(60, {"kind": "a"} if i % 5 == 0 else {"other": "x"} if i % 5 == 1 else {})
            for i in range(50)]  # fmt: skip
    # A fifth of 3000 words has "kind": all of that, where half would be more.
    for tokens, labels, names, share in (
        (800, ("kind",), {"kind"}, 0.5),
        (800, (), {"kind", "other"}, 0.5),
        (2000, ("kind",), {"kind"}, 0.3),
    ):
        text = take(model, tmp_path, some, tokens, labels)
        labelled = [n for n, header in text.headers.items() if names & set(header["labels"])]
        theirs = torch.isin(text.owner[text.context], torch.tensor(labelled)).double().mean()
        assert tokens <= text.num_rows < tokens + SIZE
        assert float(theirs) == pytest.approx(share, abs=0.05)


def test_a_few_tokens_are_taken_from_two_contexts_and_too_few_are_an_error(model, tmp_path):
    """One holds them, but what compares contexts would not be defined."""
    for tokens, documents in ((5, [{}, {}]), (1, [{}, {"kind": "a"}]), (5, [{}, {"kind": "a"}])):
        text = take(model, tmp_path, [(40, own) for own in documents], tokens)
        assert text.num_contexts == 2 and bool((text.keep.sum(1) > 10).all())
    with pytest.raises(LlmWsaeError, match=r"holds \d+ tokens in \d+ contexts, but 10,000 t"):
        take(model, tmp_path, [(60, {})] * 5, 10_000)
    fails("does not fill a single context", take, model, tmp_path, [(5, {})], 1)


@over(room=(0, 1 << 12, 1 << 30))
def test_activations_are_those_of_the_model_kept_or_not(model, tmp_path, room):
    text = take(model, tmp_path, [(40, {})] * 12, 300)
    sites = [Site.parse("blocks.0.hook_resid_post"), Site.parse("blocks.2.hook_resid_pre")]
    activations = ActivationCache(model, text.ids, text.keep, batch_tokens=3 * SIZE, room=room)
    activations.read(sites[:1])
    whole = model.activations(text.ids, sites)
    for _ in range(2):
        batches = list(activations.rows(sites))
        assert [batch.contexts.start for batch in batches] == list(range(0, text.num_contexts, 3))
        for site in sites:
            rows = torch.cat([batch.activations[site] for batch in batches])
            expected = whole[site].flatten(0, 1)[text.cell]
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    found = [activations.kept(number, site, lambda: torch.zeros(0)).numel() > 0
             for number in range(len(batches)) for site in sites]  # fmt: skip
    assert all(found) == (room > 1 << 12) and any(found) == (room > 0)
    starts = text.keep.sum(1).cumsum(0)[2:-1:3].tolist()
    assert [batch.rows.start for batch in batches] == [0, *starts]


def recording(threshold: float | None):
    dictionary = one_latent_a_word()
    dictionary.info = dataclasses.replace(dictionary.info, massive_threshold=threshold)
    return dictionary


def test_fidelity_and_monosemanticity_leave_out_the_same_rows(tmp_path):
    """Rows have norm 1, and one word in forty has norm 100. The smallest recorded threshold counts;
    without any, ten median norms do."""
    model = planted_model(massive=3)
    corpus = Corpus.open(str(planted_text(tmp_path / "text.jsonl")), "all")
    packing = PackConfig(context_size=16)
    config = MonosemanticConfig(tokens=600, bootstraps=10, top=2, sample=3, silent=20)
    evaluator = MonosemanticityEvaluator(model, corpus, packing, config, WordMeanings())
    for thresholds, share in (
        ((None,), 1 / 40), ((50.0, None, 200.0), 1 / 40), ((200.0,), 0.0)
    ):  # fmt: skip
        named = {f"words {n}": recording(own) for n, own in enumerate(thresholds)}
        contexts = Packer.for_model(model, packing).contexts(corpus)
        report = evaluate(named, model, contexts, EvaluateConfig(tokens=600, bootstraps=10))
        found = report.dictionaries["words 0"]
        assert found.massive_threshold == pytest.approx(thresholds[0] or 10, rel=0.05)
        for one in (report, evaluator.score(named)):
            found = one.dictionaries[f"words {len(thresholds) - 1}"]
            rows = found.rows + found.massive_rows
            assert found.massive_rows / rows == pytest.approx(share, abs=0.02), found
            assert (found.massive_rows == 0) == (share == 0)


def test_a_corpus_is_packed_as_the_training_text_was(tmp_path):
    model, path = planted_model(), str(planted_text(tmp_path / "text.jsonl"))
    corpus = Corpus.open(path, "heldout", heldout_fraction=0.5)
    packing = PackConfig(context_size=16)
    seen = {"name": corpus.identity()["name"], "part": "train", "heldout_fraction": 0.1}
    one = recording(None)
    one.info = dataclasses.replace(one.info, store={"packing": packing.packing()}, corpus=seen)
    config = EvaluateConfig(tokens=200, bootstraps=10)
    contexts = Packer.for_model(model, packing).contexts(corpus)
    expected = evaluate({"one": one}, model, contexts, config)
    found = evaluate({"one": one}, model, corpus, config)
    assert found.summaries() == expected.summaries()
    assert found.num_contexts == expected.num_contexts > 13  # of 15 kept positions each
    assert len(found.notes) == len(expected.notes) + 1
    assert "with less of" in found.notes[-1]
