"""How processes of one run keep together: who does what, and how an error reaches all."""

import os
import signal
from datetime import timedelta

import pytest
import torch
from several import run

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine import processes
from llm_wsae.machine.processes import Processes, Several, collectives, join, may_speak

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def work():
    all_of_us = join()
    rank = all_of_us.rank
    with all_of_us.together():
        led = [all_of_us.lead(lambda: {"rank": rank, "text": "ü"}), all_of_us.lead(lambda: None)]
        all_of_us.meet()
        all_of_us.count("steps", 10 + rank)
        all_of_us.meet()
        total = all_of_us.count("steps", 0)
    return [all_of_us.size, all_of_us.leads, processes.leads(), led, total]


def test_who_does_what():
    led = [{"rank": 0, "text": "ü"}, None]
    assert run(3, work) == [[3, rank == 0, rank == 0, led, 33] for rank in range(3)]


def fails_then_works():
    all_of_us = join()
    caught = []
    for kind in (UsageError, LlmWsaeError):
        try:
            with all_of_us.together():
                if all_of_us.rank == 1:
                    raise kind(f"no {kind.__name__}")
                all_of_us.meet()
        except LlmWsaeError as error:
            caught.append([type(error).__name__, str(error)])
    with all_of_us.together():
        caught.append(all_of_us.count("steps", 0))  # nothing is left of the pieces before
    return [caught, may_speak()]


def test_an_error_reaches_all_with_its_exit_code_and_is_said_once():
    outcomes = run(2, fails_then_works)
    expected = [["UsageError", "no UsageError"], ["LlmWsaeError", "no LlmWsaeError"], 0]
    assert [caught for caught, _ in outcomes] == [expected, expected]
    assert sorted(speaks for _, speaks in outcomes) == [False, True]


def test_processes_that_share_gpus_need_their_numbers():
    """As of ``srun`` alone, which sets no LOCAL_RANK; refused before any other is waited for."""
    connected = collectives(object.__new__(Several), torch.device("cuda"))
    with pytest.raises(UsageError, match=r"without LOCAL_RANK, .*torchrun, or set LOCAL_RANK to"):
        connected.__enter__()


def dies_while_the_other_waits():
    all_of_us = join()
    with all_of_us.together():
        if all_of_us.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_of_us.meet()


def test_who_waits_for_a_killed_process_is_told():
    said, killed = run(2, dies_while_the_other_waits)
    assert "another process of this run exited without an error message" in said
    assert killed is None


def test_one_process_needs_nothing(tmp_path, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    alone = join.__wrapped__()
    assert (alone.rank, alone.size, alone.leads, may_speak()) == (0, 1, True, True)
    with alone.together(), alone.folder_lock(tmp_path, "store"):
        assert alone.lead(lambda: 3) == 3 and alone.count("n", 2) + alone.count("n", 2) == 6
    with alone.together():
        assert alone.count("n", 1) == 1
    monkeypatch.setattr(os, "environ", {**os.environ, **dict.fromkeys(ENVIRONMENT, "1")})
    assert type(join.__wrapped__()) is Processes  # a launcher that starts one


def test_processes_that_do_not_come_are_one_sentence(monkeypatch):
    values = ("1", "2", "127.0.0.1", "1")
    for name, value in zip(ENVIRONMENT, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_JOIN", timedelta(seconds=1))
    with pytest.raises(LlmWsaeError, match=r"the 2 processes .* at 127\.0\.0\.1:1 \("):
        join.__wrapped__()
