"""A rule is parsed once: what the object knows, what it refuses, what it gives, its controls."""

import pytest
import torch
from covariances import second_moment
from scipy.stats import spearmanr

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.rules import EIGENVALUE_FLOOR, OWN, RULES, Rule, RuleInputs, rotated, spectrum

D_IN = 4  # of the fixture ``inputs``
MATRIX, SPACE = WeightConfig(form="matrix"), WeightConfig(place="space")
DIAGONAL = WeightConfig(form="diagonal")


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
    for text, config, form in [
        ("variance", WeightConfig(), "diagonal"),
        ("variance", SPACE, "diagonal"),
        ("sensitivity", WeightConfig(), "diagonal"),
        ("sensitivity", SPACE, "matrix"),
        ("sensitivity", WeightConfig("space", form="diagonal"), "diagonal"),
        ("sensitivity", MATRIX, "matrix"),
        ("permuted:sensitivity", SPACE, "matrix"),
        ("rotated:sensitivity", WeightConfig(), "matrix"),
        ("whitening", WeightConfig(), "matrix"),
        ("uniform", MATRIX, "diagonal"),  # plain whatever the settings
    ]:
        assert Rule.parse(text).form(config) == form, (text, config)
    for text, config, sentence in [
        ("variance", MATRIX, "'variance' has no matrix form; those with one are sensitivity"),
        ("permuted:uniform", MATRIX, "'permuted:uniform' has no matrix form"),
        ("whitening", DIAGONAL, "'whitening' gives only a matrix"),
        ("rotated:sensitivity", DIAGONAL, "'rotated:sensitivity' gives only a matrix"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            Rule.parse(text).form(config)


def test_every_claim_has_a_control_of_the_same_form():
    for text, config, control in [
        ("variance", WeightConfig(), "permuted:variance"),
        ("variance", SPACE, "permuted:variance"),
        ("sensitivity", WeightConfig(), "permuted:sensitivity"),
        ("sensitivity", SPACE, "rotated:sensitivity"),
        ("whitening", WeightConfig(), "rotated:whitening"),
        ("uniform", SPACE, None),
        ("permuted:variance", WeightConfig(), None),
        ("rotated:whitening", SPACE, None),
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
        "rotated:sensitivity": "the model",
        "whitening": r"the covariance .* llm_wsae.measure_inputs\(\['whitening'\], store",
        "permuted:whitening": "the covariance",
    }.items():
        with pytest.raises(UsageError, match=f"the rule '{text}' needs {sentence}"):
            weights_from_rule(text, 0.5, bare)
    with pytest.raises(UsageError, match="gives only a matrix"):
        RULES["whitening"].scores(inputs)
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


FEATURES = torch.tensor([1, 1, 1, 2, 2, 2, 9, 9])  # in each dimension; orthogonal to the others'


def planted() -> RuleInputs:
    """x = W_p f: dimensions of one feature, of an antipodal pair, and of nine features."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.zeros(int(FEATURES.sum()), len(FEATURES))
    first = 0
    for dimension, count in enumerate(FEATURES.tolist()):
        decoder[first : first + count, dimension] = 1
        decoder[first + 1 : first + count : 2, dimension] = -1
        first += count
    shape = (8000, len(decoder))
    active = torch.rand(shape, generator=generator) > 0.9
    f = active * (1 - torch.rand(shape, generator=generator))
    fisher = torch.diag(torch.arange(1.0, 9.0)).double() + 0.1
    rows = of_rows(f @ decoder).statistics
    return RuleInputs(rows, decoder=decoder, energy=f.square().mean(0), fisher=fisher)


def test_scores_of_planted_dimensions():
    """Rank correlation with the true monosemanticity, one over the number of features. With
    features all alike variance counts them, so the paper's proxy points the wrong way."""
    inputs = planted()
    for rule, low, high in (
        ("variance", -1.0, -0.9),
        ("kurtosis", 0.9, 1.0),
        ("participation", 0.9, 1.0),
        ("sensitivity", -1.0, -0.9),
    ):
        found = RULES[rule].scores(inputs)
        assert float(found.min()) >= 0
        assert low <= spearmanr(found, 1 / FEATURES).statistic <= high + 1e-9, rule
    found = RULES["participation"].scores(inputs)
    torch.testing.assert_close(found, 1 / FEATURES.double(), rtol=0.05, atol=0)
    found = RULES["sensitivity"].scores(inputs)
    torch.testing.assert_close(found, torch.arange(1.0, 9.0).double() + 0.1)


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


def test_permuted_gives_rows_and_columns_to_other_dimensions(inputs):
    control = Rule.parse("permuted:sensitivity").matrix(inputs, 3)
    order = torch.randperm(D_IN, generator=torch.Generator().manual_seed(3))
    for i in range(D_IN):
        for j in range(D_IN):
            assert control[i, j] == inputs.fisher[order[i], order[j]]


def test_the_floor_makes_any_matrix_invertible():
    values, vectors = spectrum(torch.diag(torch.tensor([0.0, 1e-9, 2.0, 4.0, 6.0])))
    floor = 2 * EIGENVALUE_FLOOR
    assert values.tolist() == pytest.approx([floor, floor, 2.0, 4.0, 6.0])
    assert vectors.dtype == torch.float64
    with pytest.raises(LlmWsaeError, match="no positive eigenvalue, so it prefers nothing"):
        spectrum(torch.zeros(3, 3))
    with pytest.raises(LlmWsaeError, match="NaN"):
        spectrum(torch.full((3, 3), float("nan")))
