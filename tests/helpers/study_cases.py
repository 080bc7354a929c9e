"""Made-up results of a study, with a truth that is known."""

import numpy as np

from llm_wsae.studies.curve import Point, Value
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import FAMILY, MEASURES, Result

KS = (16, 24, 32, 48, 64)
SEEDS = (0, 1, 2)
FAMILIES = 9
NATS = 0.3  # that a plain dictionary of k = 1 would cost; it falls as 1/k


class Made:
    """Draws dictionaries: on the plain curve, ``effect`` above it, with noise over seeds."""

    def __init__(self, seed: int = 0, noise: float = 0.002, with_spill: bool = False):
        self._draw = np.random.default_rng(seed)
        self._noise, self._with_spill = noise, with_spill
        self._families = self._draw.normal(0, 0.02, FAMILIES)

    def one(
        self, label, rule, control, k, seed, cost=1.0, effect=0.0, selective=None, spill=0.0
    ) -> Result:
        """``cost`` multiplies the cross-entropy that it costs; ``effect`` is on every measure,
        ``selective`` on selectivity in its place, and ``spill`` on spill."""
        increase = NATS / k * cost
        level = 1 - 0.1 * np.log(increase / NATS)  # straight over the logarithm
        values = {
            name: Value(level + effect + self._draw.normal(0, self._noise), 1e-8)
            for name in MEASURES
            if name not in ("spill", "absorbed")  # as in older results
        }
        if self._with_spill:
            values["spill"] = Value(level + spill + self._draw.normal(0, self._noise), 1e-8)
        shift = effect if selective is None else selective
        for name in ("selectivity", "selectivity_dense", "selectivity_letters"):
            of_families = level + shift + self._families + self._draw.normal(0, self._noise)
            of_families = of_families + self._draw.normal(0, self._noise, FAMILIES)
            items = {f"family {i}": float(v) for i, v in enumerate(of_families)}
            values[name] = Value(float(of_families.mean()), 0.0, items)
        values[FAMILY + "letters"] = Value(level + shift)
        return Result(
            name=f"{label}-k{k}-s{seed}",
            label=label,
            rule=rule,
            control=control,
            point=Point(k, seed, increase, values),
            ce_recovered=1 - increase,
            fvu=0.1,
            kl=increase,
            shares={"eligible_share": 0.8, "dense_share": 0.01, "dead_share": 0.0, "l0": float(k)},
            density=float(k),
            processor="made up",
        )

    def curve(self, ks=KS, seeds=SEEDS) -> list[Result]:
        return [self.one(PLAIN, PLAIN, None, k, seed) for seed in seeds for k in ks]

    def rule(self, name="variance", ks=(32,), seeds=SEEDS, **options) -> list[Result]:
        """A rule's dictionaries. Options of the control are prefixed with ``control_``."""
        prefix = "control_"
        own = {k: v for k, v in options.items() if not k.startswith(prefix)}
        controls = {k.removeprefix(prefix): v for k, v in options.items() if k not in own}
        label, control = f"{name}-a0.5", f"permuted-{name}-a0.5"
        return [
            *(self.one(label, name, control, k, s, **own) for s in seeds for k in ks),
            *(
                self.one(control, f"permuted:{name}", None, k, s, **controls)
                for s in seeds
                for k in ks
            ),
        ]
