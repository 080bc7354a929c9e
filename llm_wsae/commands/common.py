"""What commands share beyond their options: the type of a result, checks of names, the cost."""

import sys
import time
from typing import Any

from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.processes import leads
from llm_wsae.terminal import printable

Result = tuple[dict[str, Any], str]  # the JSON object, the text for people


def note(text: str) -> None:
    """One line on stderr, however many processes there are."""
    if leads():
        print(printable(text), file=sys.stderr, flush=True)


def sites_of(names: tuple[str, ...]) -> list[Site]:
    """The sites of their names. Raises UsageError if there is none or one is misspelt."""
    if not names:
        raise UsageError("name at least one site, e.g. --site blocks.8.hook_resid_post")
    return [Site.parse(name) for name in names]


def cost(started: float) -> str:
    """Time since ``started`` (a ``time.monotonic``) and peak memory, in words."""
    from llm_wsae.hardware import peak_memory_bytes

    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    peak = peak_memory_bytes() / 2**30
    return f"took {minutes} min {seconds:02} s, peak memory {peak:.1f} GiB"
