"""What commands share beyond the options of their requests (``pipeline/request.py``)."""

import time
from typing import Annotated, Any

import tyro

RepoId = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]
Result = tuple[dict[str, Any], str]  # the JSON object, the text for people


def cost(started: float) -> str:
    """Time since ``started`` (a ``time.monotonic``) and peak memory, in words."""
    from llm_wsae.machine.hardware import peak_memory_bytes

    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    peak = peak_memory_bytes() / 2**30
    return f"took {minutes} min {seconds:02} s, peak memory {peak:.1f} GiB"
