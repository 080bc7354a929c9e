"""Which rows are massive activations: the one definition that every measurement uses.

A row is massive when its norm exceeds ten median norms. A few such rows would dominate every mean
and every list of top contexts, so training omits them: it takes the median from the
statistics of its store (``Statistics.massive_threshold``), and the dictionary records the
threshold. Measurements use that record, so that they omit what training omitted. For
dictionaries without one (made by other tools) the median norm of the evaluated text takes its
place.

``inspecting`` and ``attaching`` see a few rows at a time and cannot measure a median: they use the
record alone, and where there is none, no row counts as massive.
"""

from collections.abc import Iterable, Mapping

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.activation_cache import ActivationCache
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import MASSIVE_RATIO


def massive_thresholds(
    by_site: Mapping[Site, Iterable[Dictionary]], activations: ActivationCache
) -> dict[Site, float]:
    """Norm above which a row is massive, for each site.

    All dictionaries of a site share one threshold, the smallest that any of them records, so that
    they are measured on the same rows.
    """
    recorded = {
        site: [
            d.info.massive_threshold for d in dictionaries if d.info.massive_threshold is not None
        ]
        for site, dictionaries in by_site.items()
    }
    medians = activations.median_norms([site for site, known in recorded.items() if not known])
    return {
        site: min(known) if known else MASSIVE_RATIO * medians[site]
        for site, known in recorded.items()
    }
