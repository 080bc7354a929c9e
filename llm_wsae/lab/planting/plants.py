"""The planted features: their directions, strengths, and how often each fires.

They come in strata of directions, because a loss hears some directions better than others:

- ``quiet dimension``, ``loud dimension``: along a dimension of least or of most variance;
- ``quiet component``, ``loud component``: along a principal component of least or most variance;
- ``random``: uniform on the sphere;
- ``antipodal``: two that point in opposite random directions (the paper's digon);
- ``triangle``: three at 120° in a random plane (its polygon);
- ``coloured ¼``, ``coloured ½``: Σ^¼g and Σ^½g of a Gaussian g, if natural ones are asked for;
- ``token mean``: from the mean of all rows to that of the rows of a token, likewise;
- ``decoder row``: the decoder row of a latent of another dictionary, if one is given.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.statistics.moments import Statistics

ON_TOKEN = 0.5
"""How often a feature that is tied to a token fires on it. If it always fired, a latent of the
token would recover the feature without knowing its direction; so that latent's F1 is at most ⅔."""


@dataclass(frozen=True)
class Plants:
    """Features to add to rows: x′ = x + Σ_j a_j v_j over those that fire."""

    directions: Float[Tensor, "plants d_in"]
    """Unit vectors v, float32."""
    strength: Float[Tensor, " plants"]
    """Mean strength of each, in the units of the rows (float64)."""
    relative_strength: tuple[float, ...]
    """The same in median norms of the centred rows, as it was asked for."""
    probability: Float[Tensor, " plants"]
    """Probability that it fires on a row; of one tied to a token, on a row of that token
    (float64)."""
    token: Int[Tensor, " plants"]
    """Id of the token that it is tied to, -1 for none."""
    stratum: tuple[str, ...]
    """Where its direction comes from."""
    seed: int
    """Seed of the firings."""

    def __len__(self) -> int:
        return len(self.directions)

    def identity(self) -> dict[str, Any]:
        """JSON values that identify them."""
        digest = hashlib.sha256(self.directions.numpy().tobytes())
        for part in (self.strength, self.probability, self.token):
            digest.update(part.numpy().tobytes())
        return {"plants": len(self), "seed": self.seed, "sha256": digest.hexdigest()}


def make_plants(
    statistics: Statistics,
    token_counts: Mapping[int, int],
    config: PlantConfig = PlantConfig(),  # noqa: B008 - frozen
    dictionary: Dictionary | None = None,
    token_means: Float[Tensor, "tokens d_in"] | None = None,
) -> Plants:
    """Draw plants for a site, from the statistics of its rows before planting.

    ``token_counts`` says how many rows each token id has. The decoder rows of ``dictionary`` are a
    further stratum. ``token_means``, less the mean of all rows, are needed for natural ones.

    Raises UsageError if the site has too few dimensions, the dictionary too few latents or the rows
    too few tokens for that many plants, or if the plants of a row are together longer than the rows
    (root mean square, and median of the centred rows); LlmWsaeError if the rows do not vary.
    """
    draw = np.random.default_rng((config.seed, 0))
    statistics.check_varying()
    usual = statistics.usual_sample.double()
    norm = float((usual - usual.mean(0)).norm(dim=1).median())
    per_stratum = config.per_cell * len(config.strengths)
    strata = _directions(statistics, per_stratum, draw, dictionary)
    if config.natural:
        strata |= _natural_directions(statistics, per_stratum, draw, token_means)
    directions = torch.from_numpy(np.concatenate(list(strata.values())))
    count = len(directions)
    relative = np.tile(np.repeat(config.strengths, config.per_cell), len(strata))
    low, high = np.log([config.rarest, config.commonest])
    probability = np.exp(draw.uniform(low, high, count))
    on_a_row = probability.copy()
    token = np.full(count, -1)
    of_cell = np.arange(config.per_cell) < round(config.token_share * config.per_cell)
    tied = np.flatnonzero(np.tile(of_cell, len(strata) * len(config.strengths)))
    ids = np.array(sorted(token_counts), dtype=np.int64)
    if len(tied) > len(ids):
        raise UsageError(
            f"the rows have {len(ids):,} different tokens, too few to tie each of {len(tied):,} "
            "features to one of its own; lower token-share or per-cell"
        )
    share = np.array([token_counts[i] for i in ids.tolist()]) / max(1, sum(token_counts.values()))
    for plant in tied.tolist():
        nearest = int(np.abs(np.log(share * ON_TOKEN / probability[plant])).argmin())
        token[plant], probability[plant] = ids[nearest], ON_TOKEN
        on_a_row[plant] = ON_TOKEN * share[nearest]
        share[nearest] = np.inf  # another plant takes another token
    together = _length_of_sum(directions.numpy(), relative, on_a_row)
    if together > 1:
        raise UsageError(
            f"the plants of a row are together {together:.1f} times as long as the rows, and would "
            "drown the stream; lower strengths, commonest or per-cell"
        )
    return Plants(
        directions.float(),
        torch.from_numpy(relative * norm),
        tuple(relative.tolist()),
        torch.from_numpy(probability),
        torch.from_numpy(token),
        tuple(name for name in strata for _ in range(per_stratum)),
        config.seed,
    )


def _length_of_sum(directions: np.ndarray, strength: np.ndarray, often: np.ndarray) -> float:
    """Root mean square of ‖Σ_j b_j a_j v_j‖, where b_j is 1 with probability ``often``, on its own,
    and a_j is ``strength``."""
    mean = (often * strength) @ directions
    return float(np.sqrt(mean @ mean + np.sum(often * (1 - often) * strength**2)))


def _directions(
    statistics: Statistics, count: int, draw: np.random.Generator, dictionary: Dictionary | None
) -> dict[str, np.ndarray]:
    """Stratum → unit vectors [count, d_in], in an order that says nothing of their variance."""
    d_in = statistics.d_in
    varying = torch.where(statistics.robust_variance > 0)[0]
    by_variance = varying[statistics.robust_variance[varying].argsort()].numpy()
    if len(by_variance) < 2 * count:
        raise UsageError(
            f"the site has {len(by_variance)} dimensions that vary, too few to plant along {count} "
            f"of least and {count} of most variance; lower per-cell"
        )
    axes = np.eye(d_in)
    components = torch.linalg.eigh(statistics.robust_covariance).eigenvectors.T.numpy()
    components = components[d_in - len(by_variance) :]  # the rest belong to constant dimensions

    def some(vectors: np.ndarray) -> np.ndarray:
        signs = draw.choice([-1.0, 1.0], size=(count, 1))
        return vectors[draw.permutation(count)] * signs

    planes = _on_sphere(draw, 2 * -(-count // 3), d_in).reshape(-1, 2, d_in)
    pairs = _on_sphere(draw, -(-count // 2), d_in)
    strata = {
        "quiet dimension": some(axes[by_variance[:count]]),
        "loud dimension": some(axes[by_variance[-count:]]),
        "quiet component": some(components[:count]),
        "loud component": some(components[-count:]),
        "random": _on_sphere(draw, count, d_in),
        "antipodal": np.stack([pairs, -pairs], 1).reshape(-1, d_in)[:count],
        "triangle": np.concatenate([_triangle(plane) for plane in planes])[:count],
    }
    if dictionary is not None:
        strata["decoder row"] = _decoder_rows(statistics, count, draw, dictionary)
    return strata


def _natural_directions(
    statistics: Statistics, count: int, draw: np.random.Generator, token_means: Tensor | None
) -> dict[str, np.ndarray]:
    """Those that the stream itself prefers, the louder the more."""
    if token_means is None or len(token_means) < count:
        raise UsageError(
            f"the rows have too few tokens of which there are many to plant along {count} of their "
            "means; harvest more tokens or lower per-cell"
        )
    values, vectors = np.linalg.eigh(statistics.robust_covariance.numpy())

    def coloured(power: float) -> np.ndarray:
        gaussian = draw.standard_normal((count, statistics.d_in))
        return _unit(gaussian @ (vectors * values.clip(0) ** power) @ vectors.T)

    chosen = draw.permutation(len(token_means))[:count]
    return {
        "coloured ¼": coloured(0.25),
        "coloured ½": coloured(0.5),
        "token mean": _unit(token_means.double().numpy()[chosen]),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _on_sphere(draw: np.random.Generator, count: int, d_in: int) -> np.ndarray:
    return _unit(draw.standard_normal((count, d_in)))


def _triangle(plane: np.ndarray) -> np.ndarray:
    """Three unit vectors at 120° in the plane of two."""
    first, second = np.linalg.qr(plane.T)[0].T
    angles = np.arange(3) * 2 * np.pi / 3
    return np.cos(angles)[:, None] * first + np.sin(angles)[:, None] * second


def _decoder_rows(
    statistics: Statistics, count: int, draw: np.random.Generator, dictionary: Dictionary
) -> np.ndarray:
    codes = dictionary.encode_sparse(statistics.usual_sample)
    active = codes.indices[codes.values > 0].unique().cpu()
    if len(active) < count:
        raise UsageError(
            f"{len(active)} latents of {dictionary.info.name} fire on the site's sample, too few "
            f"to plant {count} of its decoder rows; lower per-cell or name another dictionary"
        )
    chosen = active[torch.from_numpy(draw.permutation(len(active))[:count])]
    rows = dictionary.W_dec.detach().cpu()[chosen].double()
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()
