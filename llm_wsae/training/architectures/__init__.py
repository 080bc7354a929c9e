"""Every file here is one architecture, named after the file: ``batch_topk.py`` is ``batch-topk``.

The registry is the folder: a new file is a new architecture, on the command line too. This module
is free of torch, so that the command line can list the names at once.
"""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from llm_wsae.errors import UsageError, nearest

if TYPE_CHECKING:
    from llm_wsae.training.architecture import Architecture


def architecture_names() -> tuple[str, ...]:
    """The names of all architectures, in alphabetical order."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def find_architecture(name: str) -> "type[Architecture]":
    """The architecture of that name: what its file calls ``ARCHITECTURE``.

    Raises UsageError if there is none.
    """
    known = architecture_names()
    if name not in known:
        raise UsageError(f"there is no architecture {name!r}; {nearest(name, known)}")
    found = import_module(f"{__name__}.{name.replace('-', '_')}").ARCHITECTURE
    assert found.name == name, f"{found.name} is in the file of {name}"
    return found
