"""Rules on planted rows whose answer is known, and what they say when an input is missing."""

import pytest
import torch
from scipy.stats import spearmanr

from llm_wsae.errors import UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.rules import RULES, check_rule, need_of, score

FEATURES = torch.tensor([1, 1, 1, 2, 2, 2, 9, 9])  # in each dimension; orthogonal to the others'


def planted(rows=8000, seed=0):
    """x = W_p f: dimensions of one feature, of an antipodal pair, and of nine features."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.zeros(int(FEATURES.sum()), len(FEATURES))
    first = 0
    for dimension, count in enumerate(FEATURES.tolist()):
        signs = torch.ones(count)
        signs[1::2] = -1
        decoder[first : first + count, dimension] = signs
        first += count
    shape = (rows, len(decoder))
    active = torch.rand(shape, generator=generator) > 0.9
    f = active * (1 - torch.rand(shape, generator=generator))
    return f @ decoder, decoder, f


@pytest.fixture(scope="module")
def inputs():
    x, decoder, f = planted()
    statistics = Statistics(len(FEATURES), 16).update(x, torch.arange(len(x)) % 16)
    fisher = torch.diag(torch.arange(1.0, 9.0)).double() + 0.1
    return RuleInputs(
        statistics,
        decoder=decoder,
        energy=f.square().mean(0),
        fisher=fisher,
        coherence=torch.linspace(0.5, 0.1, 8).double(),
    )


# Rank correlation with the true monosemanticity, one over the number of features. With features
# all alike variance counts them, so the paper's proxy points the wrong way.
KNOWN = {
    "variance": (-1.0, -0.9),
    "robust-variance": (-1.0, -0.9),
    "kurtosis": (0.9, 1.0),
    "hoyer": (0.9, 1.0),
    "negentropy": (0.9, 1.0),
    "participation": (0.9, 1.0),
    "semantic": (0.9, 1.0),
    "sensitivity": (-1.0, -0.9),
    "random": (-0.9, 0.9),
}


@pytest.mark.parametrize("rule", KNOWN)
def test_planted_dimensions(rule, inputs):
    low, high = KNOWN[rule]
    s = score(rule, inputs)
    assert s.dtype == torch.float64 and s.shape == (8,) and float(s.min()) >= 0
    assert low <= spearmanr(s, 1 / FEATURES).statistic <= high + 1e-9


def test_participation_counts_the_features(inputs):
    torch.testing.assert_close(
        score("participation", inputs), 1 / FEATURES.double(), rtol=0.05, atol=0
    )


def test_gap_leaves_the_least_gap(inputs):
    """On orthogonal groups of n features the best γ² is 1/n, dimension by dimension."""
    torch.testing.assert_close(score("gap", inputs), FEATURES.double().rsqrt(), rtol=1e-6, atol=0)


def test_controls_know_nothing_but_the_rule(inputs):
    plain, control = score("kurtosis", inputs), score("permuted:kurtosis", inputs)
    assert torch.equal(plain.sort().values, control.sort().values)
    assert not torch.equal(plain, control)
    assert torch.equal(control, score("permuted:kurtosis", inputs))
    assert not torch.equal(control, score("permuted:kurtosis", inputs, draw=1))
    assert not torch.equal(score("random", inputs), score("random", inputs, draw=1))
    many = torch.cat([score("random", inputs, draw=i) for i in range(200)])
    assert float(many.mean()) == pytest.approx(0.5, abs=0.03)


def test_sensitivity_is_the_diagonal(inputs):
    torch.testing.assert_close(score("sensitivity", inputs), torch.arange(1.0, 9.0).double() + 0.1)


MISSING = {
    "participation": "a first dictionary: .* --dictionary DICT",
    "permuted:gap": "a first dictionary: .* --dictionary DICT",
    "sensitivity": "the model: .* --model M",
    "semantic": "the model's tokenizer: .* --model M",
}


@pytest.mark.parametrize("rule", MISSING)
def test_missing_evidence_is_named_with_its_option(rule, inputs):
    with pytest.raises(UsageError, match=f"the rule '{rule}' needs {MISSING[rule]}"):
        score(rule, RuleInputs(inputs.statistics))
    assert need_of(rule) is not None


def test_every_rule_can_be_asked_for(inputs):
    for name, rule in RULES.items():
        check_rule(name)
        if rule.score:
            assert score(name, inputs).shape == (8,)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("varience", "no weight rule 'varience'; did you mean 'variance'"),
        ("permutd:variance", "no weight rule 'permutd:variance'; did you mean 'permuted:variance'"),
        ("permuted:random:x", "no weight rule"),
        (
            "rotated:hoyer",
            r"only rules with a matrix can be rotated \(sensitivity, whitening, lead",
        ),
    ],
)
def test_rules_that_are_not(rule, sentence):
    with pytest.raises(UsageError, match=sentence):
        check_rule(rule)


def test_a_matrix_is_no_score(inputs):
    for rule in ("whitening", "permuted:whitening", "rotated:sensitivity"):
        with pytest.raises(UsageError, match="gives only a matrix"):
            score(rule, inputs)
