"""How held-out text is packed for dictionaries."""

import pytest
from small_dictionaries import make_dictionary
from tiny import tiny_model, write_jsonl

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.checks import common_packing
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import evaluate

CONFIG = EvaluateConfig(tokens=110, bootstraps=10)


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
        report = evaluate({"theirs": theirs}, model, corpus, CONFIG)
        assert report.num_contexts == contexts
