"""From text and a model to rows in a store on disk.

The forward pass is the only expensive part, so everything else runs in parallel with it: one thread
tokenises the next contexts ahead, another computes statistics and checksums and writes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import remove_partials
from llm_wsae.artifact.outputs import check_room
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.covariance import second_moment_of
from llm_wsae.data.finishing import finish_store
from llm_wsae.data.manifest import RECORDS, TOKENS, Manifest, store_in
from llm_wsae.data.packing import Contexts, Cursor, Packer
from llm_wsae.data.resume import (
    begin_or_resume,
    check_size,
    shard_batches,
)
from llm_wsae.data.shard_writer import StoreWriter
from llm_wsae.data.store import ActivationStore
from llm_wsae.data.stored_measurement import MEASUREMENTS
from llm_wsae.errors import UsageError
from llm_wsae.machine.hardware import check_memory
from llm_wsae.machine.processes import Processes, join
from llm_wsae.machine.threads import prefetch
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

_PACKED_AHEAD = 4


def harvest(
    model: LanguageModel,
    corpus: Corpus,
    sites: Sequence[Site],
    out: Path | str,
    config: HarvestConfig = HarvestConfig(),  # noqa: B008 - frozen
) -> ActivationStore:
    """Write the activations of ``config.tokens`` tokens of a corpus at all sites to a store, with
    their statistics and covariance sums.

    The same call resumes a harvest that was stopped or killed, and ends with the same bytes as an
    uninterrupted one. A call with more tokens extends a store. A complete store is left unchanged,
    except that covariance sums are added if it lacks them.

    Under ``torchrun`` each of W processes makes every W-th missing shard, in one folder that all
    can reach. The bytes are those of a single process (as far as a forward pass gives the same bits
    there), and a stopped harvest can be resumed with any number of processes. Each process packs
    the whole text. They sum the covariance together.

    Raises UsageError for a site or context size that the model does not have, or a process group
    of the caller's that does not reach the CPU; LlmWsaeError if the
    folder holds something else or is being written, the corpus is too small (what was harvested
    stays, and the same call with fewer tokens completes it), an activation is not finite, or the
    disk is full (all complete shards stay).
    """
    out, processes = Path(out), join()
    sites = sorted(set(sites))
    with processes.together():
        if not sites:
            raise UsageError("there is no site to harvest; name at least one")
        for site in sites:
            model.check_site(site)
        packer = Packer.for_model(model, config)
        manifest = manifest_of(model, corpus.identity(), sites, config)
        asked = {**manifest.request(), "contexts": manifest.num_contexts}
        processes.check_agreed(asked, "settings of the harvest")
        processes.lead(lambda: _check_size(out, packer, corpus, config, manifest))
        with processes.folder_lock(out, "activation store"):
            following = processes.lead(lambda: _begin(out, manifest))
            if following is None:
                if processes.leads:
                    tqdm.write(f"{out} is already complete", file=sys.stderr)
            else:
                _write_shards(model, packer, corpus, out, manifest, following, processes)
                processes.lead(lambda: finish_store(out, Manifest.load(out)))
        store = ActivationStore.open(out)
        for site in store.sites:
            second_moment_of(store, site)
    return store


def _check_size(
    out: Path, packer: Packer, corpus: Corpus, config: HarvestConfig, wanted: Manifest
) -> None:
    """Raises LlmWsaeError for too little text, UsageError for more than memory or disk could hold,
    before the first forward pass and before a complete store is reopened for more."""
    store_in(out).check_place()
    if store_in(out).is_begun():
        found = Manifest.load(out)
        if not found.complete or found.num_contexts >= wanted.num_contexts:
            return
    row = len(wanted.sites) * wanted.d_in * getattr(torch, wanted.dtype).itemsize
    shard = wanted.contexts_per_shard * wanted.context_size * row
    check_memory(shard, torch.device("cpu"), "a shard", "lower shard-tokens and batch-tokens")
    if not config.one_document_per_context:  # which may give far fewer rows
        kept = config.context_size - config.drop_positions
        check_room(out, wanted.num_contexts * kept * row, "ask for fewer tokens")
    check_size(packer, corpus, config)


def _begin(out: Path, wanted: Manifest) -> dict[int, Cursor] | None:
    """Where the text continues after each complete shard; None if the store is complete."""
    manifest, shards = begin_or_resume(out, wanted)  # refuses a foreign folder
    remove_partials(out, TOKENS, RECORDS, MEASUREMENTS, *wanted.sites)
    return None if manifest.complete else {i: Cursor(*shard.next) for i, shard in shards.items()}


def _write_shards(
    model: LanguageModel,
    packer: Packer,
    corpus: Corpus,
    out: Path,
    manifest: Manifest,
    whole: dict[int, Cursor],
    processes: Processes,
) -> None:
    """Write this process's share of the shards that are missing."""
    sites = [Site.parse(name) for name in manifest.sites]
    missing = [i for i in range(manifest.num_shards) if i not in whole]
    own = missing[processes.rank :: processes.size]
    batches = shard_batches(packer, corpus, manifest, whole, own)
    lacking = sum(map(manifest.shard_contexts, own)) * manifest.context_size
    there = sum(map(manifest.shard_contexts, whole)) * manifest.context_size
    # of several processes, the one that leads shows its own part
    bar = tqdm(
        total=there + lacking,
        initial=there,
        desc="harvest",
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not processes.leads,
    )
    with bar, StoreWriter(out, manifest) as writer:
        for shard, contexts in prefetch(batches, _PACKED_AHEAD):
            rows = kept_rows(model, contexts, sites)
            writer.add(shard, contexts, {str(site): rows[site] for site in sites})
            bar.update(contexts.ids.size)
        writer.wait()
        processes.meet()


def kept_rows(
    model: LanguageModel, contexts: Contexts, sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "rows d_in"]]:
    """The rows of the kept positions at each site, on the CPU, in the model's dtype."""
    activations = model.activations(torch.from_numpy(contexts.ids), sites)
    keep = torch.from_numpy(contexts.keep)
    return {site: activations[site][keep.to(activations[site].device)].cpu() for site in sites}


def manifest_of(
    model: LanguageModel, corpus: dict[str, Any], sites: Sequence[Site], config: HarvestConfig
) -> Manifest:
    """The manifest of a store before it has a shard; ``corpus`` is the text's identity."""
    auto = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    return Manifest(
        model=model.identity(),
        corpus=corpus,
        sites=[str(site) for site in sites],
        dtype=auto if config.dtype == "auto" else config.dtype,
        d_in=model.d_model,
        packing=config.packing(),
        bos_token_id=model.bos_token_id if config.prepend_bos else None,
        contexts_per_batch=config.contexts_per_batch,
        contexts_per_shard=config.contexts_per_shard,
        num_contexts=config.num_contexts,
    )
