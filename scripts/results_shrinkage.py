"""How well is a covariance known from few rows? Whitening's beside scikit-learn's estimators.

    bash scripts/reproduce.sh shrinkage

Stretches of consecutive rows, as a short harvest has them, from eight places of the stores of
``results_recovery.py``, without massive rows. Each estimate is compared with the covariance of the
whole store: the eigenvalues of one relative to the other are 1 if both agree, and the error is the
root mean square of their logarithms. Whitening raises the covariance to a power, so relative errors
count, of small eigenvalues, too. Whitening shrinks a covariance and a number of rows as
scikit-learn's ``OAS`` shrinks the rows; both are measured. ``EXPECTED`` was written down after a
look at four of the sites: at random rows, and at the first ones, which are a stretch here. By a
formula of ours, which whitening had then, it was met and missed where it is now.

Where Ledoit and Wolf's estimator fails, a few rows are strong: *strong* ones have five to ten
median norms, and so are not massive. They were looked for once the estimators were known.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import README, write_result
from results_archive import pack, unpack
from results_recovery import PLACES
from results_recovery import RUN as RECOVERY
from torch import Tensor

from llm_wsae import ActivationStore, Site
from llm_wsae.files import read_own_json, write_json
from llm_wsae.statistics.second_moment import shrunk
from llm_wsae.terminal import markdown
from llm_wsae.weighing import measure_inputs
from llm_wsae.weights.inputs import RuleInputs

RUN = README.parent / "runs/shrinkage"
ARCHIVE = Path(__file__).parent / "results/shrinkage.jsonl.gz"
ROWS, STRETCHES = (600, 2400, 9600), 8
STRONG, AT_ONCE = 5, 32_768
NAMES = {
    "sample": "not shrunk",
    "ours": "whitening's",
    "oas": "scikit-learn's `OAS`",
    "ledoit-wolf": "its `LedoitWolf`",
}
EXPECTED = (
    "from 600 rows, the error of whitening's is less than half of that of the covariance that is "
    "not shrunk, at all five sites",
    "whitening's and scikit-learn's `OAS` differ by at most .01 everywhere",
    "from 9,600 rows, the error of Ledoit and Wolf's is at least one and a half times that of "
    "whitening's at all three sites of Gemma, and at most a tenth above it at both of SmolLM2",
)


def estimators() -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, from rows [rows, d_in] float64 to a covariance."""
    from sklearn.covariance import OAS, LedoitWolf

    def own(rows: Tensor) -> Tensor:
        return torch.cov(rows.T, correction=0)

    return {
        "sample": own,
        "ours": lambda rows: shrunk(own(rows), len(rows)),
        "oas": lambda rows: torch.from_numpy(OAS().fit(rows.numpy()).covariance_),
        "ledoit-wolf": lambda rows: torch.from_numpy(LedoitWolf().fit(rows.numpy()).covariance_),
    }


def error(estimate: Tensor, truth: Tensor) -> float:
    """Root mean square of the logarithms of the eigenvalues of one relative to the other."""
    root = torch.linalg.cholesky(truth)
    half = torch.linalg.solve_triangular(root, estimate, upper=False)
    relative = torch.linalg.solve_triangular(root, half.T, upper=False)
    # those of a sample of fewer rows than dimensions are 0 but for rounding
    values = torch.linalg.eigvalsh(relative).clamp_min(torch.finfo(torch.float32).eps)
    return float(values.log().square().mean().sqrt())


def measure(key: str) -> None:
    """The errors of all estimators at a site, by rows, one for each stretch; and strong rows."""
    path = RUN / f"{key}.json"
    if path.exists():
        return
    site = PLACES[key].site
    store = ActivationStore.open(RECOVERY / "stores" / PLACES[key].model_key)
    inputs = measure_inputs(["whitening"], store, site)
    threshold = inputs.statistics.massive_threshold
    truth = inputs.covariance
    found: dict[str, dict[str, list[float]]] = {}
    for count in ROWS:
        errors = found[str(count)] = {name: [] for name in NAMES}
        for stretch in range(STRETCHES):
            start = stretch * store.num_rows // STRETCHES
            # some more, of which massive ones are left out
            rows = store.rows(site, start, start + 2 * count).double()
            rows = rows[rows.norm(dim=1) <= threshold][:count]
            for name, estimate in estimators().items():
                errors[name].append(error(estimate(rows), truth))
    write_json(path, {"errors": found, "strong": strong(store, site, inputs)})


def strong(store: ActivationStore, site: Site, inputs: RuleInputs) -> dict[str, float]:
    """The shares of strong rows in the rows and in their variance, and of the commonest token in
    the strong rows."""
    assert inputs.second_moment is not None
    statistics, mean = inputs.statistics, inputs.second_moment.mean
    numbers, of_strong, of_all = [], 0.0, 0.0
    for start in range(0, store.num_rows, AT_ONCE):
        rows = store.rows(site, start, min(start + AT_ONCE, store.num_rows)).double()
        norms, squares = rows.norm(dim=1), (rows - mean).square().sum(1)
        usual = norms <= statistics.massive_threshold
        chosen = usual & (norms > STRONG * statistics.median_norm)
        numbers.append(start + chosen.nonzero().squeeze(1))
        of_strong, of_all = (
            of_strong + float(squares[chosen].sum()),
            of_all + float(squares[usual].sum()),
        )
    located = store.locate(torch.cat(numbers))
    tokens = Counter(located.ids.gather(1, located.position[:, None]).squeeze(1).tolist())
    return {
        "rows": len(located.position) / store.num_rows,
        "variance": of_strong / of_all,
        "token": max(tokens.values(), default=0) / max(len(located.position), 1),
    }


def read() -> dict[str, dict[str, Any]]:
    """Site → what was measured."""
    return {
        key: read_own_json(path, "result")
        for key in PLACES
        if (path := RUN / f"{key}.json").exists()
    }


def section() -> str:
    """The part of docs/results."""
    everything = read()
    found = {key: one["errors"] for key, one in everything.items()}
    head = ["site", "rows", *(f"error, {words}" for words in NAMES.values())]
    table = [head]
    for key, by_rows in found.items():
        for count, errors in by_rows.items():
            cells = [_cell(errors[name]) for name in NAMES]
            table.append([PLACES[key].title, f"{int(count):,}", *cells])
    outcomes = [["expected beforehand", "measured", ""]]
    for words, (holds, measured) in zip(EXPECTED, _outcomes(found), strict=True):
        outcomes.append([words, measured, "yes" if holds else "**no**"])
    rows = [["site", "strong rows, %", "their share of the variance, %",
             "of them, the commonest token, %"]]  # fmt: skip
    for key, one in everything.items():
        shares = one["strong"]
        cells = [f"{100 * shares['rows']:.3f}", f"{100 * shares['variance']:.1f}"]
        rows.append([PLACES[key].title, *cells, f"{100 * shares['token']:.0f}"])
    tables = [markdown(table), markdown(outcomes), markdown(rows)]
    return "\n\n".join(["### A covariance of few rows", *tables])


def _cell(errors: list[float]) -> str:
    return f"{np.mean(errors):.2f} [{min(errors):.2f}, {max(errors):.2f}]"


def _outcomes(found: dict[str, dict[str, dict[str, list[float]]]]) -> Iterator[tuple[bool, str]]:
    def mean(key: str, count: str, name: str) -> float:
        return float(np.mean(found[key][count][name]))

    shares = [mean(key, "600", "ours") / mean(key, "600", "sample") for key in found]
    yield max(shares) < 0.5, f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"
    apart = max(
        abs(ours - theirs)
        for by_rows in found.values()
        for errors in by_rows.values()
        for ours, theirs in zip(errors["ours"], errors["oas"], strict=True)
    )
    yield apart <= 0.01, f"{apart:.4f} at most"
    ratio = {key: mean(key, "9600", "ledoit-wolf") / mean(key, "9600", "ours") for key in found}
    gemma = [one for key, one in ratio.items() if PLACES[key].model_key == "gemma"]
    smollm2 = [one for key, one in ratio.items() if PLACES[key].model_key == "smollm2"]
    said = f"Gemma × {min(gemma):.2f} to {max(gemma):.2f}, SmolLM2 × {min(smollm2):.2f} to "
    yield min(gemma) >= 1.5 and max(smollm2) <= 1.1, said + f"{max(smollm2):.2f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    for key in PLACES:
        measure(key)
    pack(RUN, ARCHIVE)
    write_result("shrinkage", section())


if __name__ == "__main__":
    main()
