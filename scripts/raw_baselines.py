"""Dictionaries that nobody trained: the coordinates of the stream, and its principal components."""

from llm_wsae import Dictionary, Site
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.evaluation.baselines import raw_dimensions as of_statistics
from llm_wsae.evaluation.baselines import signed_axes
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.matrix_rules import spectrum


def raw_dimensions(inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """The dimensions of the activations."""
    return of_statistics(_info(inputs, site), inputs.statistics, float(k))


def principal_components(inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """The eigenvectors of their covariance."""
    values, vectors = spectrum(inputs.covariance)
    mean = inputs.statistics.usual_sample.mean(0)
    return signed_axes(_info(inputs, site), vectors.T, values.sqrt(), mean, float(k))


def _info(inputs: RuleInputs, site: Site) -> DictionaryInfo:
    threshold = inputs.statistics.massive_threshold
    return DictionaryInfo(str(site), "baseline", massive_threshold=threshold)
