"""SAELens' own runner trains with weights of ours: what it minimises, and what it leaves behind.

A random model of two blocks, random tokens, four trainings of the same length: SAELens' own class,
the weighted one with weights of 1, which must come out the same to the bit, and the weighted one
with weights that ask for the first half of the dimensions, once more for BatchTopK.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from written import D_IN, D_SAE, OUT, K, done, expect

from llm_wsae.saelens import (
    WeightedBatchTopKTrainingSAEConfig,
    WeightedTopKTrainingSAEConfig,
)
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

CONTEXT, PROMPTS, VOCABULARY, STEPS, BATCH = 32, 16, 200, 150, 512
SITE = "blocks.1.hook_resid_post"
SIZES: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": K}

torch.manual_seed(0)
model = HookedTransformer(
    HookedTransformerConfig(
        n_layers=2,
        d_model=D_IN,
        n_ctx=CONTEXT,
        d_head=12,
        act_fn="gelu",
        d_vocab=VOCABULARY,
        device="cpu",
        init_weights=True,
        initializer_range=0.2,
    )
)
tokens = torch.randint(VOCABULARY, (4000, CONTEXT), generator=torch.Generator().manual_seed(1))
first_half = torch.cat([torch.full((D_IN // 2,), 1.9**0.5), torch.full((D_IN // 2,), 0.1**0.5)])


def weights_file(name: str, gamma: Tensor) -> str:
    LossWeights(gamma, RULES["variance"], -0.25).save(OUT / f"{name}.safetensors")
    return str(OUT / f"{name}.safetensors")


def run(name: str, sae: Any) -> Any:
    """Train by the runner; the trained object, beside what it saved in ``OUT/name``."""
    torch.manual_seed(0)
    config = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny",
        hook_name=SITE,
        dataset_path="words",
        streaming=False,
        context_size=CONTEXT,
        prepend_bos=False,
        store_batch_size_prompts=PROMPTS,
        n_batches_in_buffer=32,
        train_batch_size_tokens=BATCH,
        training_tokens=STEPS * BATCH,
        lr=3e-3,
        dead_feature_window=50,
        n_checkpoints=1,
        checkpoint_path=str(OUT / "checkpoints" / name),
        output_path=str(OUT / name),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    return LanguageModelSAETrainingRunner(
        config, override_dataset=dataset, override_model=model
    ).run()


def by_dimension(sae: Any, x: Tensor) -> Tensor:
    """Share of the variance that is not explained, of each half of the dimensions."""
    error, spread = (sae(x) - x) ** 2, (x - x.mean(0)) ** 2
    return (error.mean(0).view(2, -1).sum(1) / spread.mean(0).view(2, -1).sum(1)).detach()


_, cache = model.run_with_cache(tokens[-100:], names_filter=[SITE])
x = cache[SITE].reshape(-1, D_IN).detach()
ones, half = weights_file("ones", torch.ones(D_IN)), weights_file("half", first_half)
plain = run("plain", TopKTrainingSAEConfig(**SIZES))
same = run("ones-topk", WeightedTopKTrainingSAEConfig(**SIZES, weights_file=ones))
weighted = run("topk", WeightedTopKTrainingSAEConfig(**SIZES, weights_file=half))
batch = run("batchtopk", WeightedBatchTopKTrainingSAEConfig(**SIZES, weights_file=half))

facts: dict[str, Any] = {
    "ones_equal_plain": all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True)
    ),
    "unexplained": {
        name: by_dimension(sae, x).tolist() for name, sae in (("plain", plain), ("topk", weighted))
    },
    "losses": {},
}
for name, sae in (("topk", weighted), ("batchtopk", batch)):
    step = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    difference = (x - step.sae_out).double() @ torch.diag(first_half.double())
    facts["losses"][name] = [
        step.losses["mse_loss"].item(),
        (difference**2).sum(1).mean().item(),
        ((x - step.sae_out).double() ** 2).sum(1).mean().item(),
    ]
    saved = SAE.load_from_disk(OUT / name)
    latents = saved.encode(x)
    expect(OUT / name, latents, saved.decode(latents), x)
    (checkpoint,) = (p.parent for p in (OUT / "checkpoints" / name).rglob("cfg.json"))
    facts.setdefault("checkpoints", {})[name] = str(Path(checkpoint))
(OUT / "facts.json").write_text(json.dumps(facts))
done("sae-lens", "transformer-lens")
