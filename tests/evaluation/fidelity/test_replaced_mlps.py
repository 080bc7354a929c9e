"""MLPs of a running model replaced by transcoders, beside the model of transformers with modules of
our own in their places."""

from types import SimpleNamespace

import pytest
import torch
from refusals import misused
from tiny import BLOCKS, WIDTH, model_of
from torch import nn

from llm_wsae.attaching import Ablate, attach
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.evaluation.baselines import baselines_of
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.model.site import Site

IDS = torch.randint(50, (20, 16), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones(20, 16, dtype=torch.bool)
KEEP[:, 0] = False
CONTEXTS = [SimpleNamespace(ids=ids, keep=keep) for ids, keep in zip(IDS, KEEP, strict=True)]


def transcoder(block: int) -> Dictionary:
    draw = torch.Generator().manual_seed(block)
    shapes = {"W_enc": (WIDTH, 64), "W_dec": (64, WIDTH), "b_enc": (64,), "b_dec": (WIDTH,)}
    shapes["W_skip"] = (WIDTH, WIDTH)
    tensors = {n: 0.3 * torch.randn(shape, generator=draw) for n, shape in shapes.items()}
    info = DictionaryInfo(str(Site(block, "mlp")), massive_threshold=1e6)
    return Dictionary(**tensors, sparsity=TopK(5), info=info)


TRANSCODERS = [transcoder(block) for block in range(BLOCKS)]


class Replaced(nn.Module):
    """The transcoder in the kept positions, the MLP in the others."""

    def __init__(self, transcoder: Dictionary, mlp: nn.Module):
        super().__init__()
        self.transcoder, self.mlp = transcoder, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(KEEP[..., None], self.transcoder(x), self.mlp(x))


def replaced_kl(hf_model: nn.Module, transcoders: list[Dictionary]) -> float:
    """Mean KL over the scored positions."""
    layers = hf_model.model.layers
    own = [layer.mlp for layer in layers]
    with torch.no_grad():
        old = hf_model(IDS).logits.log_softmax(-1)
        for one in transcoders:
            layers[one.site.block].mlp = Replaced(one, own[one.site.block])
        new = hf_model(IDS).logits.log_softmax(-1)
    for layer, mlp in zip(layers, own, strict=True):
        layer.mlp = mlp
    return float((old.exp() * (old - new)).sum(-1)[:, 1:-1].mean())


def test_one_block_and_all_blocks():
    model = model_of("llama")
    evaluator = FidelityEvaluator(model, CONTEXTS, EvaluateConfig(tokens=300, bootstraps=20))
    measured = evaluator.evaluate({str(one.site): one for one in TRANSCODERS})
    for one in TRANSCODERS:
        found, expected = measured.dictionaries[str(one.site)], replaced_kl(model.hf_model, [one])
        assert found.kl == pytest.approx(expected, rel=1e-3) and expected > 0.01
        there = model.activations(IDS, [one.site.reads, one.site.writes])
        x, y = (there[point][KEEP].double() for point in (one.site.reads, one.site.writes))
        missed = (y - one(x.float())).square().sum() / (y - y.mean(0)).square().sum()
        assert found.fvu == pytest.approx(float(missed), rel=1e-4)
    (together,) = measured.together.values()
    assert together.blocks == BLOCKS
    assert together.kl == pytest.approx(replaced_kl(model.hf_model, TRANSCODERS), rel=1e-3)


def test_a_latent_is_ablated():
    """What the MLP writes loses the latent's part alone; the skip and the error stay."""
    model, one = model_of("llama"), TRANSCODERS[1]
    reads, writes = one.site.reads, one.site.writes
    clean = model.activations(IDS, [reads, writes])
    latents = one.encode(clean[reads])
    latent = int(latents[:, 1:].sum((0, 1)).argmax())
    with attach(model, one) as attached:
        assert torch.equal(model.activations(IDS, [writes])[writes], clean[writes])
        attached.edit(one.site, Ablate(latent))
        changed = model.activations(IDS, [writes])[writes]
    expected = -latents[..., latent, None] * one.W_dec[latent]
    expected[:, 0] = 0
    torch.testing.assert_close(changed - clean[writes], expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().max() > 0.1


def test_rows_that_are_massive_where_they_are_read_are_left_out_as_in_training():
    model, one = model_of("llama"), TRANSCODERS[1]
    evaluator = FidelityEvaluator(model, CONTEXTS, EvaluateConfig(tokens=300, bootstraps=20))
    norms = model.activations(IDS, [one.site.reads])[one.site.reads][KEEP].norm(dim=1)
    evaluator._cache._medians[one.site.reads] = float(norms.median()) / 10
    found = evaluator.evaluate({"one": one}).dictionaries["one"]
    assert found.rows == int((norms <= norms.median()).sum())
    assert found.rows + found.massive_rows == len(norms)


def test_a_whole_mlp_has_no_activations_and_of_baselines_its_skip_alone():
    model = model_of("llama")
    misused("is a whole MLP.*take those of", model.activations, IDS, [Site(1, "mlp")])
    one = TRANSCODERS[0]
    assert one.W_skip is not None
    ((name, alone),) = baselines_of({"one": one}, model, CONTEXTS).items()
    assert name == "skip alone of one" and alone.site == one.site
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(alone(x), x @ one.W_skip.T + one.b_dec)
