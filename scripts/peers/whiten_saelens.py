"""SAELens trains TopK dictionaries on rows of ours: as it usually does, and whitening them.

The folder that is given holds the rows, shuffled, in ``rows.f32``, and the settings in
``job.json``; it receives a dictionary for each kind of ``normalize_activations``.
"""

import json
from collections.abc import Iterator

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from written import OUT, done

job = json.loads((OUT / "job.json").read_text())
count, d_in, batch = job["rows"], job["d_in"], job["batch_size"]
rows = torch.from_file(str(OUT / "rows.f32"), size=count * d_in).view(count, d_in)
steps = count // batch


def batches() -> Iterator[Tensor]:
    while True:  # the estimate of the covariance takes the first
        yield from rows[: steps * batch].split(batch)


for kind in ("expected_average_only_in", "covariance_whitening"):
    torch.manual_seed(job["seed"])
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=d_in, d_sae=job["d_sae"], k=job["k"], normalize_activations=kind)
    )
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=job["learning_rate"],
        lr_end=0.0,
        lr_warm_up_steps=int(job["warmup"] * steps),
        lr_decay_steps=int(job["decay"] * steps),
        dead_feature_window=steps // 10,
        n_batches_for_norm_estimate=min(steps, 200),
        autocast=True,
    )
    SAETrainer(config, sae, batches()).fit().save_inference_model(OUT / kind)
done("sae-lens")
