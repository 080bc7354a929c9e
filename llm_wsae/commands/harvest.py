"""The command that stores activations."""

import time
from pathlib import Path

from llm_wsae.artifact.outputs import check_folder
from llm_wsae.artifact.provenance import write_record
from llm_wsae.commands.options import (
    CorpusOptions,
    Flat,
    ModelOptions,
    Part,
    Result,
    cost,
    sites_of,
)
from llm_wsae.data.config import HarvestConfig
from llm_wsae.machine.processes import leads


def harvest(
    model: Flat[ModelOptions],
    corpus: Flat[CorpusOptions],
    site: tuple[str, ...],
    out: Path,
    part: Part = "train",
    harvesting: Flat[HarvestConfig] = HarvestConfig(),  # noqa: B008 - frozen
) -> Result:
    """Write a model's activations at some sites into an activation store.

    Run it again to resume after an interruption.

    Args:
        site: Residual-stream sites, named as in TransformerLens: blocks.8.hook_resid_post.
        out: Folder of the store.
        part: Which documents to read: those for training, those held out, or all.
    """
    from llm_wsae.data.harvesting import harvest as harvest_into
    from llm_wsae.data.manifest import MANIFEST, Manifest

    started, sites = time.monotonic(), sites_of(site)
    check_folder(out)
    text = corpus.open(part)
    begun = Manifest.load(out).model if (out / MANIFEST).is_file() else None
    loaded = model.load(model.model, begun)
    store = harvest_into(loaded, text, sites, out, harvesting)
    asked = {"model": loaded.name, "corpus": corpus.corpus, "site": site, "part": part}
    if leads():
        write_record(out / "harvest.json", "harvest", {**asked, **vars(harvesting)})
    massive = {str(s): store.statistics(s).massive_count for s in store.sites}
    size = store.text_size()
    facts = {"store": str(out), "rows": store.num_rows, "d_in": store.d_in, "massive": massive}
    facts |= {"documents": size.documents, "effective_documents": size.effective}
    lines = [f"{store.num_rows:,} rows of {store.d_in} dimensions at each site in {out}"]
    lines += [size.text("text"), *(f"note: {warning}" for warning in size.warnings())]
    lines += [f"  {s}: {count:,} massive activations" for s, count in massive.items()]
    return facts, "\n".join([*lines, cost(started)])
