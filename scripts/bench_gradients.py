"""How exact are the training step's gradients? Relative error beside autograd in float64.

    python scripts/bench_gradients.py                        # 768 → 24576, k 32, batch 4096
    python scripts/bench_gradients.py --shape 576x4608x32 --write

The step is that of bench_train.py with weights γ, after some steps of training, so that biases are
not 0 and the encoder is not the decoder. Its error has two parts, told apart by two references. The
first has the same active latents as the step: what is left is rounding in sums and products, held
to 5e-3 with products in bfloat16 and to 1e-5 in float32. The second picks the k largest latents
itself, in float64: where two of them nearly tie, a product in bfloat16 picks the other one.
"""

import argparse

import torch
from bench_train import Shape
from benchmarks import machine, write_benchmark
from torch import Tensor
from torch.nn.functional import embedding
from tqdm import tqdm

from llm_wsae.sparse.operations import encode_topk
from llm_wsae.statistics.moments import Statistics
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.config import default_learning_rate
from llm_wsae.training.normaliser import Normaliser
from llm_wsae.training.parameters import Batch, Parameters
from llm_wsae.weights.choosing import weights_from_rule

CPU = torch.device("cpu")
TILE_ROWS = 512  # × d_sae in float64, and × k × d_in
NEVER = 10**9  # rows until a latent is dead


def train_a_little(shape: Shape, rows: Tensor, fast: torch.dtype, batch: int) -> tuple[Arm, Batch]:
    """An arm after a pass over all rows but the last batch, and that batch."""
    statistics = Statistics(shape.d_in, 1).update(rows, torch.zeros(len(rows), dtype=torch.int64))
    normaliser = Normaliser(statistics, CPU, fast)
    arm = Arm(
        ArmConfig(weights_from_rule("variance", 0.5, statistics), k=shape.k),
        shape.d_in,
        shape.d_sae,
        CPU,
    )
    *earlier, last = rows.split(batch)
    for number, some in enumerate(earlier, start=1):
        seen = number * batch
        arm.step(normaliser.batch(some), seen, default_learning_rate(shape.d_sae), 0.0, NEVER)
    return arm, normaliser.batch(last)


def largest(arm: Arm, batch: Batch, k: int) -> Tensor:
    """The k latents [batch, k] that are largest in every row, in float64."""
    encoder, bias = arm.parameters.encoder.double(), arm.parameters.encoder_bias.double()
    tiles = tqdm(batch.x.double().split(TILE_ROWS), desc="float64", leave=False)
    return torch.cat([torch.addmm(bias, x, encoder.T).topk(k).indices for x in tiles])


def reference(arm: Arm, batch: Batch, picked: Tensor) -> Parameters:
    """Gradients of the loss by autograd in float64, of the latents ``picked`` [batch, k]."""
    leaves = Parameters(*(p.double().clone().requires_grad_() for p in arm.parameters))
    encoder, decoder, encoder_bias, decoder_bias = leaves
    gamma, num_values = arm.gamma.double(), float(batch.mask.sum()) * batch.x.shape[1]
    parts = (part.split(TILE_ROWS) for part in (batch.x.double(), batch.mask.double(), picked))
    for x, mask, indices in tqdm(list(zip(*parts, strict=True)), desc="autograd", leave=False):
        pre = (embedding(indices, encoder) @ x[:, :, None]).squeeze(2) + encoder_bias[indices]
        made = (pre.relu()[:, None] @ embedding(indices, decoder)).squeeze(1) + decoder_bias
        error = (made - x) * mask[:, None] * gamma
        (error.square().sum() / num_values).backward()
    return Parameters(*(p.grad for p in leaves))


def shared(some: Tensor, others: Tensor) -> float:
    """Share of the latents of each row [batch, k] that the other choice has too."""
    return float((some[:, :, None] == others[:, None]).any(2).double().mean())


def relative_errors(found: Parameters, expected: Parameters) -> list[float]:
    """‖g − g₆₄‖ / ‖g₆₄‖ of every parameter."""
    return [
        float((own.double() - exact).norm() / exact.norm())
        for own, exact in zip(found, expected, strict=True)
    ]


def row(shape: Shape, rows: Tensor, fast: torch.dtype, batch_size: int) -> list[str]:
    """The table's line of one number format."""
    arm, batch = train_a_little(shape, rows, fast, batch_size)
    own = arm.evaluate(batch).gradients
    encoder, bias = arm.parameters.encoder.to(fast), arm.parameters.encoder_bias.to(fast)
    picked = encode_topk(batch.x_fast, encoder, bias, shape.k).indices
    exact = largest(arm, batch, shape.k)
    same_picks, own_picks = (reference(arm, batch, some) for some in (picked, exact))
    return [
        str(fast).removeprefix("torch."),
        *(f"{error:.1e}" for error in relative_errors(own, same_picks)),
        f"{1 - shared(picked, exact):.2%}",
        f"{max(relative_errors(own, own_picks)):.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Shape.parse, default=Shape(768, 24576, 32))
    parser.add_argument("--batch", type=int, default=4096, help="rows per step")
    parser.add_argument("--steps", type=int, default=10, help="steps before the one that counts")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    busy = machine(torch.get_num_threads())
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn((args.steps + 1) * args.batch, args.shape.d_in, generator=draw)
    head = ["products in", "encoder", "decoder", "encoder bias", "decoder bias"]
    head += ["latents float64 would not pick", "largest, if it picks"]
    formats = (torch.bfloat16, torch.float32)
    table = [head, *(row(args.shape, rows, fast, args.batch) for fast in formats)]
    text = "\n\n".join(
        [
            f"## Gradients compared with float64, {args.shape}, batch {args.batch}, "
            f"after {args.steps} steps on random normal rows",
            markdown(table),
            "‖g − g₆₄‖ / ‖g₆₄‖ by parameter, float64 having the same active latents; then the "
            f"share of latents that it would not pick, and what that makes of the error. {busy}.",
        ]
    )
    print(text)
    if args.write:
        write_benchmark(f"gradients {args.shape}", text)


if __name__ == "__main__":
    main()
