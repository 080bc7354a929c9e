"""eai-sparsify's step, the operations of its Trainer's loop around one SparseCoder, with Adam."""

import torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from torch import Tensor
from worker import Job, Trainer, serve, state_of

AUXK_ALPHA = 1 / 32  # of Gao et al. 2024; its default is 0


def make(job: Job, rows: Tensor) -> Trainer:
    config = SparseCoderConfig(num_latents=job.d_sae, k=job.k)
    coder = SparseCoder(job.d_in, config, device=job.device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=2e-4 / (job.d_sae / 2**14) ** 0.5)

    dead = torch.arange(job.d_sae, device=job.device) < job.dead if job.dead else None

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=dead)
        (out.fvu + AUXK_ALPHA * out.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    about = "bfloat16, Triton" if job.device == "cuda" else "float32, its only mode on a CPU"
    return Trainer(step, lambda: state_of(optimiser), about)


if __name__ == "__main__":
    serve(make, "eai-sparsify")
