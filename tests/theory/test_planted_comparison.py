"""Statistics of the planted experiments: paired differences, controls, and verdicts."""

import numpy as np
import pytest
from scipy import stats

from llm_wsae.theory.comparison import summarise_arms
from llm_wsae.theory.rules import ARMS, SHOWN


def unit(**losses: float) -> dict:
    """One seed, all arms at 0.5 except those named (``-`` written as ``_``)."""
    measures = {"mmcs": 0.7, "recovered": 0.5, "features_per_latent": 2.0, "fvu": 0.1}
    named = {name.replace("_", "-"): loss for name, loss in losses.items()}
    return {"arms": {arm: {"l_gt": named.get(arm, 0.5), **measures} for arm in ARMS}}


def seeds(count: int = 10, noise: float = 0.001, draw: int = 0, **changes: float) -> list[dict]:
    """Seeds at which arms differ from plain by ``changes``, up to a little noise."""
    draw = np.random.default_rng(draw)
    return [
        unit(
            **{
                arm: 0.5 + change + noise * draw.standard_normal()
                for arm, change in changes.items()
            }
        )
        for _ in range(count)
    ]


def test_differences_are_paired_and_in_per_cent_of_plain():
    units = [unit(plain=a, hoyer=a - b) for a, b in ((0.4, 0.04), (0.6, 0.06), (0.5, -0.01))]
    found = summarise_arms(units)["hoyer"]
    differences = np.array([-0.04, -0.06, 0.01]) / 0.5 * 100
    assert found.change.mean == pytest.approx(differences.mean()) and found.wins == 2
    low, high = stats.t.interval(0.95, 2, loc=differences.mean(), scale=stats.sem(differences))
    assert found.change.interval == pytest.approx((low, high))
    # nothing else differs: no other arm to correct for but by number
    p = stats.ttest_1samp(differences, 0).pvalue
    assert found.p_holm == pytest.approx(min(1, p * len(SHOWN)))


def test_verdicts_need_the_controls():
    as_random = dict(hoyer=-0.05, gap=-0.05, kurtosis=0.05, random=-0.05)
    found = summarise_arms(seeds(**as_random))
    assert found["hoyer"].verdict == found["gap"].verdict == "no better than a control"
    assert found["hoyer"].against["random"].mean == pytest.approx(0, abs=0.3)
    assert found["hoyer"].against["permuted:hoyer"].mean == pytest.approx(-10, abs=0.3)
    assert (
        found["kurtosis"].verdict == "worse"
        and found["random"].verdict == "no better than a control"
    )
    assert found["variance"].verdict == "–"
    as_permuted = summarise_arms(seeds(**{"hoyer": -0.05, "permuted:hoyer": -0.05}))
    assert as_permuted["hoyer"].verdict == "no better than a control"
    others = summarise_arms(seeds(**{"hoyer": -0.05, "permuted:gap": -0.05}))
    assert others["hoyer"].verdict == "better"
    better = summarise_arms(seeds(hoyer=-0.05, hoyer_annealed=-0.05, random_annealed=-0.05))
    assert better["hoyer"].verdict == "better"
    assert better["hoyer"].against["random"].mean == pytest.approx(-10, abs=0.3)
    assert better["hoyer-annealed"].verdict == "no better than a control"


def test_a_small_difference_in_one_arm_of_many_is_no_finding():
    nothing = {arm.replace("-", "_"): 0.0 for arm in SHOWN}
    units = seeds(noise=0.02, draw=5, **nothing)
    found = summarise_arms(units)
    raw = [stats.ttest_1samp([u["arms"][a]["l_gt"] - 0.5 for u in units], 0).pvalue for a in SHOWN]
    assert min(raw) < 0.05  # some arm looks like something
    assert {s.verdict for s in found.values()} == {"–"}
