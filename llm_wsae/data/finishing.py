"""The end of a store, harvested or merged: what is known of all its shards together."""

import shutil
from pathlib import Path

from llm_wsae.data.manifest import RECORDS, Manifest, complete_shards
from llm_wsae.data.shard_record import STATISTICS, FileRecord, shard_paths
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import load_tensors, save_tensors
from llm_wsae.statistics.moments import Statistics

NO_ROWS = "no token of these documents gives a row; lower --drop-positions"


def finish_store(folder: Path, manifest: Manifest) -> None:
    """Finish a store that has all its shards: write the statistics of all rows and the manifest.

    Raises LlmWsaeError if there is no row.
    """
    shards = complete_shards(folder, manifest)
    assert list(shards) == list(range(manifest.num_shards))
    if not any(shard.rows for shard in shards.values()):
        raise LlmWsaeError(NO_ROWS)
    manifest.shards = list(shards.values())
    for site in manifest.sites:
        merged = Statistics(manifest.d_in, manifest.context_size)
        for index, shard in shards.items():
            path = shard_paths(index, [site])[site][1]
            shard.files[path].check(folder / path)
            tensors, _ = load_tensors(folder / path, "statistics of a shard")
            merged.merge(Statistics.from_tensors(tensors))
        path = f"{site}/{STATISTICS}"
        save_tensors(folder / path, merged.to_tensors())
        manifest.statistics[path] = FileRecord.of(folder / path)
    manifest.complete = True
    manifest.save(folder)
    shutil.rmtree(folder / RECORDS, ignore_errors=True)
