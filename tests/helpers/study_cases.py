"""Made-up results of a study, with a truth that is known."""

import numpy as np

from llm_wsae.lab.studies.differences import Value
from llm_wsae.lab.studies.report import PLAIN, Result
from llm_wsae.statistics.measures import STUDIED
from llm_wsae.statistics.uncertainty import TextSize

KS = (16, 32)
SEEDS = (0, 1, 2)
FAMILIES, DOCUMENTS = 9, 60
MEASURES = {name: one for name, one in STUDIED.items() if one.source != "plants"}
NATS = 0.3  # KL of a plain dictionary of k = 1; it falls as 1/k


class Made:
    """Draws dictionaries: plain ones, and others by ``effect`` better, with noise over seeds."""

    def __init__(self, seed: int = 0, noise: float = 0.002):
        self._draw = np.random.default_rng(seed)
        self._noise = noise
        self._families = self._draw.normal(0, 0.02, FAMILIES)
        self._documents = self._draw.gamma(4, 25, DOCUMENTS)  # how long they are

    def one(self, label, control, k, seed, kl=0.0, effect=0.0, spill=0.0) -> Result:
        """``kl`` is the share by which it is higher; ``effect`` is on detection and all that is not
        lower where it is better, ``spill`` on the others."""
        level = 1 - 0.1 * np.log(k)
        values = {}
        for name, measure in MEASURES.items():
            shift = spill if measure.lower_is_better else effect
            mean = level + shift + self._draw.normal(0, self._noise)
            if measure.source == "concepts":
                of_families = mean + self._families + self._draw.normal(0, self._noise, FAMILIES)
                items = {f"family {i}": float(v) for i, v in enumerate(of_families)}
                values[name] = Value(float(of_families.mean()), items)
            else:
                values[name] = Value(float(mean))
        of_seed = (1 + kl) * (1 + self._draw.normal(0, self._noise)) * NATS / k
        sums = self._documents * of_seed * self._draw.normal(1, 0.02, DOCUMENTS)
        values["kl"] = Value(float(sums.sum() / self._documents.sum()), documents=tuple(sums))
        return Result(
            name=f"{label}-k{k}-s{seed}",
            label=label,
            control=control,
            k=k,
            seed=seed,
            values=values,
            ce_recovered=1 - of_seed,
            fvu=0.1,
            shares={"eligible_share": 0.8, "dense_share": 0.01, "dead_share": 0.0, "l0": float(k)},
            density=float(k),
            text=TextSize(10**6, 10**4, 1e4),
        )

    def plain(self, ks=KS, seeds=SEEDS) -> list[Result]:
        return [self.one(PLAIN, None, k, seed) for seed in seeds for k in ks]

    def rule(self, name="variance", ks=(32,), seeds=SEEDS, **options) -> list[Result]:
        """A rule's dictionaries. Options of the control are prefixed with ``control_``."""
        prefix = "control_"
        own = {k: v for k, v in options.items() if not k.startswith(prefix)}
        controls = {k.removeprefix(prefix): v for k, v in options.items() if k not in own}
        label, control = f"{name}-a0.5", f"permuted-{name}-a0.5"
        return [
            *(self.one(label, control, k, s, **own) for s in seeds for k in ks),
            *(self.one(control, None, k, s, **controls) for s in seeds for k in ks),
        ]
