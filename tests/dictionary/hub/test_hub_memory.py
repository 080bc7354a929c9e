"""A push and a pull keep no second copy of a dictionary in memory."""

import re
import subprocess
import sys

import pytest
from places import SCRIPTS

SCRIPT = SCRIPTS / "bench_hub.py"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_round_trip_takes_no_more_memory_than_the_file():
    """At 33 MB; the number for 151 MB is the script's own. Half the folder is left for buffers."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--shape", "512x8064"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "The bytes that came back are the same." in done.stdout
    shares = dict(re.findall(r"^\| (push|pull) \| \d+ \| ([\d.]+) \|", done.stdout, re.MULTILINE))
    assert sorted(shares) == ["pull", "push"]
    assert all(0.5 < float(share) <= 1.5 for share in shares.values()), shares
