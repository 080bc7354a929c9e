"""The command that says what a run takes."""

import time

from llm_wsae.commands.options import Result, cost
from llm_wsae.errors import LlmWsaeError
from llm_wsae.pipeline.request import Run


def plan(request: Run) -> Result:
    """What a run takes, before anything is spent: rows, disk, memory, time by stage.

    It takes the options of run. What does not fit is said in a sentence, with exit code 1.
    """
    from llm_wsae.pipeline.planning import plan as plan_run

    started = time.monotonic()
    found = plan_run(request)
    if shortage := found.shortage():
        raise LlmWsaeError(shortage)
    return found.to_dict(), f"{found.table()}\n{cost(started)}"
