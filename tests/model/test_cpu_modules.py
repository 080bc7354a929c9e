"""Attention of short contexts, norms and gates: against float64, and against transformers' own."""

import copy
import gc
import weakref
from unittest.mock import Mock

import pytest
import torch
from looping import over
from tiny import save_hf_model, tiny_hf_model
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from llm_wsae.model import cpu_modules
from llm_wsae.model.cpu_modules import LONGEST, fuse_norms_and_gates, short_attention
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.sparse.backends import cpu

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="there is no C++ compiler")
WIDTHS = (1, 37, 640)
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-20}  # of one operation; of a sum
MODULE = torch.nn.Module()
MODULE.is_causal, MODULE.num_key_value_groups = True, 3


def drawn(*shape, scale=1.0, seed=0, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=draw)).to(dtype)


# --- Attention


def asked(tokens, dtype=torch.bfloat16):
    """Queries of six heads, keys and values of two groups."""
    return [drawn(2, n, tokens, 16, seed=i, dtype=dtype) for i, n in enumerate((6, 2, 2))]


def exact(query, key, value, scaling):
    query, key, value = (one.double() for one in (query, key, value))
    key, value = (one.repeat_interleave(3, 1) for one in (key, value))
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@over(
    tokens=[1, 2, 31, LONGEST],
    scaling=[None, 0.1],
    precision=[(torch.bfloat16, 0.01), (torch.float32, 1e-6)],
)
def test_it_is_attention_to_the_tokens_before(tokens, scaling, precision):
    dtype, most = precision
    given = asked(tokens, dtype)
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
        given = [one.requires_grad_() for one in asked(20)]
        function(MODULE, *given, None)[0].float().square().sum().backward()
        gradients.append(torch.cat([one.grad.flatten() for one in given]).float())
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_all_else_is_transformers_own():
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask[:, :, :, 0] = False
    mask[:, :, 0, 0] = True
    bias = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).bfloat16()
    for given, mask_given, more in (
        (asked(LONGEST + 1), None, {}),
        (asked(8), mask, {}),
        (asked(8), None, {"is_causal": False}),
        (asked(8), None, {"position_bias": bias}),
    ):
        found, _ = short_attention(MODULE, *given, mask_given, **more)
        expected, _ = sdpa_attention_forward(MODULE, *given, mask_given, **more)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="softcap"):
        short_attention(MODULE, *asked(8), None, softcap=30.0)


def test_a_model_has_it_only_where_it_is_faster():
    model, other = tiny_hf_model("llama").bfloat16(), tiny_hf_model("llama").half()
    ids, counted = torch.arange(24).view(2, 12), Mock(wraps=short_attention)
    before = model(ids).logits
    for one in (model, other):
        cpu_modules.use_short_attention(one)
    assert other.config._attn_implementation == "sdpa"
    if torch.cpu._is_amx_tile_supported():
        assert model.config._attn_implementation == "sdpa"
        return
    AttentionInterface.register(cpu_modules.ATTENTION, counted)
    difference = model(ids).logits.float() - before.float()
    assert difference.norm() < 0.02 * before.float().norm()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0  # transformers gives a mask, and its own attention takes it
    model(ids, attention_mask=padded)
    assert counted.call_count == 2 * model.config.num_hidden_layers
    AttentionInterface.register(cpu_modules.ATTENTION, short_attention)


# --- Norms and gates


def fused(family="llama", dtype=torch.bfloat16):
    hf_model = tiny_hf_model(family).to(dtype).eval()
    fuse_norms_and_gates(hf_model)
    return hf_model


def changed(hf_model):
    return [one for one in hf_model.modules() if type(one).__module__ == cpu_modules.__name__]


@needs_kernels
@over(kind=[LlamaRMSNorm, Gemma3RMSNorm], width=WIDTHS, dtype=ROUNDING)
def test_a_norm_divides_by_the_root_mean_square_and_rounds_where_its_model_does(kind, width, dtype):
    norm, one_more = kind(width).to(dtype), kind is Gemma3RMSNorm
    norm.weight.data += drawn(width, scale=0.3, dtype=dtype)
    # heads before tokens, as attention has them
    x = drawn(4, 6, 25, width, scale=7, dtype=dtype).transpose(1, 2)
    found, exact = cpu.rms_norm(x, norm.weight, 1e-6, one_more), x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * (norm.weight.double() + one_more)
    assert found.shape == x.shape and found.dtype == dtype
    # rounded twice at most
    assert (found.double() - exact).abs().le(2 * ROUNDING[dtype] * exact.abs()).all()
    assert dtype == torch.float32 or (found == norm(x)).float().mean() > 0.999


ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours and transformers' names


@needs_kernels
@over(name=ACTIVATIONS, width=WIDTHS, dtype=ROUNDING)
def test_a_gate_multiplies_with_the_activation(name, width, dtype):
    gates, values = (drawn(2, 50, width, scale=4, seed=seed, dtype=dtype) for seed in (0, 1))
    exact = ACT2FN[ACTIVATIONS[name]](gates.double()) * values.double()
    expected = ACT2FN[ACTIVATIONS[name]](gates) * values
    found = cpu.gate(name, gates, values)
    assert found.data_ptr() == gates.data_ptr()
    rounding = ROUNDING[dtype]  # 1 + tanh of torch's own leaves little of it in float32
    slack = 2e-3 if dtype == torch.bfloat16 else 4e-6
    assert (found - expected).abs().le(2 * rounding * expected.abs() + slack).all()
    error, its = ((one.double() - exact).norm() for one in (found, expected))
    assert error <= max(1.01 * its, rounding / 4 * exact.norm())


@needs_kernels
@over(dtype=ROUNDING)
def test_numbers_without_bounds(dtype):
    ends = torch.tensor([0.0, -0.0, 3e38, -3e38, torch.inf, torch.nan]).to(dtype)[None]
    for name, torchs in ACTIVATIONS.items():
        found = cpu.gate(name, ends.clone(), torch.ones_like(ends))
        assert torch.equal(found.nan_to_num(7), ACT2FN[torchs](ends).nan_to_num(7)), name
    weight = torch.ones(6, dtype=dtype)
    assert cpu.rms_norm(ends, weight, 1e-6, False).isnan().all()
    assert not cpu.rms_norm(torch.zeros_like(ends), weight, 1e-6, False).any()
    assert cpu.rms_norm(drawn(0, 6, dtype=dtype), weight, 1e-6, False).shape == (0, 6)


@needs_kernels
@over(family=[("llama", 13), ("gemma2", 21), ("gpt2", 0)], dtype=ROUNDING)
def test_a_model_says_the_same(family, dtype):
    name, parts = family  # norms and MLPs of four blocks, and the last norm
    own, other = tiny_hf_model(name).to(dtype).eval(), fused(name, dtype)
    assert len(changed(other)) == parts
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        expected, found = own(ids).logits, other(ids).logits
    assert (found - expected).float().norm() <= 2.6 * ROUNDING[dtype] * expected.float().norm()
    gradients = []  # of the model itself
    for hf_model in (own, other):
        embedded = drawn(1, 8, hf_model.config.hidden_size, dtype=dtype).requires_grad_()
        hf_model(inputs_embeds=embedded).logits.float().square().sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients) and gradients[0].any()
    copied = copy.deepcopy(other)  # computes with modules of its own
    assert len(changed(copied)) == parts
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
        assert not copied(ids).logits.any() and torch.equal(other(ids).logits, found)


@needs_kernels
def test_a_model_is_gone_when_nobody_has_it():
    hf_model = fused()
    left = [weakref.ref(hf_model.model.layers[0].mlp.gate_proj.weight)]
    left.append(weakref.ref(hf_model.model.norm))
    gc.disable()
    try:
        del hf_model
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


class Doubled(LlamaRMSNorm):
    """Looks like a norm, and is something else."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@needs_kernels
def test_only_a_loaded_model_has_them_and_only_where_they_compute_and_round_the_same(tmp_path):
    assert not changed(fused(dtype=torch.float64))
    hf_model, saved = tiny_hf_model("llama").bfloat16().eval(), save_hf_model(tmp_path)
    loaded = LanguageModel.load(str(saved), device="cpu", dtype="bfloat16")
    assert len(changed(loaded.hf_model)) == 13
    assert not changed(LanguageModel.from_live(hf_model, None).hf_model)
    for kind in (Doubled, Olmo2RMSNorm):
        own = copy.deepcopy(hf_model)
        norm = own.model.norm = kind(32).bfloat16()
        norm.weight.data += drawn(32, scale=0.3)
        fuse_norms_and_gates(own)
        assert norm not in changed(own) and len(changed(own)) == 12
