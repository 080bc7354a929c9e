"""How much of the planted features a dictionary recovers, on rows that its training did not see.

Every plant gets its best latent: the one whose firing has the largest F1 with the plant's, chosen
on one half of the rows. Everything is then measured on the other half, so that the choice among
thousands of latents flatters nobody.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.artifact.provenance import plain
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import to_dense
from llm_wsae.errors import UsageError
from llm_wsae.lab.planting import PlantedSource, Plants
from llm_wsae.sparse.codes import Codes

RECOVERED_F1 = 0.8
MEASURES = ("recovered", "f1", "cosine", "slope", "vanished")
_Piece = tuple[Codes, Tensor]  # rows: their codes, and the strength of every plant (sparse)


@dataclass(frozen=True)
class PlantRecovery:
    """One dictionary compared with the plants; all tensors [plants], float64 unless said
    otherwise."""

    plants: Plants
    latent: Int[Tensor, " plants"]  # the number of each plant's best (int64)
    f1: Float[Tensor, " plants"]
    """2·both / (plant fires + latent fires), over rows; NaN for a plant that does not fire."""
    cosine: Float[Tensor, " plants"]
    """Between the plant's direction and the decoder row of its latent."""
    slope: Float[Tensor, " plants"]
    """Answer over strength where both fire: Σ z⟨w, v⟩a / Σ a², without a fitted scale. Below 1 the
    feature is shrunk. NaN if they never fire together."""
    vanished: Float[Tensor, " plants"]
    """Share of the plant's firings on which its latent is silent."""
    l_gt: float
    """min over one scale c of Σ_j E(x_j − c·z_j)² / Σ_j E x_j²: what is missing of the plants when
    each is read from its latent."""
    dead: float  # share of the latents that fire on none of the held-out rows

    @property
    def recovered(self) -> Float[Tensor, " plants"]:
        """1 where F1 reaches 0.8, else 0; NaN for a plant that does not fire."""
        return torch.where(self.f1.isnan(), self.f1, (self.f1 >= RECOVERED_F1).double())

    def means(self) -> dict[str, float]:
        """Mean of every measure over the plants that have it."""
        columns = {name: getattr(self, name) for name in MEASURES}
        return {name: float(own[~own.isnan()].mean()) for name, own in columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: means, and every plant."""
        plants = self.plants
        known = {"stratum": plants.stratum, "strength": plants.relative_strength}
        measured = {name: getattr(self, name).tolist() for name in MEASURES}
        every = plain({**known, "token": plants.token.tolist(), **measured})
        return {**self.means(), "l_gt": self.l_gt, "dead": self.dead, "plants": every}


def measure_recovery(dictionary: Dictionary, source: PlantedSource) -> PlantRecovery:
    """Compare a dictionary with a source's plants on its held-out rows, massive ones ignored.

    Raises UsageError if the dictionary is of another site or width.
    """
    if (dictionary.site, dictionary.d_in) != (source.site, source.d_in):
        raise UsageError(
            f"the dictionary is for {dictionary.d_in} dimensions of {dictionary.site}, but the "
            f"plants are in {source.d_in} of {source.site}"
        )
    plants, threshold = source.plants, source.statistics().massive_threshold
    halves: tuple[list[_Piece], list[_Piece]] = ([], [])
    for number, (rows, firings) in enumerate(source.heldout()):
        kept = rows.norm(dim=1) <= threshold
        codes = dictionary.encode_sparse(rows[kept].to(dictionary.W_enc.device))
        truth = torch.zeros(len(rows), len(plants))
        truth[firings.row, firings.plant] = torch.from_numpy(firings.strength).float()
        piece = Codes(codes.indices.cpu(), codes.values.cpu()), truth[kept].to_sparse()
        halves[number % 2].append(piece)
    (together, seen_fires, active), (_, _, active_later) = (
        _counts(half, len(plants), dictionary.d_sae) for half in halves
    )
    either = seen_fires[:, None] + active
    best = (2 * together / either.clamp(min=1)).argmax(1)  # of largest F1
    decoder = dictionary.W_dec.detach().cpu().double()[best]
    length, directions = decoder.norm(dim=1), plants.directions.double()
    along = (decoder * directions).sum(1)
    seen = seen_fires.bool()
    answered = seen & (together.sum(1) > 0)  # else no latent is the best
    sums = _sums(halves[1], best, seen, answered, dictionary.d_sae)
    fires, both = sums["fires"], sums["both"]
    none = torch.full_like(fires, torch.nan)
    product, power = (sums["answer"] * length).sum(), (sums["code"] * length.square()).sum()
    explained = product.square() / power.clamp(min=1e-300) / sums["truth"].sum().clamp(min=1e-300)
    return PlantRecovery(
        plants=plants,
        latent=best,
        f1=torch.where(fires > 0, 2 * both / (fires + sums["active"]), none),
        cosine=torch.where(answered, along / length.clamp(min=1e-300), none),
        slope=torch.where(both > 0, sums["answer"] * along / sums["together"], none),
        vanished=torch.where(fires > 0, 1 - both / fires, none),
        l_gt=float(1 - explained),
        dead=float((active + active_later == 0).double().mean()),
    )


def _counts(pieces: list[_Piece], plants: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """On how many rows plants and latents fire: together [plants, latents], and each."""
    together, fires = torch.zeros(plants, latents), torch.zeros(plants)
    active = torch.zeros(latents)
    for codes, strength in pieces:
        truth = (strength.to_dense() > 0).float()
        answer = (to_dense(codes, latents) > 0).float()
        together += torch.sparse.mm(truth.T.to_sparse(), answer)
        fires += truth.sum(0)
        active += answer.sum(0)
    return together, fires, active


def _sums(
    pieces: list[_Piece], best: Tensor, seen: Tensor, answered: Tensor, latents: int
) -> dict[str, Tensor]:
    """Over rows, for every plant and its latent; plants that were not ``seen`` where latents were
    chosen do not fire, and latents of those that were not ``answered`` are silent."""
    found: dict[str, Tensor] = {}
    for codes, strength in pieces:
        truth = strength.to_dense().double() * seen
        answer = to_dense(codes, latents)[:, best].double() * answered
        both = (truth > 0) & (answer > 0)
        parts = {
            "fires": (truth > 0).double(),
            "active": (answer > 0).double(),
            "both": both.double(),
            "answer": answer * truth,
            "together": truth.square() * both,
            "truth": truth.square(),
            "code": answer.square(),
        }
        for name, part in parts.items():
            found[name] = found.get(name, 0) + part.sum(0)
    return found
