"""The command that stores activations."""

# ruff: noqa: RUF009 - the defaults are frozen

import time
from dataclasses import dataclass
from pathlib import Path

from llm_wsae.artifact.outputs import check_folder
from llm_wsae.commands.options import Result, cost
from llm_wsae.data.config import HarvestConfig
from llm_wsae.machine.processes import leads
from llm_wsae.pipeline.request import Flat, ModelConfig, Part, TextConfig, sites_of, write_request


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """What ``harvest`` is asked for."""

    site: tuple[str, ...]
    """Residual-stream sites, named as in TransformerLens: blocks.8.hook_resid_post."""
    out: Path
    """Folder of the store."""
    part: Part = "train"
    """Which documents to read: those for training, those held out, or all."""
    model: Flat[ModelConfig]
    corpus: Flat[TextConfig]
    harvesting: Flat[HarvestConfig] = HarvestConfig()


def harvest(request: Harvest) -> Result:
    """Write a model's activations at some sites into an activation store.

    Run it again to resume after an interruption.
    """
    from llm_wsae.data.harvesting import harvest as harvest_into
    from llm_wsae.data.manifest import MANIFEST, Manifest

    started, sites, out = time.monotonic(), sites_of(request.site), request.out
    check_folder(out)
    text = request.corpus.open(request.part)
    begun = Manifest.load(out).model if (out / MANIFEST).is_file() else None
    model = request.model.load(begun)
    store = harvest_into(model, text, sites, out, request.harvesting)
    if leads():
        write_request(out / "harvest.json", "harvest", request, model=model.name)
    massive = {str(s): store.statistics(s).massive_count for s in store.sites}
    size = store.text_size()
    facts = {"store": str(out), "rows": store.num_rows, "d_in": store.d_in, "massive": massive}
    facts |= {"documents": size.documents, "effective_documents": size.effective}
    lines = [f"{store.num_rows:,} rows of {store.d_in} dimensions at each site in {out}"]
    lines += [size.text("text"), *(f"note: {warning}" for warning in size.warnings())]
    lines += [f"  {s}: {count:,} massive activations" for s, count in massive.items()]
    return facts, "\n".join([*lines, cost(started)])
