"""Every row comes once an epoch, in an order that a seed determines, in bounded memory."""

import gc
import subprocess
import sys
import threading
import time
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import over
from places import ROOT
from refusals import fails, misused
from safetensors.torch import save_file

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.data import rows as rows_module
from llm_wsae.data.rows import ActivationSource, ArrayRows, row_checks, shuffled_batches
from llm_wsae.data.store import ActivationStore, Manifest, ShardRecord
from llm_wsae.machine.threads import prefetch
from llm_wsae.model.site import Site

SITE = Site(0, "post")


def store_of(folder, shard_rows, d_in=3):
    """A store whose rows are numbered: row i is (i, i, …)."""
    (folder / str(SITE)).mkdir(parents=True, exist_ok=True)
    manifest = Manifest({}, {}, [str(SITE)], "float32", d_in, {"context_size": 4}, None, 1, 1, 1)
    at = 0
    for index, count in enumerate(shard_rows):
        rows = torch.arange(at, at + count).float()[:, None].expand(-1, d_in).contiguous()
        name = f"{SITE}/{index:05d}.safetensors"
        save_file({"activations": rows}, folder / name)
        files = {name: FileRecord.of(folder / name)}
        manifest.shards.append(
            ShardRecord(1, count, (0, 0), (0, 0), files, {name: row_checks(rows)})
        )
        at += count
    return ActivationStore(folder, manifest)


def reader_of(*given, **named):
    return store_of(*given, **named).reader(SITE)


def numbers(batches):
    return torch.cat([batch[:, 0] for batch in batches]).long()


@settings(max_examples=30, deadline=None)
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
    reader = reader_of(tmp_path_factory.mktemp("rows"), shard_rows)
    window = chunk * chunks_per_window * reader.row_bytes
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows_module, "CHUNK_ROWS", chunk)

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


@over(parts=[2, 3])
def test_a_part_reads_its_share_and_gets_about_as_many_rows_as_the_others(tmp_path, parts):
    store, lengths = store_of(tmp_path, [9_000, 7_000]), []
    for part in range(parts):
        reader = store.reader(SITE)
        with patch.object(reader, "read", wraps=reader.read) as read:
            own = list(islice(shuffled_batches(reader, 1600, 3, part=(part, parts)), 10))
        lengths.append([len(batch) for batch in own])
        rows = sum(len(call.args[1]) for call in read.call_args_list)
        assert rows <= 3 * (16_000 // parts + 16)  # two windows, an epoch each here, are ahead
    assert all(sum(batch) == 1600 for batch in zip(*lengths, strict=True))
    assert max(map(max, lengths)) < 1600 / parts * 1.12


def test_the_order_is_a_function_of_the_seed_and_well_mixed(tmp_path):
    reader = reader_of(tmp_path, [40_000, 30_000])

    def first(count, seed):
        return numbers(islice(shuffled_batches(reader, 1000, seed, window_bytes=1 << 18), count))

    both = first(140, 0)
    order = both[:70_000]
    assert torch.equal(order, first(70, 0)) and not torch.equal(order, first(70, 1))
    assert not torch.equal(both[70_000:], order)  # the second epoch has an order of its own
    assert (order.diff().abs() == 1).double().mean() < 0.001  # rows that were neighbours
    # a batch holds rows from all over the store: chunks of a window are far apart
    assert all(len((b // 1024).unique()) > 15 for b in order.split(1000))


MEMORY = """
import sys
sys.path[:0] = ["tests/data", "tests/helpers"]
from itertools import islice
from pathlib import Path
from test_rows import reader_of
from llm_wsae.data.rows import shuffled_batches
from llm_wsae.machine.hardware import peak_memory_bytes
reader = reader_of(Path(sys.argv[1]), [32_768] * 8, d_in=256)
small = shuffled_batches(reader, 4096, 0, window_bytes=1 << 20)
next(small); small.close()
before = peak_memory_bytes()
for batch in islice(shuffled_batches(reader, 4096, 0, window_bytes=16 << 20), 64):
    assert batch.untyped_storage().nbytes() == 4 << 20
print((peak_memory_bytes() - before) >> 20)
"""


def test_memory_is_bounded_by_the_window(tmp_path):
    """An epoch over 256 MB in windows of 16 MB, in a process of its own."""
    out = subprocess.check_output([sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT)
    # three windows, their shuffled copy, and the batches that were cut ahead
    assert int(out) < 4 * 16 + 6 * 4 + 16


def test_the_thread_ends_with_its_iterator(tmp_path):
    reader, before = reader_of(tmp_path, [50_000]), set(threading.enumerate())
    closed, dropped = shuffled_batches(reader, 10, 0), shuffled_batches(reader, 10, 0)
    next(closed)
    next(dropped)
    threads = set(threading.enumerate()) - before
    assert len(threads) >= 2
    closed.close()
    del dropped
    gc.collect()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


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
    assert made == [] and next(ahead) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2]
    assert [next(ahead) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="four"):
        next(ahead)
    assert list(ahead) == []


def test_a_store_and_rows_in_memory_are_sources(tmp_path):
    store = store_of(tmp_path, [30])
    rows = store.rows(SITE, 0, 30)
    memory = ArrayRows(rows, SITE)
    for source in (store.source(SITE), memory):
        assert isinstance(source, ActivationSource)
        assert (source.d_in, source.num_rows, source.site) == (3, 30, SITE)
        batches = list(islice(source.batches(10, seed=1), 3))
        assert sorted(numbers(batches).tolist()) == list(range(30))
        assert torch.equal(next(source.batches(10, seed=1, start=2)), batches[2])
    assert store.source(SITE).identity()["window_bytes"] == 256 << 20
    assert memory.statistics().count == 30
    covariance = memory.second_moment().covariance()
    torch.testing.assert_close(covariance, rows.double().T.cov(correction=0), rtol=1e-3, atol=1e-4)
    assert memory.identity() == ArrayRows(rows.double(), SITE).identity()
    for other in (rows + 1, rows.half()):
        assert memory.identity() != ArrayRows(other, SITE).identity()
    assert memory.identity() != ArrayRows(rows, Site(1, "mid")).identity()


class Sliced:
    """An array that counts the rows of each run that is read."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype, self.sizes = rows, rows.shape, rows.dtype, []

    def __getitem__(self, run):
        self.sizes.append(len(self.rows[run]))
        return self.rows[run]


def test_an_array_is_read_in_runs_and_keeps_its_dtype():
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    rows[::700] *= 100
    whole = ArrayRows(rows)
    with patch.object(rows_module, "_RUN_BYTES", 12_000):
        array = Sliced(rows.numpy())
        source = ArrayRows(array)
        assert source.identity() == whole.identity()
        one, other = source.second_moment().covariance(), whole.second_moment().covariance()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert max(array.sizes) == 1000 and sum(array.sizes) == 10_000
    assert source.statistics().massive_count == whole.statistics().massive_count == 8
    next(source.batches(100, seed=1))
    assert max(array.sizes) == 1024
    for own in (rows.half(), rows.bfloat16(), rows.half().numpy(), rows.double().requires_grad_()):
        batch = next(ArrayRows(own).batches(100, seed=1))
        assert str(batch.dtype).endswith(str(own.dtype).replace("64", "32").removeprefix("torch."))
        expected = next(whole.batches(100, seed=1)).to(batch.dtype)
        assert torch.equal(batch, expected) and not batch.requires_grad


def test_rows_that_cannot_be_trained_on_are_refused():
    rows = torch.randn(100, 3)
    for own, said in (
        ([[1.0, 2.0]], r"are a tensor or an array \[rows, d_in\], not list; of a store pass"),
        (rows[0], r"\[rows, d_in\], not of shape \[3\]; of a store"),
        (rows[:0].numpy(), r"\[rows, d_in\], not of shape \[0, 3\]; of a store"),
        (
            rows.long(),
            "must be float32, bfloat16, float16 or float64, not int64; convert them first",
        ),
        (rows.numpy() > 0, "float64, not bool; convert them first"),
    ):
        misused(said, ArrayRows, own)
    rows[70, 1] = 1e6
    with patch.object(rows_module, "_RUN_BYTES", 120):
        fails("^row 70 holds NaN .* large for torch.float16;", ArrayRows(rows.half()).statistics)
        fails("^row 70 .* torch.float32", ArrayRows(rows.double().numpy() * 1e35).identity)
