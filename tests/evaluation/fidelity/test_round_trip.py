"""The three numbers of the round trip are those of their definitions, written out in float64."""

import math

import pytest
import torch
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK, to_dense
from llm_wsae.evaluation.fidelity import reconstruction
from llm_wsae.evaluation.fidelity.reconstruction import ReconstructionSums
from llm_wsae.lab.theory.superposition import Superposition, digon_mixing

D_IN, D_SAE, ROWS = 6, 15, 240


def of_kind(kind: str) -> Dictionary:
    """A random dictionary whose encoder has something to do with its decoder; its last latent is
    dead."""
    made = make_dictionary(d_in=D_IN, d_sae=D_SAE)
    bias = 0.3 * made.b_enc
    bias[-1] = -1e6
    sparsity = {"topk": TopK(4), "relu": ReLU(), "jumprelu": JumpReLU()}[kind]
    return Dictionary(
        W_enc=0.7 * made.W_dec.T + 0.2 * made.W_enc,
        W_dec=0.6 * made.W_dec,
        b_enc=bias,
        b_dec=made.b_dec,
        sparsity=sparsity,
        info=made.info,
        threshold=torch.full((D_SAE,), 0.5) if kind == "jumprelu" else None,
    )


def shares_of(one: Dictionary, rows: torch.Tensor) -> dict[str, float]:
    found = ReconstructionSums(one.d_in, one.d_sae)
    for batch in rows.split(50):
        found.update(one, batch)
    return found.shares()


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
def test_every_number_is_that_of_its_definition(kind, monkeypatch):
    monkeypatch.setattr(reconstruction, "_ROWS_AT_ONCE", 30)
    one = of_kind(kind)
    x = 2 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(5))
    found = shares_of(one, x)
    codes = one.encode_sparse(x)
    z = to_dense(codes, D_SAE).double()
    r = to_dense(one.encode_sparse(one.decode(codes)), D_SAE).double()
    fires, both, false = z > 0, (z > 0) & (r > 0), (z == 0) & (r > 0)
    assert both.any() and false.any() and int(fires.sum()) > int(both.sum())
    assert found["vanished"] == pytest.approx(1 - float(both.sum() / fires.sum()))
    shrunk = ((z - r) / z)[both].mean()
    assert found["shrunk"] == pytest.approx(float(shrunk), rel=1e-5)
    assert found["false_latents"] == pytest.approx(float(false.sum()) / ROWS)


def test_in_digons_the_codes_do_not_know_what_was_lost():
    """The closed form makes the round trip unharmed, though opposite features took from each
    other."""
    mixing = digon_mixing(2, 3)
    data = Superposition(mixing, 0.5)
    rows = data.observe(data.features(4000, torch.Generator().manual_seed(2)))
    features, dimensions = mixing.T.shape
    one = Dictionary(
        W_enc=mixing,
        W_dec=mixing.T,
        b_enc=torch.zeros(features),
        b_dec=torch.zeros(dimensions),
        sparsity=ReLU(),
        info=make_dictionary().info,
    )
    found = shares_of(one, rows)
    assert found["vanished"] == 0 and found["false_latents"] == 0
    assert found["shrunk"] == pytest.approx(0, abs=1e-6)


def test_without_a_firing_nothing_vanishes_or_shrinks():
    silent = of_kind("relu")
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    found = shares_of(silent, torch.randn(10, D_IN))
    assert math.isnan(found["vanished"]) and math.isnan(found["shrunk"])
