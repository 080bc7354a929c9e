"""Measurements made after training are kept in the dictionary's folder and travel with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_wsae.dictionary.folder import INFO, is_dictionary
from llm_wsae.errors import UsageError
from llm_wsae.files import read_json, write_json


def check_keeps_measurements(folder: Path) -> None:
    """Raises UsageError for a folder that must not be written to: other tools' files are left
    alone, and so are links, which lead into the Hub's cache."""
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
    """Store groups of measurements (``fidelity``, ``monosemanticity``; JSON values) in the metrics
    of a dictionary's folder, replacing older ones of the same group.

    Raises UsageError as ``check_keeps_measurements`` does, and LlmWsaeError if the file cannot be
    read or written; it is then unchanged.
    """
    check_keeps_measurements(folder)
    info = read_json(folder / INFO, "dictionary's information")
    metrics = info.get("metrics")
    old = metrics if isinstance(metrics, dict) else {}
    write_json(folder / INFO, {**info, "metrics": {**old, **found}})
