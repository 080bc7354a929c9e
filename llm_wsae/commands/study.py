"""The command that asks whether weights help."""

import time

from llm_wsae.commands.options import Result, cost
from llm_wsae.lab.studies.config import Study


def study(request: Study) -> Result:
    """Do weights help? Compare rules and their controls with plain dictionaries of the same k.

    Run it again to resume after an interruption, or with other rules or seeds to extend the
    study: no dictionary is trained twice, and the report is about all that was tried in the folder.
    """
    from llm_wsae.lab.studies.report import MARKDOWN, PAGE, REPORT
    from llm_wsae.lab.studies.runner import study as compare

    started = time.monotonic()
    report = compare(request)
    page = request.out / PAGE
    written = f"report  {page}, to open in a browser; {MARKDOWN}, {REPORT} and a figure beside it"
    return report.to_dict(), "\n".join([report.table(), "", written, cost(started)])
