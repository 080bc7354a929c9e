"""Checking every byte of an activation store against its manifest."""

from pathlib import Path

from tqdm import tqdm

from llm_wsae.data.manifest import FileRecord, Manifest, complete_shards, tokens_path
from llm_wsae.data.packing import load_contexts
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import sha256


def verify_store(folder: Path | str) -> list[str]:
    """Read a store once and return one sentence for each fault.

    Finds missing, truncated and changed files, and keep-masks that do not match the rows. Files are
    read piece by piece, so memory use does not depend on the size of the store. Raises LlmWsaeError
    if there is no store or its manifest is damaged.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    shards = complete_shards(folder, manifest)
    problems = []
    if not manifest.complete:
        there = sum(shard.contexts for shard in shards.values())
        problems.append(
            f"the harvest is not complete: {there} of {manifest.num_contexts} "
            "contexts are there; run the same harvest again to resume it"
        )
    files = {**manifest.statistics, **{p: f for s in shards.values() for p, f in s.files.items()}}
    size = sum(record.bytes for record in files.values())
    with tqdm(total=size, desc="verify", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for name, record in files.items():
            problem = _check_file(folder / name, record)
            bar.update(record.bytes)
            if problem is not None:
                problems.append(problem)
    for index, shard in shards.items():
        path = folder / tokens_path(index)
        try:
            contexts = load_contexts(path, shard.first, shard.next)
        except LlmWsaeError:
            continue  # its wrong checksum was reported above
        kept = int(contexts.keep.sum())
        if (len(contexts.ids), kept) != (shard.contexts, shard.rows):
            problems.append(
                f"{path} holds {len(contexts.ids)} contexts with {kept} rows, but the manifest "
                f"says {shard.contexts} with {shard.rows}"
            )
    return problems


def _check_file(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{path} is truncated or extended: {size} bytes instead of {record.bytes}"
    try:
        changed = sha256(path) != record.sha256
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return f"{path} is damaged: its checksum does not match" if changed else None
