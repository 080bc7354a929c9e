"""A rule is parsed once: what the object knows, what it refuses, what it gives, its controls."""

import pytest
import torch
from refusals import fails, misused

from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.rules import OWN, RULES, Rule
from llm_wsae.weights.scoring import EIGENVALUE_FLOOR, RuleInputs, spectrum

D_IN = 4  # of the fixture ``inputs``
MATRIX, SPACE = WeightConfig(form="matrix"), WeightConfig(place="space")


def drawn(text, inputs, draw=0, form="auto"):
    return Rule.parse(text).apply(inputs, WeightConfig(form=form, draw=draw))


def test_a_parsed_rule_names_itself():
    every = [*RULES, *(f"permuted:{name}" for name in RULES), "rotated:whitening"]
    for text in every:
        rule = Rule.parse(text)
        assert rule.name == text and Rule.parse(rule) is rule
        assert rule.is_plain == (text == "uniform") and rule.is_drawn == (":" in text)
    assert Rule.parse("variance") is RULES["variance"] and not (OWN.has_scores or OWN.is_drawn)


def test_texts_that_name_no_rule():
    for text, sentence in {
        "permutd:variance": "no weight rule 'permutd:variance'; did you mean 'permuted:variance'",
        "permuted:permuted:variance": "no weight rule",
        "permuted:": "no weight rule 'permuted:'",
        "": "no weight rule ''; known are 'uniform', 'variance'",
        "own": "no weight rule 'own'",
        "rotated:kurtosis": r"only rules with a matrix can be rotated \(sensitivity, whitening\)",
    }.items():
        misused(sentence, Rule.parse, text)


def test_the_form_follows_the_settings_and_every_claim_has_a_control_of_it(inputs):
    for text, config, form, control in [
        ("variance", WeightConfig(), "diagonal", "permuted:variance"),
        ("variance", SPACE, "diagonal", "permuted:variance"),
        ("kurtosis", WeightConfig(), "diagonal", "permuted:kurtosis"),
        ("participation", WeightConfig(), "diagonal", "permuted:participation"),
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
        found, given = rule.matched_control(config), rule.apply(inputs, config)
        assert (rule.form(config), found and found.name) == (form, control), (text, config)
        assert given.shape == ((D_IN, D_IN) if form == "matrix" else (D_IN,))
        assert given.dtype == torch.float64


def test_controls_know_nothing_but_the_rule(inputs):
    scores, control = drawn("kurtosis", inputs), drawn("permuted:kurtosis", inputs)
    assert torch.equal(scores.sort().values, control.sort().values)
    assert not torch.equal(scores, control)
    assert not torch.equal(control, drawn("permuted:kurtosis", inputs, draw=1))
    matrix = drawn("whitening", inputs)
    order = torch.randperm(D_IN, generator=torch.Generator().manual_seed(2))
    for text in ("permuted:whitening", "rotated:whitening"):
        control = drawn(text, inputs, 2)
        torch.testing.assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(matrix))
        assert torch.equal(control, drawn(text, inputs, 2)) and not torch.allclose(control, matrix)
        assert torch.equal(control, matrix[order][:, order]) == (text == "permuted:whitening")


def test_what_a_rule_lacks_is_named(inputs):
    few = RuleInputs(Statistics(6, 16), second_moment=SecondMoment(6).update(torch.randn(6, 6)))
    needed = r"the rule 'whitening' needs the covariance .* llm_wsae.measure_inputs\(\['whitening'"
    too_few = "6 rows are too few for the covariance of 6 dimensions; take at least 60: harvest"
    misused(needed, weights_from_rule, "whitening", 0.5, RuleInputs(inputs.statistics))
    fails(too_few, drawn, "whitening", few)
    for text, form, sentence in (
        ("rotated:sensitivity", "diagonal", "gives only a matrix"),
        ("variance", "matrix", r"no matrix form; those .* are sensitivity, whitening"),
    ):
        misused(sentence, drawn, text, inputs, form=form)


# --- Against numbers known otherwise


def test_kurtosis_of_known_distributions():
    """Whatever their scale and level, which here leaves no row massive."""
    g = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=g)
    rows = [torch.randn(200_000, generator=g), uniform, (uniform < 0.1).float(), 0 * uniform]
    statistics = Statistics(4, 16, sample_rows=200_000)
    statistics.update(30 * torch.stack(rows, dim=1) + 100, torch.arange(200_000) % 16)
    rare = (1 - 3 * 0.1 * 0.9) / (0.1 * 0.9)
    found = drawn("kurtosis", RuleInputs(statistics))
    assert found.tolist() == pytest.approx([3, 1.8, rare, 0], rel=0.03)


def test_participation_counts_the_latents_that_share_a_dimension():
    decoder = torch.tensor([[1.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
    for energy, scores in (
        ([1.0, 1, 1], [1, 1 / 3, 0]),
        ([2.0, 0, 0], [1, 1, 0]),  # two latents are never used
        ([2.0, 1, 1], [1, 6 / 16, 0]),
    ):
        inputs = RuleInputs(Statistics(3, 1), decoder=decoder, energy=torch.tensor(energy))
        assert drawn("participation", inputs).tolist() == pytest.approx(scores)


def test_whitening_makes_the_covariance_the_identity(inputs):
    s, sigma = drawn("whitening", inputs), inputs.covariance
    torch.testing.assert_close(s @ sigma @ s, torch.eye(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(s, s.T)  # the symmetric root: ZCA, not another whitening


def test_rotations_are_uniform():
    """The mean of Q diag(s) Qᵀ over all rotations is mean(s)·1."""
    inputs = RuleInputs(Statistics(3, 1), fisher=torch.tensor([1.0, 2.0, 9.0]).diag())
    assert torch.equal(drawn("sensitivity", inputs, form="matrix"), inputs.fisher.double())
    mean = sum(drawn("rotated:sensitivity", inputs, draw) for draw in range(1000)) / 1000
    torch.testing.assert_close(mean, 4 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.3)


def test_the_floor_makes_any_matrix_invertible():
    values, vectors = spectrum(torch.diag(torch.tensor([0.0, 1e-9, 2.0, 4.0, 6.0])))
    floor = 2 * EIGENVALUE_FLOOR
    assert values.tolist() == pytest.approx([floor, floor, 2.0, 4.0, 6.0])
    assert vectors.dtype == torch.float64
    for number, sentence in ((0.0, "no positive eigenvalue, so it prefers"), (torch.nan, "NaN")):
        fails(sentence, spectrum, torch.full((3, 3), number))
