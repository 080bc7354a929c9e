"""What connecting several processes refuses before it waits for any of them."""

import pytest
import torch

from llm_wsae import collectives
from llm_wsae.errors import UsageError
from llm_wsae.processes import Several


@pytest.mark.parametrize("backends", ["cuda:nccl", "cpu:gloo"])
def test_a_process_group_must_reach_every_device(monkeypatch, backends):
    monkeypatch.setattr(collectives.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(collectives.distributed, "get_backend_config", lambda: backends)
    missing = "cpu" if "cpu" not in backends else "cuda"
    with (
        pytest.raises(UsageError, match=f"cannot exchange tensors on {missing}; start it with"),
        collectives.collectives(object.__new__(Several), torch.device("cuda")),
    ):
        pass


def test_processes_that_share_gpus_need_their_numbers(monkeypatch):
    """As of ``srun`` alone, which sets no LOCAL_RANK; refused before any other is waited for."""
    monkeypatch.setattr(collectives.distributed, "is_initialized", lambda: False)
    connected = collectives.collectives(object.__new__(Several), torch.device("cuda"))
    with pytest.raises(UsageError, match=r"without LOCAL_RANK, .*torchrun, or set LOCAL_RANK to"):
        connected.__enter__()
    for device in ("cpu", "cuda:0", "cuda:3"):
        collectives.check_device(torch.device(device))
