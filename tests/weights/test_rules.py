"""A rule is parsed once: what the object knows, what it refuses, what it gives, its controls."""

import pytest
import torch
from covariances import second_moment

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.rules import EIGENVALUE_FLOOR, OWN, RULES, Rule, RuleInputs, rotated, spectrum

D_IN = 4  # of the fixture ``inputs``
MATRIX, SPACE = WeightConfig(form="matrix"), WeightConfig(place="space")


def test_a_parsed_rule_names_itself():
    every = [*RULES, *(f"permuted:{name}" for name in RULES)]
    every += [f"rotated:{name}" for name, rule in RULES.items() if rule.has_matrix]
    for text in every:
        rule = Rule.parse(text)
        assert rule.name == text and Rule.of(text) == Rule.of(rule) == rule
        assert rule.is_plain == (text == "uniform") and rule.is_drawn == (":" in text)
    assert Rule.parse("variance") is RULES["variance"]


def test_texts_that_name_no_rule():
    for text, sentence in {
        "permutd:variance": "no weight rule 'permutd:variance'; did you mean 'permuted:variance'",
        "permuted:permuted:variance": "no weight rule",
        "permuted:": "no weight rule 'permuted:'",
        "": "no weight rule ''; known are 'uniform', 'variance'",
        "own": "no weight rule 'own'",
        "rotated:kurtosis": r"only rules with a matrix can be rotated \(sensitivity, whitening\)",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            Rule.parse(text)


def test_the_form_follows_the_settings_and_every_claim_has_a_control_of_it():
    for text, config, form, control in [
        ("variance", WeightConfig(), "diagonal", "permuted:variance"),
        ("variance", SPACE, "diagonal", "permuted:variance"),
        ("sensitivity", WeightConfig(), "diagonal", "permuted:sensitivity"),
        ("sensitivity", SPACE, "matrix", "rotated:sensitivity"),
        ("sensitivity", WeightConfig("space", "diagonal"), "diagonal", "permuted:sensitivity"),
        ("sensitivity", MATRIX, "matrix", "rotated:sensitivity"),
        ("permuted:sensitivity", SPACE, "matrix", None),
        ("rotated:sensitivity", WeightConfig(), "matrix", None),
        ("whitening", WeightConfig(), "matrix", "rotated:whitening"),
        ("uniform", MATRIX, "diagonal", None),  # plain whatever the settings
    ]:
        rule = Rule.parse(text)
        found = rule.matched_control(config)
        assert (rule.form(config), found and found.name) == (form, control), (text, config)


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
    scores = RULES["kurtosis"].scores(inputs)
    control = Rule.parse("permuted:kurtosis").scores
    assert torch.equal(scores.sort().values, control(inputs).sort().values)
    assert not torch.equal(scores, control(inputs))
    assert not torch.equal(control(inputs), control(inputs, draw=1))
    matrix, order = RULES["whitening"].matrix(inputs), drawn_order(2)
    for text in ("permuted:whitening", "rotated:whitening"):
        control = Rule.parse(text).matrix(inputs, 2)
        torch.testing.assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(matrix))
        assert torch.equal(control, Rule.parse(text).matrix(inputs, 2))
        assert not torch.allclose(control, matrix)
        assert torch.equal(control, matrix[order][:, order]) == (text == "permuted:whitening")


def drawn_order(draw):
    return torch.randperm(D_IN, generator=torch.Generator().manual_seed(draw))


def test_what_a_rule_lacks_is_named(inputs):
    sentence = r"the covariance .* llm_wsae.measure_inputs\(\['whitening'\], store"
    with pytest.raises(UsageError, match=f"the rule 'whitening' needs {sentence}"):
        weights_from_rule("whitening", 0.5, RuleInputs(inputs.statistics))
    with pytest.raises(UsageError, match="gives only a matrix"):
        Rule.parse("rotated:sensitivity").scores(inputs)
    with pytest.raises(UsageError, match=r"no matrix form; those .* are sensitivity, whitening"):
        RULES["variance"].matrix(inputs)


# --- Scores, against numbers known otherwise


def of_rows(rows: torch.Tensor) -> RuleInputs:
    statistics = Statistics(rows.shape[1], 16, sample_rows=len(rows))
    return RuleInputs(statistics.update(rows, torch.arange(len(rows)) % 16))


def test_kurtosis_of_known_distributions():
    """Whatever their scale and level, which here leaves no row massive."""
    g = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=g)
    rows = [torch.randn(200_000, generator=g), uniform, (uniform < 0.1).float(), 0 * uniform]
    found = RULES["kurtosis"].scores(of_rows(30 * torch.stack(rows, dim=1) + 100))
    rare = (1 - 3 * 0.1 * 0.9) / (0.1 * 0.9)
    assert found.tolist() == pytest.approx([3, 1.8, rare, 0], rel=0.03)


def test_participation_counts_the_latents_that_share_a_dimension():
    decoder = torch.tensor([[1.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
    statistics = Statistics(3, 1)
    for energy, scores in (
        ([1.0, 1, 1], [1, 1 / 3, 0]),
        ([2.0, 0, 0], [1, 1, 0]),  # two latents are never used
        ([2.0, 1, 1], [1, 6 / 16, 0]),
    ):
        inputs = RuleInputs(statistics, decoder=decoder, energy=torch.tensor(energy))
        assert RULES["participation"].scores(inputs).tolist() == pytest.approx(scores)


# --- Matrices


def test_too_few_rows_are_not_whitened():
    statistics = of_rows(torch.randn(6, 6)).statistics
    sentence = "6 rows are too few for the covariance of 6 dimensions; harvest at least 60 tokens"
    with pytest.raises(LlmWsaeError, match=sentence):
        RULES["whitening"].matrix(RuleInputs(statistics, second_moment=second_moment(statistics)))


def test_whitening_makes_the_covariance_the_identity(inputs):
    s, sigma = RULES["whitening"].matrix(inputs), inputs.covariance
    torch.testing.assert_close(s @ sigma @ s, torch.eye(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(s, s.T)  # the symmetric root: ZCA, not another whitening


def test_rotated_keeps_the_spectrum_only(inputs):
    f = inputs.fisher
    assert torch.equal(RULES["sensitivity"].matrix(inputs), f)
    control = rotated(f, 0)
    torch.testing.assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(f))
    assert float((spectrum(f)[1].T @ spectrum(control)[1]).diagonal().abs().max()) < 0.99
    assert torch.equal(control, rotated(f, 0)) and not torch.allclose(control, rotated(f, 1))
    # uniform: the mean of Q diag(s) Qᵀ over all rotations is mean(s)·1
    s = torch.diag(torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
    mean = sum(rotated(s, draw) for draw in range(3000)) / 3000
    torch.testing.assert_close(mean, 4 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.2)


def test_the_floor_makes_any_matrix_invertible():
    values, vectors = spectrum(torch.diag(torch.tensor([0.0, 1e-9, 2.0, 4.0, 6.0])))
    floor = 2 * EIGENVALUE_FLOOR
    assert values.tolist() == pytest.approx([floor, floor, 2.0, 4.0, 6.0])
    assert vectors.dtype == torch.float64
    with pytest.raises(LlmWsaeError, match="no positive eigenvalue, so it prefers nothing"):
        spectrum(torch.zeros(3, 3))
    with pytest.raises(LlmWsaeError, match="NaN"):
        spectrum(torch.full((3, 3), float("nan")))
