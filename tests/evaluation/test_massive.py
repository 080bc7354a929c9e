"""One definition of massive rows, for fidelity and for monosemanticity."""

import dataclasses

import pytest
import torch
from planted_model import SITE, WordMeanings, one_latent_a_word, planted_model, planted_text

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.evaluation.activation_cache import ActivationCache
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.evaluation.fidelity.evaluator import evaluate
from llm_wsae.evaluation.massive import massive_thresholds
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
from llm_wsae.model.site import Site

AT = Site.parse(SITE)


def recording(threshold: float | None):
    dictionary = one_latent_a_word()
    dictionary.info = dataclasses.replace(dictionary.info, massive_threshold=threshold)
    return dictionary


def test_the_smallest_recorded_threshold_counts_and_the_text_is_measured_without_any():
    model = planted_model()
    ids = torch.randint(5, 20, (6, 8), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = False
    cache = ActivationCache(model, list(zip(ids.split(4), keep.split(4), strict=True)))

    def threshold(*recorded):
        return massive_thresholds({AT: [recording(r) for r in recorded]}, cache)[AT]

    assert threshold(7.0, None, 5.0) == 5.0
    assert not cache.holds([AT])  # a recorded threshold costs no forward pass
    norms = model.activations(ids, [AT])[AT][keep].norm(dim=1)
    assert threshold(None, None) == pytest.approx(10 * float(norms.median()), rel=1e-6)


def test_fidelity_and_monosemanticity_leave_out_the_same_rows(tmp_path):
    """Rows have norm 1, and one word in forty has norm 100."""
    model = planted_model(massive=3)
    corpus = Corpus.open(str(planted_text(tmp_path / "text.jsonl")), "all")
    packing = PackConfig(context_size=16)
    config = MonosemanticConfig(tokens=600, bootstraps=10, top=2, sample=3, silent=20)
    evaluator = MonosemanticityEvaluator(model, corpus, packing, config, WordMeanings())
    for threshold, share in ((None, 1 / 40), (50.0, 1 / 40), (200.0, 0.0)):
        named = {"words": recording(threshold)}
        contexts = Packer.for_model(model, packing).contexts(corpus)
        report = evaluate(named, model, contexts, EvaluateConfig(tokens=600, bootstraps=10))
        for found in (report.dictionaries["words"], evaluator.score(named).dictionaries["words"]):
            rows = found.rows + found.massive_rows
            assert found.massive_rows / rows == pytest.approx(share, abs=0.02), found
            assert (found.massive_rows == 0) == (share == 0)
