"""What the closed form says about the planted mixtures, from W_p alone, without any training."""

from typing import Any

import torch

from llm_wsae.theory.closed_form import (
    check_assumptions,
    gap_matrix,
    loss_gap,
    losses,
    relative_error,
    sae_loss,
    sparsity_for_error,
    truth_loss,
)
from llm_wsae.theory.regimes import REGIMES, Stream, generator
from llm_wsae.theory.superposition import features_from_uniform
from llm_wsae.weights import scores

# Each mixture with the sparsity at which a toy model's W_p is trained; the other two ignore it.
MIXTURES: dict[str, float] = {"digon": 0.5, "mixed": 0.5, "toy-40": 0.9, "toy-200": 0.95}
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
BOUND = 0.05  # of E‖x‖², for "the sparsity that is needed"


def closed_form_facts(name: str, rows: int, seed: int) -> dict[str, Any]:
    """For one of the ``MIXTURES``: whether the assumptions hold, what is lost at each sparsity, and
    how much of the gap between the losses a diagonal Γ can close.

    Features are uniform on (0, 1] with equal probability; W_p is that of the experiments with this
    seed and sparsity. JSON-able.
    """
    mixing = REGIMES[name](MIXTURES[name], generator(seed, Stream.DATA)).mixing.double()
    draw = generator(seed, Stream.SAMPLE)
    n = mixing.shape[1]
    assumed = check_assumptions(mixing)
    gamma = scores.gap(mixing.T)
    uniform = torch.rand(rows, n, generator=draw, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    by_sparsity = []
    for sparsity in SPARSITIES:
        x = features_from_uniform(uniform, ones * (1 - sparsity), ones)
        lost = losses(mixing, x)
        by_sparsity.append(
            {
                "sparsity": sparsity,
                "relative_error": float(relative_error(mixing, x)),
                "sae_loss": float(sae_loss(mixing.T, x @ mixing.T)),
                "truth_loss": float(truth_loss(mixing, x)),
                "gap": float(loss_gap(mixing, x)),
                "gap_weighted": float(loss_gap(mixing, x, gamma)),
                "shrunk": float(lost.shrunk.nanmean()),
                "vanished": float(lost.vanished.nanmean()),
            }
        )
    return {
        "n": n,
        "n_p": len(mixing),
        "assumptions_hold": assumed.hold,
        "only_digons": assumed.only_digons,
        "possible": assumed.possible,
        "num_nonzero": assumed.num_nonzero,
        "largest_interference": assumed.largest_interference,
        "largest_norm_error": assumed.largest_norm_error,
        "gap_norm": float(gap_matrix(mixing).norm()),
        "gap_norm_weighted": float(gap_matrix(mixing, gamma).norm()),
        "bound": BOUND,
        "sparsity_needed": sparsity_for_error(mixing, BOUND, draw, rows),
        "by_sparsity": by_sparsity,
    }
