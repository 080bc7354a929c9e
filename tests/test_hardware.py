"""What the machine is asked for, and given back."""

import sys
from pathlib import Path

import pytest
import torch

from llm_wsae.hardware import return_freed_memory

MB = 2**20


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and the allocator of glibc")
def test_freed_memory_is_returned():
    large = torch.ones(30 * MB, dtype=torch.uint8)
    del large  # from now on the allocator takes blocks below this size from its own
    before = resident()
    blocks = [torch.ones(MB, dtype=torch.uint8) for _ in range(200)]
    assert resident() - before > 150 * MB
    del blocks[:-1]  # the last one lies above all others
    return_freed_memory()
    assert resident() - before < 50 * MB
    assert blocks[0].all()
