"""The record stored with every result: the command that made it, its settings, the versions."""

import dataclasses
import math
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import write_json

number_formats: dict[str, str] = {}
"""The number formats that this process chose, and why; part of a command's record."""
_PATH = re.compile(  # also one of several texts
    r"(^|[=+])(?:(?:~[^/+]*)?/|(?:[^/+=]*/)*\.\./)(?:[^/+]*/)*([^/+]+)/?"
)
_PACKAGES = (
    "llm-wsae",
    "torch",
    "transformers",
    "transformer-lens",
    "datasets",
    "safetensors",
    "huggingface-hub",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}}


def version_of(package: str) -> str:
    """The installed version of a package; a checkout that was not installed has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def command_line() -> str:
    """The command that this process runs, ``portable``; empty in any other program."""
    program = Path(sys.argv[0])
    ours = program.name == "llm-wsae" or program.parts[-2:] == ("llm_wsae", "__main__.py")
    return portable(shlex.join(["llm-wsae", *sys.argv[1:]])) if ours else ""


def portable(command: str) -> str:
    """A command without the folders of the machine that it ran on: of a path from the root, from a
    home, or upwards, only the last name stays. For what leaves the machine, such as a card."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        words = command.split()
    short = [_PATH.sub(r"\1\2", word) for word in words]
    return command if short == words else shlex.join(short)


def write_record(path: Path, command: str, config: dict[str, Any]) -> None:
    """Write ``{command, config, number_formats, versions}`` as JSON."""
    found = {"number_formats": number_formats, "versions": versions()}
    write_json(path, {"command": command, "config": plain(config), **found})


def plain(value: Any) -> Any:
    """The value in JSON's types: dataclasses as objects, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
