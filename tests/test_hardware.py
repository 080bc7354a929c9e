"""What the machine is asked for, and given back."""

import subprocess
import sys

import pytest

SCRIPT = """
from pathlib import Path
import torch
from llm_wsae.machine.hardware import return_freed_memory

MB = 2**20

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

large = torch.ones(30 * MB, dtype=torch.uint8)
del large  # from now on the allocator takes blocks below this size from its own
before = resident()
blocks = [torch.ones(MB, dtype=torch.uint8) for _ in range(200)]
held = resident()
del blocks[:-1]  # the last one lies above all others
kept = resident()
return_freed_memory()
assert blocks[0].all()
print(held - before > 150 * MB, kept - before > 150 * MB, resident() - before < 50 * MB)
"""
"""In a process of its own: one that has run for long holds freed memory in which blocks fit."""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and the allocator of glibc")
def test_freed_memory_is_returned():
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert said.stdout == "True True True\n", said.stderr
