"""What a dictionary does with features that belong together: absorption and merging.

A feature's latent is the one whose code correlates most with it. Both measures are above 0 by
chance, where many features share few dimensions, so they are read beside the same measure on
independent features (``superposition``).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def correlations(
    codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]
) -> Float[Tensor, "latents n"]:
    """Pearson's correlation of every latent with every feature; 0 where either is constant."""
    z, centred = codes - codes.mean(0), x - x.mean(0)
    return _unit(z).T @ _unit(centred)


def absorbed(
    codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"], parent: Int[Tensor, " n"]
) -> float:
    """Mean over children of P(z = 0 | parent and child active) − P(z = 0 | parent active, none of
    its children), z the code of the parent's latent; NaN if no child is ever active.

    Feature absorption as Chanin et al. 2024 (arXiv 2409.14507) describe it: the child's latent
    stands for the parent too, and the parent's latent has a hole where the child is. So the
    parent's latent is found on the rows without a child of it.
    """
    active = x > 0
    differences = []
    for p in parent[parent >= 0].unique().tolist():
        children = (parent == p).nonzero()[:, 0]
        childless = ~active[:, children].any(1)
        best = int(correlations(codes[childless], x[childless, p : p + 1]).argmax())
        silent = (codes[:, best] == 0).double()
        alone = active[:, p] & childless
        differences += [silent[active[:, p] & active[:, c]].mean() - silent[alone].mean()
                        for c in children.tolist()]  # fmt: skip
    return float(torch.stack(differences).nanmean()) if differences else float("nan")


def merged(
    codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"], group: Int[Tensor, " n"]
) -> float:
    """Share of features with relatives whose latent is also that of a relative (one of the same
    group); NaN if no feature has any."""
    best = correlations(codes, x).argmax(0)
    related = (group == group[:, None]) & ~torch.eye(len(group), dtype=torch.bool)
    shares = (related & (best == best[:, None])).any(1)
    return float(shares[related.any(1)].double().mean())


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=1e-12)
