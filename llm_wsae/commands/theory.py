"""The command that runs the planted experiments."""

import time
from pathlib import Path

from llm_wsae.commands.common import Config, Result, cost
from llm_wsae.theory.config import TheoryConfig


def theory(
    out: Path,
    config: Config[TheoryConfig] = TheoryConfig(),  # noqa: B008 - frozen
) -> Result:
    """Which weights help where the truth is known: the closed form, dictionaries on planted data.

    Run it again to go on after an interruption, or with more experiments or seeds to add them.

    Args:
        out: Folder that receives report, figures and one file per experiment and seed.
    """
    from llm_wsae.theory.experiments import FIGURES, run_theory

    started = time.monotonic()
    report = run_theory(config, out)
    lines = [report.table(), "", f"report   {out / 'theory.md'}, theory.json beside it"]
    lines += [f"figure   {out / name}" for name in FIGURES]
    return report.to_dict(), "\n".join([*lines, "", cost(started)])
