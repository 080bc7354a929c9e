"""The command that measures dictionaries."""

from pathlib import Path
from typing import Literal

import tyro

from llm_wsae.commands.common import Config, Device, Result, label_of, load_model
from llm_wsae.errors import UsageError
from llm_wsae.evaluate.config import EvaluateConfig
from llm_wsae.files import write_json
from llm_wsae.record import plain, versions


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
) -> Result:
    """Measure what dictionaries keep of the model, on held-out text.

    Args:
        dictionaries: Dictionary folders.
        model: The model they explain: Hub id, local folder or .gguf file.
        corpus: Hub dataset, .txt/.jsonl/.parquet file or folder, or text package; a+b mixes.
        out: JSON report to write.
        part: Which documents: those held out, those for training, or all.
        text_column: Column of the corpus that holds the text, where that is not clear.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
    """
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.tokens import Packer
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.evaluate.contexts import packing_of
    from llm_wsae.evaluate.fidelity import evaluate as measure

    if not dictionaries:
        raise UsageError("name at least one dictionary folder")
    if out.is_dir():
        raise UsageError(f"--out is the JSON report to write, but {out} is a folder")
    loaded = {label_of(path, dictionaries): Dictionary.load(path) for path in dictionaries}
    packing, text = packing_of(loaded), Corpus.open(corpus, part, text_column=text_column)
    language_model = load_model(model, revision, device)
    contexts = Packer.for_model(language_model, packing).contexts(text)
    report = measure(loaded, language_model, contexts, config)
    asked = {"dictionaries": dictionaries, "corpus": corpus, "part": part}
    write_json(
        out, {"command": "evaluate", **plain(asked), "versions": versions(), **report.to_dict()}
    )
    return report.to_dict(), f"{report.table()}\n\nreport  {out}"
