"""The worker processes of bench_train.py, and the environments of the peers they run in."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SCRIPTS = Path(__file__).parent / "peers"
PEERS = {  # folder of the environment, distributions, module
    "sparsify": ("sparsify", "eai-sparsify", "sparsify"),
    "saelens": ("saelens", "sae-lens", "sae_lens"),
    "dictionary_learning": ("dictlearn", "dictionary-learning", "dictionary_learning"),
    "saebench": ("saebench", "sae-bench", "sae_bench"),
    "saelens5": ("saelens5", "sae-lens>=5,<6 pyarrow<20", "sae_lens"),
    "saelens3": ("saelens3", "sae-lens>=3,<4 pyarrow<20", "sae_lens"),
}


class WorkerFailed(Exception):
    """A worker cannot be started or ended too early; the message says why."""


def peer_python(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there.

    It gets the torch that we have, so that the peers differ in nothing but themselves. Raises
    WorkerFailed if the packages cannot be installed.
    """
    folder, distribution, module = PEERS[peer]
    home = os.environ.get("LLM_WSAE_PEERS") or Path.home() / ".cache" / "llm_wsae" / "peers"
    environment = Path(home) / folder
    python = environment / "bin" / "python"
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    if python.exists() and subprocess.run([python, "-c", look]).returncode == 0:
        return python
    print(f"installing {distribution} into {environment} (once; a few minutes)", file=sys.stderr)
    same_torch = f"torch=={torch.__version__.split('+')[0]}"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([*pip, same_torch, *distribution.split()], check=True)
    except subprocess.CalledProcessError:
        raise WorkerFailed(f"{distribution} could not be installed") from None
    return python


class Worker:
    """A running worker process; see peers/worker.py for what it is asked and answers."""

    def __init__(self, peer: str | None, script: str, job: dict, threads: int):
        python = peer_python(peer) if peer else sys.executable
        job = json.dumps(job | {"threads": threads})
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the process
        # Answers have a pipe of their own: libraries print to the standard output, even on import.
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        self._process = subprocess.Popen(
            [python, SCRIPTS / script, job, str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[writing],
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"},
        )
        os.close(writing)
        self.facts = self._answer()

    def turn(self, steps: int) -> dict:
        """Let it take steps. Raises WorkerFailed if it cannot."""
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failed() from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._log.close()

    def _answer(self) -> dict:
        line = self._answers.readline()
        if not line:
            raise self._failed()
        return json.loads(line)

    def _failed(self) -> WorkerFailed:
        code = self._process.wait()
        self._log.seek(0)
        words = self._log.read().strip().splitlines()
        print("\n".join(words[-20:]), file=sys.stderr)
        if code == -9:
            return WorkerFailed("killed, most likely for want of memory")
        errors = [line for line in words if "Error" in line]
        return WorkerFailed(errors[-1] if errors else f"ended with code {code}")
