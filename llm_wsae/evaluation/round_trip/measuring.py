"""All measurements of one dictionary, in one pass over the rows.

What is kept grows with the firings (8 bytes each) and not with rows × latents: the codes, of which
the median strengths and the interference are made, and the rows for the injection.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.round_trip.config import RecoverConfig
from llm_wsae.evaluation.round_trip.injection import Injection, inject
from llm_wsae.evaluation.round_trip.interference import takers
from llm_wsae.evaluation.round_trip.refit import refit
from llm_wsae.evaluation.round_trip.sums import RoundTripSums
from llm_wsae.sparse.codes import Codes

KEPT = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Probabilities with which an active latent is kept in thinned codes."""
_BATCHES_PER_THINNED = 4  # each thinning encodes the rows again


class CurvePoint(NamedTuple):
    """The round trip of thinned codes."""

    active: float
    """Mean number of latents that are kept in a row."""
    vanished: float
    """Of the kept firings, the share that vanishes."""
    shrunk: float
    """Mean of (z − r)/z over those that survive."""
    false: float
    """Latents that the round trip adds to a row."""


@dataclass(frozen=True)
class RoundTrip:
    """What was measured of a dictionary. Tensors by latent are [d_sae], float64 unless said
    otherwise, NaN where there is nothing to measure."""

    sums: RoundTripSums
    curve: list[CurvePoint]
    """One point for each of ``KEPT``, on every fourth batch of the rows."""
    strength: Float[Tensor, " d_sae"]
    """Median activation of each latent where it fires."""
    injection: Injection
    refit: Float[Tensor, " d_sae"]
    """Σ least-squares strength / Σ activation over its firings: above 1 the encoder shrinks."""
    refit_share: float
    """The same of all latents together, by energy: Σ refit·z / Σ z²."""
    takers: Int[Tensor, "d_sae 3"]
    """The latents that take most from each, −1 where there are fewer."""
    taken: Float[Tensor, "d_sae 3"]
    """What each of them takes, as a share of the latent's mean strength; below 0."""
    energy: float
    """E‖z‖²."""
    observed_loss: float
    """E‖W_decᵀ(z − r)‖² / E‖z‖²: the error of the round trip in the dimensions that one sees."""
    latent_loss: float
    """E‖z − r‖² / E‖z‖²: its error in the latents, which one wants."""

    @property
    def gap(self) -> float:
        """E (z − r)ᵀ(WᵀW − I)(z − r) / E‖z‖², W = W_decᵀ: theorem 4's L_SAE − L_GT. Below 0, the
        loss on the dimensions is deaf to that much of the error in the latents."""
        return self.observed_loss - self.latent_loss


@torch.no_grad()
def measure_round_trip(
    dictionary: Dictionary,
    batches: Iterable[Float[Tensor, "_ d_in"]],
    num_rows: int,
    config: RecoverConfig = RecoverConfig(),  # noqa: B008 - frozen
) -> RoundTrip:
    """Measure a dictionary on at most ``num_rows`` rows, given in batches without massive ones.

    Raises LlmWsaeError if there is no row or no latent fires on any; UsageError for rows of another
    width.
    """
    every = _Collector(dictionary, num_rows, config)
    for number, batch in enumerate(batches):
        every.look(number, batch)
    return every.measured()


class _Collector:
    """Sums of one pass over the rows."""

    def __init__(self, dictionary: Dictionary, num_rows: int, config: RecoverConfig):
        self._dictionary = dictionary
        d_sae = dictionary.d_sae
        wanted = torch.linspace(0, num_rows - 1, min(num_rows, config.injections)).round().long()
        self._is_sampled = torch.zeros(num_rows, dtype=torch.bool)
        # float32 has no place for every row beyond 2^24, and may round the last one up
        self._is_sampled[wanted.clamp(max=num_rows - 1)] = True
        self._draw = torch.Generator().manual_seed(config.seed)
        self._sampled: list[Tensor] = []
        self._sums = RoundTripSums(d_sae)
        self._thinned = {p: RoundTripSums(d_sae) for p in KEPT}
        self._codes: list[csr_matrix] = []
        self._refit = torch.zeros(d_sae, dtype=torch.float64)
        self._refit_by_z = self._z_by_z = 0.0
        self._observed = self._latent = 0.0

    def look(self, number: int, batch: Tensor) -> None:
        """Take in a batch of rows, the ``number``-th."""
        dictionary = self._dictionary
        x = batch.to(dictionary.W_enc)
        if len(x) == 0:
            return
        before = self._sums.rows
        self._sampled.append(x[self._is_sampled[before : before + len(x)].to(x.device)])
        z = dictionary.encode_sparse(x)
        decoded = dictionary.decode(z)
        r = dictionary.encode_sparse(decoded)
        self._sums.update(z, r)
        self._add_losses(z, r, decoded)
        self._add_refit(x, z)
        self._codes.append(_csr(z, dictionary.d_sae))
        if number % _BATCHES_PER_THINNED == 0:
            for p, sums in self._thinned.items():
                kept = torch.rand(z.values.shape, generator=self._draw) < p
                thin = Codes(z.indices, z.values * kept.to(z.values.device))
                sums.update(thin, dictionary.encode_sparse(dictionary.decode(thin)))

    def _add_losses(self, z: Codes, r: Codes, decoded: Tensor) -> None:
        seen = decoded - self._dictionary.decode(r)
        lost = Codes(torch.cat([z.indices, r.indices], 1), torch.cat([z.values, -r.values], 1))
        difference = _csr(lost, self._dictionary.d_sae)  # adds what is in both
        self._observed += float(seen.cpu().double().square().sum())
        self._latent += float(np.square(difference.data, dtype=np.float64).sum())

    def _add_refit(self, x: Tensor, z: Codes) -> None:
        best, values = refit(self._dictionary, x, z), z.values.cpu().double()
        self._refit.index_add_(0, z.indices.cpu().flatten(), best.flatten())
        self._refit_by_z += float((best * values).sum())
        self._z_by_z += float(values.square().sum())

    def measured(self) -> RoundTrip:
        """What the rows say."""
        if self._sums.rows == 0:
            raise LlmWsaeError("all rows are massive activations; name a store with other rows")
        if self._z_by_z == 0:
            raise LlmWsaeError(
                f"no latent of {self._dictionary.info.name} fires on {self._sums.rows:,} rows; "
                "name a store of the model that it was trained on"
            )
        codes = csr_matrix(vstack(self._codes))
        sampled = torch.cat(self._sampled)
        order = torch.randperm(len(sampled), generator=self._draw)
        injected = strengths(codes, len(sampled))[:, order]
        total = torch.from_numpy(np.asarray(codes.sum(0, dtype=np.float64)).ravel())
        latents, taken = takers(self._dictionary, codes)
        return RoundTrip(
            sums=self._sums,
            curve=[
                CurvePoint(s.l0, s.vanished_share, s.mean_shrunk, s.false_per_row)
                for s in self._thinned.values()
            ],
            strength=strengths(codes, 1)[:, 0],
            injection=inject(self._dictionary, sampled, injected),
            refit=torch.where(total > 0, self._refit / total, torch.nan),
            refit_share=self._refit_by_z / self._z_by_z,
            takers=latents,
            taken=taken.double(),
            energy=self._z_by_z / self._sums.rows,
            observed_loss=self._observed / self._z_by_z,
            latent_loss=self._latent / self._z_by_z,
        )


def _csr(codes: Codes, d_sae: int) -> csr_matrix:
    """The codes as a sparse matrix [rows, d_sae], float32; what is listed twice is added."""
    used = (codes.values != 0).cpu()
    row = used.nonzero()[:, 0].numpy()
    column, value = codes.indices.cpu()[used].numpy(), codes.values.cpu()[used].numpy()
    return csr_matrix((value, (row, column)), shape=(len(used), d_sae))


def strengths(codes: csr_matrix, count: int) -> Float[Tensor, "d_sae count"]:
    """``count`` activations of every latent, ascending: one from the middle of each of as many
    equal parts of its firings, so that one alone is the median. NaN for a latent that never fires.

    ``codes`` [rows, d_sae] holds the activations.
    """
    by_latent = codes.tocsc()
    first, counts = by_latent.indptr[:-1], np.diff(by_latent.indptr)
    latent = np.repeat(np.arange(len(counts)), counts)
    ordered = by_latent.data[np.lexsort((by_latent.data, latent))]
    middle = (np.arange(count) + 0.5) / count
    found = np.full((len(counts), count), np.nan)
    fires = counts > 0
    place = first[fires, None] + (middle * counts[fires, None]).astype(np.int64)
    found[fires] = ordered[place]
    return torch.from_numpy(found)
