"""The command that runs the planted experiments."""

import time
from pathlib import Path

from llm_wsae.commands.options import Flat, Result, cost
from llm_wsae.theory.config import TheoryConfig


def theory(
    out: Path,
    planted: Flat[TheoryConfig] = TheoryConfig(),  # noqa: B008 - frozen
) -> Result:
    """Which weights help where the true features are known: closed form and planted data.

    Run it again to resume after an interruption, or with more experiments or seeds to add them.

    Args:
        out: Folder that receives the report, figures, and one file per experiment and seed.
    """
    from llm_wsae.theory.experiments import figures, run_theory

    started = time.monotonic()
    report = run_theory(planted, out)
    lines = [report.table(), "", f"report   {out / 'theory.md'}, and theory.json next to it"]
    lines += [f"figure   {out / name}" for name in figures(report)]
    return report.to_dict(), "\n".join([*lines, "", cost(started)])
