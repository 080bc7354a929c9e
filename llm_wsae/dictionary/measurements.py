"""What was measured of a dictionary after its training is kept in its folder and goes with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_wsae.dictionary.folder import INFO, is_dictionary
from llm_wsae.errors import UsageError
from llm_wsae.files import read_json, write_json


def check_keeps_measurements(folder: Path) -> None:
    """Raise UsageError if a folder is not to be written into: other tools' files are left alone,
    and so are links, behind which the Hub's cache lies."""
    if not is_dictionary(folder):
        raise UsageError(
            f"{folder} was not saved by this package, so measurements cannot be kept in it"
        )
    if (folder / INFO).is_symlink():
        raise UsageError(
            f"{folder / INFO} is only a link, so measurements are not kept there; copy the "
            "dictionary first, e.g. with llm-wsae pull"
        )


def keep_measurements(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put groups of measurements (``fidelity``, ``monosemanticity``), JSON-able, into the metrics
    of a dictionary's folder, in the place of older ones of the same group.

    Raises UsageError as ``check_keeps_measurements`` does, and LlmWsaeError if the file cannot be
    read or written; it is then as it was.
    """
    check_keeps_measurements(folder)
    info = read_json(folder / INFO, "dictionary's information")
    metrics = info.get("metrics")
    old = metrics if isinstance(metrics, dict) else {}
    write_json(folder / INFO, {**info, "metrics": {**old, **found}})
