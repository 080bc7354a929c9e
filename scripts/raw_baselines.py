"""Dictionaries that nobody trained: the coordinates of the stream, and its principal components.

Either axis has two latents, one for each sign. A latent is active where the row is among its k
largest deviations from the mean, counted in standard deviations of the axis.
"""

import torch
from torch import Tensor

from llm_wsae import Dictionary, Site
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.matrix_rules import spectrum


def raw_dimensions(inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """The dimensions of the activations."""
    deviation = inputs.statistics.robust_variance.sqrt()
    return _axes(torch.eye(len(deviation), dtype=torch.float64), deviation, inputs, site, k)


def principal_components(inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """The eigenvectors of their covariance."""
    values, vectors = spectrum(inputs.covariance)
    return _axes(vectors.T, values.sqrt(), inputs, site, k)


def _axes(rows: Tensor, deviation: Tensor, inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """``rows`` are the axes [d_in, d_in], ``deviation`` the rows' standard deviation along them."""
    mean = inputs.statistics.usual_sample.mean(0).double()
    signed = torch.cat([rows, -rows])
    scale = torch.cat([deviation, deviation])[:, None].clamp(min=1e-6)
    encoder = signed / scale
    return Dictionary(
        W_enc=encoder.T.float().contiguous(),
        W_dec=(signed * scale).float(),
        b_enc=-(encoder @ mean).float(),
        b_dec=mean.float(),
        sparsity=TopK(k),
        info=DictionaryInfo(
            str(site), "baseline", massive_threshold=inputs.statistics.massive_threshold
        ),
    )
