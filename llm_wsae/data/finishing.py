"""The end of a harvest: what is known of all its shards together."""

import shutil
from pathlib import Path

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.files import load_tensors, save_tensors
from llm_wsae.data.manifest import (
    RECORDS,
    REPAIR,
    STATISTICS,
    Manifest,
    complete_shards,
    shard_paths,
)
from llm_wsae.errors import LlmWsaeError
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
            path = shard_paths(index, site)[1]
            merged.merge(read_statistics(folder / path, shard.files[path]))
        path = f"{site}/{STATISTICS}"
        save_tensors(folder / path, merged.to_tensors())
        manifest.statistics[path] = FileRecord.of(folder / path)
    manifest.complete = True
    manifest.save(folder)
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def read_statistics(path: Path, record: FileRecord) -> Statistics:
    """The statistics in a file of a store. Raises LlmWsaeError if it is not what was written."""
    record.check(path, REPAIR)
    return Statistics.from_tensors(load_tensors(path, "file of statistics", REPAIR)[0])
