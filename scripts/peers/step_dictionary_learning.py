"""dictionary_learning's step: TopKTrainer.update."""

from itertools import count

from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor
from worker import Job, Trainer, serve, state_of

STEPS = 1_000_000  # of a training that this is the beginning of


def make(job: Job, rows: Tensor) -> Trainer:
    trainer = TopKTrainer(
        steps=STEPS,
        activation_dim=job.d_in,
        dict_size=job.d_sae,
        k=job.k,
        layer=0,
        lm_name="benchmark",
        device=job.device,
    )
    numbers = count(1)  # step 0 would also look for the geometric median of the rows

    def step(x: Tensor) -> None:
        trainer.num_tokens_since_fired[: job.dead] = trainer.dead_feature_threshold
        trainer.update(next(numbers), x)

    return Trainer(step, lambda: state_of(trainer.optimizer), "float32")


if __name__ == "__main__":
    serve(make, "dictionary-learning")
