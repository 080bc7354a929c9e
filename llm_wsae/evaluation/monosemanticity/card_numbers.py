"""The few scores that are kept with a dictionary and shown on its card: each with its interval and
its control, the score that chance or the raw dimensions reach."""

from typing import Any

from llm_wsae.evaluation.monosemanticity.averages import Mean
from llm_wsae.evaluation.monosemanticity.report import MonosemanticReport
from llm_wsae.provenance import plain

_OF_LATENTS = ("purity", "coherence", "detection", "detection_without_tokens")
_OF_CONCEPTS = {"probe_1": "best_1", "probe_5": "best_5", "selectivity": "selectivity"}


def card_numbers(report: MonosemanticReport, name: str) -> dict[str, Any]:
    """The numbers of one dictionary, JSON-able: ``value`` with its 95 % ``interval`` and, where
    there is one, its ``control``: the purity of random contexts, or probes on the best
    dimensions."""
    scores = report.dictionaries[name]
    dimensions = report.sites[scores.site]["means"]
    controls = {"purity": report.chance["purity"]}
    controls |= {key: dimensions[key] for key in _OF_CONCEPTS.values() if key in dimensions}

    def entry(key: str, mean: Mean) -> dict[str, Any]:
        control = {"control": controls[key]} if key in controls else {}
        return {"value": mean.mean, "interval": mean.interval, **control}

    return plain(
        {
            "eligible_share": scores.eligible_share,
            **{key: entry(key, scores.latents[key]) for key in _OF_LATENTS},
            **{name: entry(key, scores.concepts.means[key]) for name, key in _OF_CONCEPTS.items()},
        }
    )
