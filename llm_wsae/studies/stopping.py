"""Seeds may be added, and every look at them spends its share of the error.

A study that is looked at on three seeds, and again when two were added because p was near 0.05,
errs more often than 5 times in 100. So the 5 % are divided among the looks beforehand (alpha
spending, Lan and DeMets 1983; the shares grow as O'Brien and Fleming's do): little for a few seeds,
most for five. Their sum is 5 %, so by Boole's inequality any path through the looks errs at most
that often, whatever the distribution and whatever Holm's correction makes of it.

More than five seeds are judged as five are, each time that they are looked at. So the 5 % hold of
them only if all were decided on beforehand and are looked at once, in the place of a look at five;
reports say so.
"""

from llm_wsae.studies.inference import LEVEL

SPENT = {2: 0.001, 3: 0.009, 4: 0.01, 5: 0.03}
"""Error spent at a look, by the number of seeds; at more than these, that of the most."""
_ERROR = 1 - LEVEL


def spent(p: float, seeds: int) -> float:
    """p of one look, on ``seeds`` ≥ 2 seeds, as a p of the whole study: to be compared with 5 %."""
    return min(1.0, p * _ERROR / SPENT[min(seeds, max(SPENT))])
