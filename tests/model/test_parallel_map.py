"""Results in order, each piece on its share of the cores, errors and all."""

import threading

import pytest
import torch
from looping import over

from llm_wsae.model.parallel_map import parallel_map


@pytest.fixture(params=[1, 2, 5])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@over(pieces=[0, 1, 2, 7])
def test_results_come_in_order_and_cores_are_shared_out(cores, pieces):
    def work(piece):
        return piece, torch.get_num_threads(), threading.get_ident()

    found = parallel_map(work, range(pieces))
    assert [piece for piece, _, _ in found] == list(range(pieces))
    workers = max(1, min(cores, pieces))
    assert all(share == cores // workers for _, share, _ in found)
    if workers == 1:
        assert all(thread == threading.get_ident() for _, _, thread in found)
    assert torch.get_num_threads() == cores
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [cores]


def test_pieces_run_at_the_same_time():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=60)
    try:
        parallel_map(lambda piece: meeting.wait(), [0, 1])  # alone it would wait in vain
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_out_and_cores_are_given_back(cores):
    def work(piece):
        if piece == 3:
            raise ValueError("piece 3")
        return piece

    with pytest.raises(ValueError, match="piece 3"):
        parallel_map(work, range(5))
    assert torch.get_num_threads() == cores
