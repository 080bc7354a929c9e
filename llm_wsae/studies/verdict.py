"""From the differences of a rule to one word."""

from collections.abc import Mapping

from llm_wsae.studies.inference import LEVEL, Estimate

BETTER = "better"
NO_BETTER_THAN_CONTROL = "no better than its control"
UNCONTROLLED = "better, uncontrolled"
INDISTINGUISHABLE = "indistinguishable"
MIXED = "mixed"
WORSE = "worse"
OUTSIDE = "not comparable"
ONE_SEED = "one seed"
UNMEASURED = "not measured"
CONTROL = "control"
VERDICTS = {
    BETTER: "better than the plain curve at equal CE, and better than its control",
    NO_BETTER_THAN_CONTROL: (
        "better than the plain curve at equal CE, but no better than its control"
    ),
    UNCONTROLLED: "better than the plain curve at equal CE, but its control cannot be compared",
    INDISTINGUISHABLE: "indistinguishable from the plain curve at equal CE",
    MIXED: "better than the plain curve at equal CE in one measure, worse in the other",
    WORSE: "worse than the plain curve at equal CE",
    OUTSIDE: "not comparable: at no k do all its seeds lie within the plain curve's CE",
    ONE_SEED: "not judged: a verdict needs two seeds",
    UNMEASURED: "not measured: too few latents fire often enough, and there is no concept to probe",
}
_SIGNIFICANT = 1 - LEVEL


def verdict_of(
    effects: Mapping[str, Estimate],
    corrected: Mapping[str, float],
    against: Mapping[str, Estimate],
    of_control: Mapping[str, float],
) -> str:
    """The word for a rule's differences, by measure: from the plain curve (``effects``, with their
    corrected p) and from the control (``against``, with theirs)."""
    found = [measure for measure, p in corrected.items() if p < _SIGNIFICANT]
    better = [measure for measure in found if effects[measure].difference > 0]
    if len(better) < len(found):
        return MIXED if better else WORSE
    if not better:
        return INDISTINGUISHABLE
    tested = [measure for measure in better if measure in of_control]
    if not tested:
        return UNCONTROLLED
    passed = any(against[m].difference > 0 and of_control[m] < _SIGNIFICANT for m in tested)
    return BETTER if passed else NO_BETTER_THAN_CONTROL
