"""Two launchers, as two machines would start them, on this one: one is killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TRAIN, asked, call, works
from places import ROOT
from several import run

SECONDS = 240


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher of that number; the first one leads the meetings of the two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    started = []

    def launcher(number, *words):
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-id", port, "--rdzv-endpoint",
                      f"127.0.0.1:{port}", "--rdzv-conf",
                      f"is_host={str(number == 0).lower()},keep_alive_interval=1")  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                   "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous,
                   "-m", "llm_wsae", *asked(words)]  # fmt: skip
        with open(tmp_path / f"launcher-{number}.txt", "a") as said:
            started.append(subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said
            ))  # fmt: skip
        return started[-1]

    yield launcher
    for one in started:
        one.kill()


def command(*words):
    return call(*words).code


def test_a_training(made_world, tmp_path, launch):
    words = ("train", made_world / "store", *TRAIN, "--k", 4, "--tokens", 60_000)
    out, until = tmp_path / "two", time.monotonic() + SECONDS
    launched = (*words, "--checkpoint-seconds", 0.2, "--out", out)
    first, second = launch(0, *launched), launch(1, *launched)
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < until and first.poll() is second.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    second.kill()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    second.wait()
    assert first.poll() is None
    second = launch(1, *launched)
    codes = [one.wait(timeout=SECONDS) for one in (first, second)]
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("launcher-*.txt")]
    works("verify", out)
    assert run(2, command, *words, "--out", tmp_path / "at once") == [0, 0]
    weights = "uniform-k4/sae_weights.safetensors"
    assert (tmp_path / "at once" / weights).read_bytes() == (out / weights).read_bytes()
