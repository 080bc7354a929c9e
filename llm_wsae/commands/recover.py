"""The command that writes the recovery report."""

from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.commands.options import Flat, Result
from llm_wsae.evaluation.round_trip.config import RecoverConfig
from llm_wsae.outputs import check_file, is_record_of


def recover(
    dictionaries: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DICT…")],
    store: Path,
    out: Path | None = None,
    site: str | None = None,
    measure: Flat[RecoverConfig] = RecoverConfig(),  # noqa: B008 - frozen
) -> Result:
    """Report what dictionaries recover of their own codes: what vanishes, shrinks or is false.

    Args:
        dictionaries: Dictionary folders.
        store: Activation store of their sites; one that they were not trained on, if there is one.
        out: Folder for recovery.json and recovery.png; a dashboard finds them beside dictionaries.
        site: Site of a dictionary whose files do not name it.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.folder import names_of
    from llm_wsae.evaluation.round_trip.figure import plot_recovery
    from llm_wsae.evaluation.round_trip.recovering import recover as measure_all
    from llm_wsae.evaluation.round_trip.report import FIGURE
    from llm_wsae.pages.latent_measures import RECOVER, RECOVERY

    if out is not None:  # before the work
        is_ours = is_record_of(RECOVER)
        check_file(out / RECOVERY, is_ours)
        check_file(out / FIGURE, lambda _: is_ours(out / RECOVERY))
    names = names_of(dictionaries)
    opened = ActivationStore.open(store)
    loaded = {name: Dictionary.load(path, site=site) for name, path in names.items()}
    report = measure_all(loaded, opened, measure)
    text = [report.table()]
    if out is not None:
        report.write(out / RECOVERY)
        plot_recovery(report, out / FIGURE)
        text.append(f"report  {out / RECOVERY}\nfigure  {out / FIGURE}")
    return report.to_dict(), "\n\n".join(text)
