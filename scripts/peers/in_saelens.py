"""What SAELens ≥ 6 does with dictionaries: it writes its own, and loads ours.

The folder comes first, then what to do:

- ``write``: dictionaries that SAELens writes: by hand, at the end of a training, as a checkpoint.
- ``load``: dictionaries of ours as SAELens reads them. ``job.json`` in the folder names them:
  ``disk`` and ``hub`` lead from a name to the arguments of ``SAE.load_from_disk`` and
  ``SAE.from_pretrained``.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file
from written import D_IN, D_SAE, OUT, SITE, K, done, expect, randomise, rows

BATCH, STEPS = 500, 30
SIZES: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
UNCENTRED = {"apply_b_dec_to_input": False}
WRITTEN = {  # name: class, its settings
    "standard": ("StandardSAE", {}),
    "standard-uncentred": ("StandardSAE", UNCENTRED),
    "topk": ("TopKSAE", {"k": K}),
    "topk-rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "jumprelu-uncentred": ("JumpReLUSAE", UNCENTRED),
    "gated": ("GatedSAE", {}),
    "gated-uncentred": ("GatedSAE", UNCENTRED),
    # Nothing that a dictionary of ours can be; they must be refused.
    "layer-norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "abstopk": ("AbsTopKSAE", {"k": K}),
    "matching-pursuit": ("MatchingPursuitSAE", {}),
    "transcoder": ("Transcoder", {"d_out": D_IN, **UNCENTRED}),
    "jumprelu-transcoder": ("JumpReLUTranscoder", {"d_out": D_IN, **UNCENTRED}),
    # Of a whole MLP.
    "mlp-transcoder": ("Transcoder", {"d_out": D_IN, **UNCENTRED}),
    "mlp-skip": ("SkipTranscoder", {"d_out": D_IN, **UNCENTRED}),
    "mlp-jumprelu": ("JumpReLUTranscoder", {"d_out": D_IN, **UNCENTRED}),
    "mlp-jumprelu-skip": ("JumpReLUSkipTranscoder", {"d_out": D_IN, **UNCENTRED}),
}
SCALED = {"normalize_activations": "expected_average_only_in"}
TRAINED = {
    "standard": {"l1_coefficient": 0.01},
    "topk": {"k": K},
    "topk-scaled": {"k": K, **SCALED},
    "batchtopk": {"k": K},
    "batchtopk-scaled": {"k": K, **SCALED},
    "batchtopk-plain-norm": {"k": K, "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [D_SAE // 4, D_SAE]},
    "jumprelu": {"l0_coefficient": 0.01},
    "gated": {"l1_coefficient": 0.01},
    "gated-scaled": {"l1_coefficient": 0.01, **SCALED},
}
METADATA = {
    "model_name": "owner/tiny",
    "hook_name": SITE,
    "dataset_path": "owner/words",
    "context_size": 128,
    "prepend_bos": True,
}
OF_MLP = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}


def compare(folder: Path, sae: SAE) -> None:
    """What SAELens makes of the rows."""
    expect(folder, sae.encode(rows()), sae(rows()))


def as_finished(sae: Any, scale: float | None, place: Path) -> SAE:
    """What would come out if the training of a checkpoint ended here."""
    sae = copy.deepcopy(sae)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(place)
    return SAE.load_from_disk(place)


def train(name: str, settings: dict[str, Any]) -> None:
    """Train, with one checkpoint on the way."""
    sae_class, config_class = get_sae_training_class(name.split("-")[0])
    steps = SAETrainerConfig(
        total_training_samples=BATCH * STEPS,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-3,
        device="cpu",
        n_batches_for_norm_estimate=5,
        n_checkpoints=1,
        checkpoint_path=str(OUT / "checkpoint" / name),
    )
    trainer = SAETrainer(
        steps,
        sae_class(config_class(**SIZES, **settings, metadata=SAEMetadata(**METADATA))),
        (rows(BATCH, seed=step) for step in range(10 * STEPS)),
    )
    kept: list[Any] = []

    def keep(checkpoint_path: Path) -> None:
        scale = trainer.activation_scaler.scaling_factor
        kept.append((checkpoint_path, copy.deepcopy(trainer.sae), scale))

    trainer.save_checkpoint_fn = keep
    trainer.fit().save_inference_model(OUT / "trained" / name)
    compare(OUT / "trained" / name, SAE.load_from_disk(OUT / "trained" / name))
    ((folder, before, scale),) = kept
    compare(folder, as_finished(before, scale, OUT / "finished" / name))


def write() -> None:
    """What SAELens writes, and what it makes of it."""
    for name, (kind, settings) in WRITTEN.items():
        folder = OUT / "written" / name
        about = METADATA | (OF_MLP if name.startswith("mlp") else {})
        config = getattr(sae_lens, f"{kind}Config")(
            **SIZES, **settings, metadata=SAEMetadata(**about)
        )
        sae = getattr(sae_lens, kind)(config)
        randomise(sae)
        sae.save_model(folder)
        compare(folder, SAE.load_from_disk(folder))
    for name, settings in TRAINED.items():
        train(name, settings)


def load() -> None:
    """What SAELens makes of files that it did not write."""
    job = json.loads((OUT / "job.json").read_text())
    loaded = {f"disk-{name}": SAE.load_from_disk(where) for name, where in job["disk"].items()}
    for name, (repo, sae_id) in job["hub"].items():
        loaded[f"hub-{name}"] = SAE.from_pretrained(repo, sae_id)
    for name, sae in loaded.items():
        x = load_file(OUT / f"{name.split('-', 1)[1]}.rows.safetensors")["x"]
        with torch.no_grad():
            expect(OUT / name, sae.encode(x), sae(x), x)


{"write": write, "load": load}[sys.argv[2]]()
done("sae-lens")
