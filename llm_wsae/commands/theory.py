"""The command that runs the toy experiment of the paper."""

import time
from pathlib import Path

from llm_wsae.commands.options import Result, cost
from llm_wsae.lab.theory.config import TheoryConfig
from llm_wsae.pipeline.request import Flat


def theory(
    out: Path,
    toy: Flat[TheoryConfig] = TheoryConfig(),  # noqa: B008 - frozen
) -> Result:
    """Repeat the paper's toy experiment: what dictionaries find where the features are known.

    Run it again to resume after an interruption, or with more seeds or sparsities to add them.

    Args:
        out: Folder that receives the report and one training for each sparsity and seed.
    """
    from llm_wsae.lab.theory.toy import REPORT, run_toy

    started = time.monotonic()
    report = run_toy(toy, out)
    lines = [report.table(), "", f"report   {out / REPORT}", cost(started)]
    return report.to_dict(), "\n".join(lines)
