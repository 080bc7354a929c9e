"""The faster number format, memory that is given back, and how processes keep together."""

import atexit
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from command_line import HARVEST, SITE, call, content, works
from looping import over
from several import run

from llm_wsae.artifact import provenance
from llm_wsae.data.store import Manifest
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine import hardware, processes
from llm_wsae.machine.hardware import fast_dtype, name_of
from llm_wsae.machine.processes import Processes, collectives, join, may_speak

CPU = torch.device("cpu")
TRAIN = ("--site", SITE, "--expansion", 4, "--batch-size", 256, "--k", 4)


def measured(monkeypatch, of_float32):
    """As on a processor with bfloat16 where float32 takes so many times its time."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: of_float32 > 0)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seconds = {torch.float32: 1e-3 * of_float32, torch.bfloat16: 1e-3}
    monkeypatch.setattr(hardware, "product_seconds", lambda kind: seconds)


@over(kind=["model", "encoder"])
def test_the_faster_number_format_is_chosen(kind, monkeypatch):
    for of_float32, chosen in (
        (2, "bfloat16: measured to be as fast"),
        (0.96, "bfloat16: measured to be as fast"),  # a tie takes less memory
        (0.94, "float32: measured to be the faster"),
        (0, "float32: the processor has no bfloat16"),
    ):
        measured(monkeypatch, of_float32)
        assert chosen.startswith(f"{name_of(fast_dtype(CPU, kind))}: ")
        assert provenance.number_formats[kind].startswith(chosen)


@over(kind=["model", "encoder"])
def test_the_measurement_takes_little_and_leaves_the_threads(kind):
    threads, found = torch.get_num_threads(), hardware.product_seconds.__wrapped__(kind)
    assert found.keys() == {torch.float32, torch.bfloat16} and torch.get_num_threads() == threads
    assert all(0 < one < 1 for one in found.values())


def test_what_was_begun_goes_on_in_its_format(model_and_corpus, tmp_path, monkeypatch):
    """A harvest, a training, and a stream: the second measurement finds the opposite."""
    store, out, streamed = (tmp_path / name for name in ("store", "out", "streamed"))
    harvest = ("harvest", *model_and_corpus, *HARVEST, "--tokens", 2000, "--out", store)
    few = (*TRAIN, "--context-size", 16, "--tokens", 2560)
    trainings = {out: ("train", store, *TRAIN), streamed: ("train", *model_and_corpus, *few)}

    def formats(record):
        return json.loads(record.read_text())["number_formats"]

    measured(monkeypatch, 0.5)
    works(*harvest)
    for folder, words in trainings.items():
        works(*words, "--out", folder)
    before = {folder: content(folder / "uniform-k4") for folder in trainings}
    assert formats(out / "train.json")["encoder"] == "float32: measured to be the faster one here"
    measured(monkeypatch, 2)
    for folder, words in trainings.items():
        works(*words, "--out", folder)  # finished: it would be refused in another format
        assert content(folder / "uniform-k4") == before[folder]
    kept = "float32: as recorded when this was begun"
    assert formats(streamed / "train.json") == {"model": kept, "encoder": kept}
    works(*harvest, "--tokens", 3000)
    assert Manifest.load(store).model["dtype"] == Manifest.load(store).dtype == "float32"
    assert formats(store / "harvest.json")["model"] == kept
    assert call(*harvest, "--model-dtype", "bfloat16").code == 1


FREED = """
import torch
from llm_wsae.machine.hardware import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

del (large := [torch.ones(30 << 20, dtype=torch.uint8)])[:]
before = resident()  # from now on the allocator takes blocks below that size from its own
blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
del blocks[:-1]  # the last one lies above all others
kept = resident()
return_freed_memory()
print(kept - before > 150, resident() - before < 50)
"""
"""In a process of its own: one that has run for long holds freed memory in which blocks fit."""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and the allocator of glibc")
def test_freed_memory_is_returned():
    said = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert said.stdout == "True True\n", said.stderr


# --- Processes

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def work():
    us = join()
    with us.together():
        led = us.lead(lambda: {"rank": us.rank, "text": "ü"})
        return [us.leads, processes.leads(), led, us.lead(lambda: None), us.gather(us.rank)]


def test_who_does_what():
    led = {"rank": 0, "text": "ü"}
    assert run(3, work) == [[rank == 0, rank == 0, led, None, [0, 1, 2]] for rank in range(3)]


def ends():
    join().meet()
    atexit._run_exitfuncs()
    return torch.distributed.is_initialized()


def test_the_threads_of_a_group_end_before_the_process():
    assert run(2, ends) == [False, False]


def fails(kind):
    try:
        with join().together():
            if join().rank == 1:
                if kind is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise kind(f"no {kind.__name__}")
            join().meet()
    except LlmWsaeError as error:
        return [f"{type(error).__name__}: {error}", may_speak()]


def test_an_error_reaches_all_with_its_exit_code_and_is_said_once():
    for kind in (UsageError, LlmWsaeError):
        outcomes = run(2, fails, kind)
        assert [said for said, _ in outcomes] == 2 * [f"{kind.__name__}: no {kind.__name__}"]
        assert sorted(speaks for _, speaks in outcomes) == [False, True]
    (said, _), killed = run(2, fails, None)
    assert "another process of this run exited without an error message" in said
    assert killed is None


def test_processes_that_cannot_begin_are_one_sentence(monkeypatch):
    """As of ``srun`` alone, which sets no LOCAL_RANK; and if the others do not come."""
    connected = collectives(Processes(None, 0, 2), torch.device("cuda"))
    with pytest.raises(UsageError, match=r"without LOCAL_RANK, .*torchrun, or set LOCAL_RANK to"):
        connected.__enter__()
    for name, value in zip(ENVIRONMENT, ("1", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_JOIN", timedelta(seconds=1))
    with pytest.raises(LlmWsaeError, match=r"the 2 processes .* at 127\.0\.0\.1:1 \("):
        join.__wrapped__()


def test_one_process_needs_nothing(tmp_path, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    alone = join.__wrapped__()
    assert (alone.rank, alone.size, alone.leads, may_speak()) == (0, 1, True, True)
    with alone.together(), alone.folder_lock(tmp_path, "store"):
        assert alone.lead(lambda: 3) == 3 and alone.gather(3) == [3]
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    assert join.__wrapped__().size == 1  # of a launcher that starts one
