"""Does the fast training step train as well as the plain one? FVU beside dense float32 autograd.

    python scripts/bench_quality.py runs/quickstart/store --heldout runs/heldout --write

The reference is the textbook: dense latents, ``backward()``, torch's Adam, everything float32, with
the same initial weights, batches, schedule and AuxK loss. Both train once over the store with each
seed, and FVU is measured on the rows of a second store, harvested from held-out text:

    llm-wsae harvest --part heldout …
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from benchmarks import machine, write_benchmark
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.evaluation.fidelity.evaluator import Moments, ReconstructionSums
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import BETAS, EPSILON
from llm_wsae.training.architecture import Parameters
from llm_wsae.training.arm import initial_parameters, make_arms
from llm_wsae.training.config import TrainConfig, default_learning_rate, learning_rate_factor
from llm_wsae.training.normaliser import Normaliser, folded
from llm_wsae.training.trainer import train
from llm_wsae.weights.loss_weights import weights_from_rule


def topk_latents(pre: Tensor, k: int) -> Tensor:
    """The k largest entries of every row through a ReLU, all others 0."""
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())


def auxk_loss(parameters: Parameters, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """‖e − ê‖² / ‖e‖² with ê made by the dead latents with the largest pre-activations."""
    encoder, decoder = parameters.encoder[dead], parameters.decoder[dead]
    pre = x @ encoder.T + parameters.encoder_bias[dead]
    latents = topk_latents(pre, min(len(dead), x.shape[1] // 2))
    error = (residual - latents @ decoder).square().sum()
    return error / residual.square().sum()


def dense_training(
    store: ActivationStore, site: Site, config: TrainConfig, k: int, seed: int
) -> Dictionary:
    """One dictionary by dense float32 autograd on the CPU."""
    source = store.source(site)
    normaliser = Normaliser(source.statistics(), torch.device("cpu"), torch.float32)
    d_sae = config.expansion * source.d_in
    parameters = initial_parameters(source.d_in, d_sae, seed, torch.device("cpu"))
    for parameter in parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.Adam(list(parameters), betas=BETAS, eps=EPSILON)
    num_steps = source.num_rows // config.batch_size
    dead_after = num_steps * config.batch_size // 10
    last_fired = torch.zeros(d_sae, dtype=torch.int64)
    batches = source.batches(config.batch_size, seed=config.shuffle_seed)
    for step in tqdm(range(num_steps), desc=f"dense float32, seed {seed}"):
        batch = normaliser.batch(next(batches))
        rows_seen = (step + 1) * config.batch_size
        pre = batch.x @ parameters.encoder.T + parameters.encoder_bias
        latents = topk_latents(pre, k)
        error = batch.x - latents @ parameters.decoder - parameters.decoder_bias
        error = error * batch.mask[:, None]
        loss = error.square().sum() / (batch.mask.sum() * source.d_in)
        dead = (rows_seen - last_fired > dead_after).nonzero().flatten()
        last_fired[(latents > 0).any(0)] = rows_seen
        if len(dead):
            kept = batch.mask.bool()
            auxiliary = auxk_loss(parameters, batch.x[kept], error[kept].detach(), dead)
            loss = loss + config.aux_coefficient * auxiliary
        factor = learning_rate_factor(step, num_steps, config.warmup, config.decay)
        for group in optimiser.param_groups:
            group["lr"] = default_learning_rate(d_sae) * factor
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            parameters.decoder.div_(parameters.decoder.norm(dim=1, keepdim=True))
    batches.close()
    return Dictionary(
        **folded(parameters, normaliser.x, normaliser.y),
        sparsity=TopK(k),
        info=DictionaryInfo(site=str(site), name=f"dense-k{k}-s{seed}"),
    )


def fvu(dictionary: Dictionary, store: ActivationStore, site: Site) -> float:
    """FVU on all rows of a store that are not massive."""
    found = store.statistics(site)
    moments = Moments(found.mean)
    made = ReconstructionSums(dictionary)
    for start in range(0, store.num_rows, 4096):
        rows = store.rows(site, start, min(start + 4096, store.num_rows)).float()
        rows = rows[rows.norm(dim=1) <= found.massive_threshold]
        moments.update(rows)
        made.update(rows)
    return float(made.error.sum() / moments.deviation().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--site", default="blocks.9.hook_resid_post")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    busy = machine(torch.get_num_threads())
    store, heldout = ActivationStore.open(args.store), ActivationStore.open(args.heldout)
    site, config, seeds = Site.parse(args.site), TrainConfig(lengths="unit"), range(args.seeds)
    uniform = weights_from_rule("uniform", 1.0, store.statistics(site))
    arms = make_arms([uniform], [args.k], init_seeds=seeds)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(store.source(site), arms, config, Path(folder) / "ours")
    found = {
        "llm_wsae": [fvu(d, heldout, site) for d in trained.values()],
        "dense float32 autograd": [
            fvu(dense_training(store, site, config, args.k, seed), heldout, site) for seed in seeds
        ],
    }
    lines = [
        f"## Training quality, {site}, {store.num_rows:,} rows, k {args.k}, 8 ×",
        "",
        "| | FVU on held-out text | each seed |",
        "|---|--:|---|",
    ]
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {name} | {statistics.mean(values):.4f} ± {spread:.4f} | {each} |")
    lines += ["", f"Mean and standard deviation over {args.seeds} seeds. {busy}."]
    print("\n".join(lines))
    if args.write:
        write_benchmark("quality", "\n".join(lines))


if __name__ == "__main__":
    main()
