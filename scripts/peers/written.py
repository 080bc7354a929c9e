"""What the scripts that write dictionaries with the real tools share: rows, and what a tool makes
of them.

Runs in the tools' own environments, so it needs torch and safetensors only. Each script is given a
folder, puts dictionaries below it and beside each of them, in ``NAME.expected.safetensors``, some
rows with the latents and the reconstruction that the tool itself computes from its own files.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 48, 384, 8
LAYER = 3
SITE = f"blocks.{LAYER}.hook_resid_post"
OUT = Path(sys.argv[1])


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows(number: int = 500, seed: int = 0) -> Tensor:
    """Rows of unequal variance around a mean far from zero, as the residual stream has them."""
    spread = (draw(98, D_IN) / 2).exp()
    return draw(seed, number, D_IN) * spread + draw(97, D_IN, scale=2)


def randomise(module: torch.nn.Module, seed: int = 1) -> None:
    """Give every parameter some value, as a training would."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            values = draw(seed + number, *parameter.shape, scale=0.15)
            parameter.copy_(values.abs() if "threshold" in name else values)


def expect(folder: Path, latents: Tensor, reconstruction: Tensor, x: Tensor | None = None) -> None:
    """Note what the tool makes of the rows."""
    made = {"x": rows() if x is None else x, "latents": latents, "reconstruction": reconstruction}
    made = {name: tensor.detach().float().contiguous() for name, tensor in made.items()}
    save_file(made, folder.with_name(f"{folder.name}.expected.safetensors"))


def done(*packages: str) -> None:
    """Note the versions of the tool."""
    found = {name: importlib.metadata.version(name) for name in packages}
    (OUT / "versions.json").write_text(json.dumps(found))
