"""Our training step, from raw rows on: normalise the batch, then one step of every arm.

The variant is the number of arms. They differ in seed and share the batch, as in a training.
"""

import torch
from torch import Tensor
from worker import Job, Trainer, serve

from llm_wsae.hardware import fast_dtype
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.config import TrainConfig, default_learning_rate
from llm_wsae.training.normaliser import Normaliser
from llm_wsae.weights.choosing import weights_from_rule

DEAD_AFTER = 10_000_000  # as in the peers: within a benchmark nobody's latents die


def make(job: Job, rows: Tensor) -> Trainer:
    device = torch.device(job.device)
    fast = fast_dtype(device)
    statistics = Statistics(job.d_in, 1).update(rows, torch.zeros(len(rows), dtype=torch.int64))
    normaliser = Normaliser(statistics, device, fast)
    weights = weights_from_rule("variance", 0.5, statistics)
    arms = [
        Arm(ArmConfig(weights, k=job.k, init_seed=seed), job.d_in, job.d_sae, device)
        for seed in range(int(job.variant))
    ]
    learning_rate, rows_seen = default_learning_rate(job.d_sae), 0

    def step(x: Tensor) -> None:
        nonlocal rows_seen
        rows_seen += len(x)
        batch = normaliser.batch(x)
        for arm in arms:
            arm.last_fired[: job.dead] = rows_seen - 2 * DEAD_AFTER
            arm.step(batch, rows_seen, learning_rate, TrainConfig.aux_coefficient, DEAD_AFTER)

    def state() -> list[Tensor]:
        return [tensor for arm in arms for tensor in arm.state().values()]

    return Trainer(step, state, str(fast).removeprefix("torch."))


if __name__ == "__main__":
    serve(make)
