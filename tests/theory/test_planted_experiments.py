"""The planted experiments: arms and rules, units that are not done twice, and honest statistics."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from scipy import stats

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.theory import experiments, regimes, rules
from llm_wsae.theory.comparison import holm, summarise_arms
from llm_wsae.theory.config import EXPERIMENTS, TheoryConfig
from llm_wsae.theory.experiments import FIGURES, run_theory, run_unit
from llm_wsae.theory.jobs import Unit, finish
from llm_wsae.theory.reader import coherence, fisher
from llm_wsae.theory.report import SCORING
from llm_wsae.theory.rules import ARMS, RULES, SHOWN, Known, score, weights
from llm_wsae.theory.superposition import digon_mixing, outliers, planted, rotated
from llm_wsae.weights.rules import RULES as ALL_RULES

SMALL = TheoryConfig(
    experiments=("digon-0.5", "outliers-0.7"),
    seeds=(0, 1),
    steps=30,
    batch_size=32,
    rows=400,
    workers=1,
)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Closed-form facts without the toy models, whose training takes seconds."""
    monkeypatch.setattr(experiments, "MIXTURES", {"digon": 0.5, "mixed": 0.5})


def known(sparsity: float = 0.7) -> Known:
    data = planted(digon_mixing(2, 1), sparsity)
    x = data.features(8000, torch.Generator().manual_seed(0))
    rows = data.observe(x)
    return Known(
        Statistics(3, 1).update(rows, torch.zeros(8000, dtype=torch.int64)),
        decoder=data.mixing.T,
        energy=torch.ones(4),
        fisher=fisher(data, rows),
        coherence=coherence(data, x, torch.Generator().manual_seed(1)),
        truth=data,
        draw=1,
    )


def test_every_rule_scores_planted_data_as_its_formula_says():
    e = known()
    found = {name: score(rule, e) for name, rule in RULES.items()}
    assert all(s.shape == (3,) and bool((s >= 0).all()) for s in found.values())
    # Two lone features, one digon. With the true directions in the decoder:
    for rule in ("participation", "participation-true"):
        assert found[rule].tolist() == pytest.approx([1, 1, 0.5])
    for rule in ("gap", "gap-true"):
        assert found[rule].tolist() == pytest.approx([1, 1, 0.5**0.5])
    # E x² − (E x)² of a feature, and twice that; a pair's variance says the opposite of the truth
    variance = 0.3 / 3 - 0.15**2
    assert found["variance"].tolist() == pytest.approx([variance, variance, 2 * variance], rel=0.05)
    for rule in ("kurtosis", "hoyer", "negentropy"):
        assert found[rule][:2].min() > found[rule][2], rule
    # P(x > 0) of a feature; each of a pair is read where it is the larger: together 1 − P(both 0)
    assert found["sensitivity"].tolist() == pytest.approx([0.3, 0.3, 1 - 0.7**2], abs=0.02)
    # Alike is what makes the dimension large: the same feature, or either one of two.
    assert found["semantic"][:2].min() > 1.5 * found["semantic"][2]
    for rule in RULES:  # on other dimensions: the same numbers in another order
        dealt = score(RULES[rule].as_control("permuted"), e)
        assert sorted(dealt.tolist()) == pytest.approx(sorted(found[rule].tolist())), rule


def test_a_planted_reader_is_right_about_a_feature_that_is_alone_in_any_units():
    """Its J is ∂x̂/∂x_p, and a dimension in other units is as sensitive as before."""
    data = rotated(planted(digon_mixing(2, 1), 0.7), torch.Generator().manual_seed(2))
    x = torch.eye(4)
    w = data.mixing
    read = ((data.observe(x) @ w) / w.square().sum(0)).relu()
    torch.testing.assert_close(read, x)
    rows = data.observe(data.features(500, torch.Generator().manual_seed(0)))

    def named(row):
        return (row @ w / w.square().sum(0) - 1e-4).relu()

    jacobian = torch.stack([torch.autograd.functional.jacobian(named, row) for row in rows])
    wanted = (jacobian.mT @ jacobian).double().mean(0)
    torch.testing.assert_close(fisher(data, rows), wanted, rtol=1e-5, atol=1e-6)
    lone = planted(digon_mixing(2, 1), 0.7)
    large, rows = outliers(lone, (0,), 20.0), lone.features(500, torch.Generator().manual_seed(0))
    scale = torch.tensor([20.0, 1, 1], dtype=torch.float64)
    found = fisher(large, large.observe(rows)) * scale * scale[:, None]
    torch.testing.assert_close(found, fisher(lone, lone.observe(rows)))


def test_every_rule_that_scores_dimensions_is_held_against_the_truth():
    """A rule added for real models joins the planted table by itself."""
    rest = set(ALL_RULES) - set(RULES)
    assert rest == {"leading-sensitivity", "whitening", "token-norm"}  # matrices, and of tokens
    assert set(SCORING) == set(RULES) - {"uniform"}


def test_weights_have_maximum_one_and_any_exponent():
    e = known()
    for name, arm in ARMS.items():
        found = weights(arm, e)
        assert float(found.max()) == pytest.approx(1) and float(found.min()) >= 0, name
    plain, inverse = weights(ARMS["variance"], e), weights(ARMS["variance-a-0.25"], e)
    torch.testing.assert_close(inverse, (plain / plain.min()) ** -0.25)
    assert weights(ARMS["plain"], e).tolist() == [1, 1, 1]


def test_no_dimension_scores_anything(monkeypatch):
    monkeypatch.setattr(rules, "score", lambda rule, known: torch.zeros(3, dtype=torch.float64))
    with pytest.raises(LlmWsaeError, match="the rule gap scores every dimension 0; take more rows"):
        weights(ARMS["gap"], known())


def test_a_dimension_that_scores_zero(monkeypatch):
    scores = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(rules, "score", lambda rule, known: scores)
    assert weights(ARMS["variance-a0.5"], known()).tolist() == [0, 0.5, 1]
    inverse = weights(ARMS["variance-a-0.25"], known())
    assert inverse.tolist() == pytest.approx([1, 1, 4**-0.25])


def test_standardised_inputs_have_one_variance():
    e = known()
    spread = (e.statistics.usual_sample * weights(ARMS["standardised"], e)).var(0)
    assert ARMS["standardised"].space and float(spread.max() / spread.min()) < 1.001


def test_controls_use_their_weights_in_the_same_way():
    assert ARMS["hoyer"].controls == ("random", "permuted:hoyer")
    assert ARMS["hoyer-annealed"].controls == ("random-annealed", "permuted:hoyer-annealed")
    assert ARMS["standardised"].controls == ("permuted:standardised",)
    e = known()
    for name, arm in ARMS.items():
        is_control = name.startswith(("plain", "random", "permuted"))
        assert (arm.controls == ()) == is_control, name
        for control in arm.controls:
            assert ARMS[control].annealed == arm.annealed
        if not is_control:  # as far apart as the arm's, and dealt out to other dimensions
            own = ARMS[f"permuted:{name}"]
            assert own.space == arm.space and own.controls == ()
            spread = weights(own, e).sort().values
            torch.testing.assert_close(spread, weights(arm, e).sort().values)


def test_a_dead_latent_of_the_first_dictionary_tells_no_rule_anything(monkeypatch):
    """Its direction is the one it started with."""
    seen = []

    def look(rule, known):
        if rule.name == "gap":
            seen.append(known)
        return score(rule, known)

    monkeypatch.setattr(rules, "score", look)
    kept = experiments.encode_tied

    def dying(w, rows, k):
        codes = kept(w, rows, k)
        codes[:, 5] = 0
        return codes

    monkeypatch.setattr(experiments, "encode_tied", dying)
    run_unit(EXPERIMENTS["digon-0.5"], 0, SMALL)
    assert seen
    for inputs in seen:
        assert len(inputs.decoder) == len(inputs.energy) < 40
        assert bool((inputs.energy > 0).all())


def test_a_unit_measures_every_arm_and_rule_and_repeats_itself():
    unit = run_unit(EXPERIMENTS["digon-0.5"], 3, SMALL)
    assert list(unit["arms"]) == list(ARMS) and list(unit["correlations"]) == list(RULES)
    assert unit["facts"] == {
        "n": 30,
        "n_p": 20,
        "latents": 40,
        "k": 8,
        "mean_active": pytest.approx(15),
    }
    assert unit["correlations"]["uniform"] is None
    assert unit["correlations"]["participation-true"] == pytest.approx(1)
    assert unit["correlations"]["variance"] < -0.8 and unit["correlations"]["hoyer"] > 0.8
    losses = [arm["l_gt"] for arm in unit["arms"].values()]
    assert all(0 < loss < 1 for loss in losses) and len(set(losses)) > 30
    again = run_unit(EXPERIMENTS["digon-0.5"], 3, SMALL)
    assert json.dumps(again) == json.dumps(unit)
    assert run_unit(EXPERIMENTS["digon-0.5"], 4, SMALL)["arms"] != unit["arms"]


def test_a_run_writes_tables_and_figures(tmp_path):
    report = run_theory(SMALL, tmp_path)
    for name in FIGURES:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "theory.json").read_text())
    assert written.items() >= json.loads(json.dumps(report.to_dict())).items()
    assert written["command"] == "theory" and written["config"]["seeds"] == [0, 1]
    assert written["closed_form"]["digon"]["only_digons"]
    assert written["closed_form"]["digon"]["sparsity_needed"] == pytest.approx(0.85, abs=0.03)
    assert written["closed_form"]["mixed"]["sparsity_needed"] is None
    for point in written["closed_form"]["mixed"]["by_sparsity"]:
        assert point["gap"] == pytest.approx(point["sae_loss"] - point["truth_loss"], abs=1e-10)
    # 10 digons, each an off-diagonal −1 twice; the best γ² of (1, −1; −1, 1) is ½, which leaves 1
    assert written["closed_form"]["digon"]["gap_norm"] == pytest.approx(20**0.5)
    assert written["closed_form"]["digon"]["gap_norm_weighted"] == pytest.approx(10**0.5)
    table, markdown = report.table(), (tmp_path / "theory.md").read_text()
    for text in (table, markdown):
        for word in ("plain", *SHOWN, *SCORING, *SMALL.experiments):
            assert word in text
    plain = report.arms["digon-0.5"]["plain"]
    assert plain.change.mean == 0 and plain.wins == 0 and plain.verdict == "–"
    units = [json.loads(p.read_text()) for p in sorted((tmp_path / "units").glob("digon*"))]
    mean = np.mean([u["result"]["arms"]["hoyer"]["l_gt"] for u in units])
    assert report.arms["digon-0.5"]["hoyer"].l_gt == pytest.approx(mean)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    first = run_theory(SMALL, tmp_path)
    (tmp_path / "units" / "digon-0.5-seed1.json").unlink()
    asked = []

    def counted(experiment, seed, config, check):
        asked.append((experiment.regime, seed))
        return run_unit(experiment, seed, config, check)

    monkeypatch.setattr(experiments, "run_unit", counted)
    second = run_theory(dataclasses.replace(SMALL, workers=2), tmp_path)
    assert asked == [("digon", 1)]
    assert second.arms == first.arms
    more = run_theory(dataclasses.replace(SMALL, seeds=(0, 1, 2)), tmp_path)
    assert sorted(asked[1:]) == [("digon", 2), ("outliers", 2)]
    assert len(list((tmp_path / "units").glob("*-0.?-seed*.json"))) == 6
    assert more.arms != first.arms


def test_units_of_another_configuration_are_not_mixed_in(tmp_path):
    config = dataclasses.replace(SMALL, experiments=("digon-0.5",))
    run_theory(config, tmp_path)
    with pytest.raises(LlmWsaeError, match=r"another steps \(30, now 31\)"):
        run_theory(dataclasses.replace(config, steps=31), tmp_path)


def test_a_file_that_is_no_result_is_named(tmp_path):
    config = dataclasses.replace(SMALL, experiments=("digon-0.5",))
    path = tmp_path / "units" / "digon-0.5-seed1.json"
    path.parent.mkdir()
    for text in ("[]", "{}", '{"identity": 3, "result": {}}', "{"):
        path.write_text(text)
        with pytest.raises(LlmWsaeError, match=r"digon-0\.5-seed1\.json is not "):
            run_theory(config, tmp_path)
        assert path.read_text() == text


def test_an_error_in_a_unit_is_not_swallowed(tmp_path, monkeypatch):
    def broken(sparsity, generator):
        raise LlmWsaeError("no such mixture today")

    monkeypatch.setitem(regimes.REGIMES, "digon", broken)
    threads = torch.get_num_threads()
    with pytest.raises(LlmWsaeError, match="no such mixture today"):
        run_theory(SMALL, tmp_path)
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "theory.json").exists()


def test_an_interruption_ends_every_unit_and_keeps_what_is_done(tmp_path):
    """One unit is done, one is interrupted; the one beside it would go on for ever."""
    started = threading.Event()

    def done(check):
        return {"value": 1}

    def interrupted(check):
        started.wait()
        raise KeyboardInterrupt

    def endless(check):
        started.set()
        while True:
            check()

    def units(*computes):
        return [Unit(tmp_path / f"{c.__name__}.json", {"seed": 0}, c) for c in computes]

    with pytest.raises(KeyboardInterrupt):
        finish(units(done, interrupted, endless), 2, "units")
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
    assert finish(units(done), 1, "units") == [{"value": 1}]


def test_a_training_asks_whether_to_stop(tmp_path):
    asked = []

    def stop_at_the_fifth_step():
        asked.append(1)
        if len(asked) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_unit(EXPERIMENTS["digon-0.5"], 0, SMALL, stop_at_the_fifth_step)
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experiments": ("mixed-0.4",)}, "no planted experiment 'mixed-0.4'; did you mean"),
        ({"experiments": ("digon-0.5", "digon-0.5")}, "once"),
        ({"experiments": ()}, "at least one planted experiment of digon-0.5, "),
        ({"seeds": (1,)}, "seeds are 1; .* at least two"),
        ({"seeds": ()}, "seeds are none"),
        ({"seeds": (1, 2, 1)}, "seeds are 1 2 1; .* different"),
        ({"seeds": (1, -2)}, "none of them negative"),
        ({"steps": 0}, "steps is 0"),
        ({"rows": 99}, "rows is 99, but must be at least 100"),
        ({"spare_latents": -1}, "spare-latents is -1"),
    ],
)
def test_configurations_that_cannot_be(wrong, message):
    with pytest.raises(UsageError, match=message):
        TheoryConfig(**wrong)


# The statistics.


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
    assert found["hoyer"].verdict == found["gap"].verdict == "as a control"
    assert found["hoyer"].against["random"].mean == pytest.approx(0, abs=0.3)
    assert found["hoyer"].against["permuted:hoyer"].mean == pytest.approx(-10, abs=0.3)
    assert found["kurtosis"].verdict == "worse" and found["random"].verdict == "as a control"
    assert found["variance"].verdict == "–"
    as_permuted = summarise_arms(seeds(**{"hoyer": -0.05, "permuted:hoyer": -0.05}))
    assert as_permuted["hoyer"].verdict == "as a control"
    others = summarise_arms(seeds(**{"hoyer": -0.05, "permuted:gap": -0.05}))
    assert others["hoyer"].verdict == "better"
    better = summarise_arms(seeds(hoyer=-0.05, hoyer_annealed=-0.05, random_annealed=-0.05))
    assert better["hoyer"].verdict == "better"
    assert better["hoyer"].against["random"].mean == pytest.approx(-10, abs=0.3)
    assert better["hoyer-annealed"].verdict == "as a control"


def test_a_small_difference_in_one_arm_of_many_is_no_finding():
    nothing = {arm.replace("-", "_"): 0.0 for arm in SHOWN}
    units = seeds(noise=0.02, draw=5, **nothing)
    found = summarise_arms(units)
    raw = [stats.ttest_1samp([u["arms"][a]["l_gt"] - 0.5 for u in units], 0).pvalue for a in SHOWN]
    assert min(raw) < 0.05  # some arm looks like something
    assert {s.verdict for s in found.values()} == {"–"}


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
