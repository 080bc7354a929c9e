"""Which text dictionaries are measured on, and what stands beside them."""

import pytest
import torch
from looping import over
from small_dictionaries import make_dictionary
from tiny import tiny_model, write_jsonl

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.baselines import baselines_of, half_random_beside, signed_dimensions
from llm_wsae.evaluation.checks import common_packing, notes_on_text
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import evaluate


def of(*infos):
    unknown = {"context_size": None, "prepend_bos": None, "store": {}}
    return {str(n): make_dictionary(**(unknown | info)) for n, info in enumerate(infos)}


def test_text_is_packed_as_the_dictionaries_say():
    recorded = {"store": {"packing": {"context_size": 32, "drop_positions": 3}}}
    gemma_scope = {"context_size": 1024, "prepend_bos": True}
    saelens = {"context_size": 512, "prepend_bos": False}
    for infos, most, expected in (
        ([{}], None, PackConfig()),
        ([{}], 64, PackConfig(context_size=64)),
        ([gemma_scope], 8192, PackConfig(context_size=1024)),
        ([gemma_scope], 100, PackConfig(context_size=100)),
        ([saelens], None, PackConfig(context_size=512, prepend_bos=False)),
        ([{"prepend_bos": False}], None, PackConfig(prepend_bos=False)),
        ([{"context_size": 1}], None, PackConfig()),
        ([gemma_scope, {}, saelens], None, PackConfig(context_size=512)),
        # what was measured on a store, or streamed, is known exactly
        ([gemma_scope, recorded | {"context_size": 7}], 16, PackConfig(32, drop_positions=3)),
    ):
        assert common_packing(of(*infos), most) == expected, infos
    with pytest.raises(UsageError, match="'0' and '1' were trained on differently packed"):
        common_packing(of(recorded, {"store": {"packing": {}}}))


def test_a_dictionary_of_another_tool_sees_its_own_contexts(tmp_path):
    """Or the 64 tokens that the model reads."""
    write_jsonl(tmp_path / "text.jsonl", [400] * 5)
    corpus, model = Corpus.open(str(tmp_path / "text.jsonl"), "all"), tiny_model()
    for size, contexts in ((1024, 2), (21, 6)):  # of 63 rows, of 20 rows
        theirs = make_dictionary(d_in=16, context_size=size, massive_threshold=None)
        report = evaluate({"theirs": theirs}, model, corpus, EvaluateConfig(110, bootstraps=10))
        assert report.num_contexts == contexts


HELD_OUT = {"name": "wiki", "part": "heldout", "heldout_fraction": 0.1, "fingerprint": "f"}


@over(
    case=(
        ({}, None),
        ({"part": "train"}, None),
        ({"part": "train", "heldout_fraction": 0.2}, None),
        ({"name": "another", "part": "all"}, None),
        ({"part": "all"}, "on all of wiki"),
        ({"part": "train", "heldout_fraction": 0.05}, "with less of wiki held out"),
        ({"part": "train", "fingerprint": "g"}, "on another version of wiki"),
    )
)
def test_text_that_was_not_held_out_is_noted(case):
    trained, said = case
    corpus = HELD_OUT | {"part": "train"} | trained if trained else {}
    made = of({"corpus": corpus})
    notes = notes_on_text(made, HELD_OUT)
    assert len(notes) == (said is not None) and all(said in note for note in notes)
    elsewhere = notes_on_text(made, HELD_OUT | {"part": "all"})
    assert len(elsewhere) == (corpus.get("name") == "wiki")
    assert all("was not read where it is held out" in note for note in elsewhere)


def test_all_dimensions_together_are_the_row_and_the_largest_deviations_are_active():
    info, d_in = DictionaryInfo("blocks.1.hook_resid_post", massive_threshold=50.0), 6
    x = torch.randn(400, d_in, generator=torch.Generator().manual_seed(0))
    x = x * torch.arange(1.0, d_in + 1) + 5
    mean, deviation = x.mean(0), x.std(0)
    every = signed_dimensions(info, deviation, mean, float(d_in))
    torch.testing.assert_close(every(x), x, rtol=1e-4, atol=1e-4)
    latents, away = every.encode(x), (x - mean) / deviation
    # either sign has a latent, and at most one of the two is active
    torch.testing.assert_close(latents[:, :d_in] - latents[:, d_in:], away, rtol=1e-4, atol=1e-4)
    assert float((latents[:, :d_in] * latents[:, d_in:]).abs().max()) == 0
    two = signed_dimensions(info, deviation, mean, 2.2)
    assert two.sparsity == TopK(2) and two.info == info
    active, away = two.encode(x) > 0, away.abs()
    assert torch.equal((active[:, :d_in] | active[:, d_in:]), away >= away.topk(2).values[:, 1:])


def test_a_threshold_below_every_row_is_named(tmp_path):
    corpus = Corpus.open(str(write_jsonl(tmp_path / "text.jsonl", [400] * 5)), "all")
    model, config = tiny_model(), EvaluateConfig(110, bootstraps=10)
    contexts = [*Packer.for_model(model, PackConfig(context_size=16)).contexts(corpus)][:4]
    one = make_dictionary(d_in=16, massive_threshold=1e-30)
    with pytest.raises(LlmWsaeError, match=r"threshold of plain-k4, 1e-30, so nothing can be mea"):
        baselines_of({"one": one}, model, contexts)
    with pytest.raises(LlmWsaeError, match="longer than 1e-30, the massive_threshold of its dic"):
        evaluate({"one": one}, model, corpus, config)


def test_a_half_random_dictionary_of_the_same_k_stands_beside():
    def made(architecture: str, k: int, site: str = "blocks.1.hook_resid_post"):
        return make_dictionary(site=site, training={"architecture": architecture, "k": k})

    among = {
        "a": made("frozen-decoder", 2),
        "b": made("frozen-decoder", 4),
        "c": made("frozen-decoder", 8),
        "d": made("frozen-encoder", 8),
        "e": made("frozen-encoder", 4, "blocks.2.hook_resid_post"),
        "plain": made("topk", 4),
    }
    for k, names in ((2, "ad"), (4, "bd"), (8, "cd"), (16, "ad")):
        beside = half_random_beside(made("topk", k), among)
        assert beside == dict(zip(("frozen decoder", "frozen encoder"), names, strict=True))
