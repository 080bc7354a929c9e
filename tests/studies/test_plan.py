"""Which dictionaries a study makes."""

import pytest
import torch

from llm_wsae.errors import UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.studies.config import StudyConfig
from llm_wsae.studies.plan import plan
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs


@pytest.fixture(scope="module")
def inputs():
    draw = torch.Generator().manual_seed(0)
    statistics = Statistics(8, 1, sample_rows=500)
    rows = torch.randn(500, 8, generator=draw) * torch.arange(1, 9)
    statistics.update(rows, torch.zeros(500, dtype=torch.int64))
    return RuleInputs(statistics, fisher=torch.cov(rows.T.double()))


def test_the_curve_the_rules_and_a_control_each(inputs):
    config = StudyConfig(("variance",), (0.5, -0.25), (4,), (2, 4), (0, 1))
    planned = plan(inputs, config, WeightConfig())
    assert [p.arm.name for p in planned] == [
        "uniform-k2", "uniform-k4",
        "variance-a0.5-k4", "permuted-variance-a0.5-k4",
        "variance-a-0.25-k4", "permuted-variance-a-0.25-k4",
        "uniform-k2-s1", "uniform-k4-s1",
        "variance-a0.5-k4-s1", "permuted-variance-a0.5-d1-k4-s1",
        "variance-a-0.25-k4-s1", "permuted-variance-a-0.25-d1-k4-s1",
    ]  # fmt: skip
    labels = {p.label: p.control for p in planned}
    assert labels == {
        "uniform": None,
        "variance-a0.5": "permuted-variance-a0.5",
        "permuted-variance-a0.5": None,
        "variance-a-0.25": "permuted-variance-a-0.25",
        "permuted-variance-a-0.25": None,
    }
    own, first, second = (
        next(p.arm.weights.gamma for p in planned if p.arm.name == name)
        for name in ("variance-a0.5-k4", *(p.arm.name for p in planned if "permuted-variance-a0.5"
                                           in p.arm.name))
    )  # fmt: skip
    assert not torch.equal(first, second)  # each seed has its own permutation
    ratio = (own / own.norm()).sort().values, (first / first.norm()).sort().values
    torch.testing.assert_close(*ratio)


def test_a_matrix_is_controlled_by_random_directions(inputs):
    config = StudyConfig(("sensitivity",), (0.25,), (4,), (2, 4), (0, 1))
    planned = plan(inputs, config, WeightConfig(place="space"))
    controls = {p.label: p.control for p in planned if p.control}
    assert controls == {"sensitivity-matrix-a0.25-space": "rotated-sensitivity-a0.25-space"}
    rotated = [p.arm.weights.gamma for p in planned if p.label.startswith("rotated")]
    assert len(rotated) == 2 and not torch.allclose(*rotated, atol=0.1)


def test_all_dictionaries_are_of_one_architecture(inputs):
    config = StudyConfig(("variance",), (0.5,), (4,), (2, 4), (0, 1), "jumprelu")
    planned = plan(inputs, config, WeightConfig())
    assert {p.arm.architecture for p in planned} == {"jumprelu"} and len(planned) == 2 * 4
    assert planned[2].arm.name == "variance-a0.5-jumprelu-k4"
    assert planned[2].control == planned[3].label == "permuted-variance-a0.5"


def test_what_knows_nothing_needs_no_control_and_plain_is_plain_once(inputs):
    config = StudyConfig(("random", "uniform", "variance", "permuted:variance"), (0.0, 1.0), (4,),
                         (2, 4), (0, 1))  # fmt: skip
    planned = plan(inputs, config, WeightConfig())
    assert {p.label for p in planned} == {
        "uniform", "random-a1", "variance-a1", "permuted-variance-a1"
    }  # fmt: skip
    names = [p.arm.name for p in planned]
    assert len(set(names)) == len(names) == 2 * 5


def test_bad_requests():
    for wrong, said in (
        ({"seeds": (0,)}, "at least 2 different values of seeds, not 0"),
        ({"seeds": (3, 3)}, "at least 2 different values of seeds"),
        ({"curve": (32,)}, "at least 2 different values of curve"),
        ({"seeds": (0, -1)}, "a seed must not be negative, but one is -1"),
        ({"rules": ()}, "at least one of its rules"),
        ({"ks": ()}, "at least one of its ks"),
    ):
        with pytest.raises(UsageError, match=said):
            StudyConfig(**wrong)
