"""A rule is parsed once: what the object knows, what it refuses, and its controls."""

import pytest
import torch
from covariances import second_moment

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.matrix_rules import (
    EIGENVALUE_FLOOR,
    rotated,
    sensitivity,
    spectrum,
    whitening,
)
from llm_wsae.weights.rules import OWN, RULES, Rule

D_IN = 6
MATRIX = WeightConfig(form="matrix")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, D_IN, generator=generator) * torch.arange(1, D_IN + 1)
    half = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)
    statistics = Statistics(D_IN, 16).update(x, torch.arange(len(x)) % 16)
    return RuleInputs(
        statistics,
        decoder=torch.randn(12, D_IN, generator=generator),
        energy=torch.rand(12, generator=generator),
        fisher=half @ half.T,
        second_moment=second_moment(statistics),
    )


def test_a_parsed_rule_names_itself():
    every = [*RULES, *(f"permuted:{name}" for name in RULES)]
    every += [f"rotated:{name}" for name, rule in RULES.items() if rule.has_matrix]
    for text in every:
        rule = Rule.parse(text)
        assert rule.name == text and Rule.of(text) == Rule.of(rule) == rule
        assert rule.is_plain == (text == "uniform")
    assert Rule.parse("variance") is RULES["variance"]
    own = RULES["kurtosis"]
    assert Rule.parse("permuted:kurtosis") == own.as_control("permuted") != own


def test_what_a_rule_knows():
    """(scores, matrix, drawn, need) by text."""
    table = {
        "uniform": (True, False, False, None),
        "permuted:variance": (True, False, True, None),
        "permuted:participation": (True, False, True, "dictionary"),
        "sensitivity": (True, True, False, "fisher"),
        "permuted:sensitivity": (True, True, True, "fisher"),
        "rotated:sensitivity": (False, True, True, "fisher"),
        "whitening": (False, True, False, "second_moment"),
        "rotated:whitening": (False, True, True, "second_moment"),
    }
    for text, known in table.items():
        rule = Rule.parse(text)
        found = (rule.has_scores, rule.has_matrix, rule.is_drawn, rule.need)
        assert found == known, text


def test_texts_that_name_no_rule():
    for text, sentence in {
        "varience": "no weight rule 'varience'; did you mean 'variance'",
        "permutd:variance": "no weight rule 'permutd:variance'; did you mean 'permuted:variance'",
        "permuted:variance:x": "no weight rule 'permuted:variance:x'",
        "hoyer": "no weight rule 'hoyer'",
        "deciles:variance": "no weight rule 'deciles:variance'",
        "permuted:permuted:variance": "no weight rule",
        ":variance": "no weight rule ':variance'; did you mean 'variance'",
        "permuted:": "no weight rule 'permuted:'",
        "": "no weight rule ''; known are 'uniform', 'variance'",
        "own": "no weight rule 'own'",
        "rotated:kurtosis": r"only rules with a matrix can be rotated \(sensitivity, whitening\)",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            Rule.parse(text)


def test_the_form_follows_the_settings():
    space, diagonal = WeightConfig(place="space"), WeightConfig("space", form="diagonal")
    for text, config, form in [
        ("variance", WeightConfig(), "diagonal"),
        ("variance", space, "diagonal"),
        ("sensitivity", WeightConfig(), "diagonal"),
        ("sensitivity", space, "matrix"),
        ("sensitivity", diagonal, "diagonal"),
        ("sensitivity", MATRIX, "matrix"),
        ("permuted:sensitivity", space, "matrix"),
        ("rotated:sensitivity", WeightConfig(), "matrix"),
        ("whitening", WeightConfig(), "matrix"),
        ("uniform", MATRIX, "diagonal"),  # plain whatever the settings
    ]:
        assert Rule.parse(text).form(config) == form, (text, config)


def test_forms_that_a_rule_does_not_have():
    diagonal = WeightConfig(form="diagonal")
    for text, config, sentence in [
        ("variance", MATRIX, "'variance' has no matrix form; those with one are sensitivity"),
        ("permuted:uniform", MATRIX, "'permuted:uniform' has no matrix form"),
        ("whitening", diagonal, "'whitening' gives only a matrix"),
        ("rotated:sensitivity", diagonal, "'rotated:sensitivity' gives only a matrix"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            Rule.parse(text).form(config)


def test_every_claim_has_a_control_of_the_same_form():
    space = WeightConfig(place="space")
    for text, config, control in [
        ("variance", WeightConfig(), "permuted:variance"),
        ("variance", space, "permuted:variance"),
        ("sensitivity", WeightConfig(), "permuted:sensitivity"),
        ("sensitivity", space, "rotated:sensitivity"),
        ("whitening", WeightConfig(), "rotated:whitening"),
        ("uniform", space, None),
        ("permuted:variance", WeightConfig(), None),
        ("rotated:whitening", space, None),
    ]:
        found = Rule.parse(text).matched_control(config)
        assert (found and found.name) == control, (text, config)


def test_every_rule_gives_what_it_says(inputs):
    for rule in RULES.values():
        if rule.has_scores:
            scores = rule.scores(inputs)
            assert scores.shape == (D_IN,) and scores.dtype == torch.float64
        if rule.has_matrix:
            matrix = rule.matrix(inputs)
            assert matrix.shape == (D_IN, D_IN) and matrix.dtype == torch.float64
        assert rule.has_scores or rule.has_matrix
    assert not (OWN.has_scores or OWN.has_matrix or OWN.is_drawn)


def test_controls_know_nothing_but_the_rule(inputs):
    kurtosis, permuted = RULES["kurtosis"], Rule.parse("permuted:kurtosis")
    plain, control = kurtosis.scores(inputs), permuted.scores(inputs)
    assert torch.equal(plain.sort().values, control.sort().values)
    assert not torch.equal(plain, control)
    assert torch.equal(control, permuted.scores(inputs))
    assert not torch.equal(control, permuted.scores(inputs, draw=1))
    for text, same in (("permuted:whitening", True), ("rotated:whitening", False)):
        matrix, control = RULES["whitening"].matrix(inputs), Rule.parse(text).matrix(inputs, 2)
        torch.testing.assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(matrix))
        assert torch.equal(control, Rule.parse(text).matrix(inputs, 2))
        assert not torch.allclose(control, matrix)
        values = (m.diagonal().sort().values for m in (control, matrix))
        assert torch.allclose(*values) == same


def test_a_missing_input_is_named_with_the_option_that_brings_it(inputs):
    bare = RuleInputs(inputs.statistics)
    for text, sentence in {
        "participation": "a first dictionary: .* --dictionary DICT",
        "permuted:participation": "a first dictionary: .* --dictionary DICT",
        "sensitivity": "the model: .* --model M",
    }.items():
        with pytest.raises(UsageError, match=f"the rule '{text}' needs {sentence}"):
            Rule.parse(text).scores(bare)
    with pytest.raises(UsageError, match="'rotated:sensitivity' needs the model"):
        Rule.parse("rotated:sensitivity").matrix(bare)
    for text in ("whitening", "permuted:whitening"):
        said = rf"'{text}' needs the covariance .* llm_wsae.measure_inputs\(\['{text}'\], store"
        with pytest.raises(UsageError, match=said):
            weights_from_rule(text, 0.5, inputs.statistics)


def test_scores_and_matrices_that_a_rule_does_not_have(inputs):
    for text in ("whitening", "permuted:whitening", "rotated:sensitivity"):
        with pytest.raises(UsageError, match="gives only a matrix"):
            Rule.parse(text).scores(inputs)
    with pytest.raises(UsageError, match=r"no matrix form; those .* are sensitivity, whitening"):
        RULES["variance"].matrix(inputs)


# --- rules with a matrix ---

D = 6


@pytest.fixture(scope="module")
def of_matrices():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=generator)
    x = torch.randn(6000, D, generator=generator) @ mix + 3
    statistics = Statistics(D, 16).update(x, torch.arange(len(x)) % 16)
    half = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return RuleInputs(statistics, fisher=half @ half.T, second_moment=second_moment(statistics))


def test_too_few_rows_are_not_whitened():
    rows = torch.randn(6, 6)
    sentence = (
        "6 rows are too few for the covariance of 6 dimensions; harvest at least 60 tokens, or "
        "raise --statistics-tokens of a stream"
    )
    with pytest.raises(LlmWsaeError, match=sentence):
        statistics = Statistics(6, 4).update(rows, torch.zeros(6, dtype=torch.long))
        whitening(RuleInputs(statistics, second_moment=second_moment(statistics)))


def test_whitening_makes_the_covariance_the_identity(of_matrices):
    s, sigma = whitening(of_matrices), of_matrices.covariance
    torch.testing.assert_close(s @ sigma @ s, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(s, s.T)  # the symmetric root: ZCA, not another whitening


def test_sensitivity_is_the_fisher_matrix(of_matrices):
    torch.testing.assert_close(sensitivity(of_matrices), of_matrices.fisher)


def test_rotated_keeps_the_spectrum_only(of_matrices):
    f = of_matrices.fisher
    control = rotated(f, 0)
    torch.testing.assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(f))
    _, mine = spectrum(f)
    _, theirs = spectrum(control)
    assert float((mine.T @ theirs).diagonal().abs().max()) < 0.95
    assert torch.equal(control, rotated(f, 0)) and not torch.allclose(control, rotated(f, 1))


def test_rotations_are_uniform():
    """The mean of Q diag(s) Qᵀ over all rotations is mean(s)·1."""
    s = torch.diag(torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
    mean = sum(rotated(s, draw) for draw in range(3000)) / 3000
    torch.testing.assert_close(mean, 4 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.2)


def test_permuted_deals_out_rows_and_columns(of_matrices):
    control = Rule.parse("permuted:sensitivity").matrix(of_matrices, 3)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3))
    for i in range(D):
        for j in range(D):
            assert control[i, j] == of_matrices.fisher[order[i], order[j]]


def test_the_floor_makes_any_matrix_invertible():
    values, vectors = spectrum(torch.diag(torch.tensor([0.0, 1e-9, 2.0, 4.0, 6.0])))
    assert values.tolist() == pytest.approx(
        [2 * EIGENVALUE_FLOOR, 2 * EIGENVALUE_FLOOR, 2.0, 4.0, 6.0]
    )
    assert vectors.dtype == torch.float64
    with pytest.raises(LlmWsaeError, match="no positive eigenvalue, so it prefers nothing"):
        spectrum(torch.zeros(3, 3))
    with pytest.raises(LlmWsaeError, match="NaN"):
        spectrum(torch.full((3, 3), float("nan")))
