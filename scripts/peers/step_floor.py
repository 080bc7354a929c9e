"""What no TopK step can do without: the encoder's matrix product, and Adam over the parameters.

Variants: matmul, in whichever number format and tiling is the fastest here, and adam (fused).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from worker import Job, Trainer, seconds_of, serve, state_of

TILES = (512, 1024, None)  # rows; None: all at once


def make(job: Job, rows: Tensor) -> Trainer:
    return make_matmul(job, rows) if job.variant == "matmul" else make_adam(job)


def make_matmul(job: Job, rows: Tensor) -> Trainer:
    ways = {}
    for dtype in (torch.float32, torch.bfloat16):
        for tile in TILES:
            name = f"{str(dtype).removeprefix('torch.')}, {tile or 'all'} rows at a time"
            ways[name] = product(job, dtype, tile or job.batch)
    x = rows[: job.batch].to(job.device)
    fastest = min(ways, key=lambda name: min(seconds_of(ways[name], x) for _ in range(3)))
    step = ways[fastest]
    return Trainer(step, lambda: [], fastest)


def product(job: Job, dtype: torch.dtype, tile: int) -> Callable[[Tensor], None]:
    encoder = torch.randn(job.d_sae, job.d_in).to(job.device, dtype)
    out = torch.empty(tile, job.d_sae, dtype=dtype, device=job.device)

    def step(x: Tensor) -> None:
        for part in x.to(dtype).split(tile):
            torch.mm(part, encoder.T, out=out[: len(part)])

    return step


def make_adam(job: Job) -> Trainer:
    shapes = (job.d_sae, job.d_in), (job.d_sae, job.d_in), (job.d_sae,), (job.d_in,)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=job.device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimiser = torch.optim.Adam(parameters, fused=True)
    return Trainer(lambda x: optimiser.step(), lambda: state_of(optimiser), "float32, fused")


if __name__ == "__main__":
    serve(make)
