"""The command that measures dictionaries."""

from pathlib import Path
from typing import Literal

import tyro

from llm_wsae.commands.common import (
    Config,
    Device,
    Flag,
    ModelDtype,
    Result,
    check_counts,
    label_of,
    load_model,
)
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.fidelity.config import EvaluateConfig
from llm_wsae.evaluation.monosemanticity.config import MonosemanticConfig
from llm_wsae.files import write_json
from llm_wsae.provenance import plain, versions


def evaluate(
    dictionaries: tyro.conf.Positional[tuple[Path, ...]],
    model: str,
    corpus: str,
    out: Path,
    config: Config[EvaluateConfig] = EvaluateConfig(),  # noqa: B008 - frozen
    part: Literal["heldout", "train", "all"] = "heldout",
    text_column: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
    model_dtype: ModelDtype = "auto",
    monosemantic: Flag = False,
    monosemantic_tokens: int = MonosemanticConfig.tokens,
    encoder: str = MonosemanticConfig.encoder,
    labels: tuple[str, ...] = (),
    keep: Flag = False,
) -> Result:
    """Measure on held-out text how faithful dictionaries are and, if asked, how monosemantic.

    Args:
        dictionaries: Dictionary folders.
        model: The model they explain: Hub id, local folder or .gguf file.
        corpus: Hub dataset (name@revision), .txt/.jsonl/.parquet file or folder, text package; a+b.
        out: JSON report to write.
        part: Which documents: those held out, those for training, or all.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
        model_dtype: Number format of the model; auto is bfloat16 where the hardware is fast in it.
        monosemantic: Also measure whether latents are monosemantic, which needs a sentence encoder.
        monosemantic_tokens: Held-out rows for that.
        encoder: Sentence encoder for that: a Hub id, a folder or an installed package.
        labels: Columns of the corpus that say what its documents are, to probe; all by default.
        keep: Also keep the results in the dictionaries' own folders, for their cards.
    """
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.packing import Packer
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.measurements import check_keeps_measurements, keep_measurements
    from llm_wsae.evaluation.checks import common_packing, notes_on_text
    from llm_wsae.evaluation.fidelity.evaluator import evaluate as measure
    from llm_wsae.evaluation.monosemanticity.card_numbers import card_numbers
    from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator

    check_counts(monosemantic_tokens=monosemantic_tokens)
    _check_asked(monosemantic, monosemantic_tokens, encoder, labels)
    scoring = MonosemanticConfig(
        tokens=monosemantic_tokens,
        encoder=encoder,
        labels=labels,
        bootstraps=config.bootstraps,
        seed=config.seed,
    )
    if not dictionaries:
        raise UsageError("name at least one dictionary folder")
    if out.is_dir():
        raise UsageError(f"--out is the JSON report to write, but {out} is a folder")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir():
        raise UsageError(f"--out cannot be {out}: {there} is not a folder")
    dictionaries = tuple(dict.fromkeys(dictionaries))
    if keep and part != "heldout":
        raise UsageError("--keep is for what was measured on held-out text; leave --part out")
    for folder in dictionaries if keep else ():
        check_keeps_measurements(folder)
    loaded = {label_of(path, dictionaries): Dictionary.load(path) for path in dictionaries}
    packing, text = common_packing(loaded), Corpus.open(corpus, part, text_column=text_column)
    seen = notes_on_text(loaded, text.identity())
    if keep and seen:
        raise UsageError(f"{seen[0]}, so nothing is kept as held out; leave --keep out")
    language_model = load_model(model, revision, device, model_dtype)
    contexts = Packer.for_model(language_model, packing).contexts(text)
    # Before the long work: it reads its text and finds its encoder.
    scorer = (
        MonosemanticityEvaluator(language_model, text, packing, scoring) if monosemantic else None
    )
    fidelity = measure(loaded, language_model, contexts, config)
    fidelity.notes.extend(seen)
    facts, tables = fidelity.to_dict(), [fidelity.table()]
    found = {
        name: {"fidelity": {"corpus": text.name, **own}}
        for name, own in fidelity.summaries().items()
    }
    if scorer is not None:
        scores = scorer.score(loaded)
        facts["monosemanticity"] = scores.to_dict()
        tables.append(scores.table())
        for name in loaded:
            found[name]["monosemanticity"] = card_numbers(scores, name)
    asked = {"dictionaries": dictionaries, "corpus": corpus, "part": part}
    write_json(out, {"command": "evaluate", **plain(asked), "versions": versions(), **facts})
    for name, folder in zip(loaded, dictionaries, strict=True) if keep else ():
        keep_measurements(folder, found[name])
    return facts, "\n\n".join([*tables, f"report  {out}"])


def _check_asked(monosemantic: bool, tokens: int, encoder: str, labels: tuple[str, ...]) -> None:
    """Raises UsageError for options of what is not measured."""
    without_effect = {
        "--monosemantic-tokens": tokens != MonosemanticConfig.tokens,
        "--encoder": encoder != MonosemanticConfig.encoder,
        "--labels": bool(labels),
    }
    given = [option for option, is_given in without_effect.items() if is_given]
    if given and not monosemantic:
        raise UsageError(f"{' and '.join(given)}: only with --monosemantic; give that too")
