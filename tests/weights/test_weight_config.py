"""Settings that cannot be are refused when they are made."""

import pytest

from llm_wsae.errors import UsageError
from llm_wsae.weights.config import RuleInputConfig, WeightConfig


def test_weight_settings_that_cannot_be():
    for settings, sentence in [
        ({"clip": 0.5}, "clip must be a factor of at least 1, not 0.5"),
        ({"clip": float("nan")}, "clip must be a factor"),
        ({"anneal": 1.5}, "a share of the steps"),
        ({"anneal": -0.1}, "a share of the steps"),
        ({"anneal": 0.5, "place": "space"}, "only weights in the loss can be annealed"),
        ({"draw": -1}, "draw must not be negative"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            WeightConfig(**settings)
    WeightConfig(place="space", clip=1.0, anneal=0.0, draw=0)
    WeightConfig(anneal=1.0)


def test_measurements_of_too_little():
    for settings, sentence in [
        ({"top": 1}, "top is 1, but must be at least 2"),
        ({"before": -1}, "before is -1, but must be at least 0"),
        ({"after": -1}, "after is -1"),
        ({"sensitivity_tokens": 0}, "sensitivity-tokens is 0, but must be at least 1"),
        ({"semantic_tokens": 0}, "semantic-tokens is 0"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            RuleInputConfig(**settings)
    RuleInputConfig(sensitivity_tokens=1, semantic_tokens=1, top=2, before=0, after=0)
