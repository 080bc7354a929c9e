"""The whole job as one command."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.commands.options import Result, cost
from llm_wsae.data.config import PackConfig
from llm_wsae.pipeline.request import (
    RUN_RECORD,
    LoadConfig,
    ModelConfig,
    Run,
    TextConfig,
    words_of,
)


def run(request: Run) -> Result:
    """Harvest, weigh, train a plain and weighted dictionaries, evaluate: everything in one folder.

    Run it again to resume after an interruption: no harvest or training is done twice.
    """
    from llm_wsae.evaluation.baselines import HALF_RANDOM
    from llm_wsae.pipeline.run import run as run_all

    started, out = time.monotonic(), request.folder
    check_file(out / RUN_RECORD, is_record_of("run"))
    results = run_all(request)
    if not results:  # rank 0 has them
        return {}, ""
    first = next(iter(results.values()))
    widths = {
        name: one.d_sae
        for name, one in first.dictionaries.items()
        if one.info.training.get("architecture") not in HALF_RANDOM
    }
    widths = widths or {name: one.d_sae for name, one in first.dictionaries.items()}
    lines = [f"\n{result.text()}\n" for result in results.values()]
    lines += [cost(started), "next: measure on more of the held-out text, e.g."]
    lines += [f"  {_evaluate_again(first.folder / next(iter(first.dictionaries)), request)}"]
    lines += [f"look at the dictionaries of {request.sites[0]} in a browser:"]
    if request.stream:  # a page needs rows
        lines += [f"  {_harvest(request)}"]
    lines += [f"  {page_command(first.folder, widths, request.model, out)}"]
    return {str(place): result.to_dict() for place, result in results.items()}, "\n".join(lines)


def _harvest(request: Run) -> str:
    """The command that harvests rows to look at, packed as those trained on."""
    words = ["llm-wsae", "harvest", *_source(request), "--site", *request.site]
    words += ["--tokens", "100000", "--out", str(request.folder / "store")]
    return shlex.join(words + words_of(request.harvest, PackConfig))


def _evaluate_again(dictionary: Path, request: Run) -> str:
    """The command that measures the dictionary on more text."""
    words = ["llm-wsae", "evaluate", str(dictionary), *_source(request)]
    return shlex.join(
        [*words, "--tokens", "100000", "--out", str(request.folder / "report-100k.json")]
    )


def _source(request: Run) -> list[str]:
    """The options of the model and of the text, as far as they were given."""
    return words_of(request.model, ModelConfig) + words_of(request.corpus, TextConfig)


def page_command(folder: Path, widths: Mapping[str, int], model: ModelConfig, out: Path) -> str:
    """The command that shows a site's dictionaries, as many, with as many examples, as a page has
    room for. ``widths`` are their numbers of latents, by name."""
    from llm_wsae.pages.dashboard import EXAMPLES, what_fits

    number, examples = what_fits(list(widths.values()))
    words = ["llm-wsae", "dashboard", *(str(folder / name) for name in list(widths)[:number])]
    words += ["--store", str(out / "store"), "--model", model.model, "--rows", "100000"]
    if examples < EXAMPLES:
        words += ["--top", str(examples), "--bands", str(examples)]
    return shlex.join([*words, "--out", str(out / "page.html"), *words_of(model, LoadConfig)])
