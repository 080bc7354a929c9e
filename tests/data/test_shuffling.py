import gc
import subprocess
import sys
import threading
import time
import zlib
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from safetensors.torch import save_file

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.data import shuffling as module
from llm_wsae.data.manifest import ROWS_PER_CHECK, Manifest, ShardRecord, packed
from llm_wsae.data.shard_reader import RowReader
from llm_wsae.data.shuffling import ActivationSource, shuffled_batches
from llm_wsae.data.store import ActivationStore, StoreSource
from llm_wsae.errors import UsageError
from llm_wsae.machine.threads import prefetch
from llm_wsae.model.site import Site

SITE = "blocks.0.hook_resid_post"


def reader_of(folder, shard_rows, d_in=3, dtype="float32"):
    """A store's rows of site 0 that are numbered: row i is (i, i, …)."""
    (folder / SITE).mkdir(parents=True, exist_ok=True)
    at = 0
    for index, rows in enumerate(shard_rows):
        numbers = torch.arange(at, at + rows, dtype=torch.float64)[:, None].expand(-1, d_in)
        tensor = numbers.to(getattr(torch, dtype)).contiguous()
        save_file({"activations": tensor}, folder / file_of(index))
        at += rows
    manifest = manifest_of(folder, shard_rows, d_in, dtype)
    return ActivationStore(folder, manifest).reader(Site.parse(SITE)), manifest


def file_of(index):
    return f"{SITE}/{index:05d}.safetensors"


def manifest_of(folder, shard_rows, d_in, dtype):
    shards = []
    for index, rows in enumerate(shard_rows):
        name = file_of(index)
        files = {name: FileRecord.of(folder / name)}
        size = ROWS_PER_CHECK * d_in * getattr(torch, dtype).itemsize
        own = {name: packed(checks_of(folder / name, size))}
        shards.append(ShardRecord(1, rows, (0, 0), (0, 0), files, own))
    manifest = Manifest({}, {}, [SITE], dtype, d_in, {"context_size": 4}, None, 1, 1, 1)
    manifest.shards, manifest.complete = shards, True
    return manifest


def checks_of(path, size):
    """The CRC-32 of each ``size`` bytes of rows."""
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return [zlib.crc32(piece) for piece in iter(lambda: file.read(size), b"")]


def numbers(batches):
    return torch.cat([batch[:, 0] for batch in batches]).long()


@settings(max_examples=40, deadline=None)
@given(
    shard_rows=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any),
    batch_size=st.integers(1, 90),
    chunk=st.integers(1, 30),
    chunks_per_window=st.integers(1, 4),
    parts=st.integers(1, 5),
    start=st.integers(0, 40),
)
def test_each_row_once_per_epoch_from_any_start_and_in_any_parts(
    tmp_path_factory, shard_rows, batch_size, chunk, chunks_per_window, parts, start
):
    reader, _ = reader_of(tmp_path_factory.mktemp("rows"), shard_rows)
    window = chunk * chunks_per_window * reader.row_bytes
    before, module.CHUNK_ROWS = module.CHUNK_ROWS, chunk
    try:

        def batches(start, part=(0, 1)):
            return shuffled_batches(reader, batch_size, 0, start, window, part)

        n = sum(shard_rows)
        count = max(start + 2, -(-3 * n // batch_size))
        all_batches = list(islice(batches(0), count))
        assert all(len(b) == batch_size for b in all_batches)
        rows = numbers(all_batches)
        for epoch in range(3):
            assert sorted(rows[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
        for a, b in zip(all_batches[start:], batches(start), strict=False):
            assert torch.equal(a, b)
        shares = [batches(start, (number, parts)) for number in range(parts)]
        for whole, *own in islice(zip(all_batches[start:], *shares, strict=False), 8):
            assert sorted(numbers(own).tolist()) == sorted(numbers([whole]).tolist())
    finally:
        module.CHUNK_ROWS = before


class CountingReader(RowReader):
    rows_read = 0

    def read(self, start, out):
        self.rows_read += len(out)
        super().read(start, out)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_part_reads_its_share_and_gets_about_as_many_rows_as_the_others(tmp_path, parts):
    _, manifest = reader_of(tmp_path, [9_000, 7_000])
    shards = ActivationStore(tmp_path, manifest).row_shards(Site.parse(SITE))
    lengths, seen, read = [], [], []
    for number in range(parts):
        reader = CountingReader(shards, 3, torch.float32)
        own = list(islice(shuffled_batches(reader, 1600, 3, part=(number, parts)), 10))
        lengths.append([len(batch) for batch in own])
        seen.append(numbers(own))
        read.append(reader.rows_read)
    assert sorted(torch.cat(seen).tolist()) == list(range(16_000))
    assert all(sum(batch) == 1600 for batch in zip(*lengths, strict=True))
    assert max(map(max, lengths)) < 1600 / parts * 1.12
    ahead = 2  # windows, an epoch each here
    assert all(rows <= (1 + ahead) * (16_000 // parts + 16) for rows in read)


def test_the_order_is_a_function_of_the_seed_and_well_mixed(tmp_path):
    reader, _ = reader_of(tmp_path, [40_000, 30_000])

    def first_epoch(seed):
        return numbers(islice(shuffled_batches(reader, 1000, seed, window_bytes=1 << 18), 70))

    order = first_epoch(0)
    assert torch.equal(order, first_epoch(0)) and not torch.equal(order, first_epoch(1))
    both = numbers(islice(shuffled_batches(reader, 1000, 0, window_bytes=1 << 18), 140))
    assert not torch.equal(both[70_000:], order)  # the second epoch has an order of its own
    neighbours = (order.diff().abs() == 1).double().mean()
    assert neighbours < 0.001
    # a batch holds rows from all over the store: chunks of a window are far apart
    assert all(len((b // 1024).unique()) > 15 for b in order.split(1000))


def test_memory_is_bounded_by_the_window(tmp_path):
    """An epoch over 256 MB in windows of 16 MB, in a process of its own."""
    shards = [32_768] * 8
    reader_of(tmp_path, shards, d_in=256)
    script = f"""
import sys
sys.path[:0] = ["tests/data", "tests/helpers"]
from itertools import islice
from pathlib import Path
from test_shuffling import SITE, ActivationStore, Site, manifest_of
from llm_wsae.data.shuffling import shuffled_batches
from llm_wsae.machine.hardware import peak_memory_bytes
folder = Path({str(tmp_path)!r})
store = ActivationStore(folder, manifest_of(folder, {shards}, 256, "float32"))
reader = store.reader(Site.parse(SITE))
small = shuffled_batches(reader, 4096, 0, window_bytes=1 << 20)
next(small); small.close()
before = peak_memory_bytes()
for batch in islice(shuffled_batches(reader, 4096, 0, window_bytes=16 << 20), 64):
    assert batch.untyped_storage().nbytes() == 4 << 20
print((peak_memory_bytes() - before) >> 20)
"""
    root = ROOT
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    # three windows, their shuffled copy, and the batches that were cut ahead
    assert int(out.stdout) < 4 * 16 + 6 * 4 + 16


def test_the_thread_ends_with_its_iterator(tmp_path):
    reader, _ = reader_of(tmp_path, [50_000])

    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("prefetch")]

    before = len(threads())
    closed = shuffled_batches(reader, 10, 0)
    next(closed)
    dropped = shuffled_batches(reader, 10, 0)
    next(dropped)
    assert len(threads()) >= before + 2
    closed.close()
    del dropped
    gc.collect()
    deadline = time.monotonic() + 120
    while len(threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads()) == before


def test_prefetch_works_ahead_and_raises_in_place():
    made = []

    def items():
        for i in range(6):
            if i == 4:
                raise RuntimeError("four")
            made.append(i)
            yield i

    ahead = prefetch(items(), depth=2)
    time.sleep(0.05)
    assert made == []
    assert next(ahead) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2]
    assert [next(ahead) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="four"):
        next(ahead)
    assert list(ahead) == []


def test_bad_requests(tmp_path):
    reader, _ = reader_of(tmp_path, [0])
    with pytest.raises(UsageError, match="holds no rows"):
        shuffled_batches(reader, 5, 0)
    with pytest.raises(UsageError, match="the batch size must be at least 1"):
        shuffled_batches(reader, 0, 0)
    with pytest.raises(UsageError, match="begin at batch -1"):
        shuffled_batches(reader, 5, 0, -1)


def test_a_store_is_a_source(tmp_path):
    _, manifest = reader_of(tmp_path, [30])
    source = ActivationStore(tmp_path, manifest).source(Site(0, "post"))
    assert isinstance(source, StoreSource)
    assert isinstance(source, ActivationSource)
    assert (source.d_in, source.num_rows, str(source.site)) == (3, 30, SITE)
    assert sorted(numbers([next(source.batches(30, seed=1))]).tolist()) == list(range(30))
    assert source.identity()["window_bytes"] == 256 << 20
