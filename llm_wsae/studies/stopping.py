"""Seeds may be added, and every look at them spends its share of the error.

A study that is looked at on three seeds, and again when two were added because p was near 0.05,
errs more often than 5 times in 100. So the 5 % are divided among the looks beforehand (alpha
spending, Lan and DeMets 1983; the shares grow as O'Brien and Fleming's do): little for a few seeds,
most for five. Their sum is 5 %, so by Boole's inequality any path through the looks errs at most
that often, whatever the distribution and whatever Holm's correction makes of it.

Seeds alone are counted. A rule or a plain curve that is given more k is looked at once more on the
same seeds, and among five k each shows another value of the same difference: until there are more
seeds it is not called better (``k_added``).

More than five seeds are judged as five are, each time that they are looked at. So the 5 % hold of
them only if all were decided on beforehand and are looked at once, in the place of a look at five;
reports say so.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_wsae.studies.inference import LEVEL
from llm_wsae.studies.results import Result

SPENT = {2: 0.001, 3: 0.009, 4: 0.01, 5: 0.03}
"""Error spent at a look, by the number of seeds; at more than these, that of the most."""
_ERROR = 1 - LEVEL


def spent(p: float, seeds: int) -> float:
    """p of one look, on ``seeds`` ≥ 2 seeds, as a p of the whole study: to be compared with 5 %."""
    return min(1.0, p * _ERROR / SPENT[min(seeds, max(SPENT))])


Look = dict[str, dict[str, list[int]]]
"""By label, the ``ks`` and ``seeds`` that a report covers."""


def look_at(results: Sequence[Result]) -> Look:
    """What a report on these dictionaries covers."""
    found: Look = {}
    for result in results:
        own = found.setdefault(result.label, {"ks": [], "seeds": []})
        own["ks"].append(result.point.k)
        own["seeds"].append(result.point.seed)
    return {
        label: {name: sorted(set(values)) for name, values in own.items()}
        for label, own in found.items()
    }


def k_added(looks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Labels that were given more k after a report, and looked at again on as many seeds: on those
    of the last look, for another number of seeds has an error of its own."""
    seen: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    last: dict[str, int] = {}
    for look in looks:
        for label, own in look.items():
            last[label] = len(own["seeds"])
            seen.setdefault((label, last[label]), set()).add(tuple(own["ks"]))
    return [label for label, seeds in last.items() if seeds > 1 and len(seen[label, seeds]) > 1]
