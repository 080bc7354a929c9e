"""Dictionaries that dictionary_learning writes: ``trainSAE`` with every trainer that it has."""

import json
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from written import D_IN, D_SAE, LAYER, OUT, K, done, expect, randomise, rows

STEPS = 40
SHORT = {"warmup_steps": 5}
PENALISED = SHORT | {"sparsity_warmup_steps": 10}
ANNEALED = PENALISED | {"anneal_start": 20, "p_end": 0.5}
SELECTED = SHORT | {"k": K, "threshold_start_step": 5, "threshold_beta": 0.8}
TRAINERS = {
    "StandardTrainer": (StandardTrainer, PENALISED),
    "StandardTrainerAprilUpdate": (StandardTrainerAprilUpdate, PENALISED),
    "PAnnealTrainer": (PAnnealTrainer, ANNEALED),
    "GatedSAETrainer": (GatedSAETrainer, PENALISED | {"lr": 1e-3}),
    "GatedAnnealTrainer": (GatedAnnealTrainer, ANNEALED),
    "TopKTrainer": (TopKTrainer, SELECTED),
    "BatchTopKTrainer": (BatchTopKTrainer, SELECTED),
    "MatryoshkaBatchTopKTrainer": (
        MatryoshkaBatchTopKTrainer,
        SELECTED | {"group_fractions": [0.25, 0.75]},
    ),
    "JumpReluTrainer": (JumpReluTrainer, PENALISED | {"lr": 1e-3, "bandwidth": 0.1}),
}


class Rows:
    """Batches, with the configuration that its buffer of activations would have."""

    def __init__(self):
        self.config = {"d_submodule": D_IN, "io": "out", "ctx_len": 128, "device": "cpu"}

    def __iter__(self):
        return (rows(seed=step) for step in range(STEPS + 1))


def compare(folder: Path) -> None:
    """What its own loader makes of a folder."""
    autoencoder, _ = load_dictionary(str(folder), "cpu")
    latents = autoencoder.encode(rows())
    expect(folder, latents, autoencoder.decode(latents))


PLACE = {"layer": LAYER, "submodule_name": f"resid_post_layer_{LAYER}"}
for name, (trainer, settings) in TRAINERS.items():
    about = {**PLACE, "lm_name": "owner/tiny", "activation_dim": D_IN, "dict_size": D_SAE}
    trainSAE(
        Rows(),
        [{"trainer": trainer, "steps": STEPS, "seed": 0, "device": "cpu", **about, **settings}],
        steps=STEPS,
        save_dir=str(OUT / name),
        normalize_activations=True,
        device="cpu",
    )
    compare(OUT / name / "trainer_0")

# No trainer makes this class any more, but its loader knows it.
folder = OUT / "AutoEncoderNew"
folder.mkdir()
autoencoder = AutoEncoderNew(D_IN, D_SAE)
randomise(autoencoder)
torch.save(autoencoder.state_dict(), folder / "ae.pt")
about = {"dict_class": "AutoEncoderNew", "activation_dim": D_IN, "dict_size": D_SAE, **PLACE}
(folder / "config.json").write_text(json.dumps({"trainer": about}))
compare(folder)
done("dictionary-learning")
