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
        ranks = all_of_us.gather(rank)
    return [all_of_us.leads, processes.leads(), led, ranks]


def test_who_does_what():
    led = [{"rank": 0, "text": "ü"}, None]
    assert run(3, work) == [[rank == 0, rank == 0, led, [0, 1, 2]] for rank in range(3)]


def fails(kind):
    all_of_us = join()
    try:
        with all_of_us.together():
            if all_of_us.rank == 1:
                raise kind(f"no {kind.__name__}")
            all_of_us.meet()
    except LlmWsaeError as error:
        return [f"{type(error).__name__}: {error}", may_speak()]


@pytest.mark.parametrize("kind", [UsageError, LlmWsaeError])
def test_an_error_reaches_all_with_its_exit_code_and_is_said_once(kind):
    outcomes = run(2, fails, kind)
    assert [said for said, _ in outcomes] == 2 * [f"{kind.__name__}: no {kind.__name__}"]
    assert sorted(speaks for _, speaks in outcomes) == [False, True]


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


def test_processes_that_share_gpus_need_their_numbers():
    """As of ``srun`` alone, which sets no LOCAL_RANK; refused before any other is waited for."""
    connected = collectives(object.__new__(Several), torch.device("cuda"))
    with pytest.raises(UsageError, match=r"without LOCAL_RANK, .*torchrun, or set LOCAL_RANK to"):
        connected.__enter__()


def test_one_process_needs_nothing(tmp_path, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    alone = join.__wrapped__()
    assert (alone.rank, alone.size, alone.leads, may_speak()) == (0, 1, True, True)
    with alone.together(), alone.folder_lock(tmp_path, "store"):
        assert alone.lead(lambda: 3) == 3 and alone.gather(3) == [3]
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    assert type(join.__wrapped__()) is Processes  # a launcher that starts one


def test_processes_that_do_not_come_are_one_sentence(monkeypatch):
    values = ("1", "2", "127.0.0.1", "1")
    for name, value in zip(ENVIRONMENT, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_JOIN", timedelta(seconds=1))
    with pytest.raises(LlmWsaeError, match=r"the 2 processes .* at 127\.0\.0\.1:1 \("):
        join.__wrapped__()
