"""Two launchers, as two machines would start them, on this one: one is killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from command_line import TRAIN, asked, call, works
from places import ROOT
from several import run

SECONDS = 240


class Launchers:
    """Both, of one command; the first one leads the meetings of the two."""

    def __init__(self, folder, *words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._folder, self._command = folder, ["-m", "llm_wsae", *asked(words)]
        self._meeting = ("--rdzv-backend", "c10d", "--rdzv-id", str(port),
                         "--rdzv-endpoint", f"127.0.0.1:{port}")  # fmt: skip
        self.both = [self._start(0), self._start(1)]

    def _start(self, number):
        conf = f"is_host={str(number == 0).lower()},keep_alive_interval=1"
        with open(self._said(number), "a") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                 "--nproc-per-node", "1", "--max-restarts", "3", *self._meeting,
                 "--rdzv-conf", conf, *self._command],
                cwd=ROOT,
                stderr=said,
                stdout=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                },
            )  # fmt: skip

    def _said(self, number):
        return self._folder / f"launcher-{number}.txt"

    def restart_second(self, begun):
        """Kill it with its process once ``begun()``, and start it again."""
        until = time.monotonic() + SECONDS
        while not begun():
            assert time.monotonic() < until
            assert [one.poll() for one in self.both] == [None, None]
            time.sleep(0.01)
        second = self.both[1]
        workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        second.kill()
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        second.wait()
        assert self.both[0].poll() is None
        self.both[1] = self._start(1)

    def end(self):
        """Wait until both have done all."""
        try:
            codes = [one.wait(timeout=SECONDS) for one in self.both]
        finally:
            for one in self.both:
                one.kill()
        assert codes == [0, 0], [self._said(number).read_text() for number in range(2)]


def command(*words):
    return call(*words).code


def test_a_training(made_world, tmp_path):
    words = ("train", made_world / "store", *TRAIN, "--k", 4, "--tokens", 200_000,
             "--checkpoint-seconds", 0.2)  # fmt: skip
    out = tmp_path / "two"
    launchers = Launchers(tmp_path, *words, "--out", out)
    launchers.restart_second((out / "checkpoint.safetensors").exists)
    launchers.end()
    works("verify", out)
    assert run(2, command, *words, "--out", tmp_path / "at once") == [0, 0]
    weights = [
        (folder / "uniform-k4/sae_weights.safetensors").read_bytes()
        for folder in (tmp_path / "at once", out)
    ]
    assert weights[0] == weights[1]
