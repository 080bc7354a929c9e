"""What the parts of interop.py share: tools in their environments, differences, tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks import PEER_SCRIPTS, ROOT, peer_python
from safetensors.torch import load_file

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError

TOLERANCE = 1e-5


class Part(NamedTuple):
    """What a part found."""

    text: str
    ok: bool


def peer(name: str, script: str, out: Path, **environment: str) -> str:
    """Run a script in a tool's environment; the tool's versions in words."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [peer_python(name), PEER_SCRIPTS / script, out],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
        sys.exit(f"peers/{script} failed in the environment of {name}")
    versions = json.loads((out / "versions.json").read_text())
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest |a − b| / (1 + |b|)."""
    return float(((ours - theirs).abs() / (1 + theirs.abs())).max())


def compare(dictionary: Dictionary, expected: Path) -> tuple[str, bool]:
    """Both differences and the active latents per row, as cells of a table; whether they are small.

    A tool whose latents are all 0 or all active would prove nothing, so neither passes.
    """
    made = load_file(expected)
    latents = dictionary.encode(made["x"])
    found = [
        difference(latents, made["latents"]),
        difference(dictionary(made["x"]), made["reconstruction"]),
    ]
    active = float((made["latents"] > 0).float().sum(1).mean())
    ok = max(found) <= TOLERANCE and 0.5 < active < dictionary.d_sae - 0.5
    cells = " | ".join(f"{value:.1e}" for value in found)
    return f"{dictionary.sparsity.architecture} | {active:.1f} | {cells}", ok


def read_all(out: Path, refused: set[str]) -> Part:
    """A table of all dictionaries that a tool wrote below ``out``."""
    lines = ["| written | read as | active | latents | reconstruction |", "|---|---|--:|--:|--:|"]
    every = True
    for expected in sorted(out.rglob("*.expected.safetensors")):
        folder = expected.with_name(expected.name.removesuffix(".expected.safetensors"))
        name = str(folder.relative_to(out))
        try:
            cells, ok = compare(Dictionary.load(folder), expected)
            ok = ok and name not in refused
        except LlmWsaeError as error:
            reason = str(error).replace(str(folder), "…").replace("|", "\\|")
            cells, ok = f"refused: {reason} | | |", name in refused
        lines.append(f"| `{name}` | {cells} |{'' if ok else ' **NO** |'}")
        every = every and ok
    return Part("\n".join(lines), every and len(lines) > 2)
