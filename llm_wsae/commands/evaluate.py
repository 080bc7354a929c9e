"""The command that measures dictionaries."""

# ruff: noqa: RUF009 - the defaults are frozen

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.artifact.provenance import number_formats, plain, versions
from llm_wsae.commands.options import Result
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.pipeline.request import (
    Flag,
    Flat,
    ModelConfig,
    Part,
    Spelt,
    TextConfig,
    check_none_given,
    named,
)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What ``evaluate`` is asked for."""

    dictionaries: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DICT…")]
    """Dictionary folders."""
    out: Path
    """JSON report to write."""
    part: Part = "heldout"
    """Which documents to read: those for training, those held out, or all."""
    monosemantic: Flag = False
    """Also measure how monosemantic the latents are, with a sentence encoder."""
    baselines: bool = True
    """Also measure untrained baselines: the dimensions themselves, and a random dictionary; what
    others win should be more."""
    keep: Flag = False
    """Also store the results in the dictionaries' own folders, for their cards, with those of the
    baselines measured beside them, half-random dictionaries included."""
    model: Flat[ModelConfig]
    corpus: Flat[TextConfig]
    fidelity: Flat[EvaluateConfig] = EvaluateConfig()
    score: Annotated[
        MonosemanticConfig,
        named(  # with the resamplings and the seed of fidelity
            "score", MonosemanticConfig, bootstraps=tyro.conf.Suppress, seed=tyro.conf.Suppress
        ),
        Spelt,
    ] = MonosemanticConfig()

    def __post_init__(self) -> None:
        if self.keep and self.part != "heldout":
            raise UsageError("--keep stores what was measured on held-out text; omit --part")
        if not self.monosemantic:
            check_none_given("score", self.score, "--monosemantic")


def evaluate(request: Evaluate) -> Result:
    """Measure how faithful dictionaries are on held-out text and, if asked, how monosemantic."""
    from llm_wsae.data.corpus import TEXT_OF_PART
    from llm_wsae.data.packing import Packer
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.folder import check_keeps_measurements, keep_measurements, names_of
    from llm_wsae.evaluation.activations import take_contexts
    from llm_wsae.evaluation.baselines import baselines_of, half_random_beside
    from llm_wsae.evaluation.checks import common_packing, notes_on_text
    from llm_wsae.evaluation.fidelity.evaluator import evaluate as measure
    from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
    from llm_wsae.evaluation.monosemanticity.report import card_numbers

    out, part, keep, fidelity = request.out, request.part, request.keep, request.fidelity
    folders = names_of(request.dictionaries)
    check_file(out, is_record_of("evaluate"))
    for folder in folders.values() if keep else ():
        check_keeps_measurements(folder)
    loaded = {name: Dictionary.load(path) for name, path in folders.items()}
    common_packing(loaded)  # raises before a model is loaded
    text = request.corpus.open(part)
    seen = notes_on_text(loaded, text.identity())
    if keep and seen:
        raise UsageError(f"{seen[0]}, so no result counts as held out; omit --keep")
    language_model = request.model.load()
    packing = common_packing(loaded, language_model.max_context)
    contexts = Packer.for_model(language_model, packing).contexts(text)
    scorer = None
    if request.monosemantic:  # before the long work: it reads its text and finds its encoder
        score = replace(request.score, bootstraps=fidelity.bootstraps, seed=fidelity.seed)
        scorer = MonosemanticityEvaluator(language_model, text, packing, score)
    taken = take_contexts(contexts, fidelity.tokens)
    measured = loaded | (baselines_of(loaded, language_model, taken) if request.baselines else {})
    report = measure(measured, language_model, taken, fidelity)
    report = replace(report, text=TEXT_OF_PART[part], notes=[*report.notes, *seen])
    facts, tables = report.to_dict(), [report.table()]
    found = {
        name: {"fidelity": {"corpus": text.name, **own}} for name, own in report.summaries().items()
    }
    if scorer is not None:
        scores = replace(scorer.score(measured), text=TEXT_OF_PART[part])
        facts["monosemanticity"] = scores.to_dict()
        tables.append(scores.table())
        for name in measured:
            found[name]["monosemanticity"] = card_numbers(scores, name)
    asked = {"dictionaries": list(folders.values()), "corpus": request.corpus.corpus, "part": part}
    made = {"number_formats": number_formats, "versions": versions()}
    write_json(out, {"command": "evaluate", **plain(asked), **made, **facts})
    for name, folder in folders.items() if keep else ():
        site = loaded[name].site
        beside = {
            one.info.name: other
            for other, one in measured.items()
            if other not in loaded and one.site == site
        } | half_random_beside(loaded[name], loaded)
        numbers = {label: found[other] for label, other in beside.items()}
        kept = {**found[name], "baselines": numbers}
        keep_measurements(folder, kept, loaded[name].weights_sha256)
    return facts, "\n\n".join([*tables, f"report  {out}"])
