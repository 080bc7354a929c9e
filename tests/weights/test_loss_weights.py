"""Loss weights: their settings, their names, what rows count under them, and their file."""

import pytest
import torch
from safetensors.torch import save_file

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.weights.config import IN_LOSS, RuleInputConfig, WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import OWN, RULES, Rule


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


def test_names_and_labels():
    vector, matrix = torch.ones(4), torch.eye(4)
    for gamma, rule, alpha, settings, name in [
        (vector, "variance", 0.5, {}, "variance-a0.5"),
        (vector, "variance", -0.25, {"place": "space"}, "variance-a-0.25-space"),
        (vector, "variance", 0.0, {"place": "space"}, "uniform"),
        (vector, "uniform", 1.0, {}, "uniform"),
        (vector, "variance", 0.5, {"clip": 4.0, "anneal": 0.5}, "variance-a0.5-c4-n0.5"),
        (vector, "variance", 0.5, {"draw": 2}, "variance-a0.5"),
        (vector, "permuted:variance", 0.5, {"draw": 2}, "permuted-variance-a0.5-d2"),
        (vector, "permuted:variance", 0.0, {"draw": 2}, "uniform"),
        (vector, "random", 1.0, {}, "random-a1"),
        (vector, "token-norm", -0.5, {}, "token-norm-a-0.5"),
        (vector, "permuted:token-norm", -0.5, {"draw": 2}, "permuted-token-norm-a-0.5-d2"),
        (vector, "sensitivity", 0.5, {}, "sensitivity-a0.5"),
        (matrix, "sensitivity", 0.25, {"place": "space"}, "sensitivity-matrix-a0.25-space"),
        (matrix, "permuted:sensitivity", 1.0, {"draw": 1}, "permuted-sensitivity-matrix-a1-d1"),
        (matrix, "whitening", 1.0, {"place": "space"}, "whitening-a1-space"),
        (matrix, "rotated:sensitivity", 0.25, {"draw": 1}, "rotated-sensitivity-a0.25-d1"),
    ]:
        weights = LossWeights(gamma, Rule.parse(rule), alpha, WeightConfig(**settings))
        assert weights.name == name
        assert weights.label == name.removesuffix("-d1").removesuffix("-d2")
    assert LossWeights(vector).name == LossWeights(matrix).name == "own"
    assert LossWeights(vector, config=WeightConfig("space", clip=2.0)).name == "own-c2-space"


def test_only_weights_of_tokens_weigh_rows():
    """A masked row neither counts nor gives its score to another one."""
    x = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0, 4.0])[:, None].expand(6, 4)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    for rule, alpha, draw, expected in (
        ("token-norm", 0.5, 0, [1, 0, 4, 9, 0, 16]),
        ("token-norm", -0.5, 0, [1, 0, 1 / 4, 1 / 9, 0, 1 / 16]),
        ("permuted:token-norm", 0.5, 0, [4, 0, 9, 16, 0, 1]),
        ("permuted:token-norm", 0.5, 1, [9, 0, 16, 1, 0, 4]),
    ):
        weights = LossWeights(torch.ones(4), Rule.parse(rule), alpha, WeightConfig(draw=draw))
        assert weights.row_weights(x, mask).tolist() == pytest.approx(expected)
        assert weights.row_weights(x[:0], mask[:0]).tolist() == []
    for rule in (OWN, RULES["variance"], RULES["uniform"]):
        assert LossWeights(torch.ones(4), rule).row_weights(x, mask) is None


def test_a_file_keeps_everything(tmp_path):
    path = tmp_path / "w.safetensors"
    config = WeightConfig(place="space", clip=9.0, draw=3)
    for weights in (
        LossWeights(torch.rand(4), RULES["variance"], 0.5),
        LossWeights(torch.rand(4, 4), Rule.parse("rotated:sensitivity"), 0.25, config),
        LossWeights(torch.rand(4), config=config),
    ):
        weights.save(path, {"site": "blocks.0.hook_resid_pre"})
        again = LossWeights.load(path)
        assert torch.equal(again.gamma, weights.gamma) and again.name == weights.name
        assert (again.rule, again.alpha, again.config) == (
            weights.rule,
            weights.alpha,
            weights.config,
        )


def test_settings_are_given_for_custom_weights_only(tmp_path):
    path, config = tmp_path / "w.safetensors", WeightConfig(place="space")
    save_file({"anything": torch.ones(4)}, path)
    own = LossWeights.load(path)
    assert (own.rule, own.alpha, own.config) == (OWN, 1.0, IN_LOSS)
    assert LossWeights.load(path, config).config == config
    LossWeights(torch.ones(4), RULES["variance"], 0.5).save(path)
    assert LossWeights.load(path, config).config == IN_LOSS


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(LlmWsaeError, match=r"there is no .*weights file"):
        LossWeights.load(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(LlmWsaeError, match="not a readable weights file"):
        LossWeights.load(path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path)
    with pytest.raises(LlmWsaeError, match="a weights file has one, 'gamma'"):
        LossWeights.load(path)
    for wrong in (torch.ones(2, 3), torch.ones(2, 2, 2), torch.ones(2).int()):
        save_file({"gamma": wrong}, path)
        with pytest.raises(LlmWsaeError, match="one floating-point number per dimension"):
            LossWeights.load(path)
    for header in ("[]", "{", '{"rule": "none"}', '{"rule": 3}', '{"rule": []}', '{"clip": "x"}'):
        save_file({"gamma": torch.ones(2)}, path, {"llm_wsae": header})
        with pytest.raises(LlmWsaeError, match="does not say how its weights were made"):
            LossWeights.load(path)
