"""Every operation against a dense float64 reference, on random and on adversarial inputs."""

import pytest
import torch

from llm_wsae.sparse.codes import Codes
from llm_wsae.sparse.operations import (
    LatentGroups,
    decode,
    encode_topk,
    latent_totals,
    select_topk,
    value_gradients,
)

D_IN, D_SAE, BATCH = 24, 160, 700  # BATCH is no multiple of the row tile


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(codes, d_sae=D_SAE):
    return torch.zeros(len(codes.indices), d_sae, dtype=codes.values.dtype).scatter_add_(
        1, codes.indices, codes.values
    )


@pytest.mark.parametrize("k", [1, 7, 19, 20, 159, 160])
@pytest.mark.parametrize("d_sae", [160, 157])
def test_selection_is_exact(k, d_sae):
    k = min(k, d_sae)
    pre = random(BATCH, d_sae)
    best = select_topk(pre, k)
    expected = pre.topk(k).values
    assert torch.equal(best.values.sort(descending=True).values, expected)
    assert torch.equal(pre.gather(1, best.indices), best.values)
    assert all(len(set(row)) == k for row in best.indices.tolist())


@pytest.mark.parametrize(
    "pre",
    [torch.zeros(5, 160), torch.full((5, 160), -1.0), torch.ones(5, 160).tril_(3)],
    ids=["zeros", "all negative", "repeated"],
)
def test_selection_with_ties_picks_k_different_latents(pre):
    best = select_topk(pre, 9)
    assert torch.equal(best.values.sort(descending=True).values, pre.topk(9).values)
    assert all(len(set(row)) == 9 for row in best.indices.tolist())


def test_encoding_clips_negative_values():
    x, encoder, bias = random(BATCH, D_IN), random(D_SAE, D_IN, seed=1), random(D_SAE) - 8
    codes = encode_topk(x, encoder, bias, 12)
    expected = (x @ encoder.T + bias).relu()
    expected = torch.where(expected >= expected.topk(12).values[:, -1:], expected, 0)
    assert codes.values.min() == 0 < codes.values.max()
    torch.testing.assert_close(dense(codes), expected)


def random_codes(k=12):
    pre = random(BATCH, D_SAE, seed=3)
    pre[:50] = -1  # rows whose codes are all unused
    best = select_topk(pre - 1.5, k)
    return Codes(best.indices, best.values.relu())


def test_decode_equals_the_dense_product():
    codes, decoder, bias = random_codes(), random(D_SAE, D_IN), random(D_IN, seed=5)
    torch.testing.assert_close(decode(codes, decoder, bias), dense(codes) @ decoder + bias)


def test_gradients_equal_the_dense_ones():
    codes, decoder = random_codes(), random(D_SAE, D_IN)
    x, output_gradient = random(BATCH, D_IN, seed=7), random(BATCH, D_IN, seed=8)
    by_value = value_gradients(codes, decoder, output_gradient)
    by_latent = (output_gradient @ decoder.T) * (dense(codes) > 0)
    torch.testing.assert_close(dense(Codes(codes.indices, by_value)), by_latent)
    groups = LatentGroups(codes, D_SAE)
    torch.testing.assert_close(
        groups.sums(output_gradient, codes.values), dense(codes).T @ output_gradient
    )
    torch.testing.assert_close(groups.sums(x, by_value), by_latent.T @ x)
    torch.testing.assert_close(latent_totals(codes.indices, by_value, D_SAE), by_latent.sum(0))


def test_unused_slots_push_no_weight():
    """A known mistake of other implementations: zero-valued selections still move the encoder."""
    codes = Codes(torch.tensor([[3, 5]]), torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    by_value = value_gradients(codes, random(D_SAE, D_IN), random(1, D_IN))
    assert by_value[0, 0] != 0 and by_value[0, 1] == 0
    sums = LatentGroups(codes, D_SAE).sums(random(1, D_IN), by_value)
    assert sums[3].abs().sum() > 0 and sums[5].abs().sum() == 0
