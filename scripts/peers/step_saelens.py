"""SAELens' step: its SAETrainer with a TopKTrainingSAE. Variants: autocast (bfloat16), float32."""

from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from worker import Job, Trainer, serve, state_of

STEPS = 1_000_000  # of a training that this is the beginning of
LEARNING_RATE = 3e-4


def make(job: Job, rows: Tensor) -> Trainer:
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=job.d_in, d_sae=job.d_sae, k=job.k, device=job.device)
    )
    config = SAETrainerConfig(
        total_training_samples=STEPS * job.batch,
        train_batch_size_samples=job.batch,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        device=job.device,
        autocast=job.variant == "autocast",
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        trainer.n_forward_passes_since_fired[: job.dead] = config.dead_feature_window + 1
        trainer.step(x)
        trainer.n_training_steps += 1

    about = "bfloat16" if job.variant == "autocast" else "float32"
    return Trainer(step, lambda: state_of(trainer.optimizer), about)


if __name__ == "__main__":
    serve(make, "sae-lens")
