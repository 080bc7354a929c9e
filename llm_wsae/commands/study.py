"""The command that asks whether weights help."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.artifact.provenance import write_record
from llm_wsae.commands.options import (
    CorpusOptions,
    EvaluateOptions,
    Flag,
    Flat,
    ModelOptions,
    PlantOptions,
    Prefixed,
    Result,
    RuleOptions,
    ScoreOptions,
    Stores,
    TrainOptions,
    check_none_given,
    cost,
)
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.lab.studies.config import StudyConfig
from llm_wsae.model.site import Site
from llm_wsae.training.config import ArchitectureName
from llm_wsae.weights.config import WeightConfig

RECORD = "command.json"


@dataclass(frozen=True, kw_only=True)
class StudyOptions(RuleOptions):
    """Which dictionaries to compare; each rule brings its control."""

    seeds: tuple[int, ...] = StudyConfig.seeds
    """Seeds, each of initial parameters, order of the rows, and controls at once."""
    architecture: ArchitectureName = StudyConfig.architecture
    """Architecture: topk has k active latents on every token, others k on average, gba fewer; the
    frozen ones are topk baselines that leave one half random."""
    keep_dictionaries: bool = StudyConfig.keep_dictionaries
    """Keep the dictionaries; otherwise each is deleted as soon as it is measured."""

    def config(self, planted: PlantConfig | None) -> StudyConfig:
        """The study that is asked for."""
        return StudyConfig(
            rules=self.rule,
            alphas=self.alpha,
            ks=self.k,
            seeds=self.seeds,
            architecture=self.architecture,
            keep_dictionaries=self.keep_dictionaries,
            plant=planted,
        )


def study(
    stores: Stores,
    model: Flat[ModelOptions],
    corpus: Flat[CorpusOptions],
    site: str,
    out: Path,
    dictionary: Path | None = None,
    plant: Flag = False,
    compare: Flat[StudyOptions] = StudyOptions(rule=StudyConfig.rules),
    weigh: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    train: Prefixed[TrainOptions] = TrainOptions(),  # noqa: B008 - frozen
    evaluate: Prefixed[EvaluateOptions] = EvaluateOptions(),  # noqa: B008 - frozen
    score: Prefixed[ScoreOptions] = ScoreOptions(),  # noqa: B008 - frozen
    planted: Prefixed[PlantOptions] = PlantOptions(),  # noqa: B008 - frozen
) -> Result:
    """Do weights help? Compare rules and their controls with plain dictionaries of the same k.

    Run it again to resume after an interruption, or with other rules or seeds to extend the
    study: no dictionary is trained twice, and the report is about all that was tried in the folder.

    Args:
        stores: Activation stores, of one model with the same sites and settings.
        site: One of their sites.
        out: Folder of the study.
        dictionary: First dictionary of the site, for the rule participation. Without it, one is
            trained for each seed.
        plant: Plant known features into the rows, and measure how much of them is recovered.
    """
    from llm_wsae.data.stores import open_stores
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.lab.studies.report import MARKDOWN, PAGE, REPORT
    from llm_wsae.lab.studies.runner import study as compare_all

    started = time.monotonic()
    if not plant:
        check_none_given("planted", planted, "--plant")
    check_file(out / RECORD, is_record_of("study"))
    config, training = compare.config(planted if plant else None), train.with_model_on(model.device)
    place, opened = Site.parse(site), open_stores(stores)
    first = Dictionary.load(dictionary) if dictionary else None
    report = compare_all(
        model.load(model.model, opened.manifest.model),
        opened,
        place,
        corpus.corpus,
        out,
        config,
        text_column=corpus.text_column,
        heldout_fraction=corpus.heldout_fraction,
        weigh=weigh,
        training=training,
        fidelity=evaluate,
        scoring=score,
        dictionary=first,
    )
    asked: dict[str, Any] = {
        "stores": stores,
        "model": model.model,
        "corpus": corpus.corpus,
        "site": site,
    }
    asked |= {**vars(config), "dictionary": dictionary, "weigh": weigh, "train": training}
    asked |= {"fidelity": evaluate, "score": score}
    write_record(out / RECORD, "study", asked)
    written = (
        f"report  {out / PAGE}, to open in a browser; {MARKDOWN}, {REPORT} and a figure beside it"
    )
    return report.to_dict(), "\n".join([report.table(), "", written, cost(started)])
