"""Dictionaries while a model generates: which positions are touched, with a cache and without."""

import pytest
import torch
from attach_targets import SITE, both, dictionary, families, logits, place
from looping import over
from tiny import tiny_hf_model

from llm_wsae.attaching.attachment import attach
from llm_wsae.attaching.edits import Steer
from llm_wsae.errors import UsageError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

pytest_plugins = ("attach_targets",)


def caches(model, target):
    """The ways of generating that the target itself gets right.

    TransformerLens 3.9 and 4.3 lose the cache of the attentions that they compute themselves:
    transformers 5.24 hands it over under a new name.
    """
    broken = target is not model and type(model.hf_model).__name__ != "GPTNeoXForCausalLM"
    return (False,) if broken else (False, True)


def written(target, ids, new, mask=None, cached=True):
    """``ids`` with ``new`` tokens of greedy generation behind them."""
    if isinstance(target, LanguageModel):
        options = {} if mask is None else {"attention_mask": mask}
        return target.hf_model.generate(
            ids, max_new_tokens=new, do_sample=False, use_cache=cached, pad_token_id=0,
            eos_token_id=None, **options,
        )  # fmt: skip
    options = {} if mask is None else {"attention_mask": mask}
    return target.generate(
        ids, max_new_tokens=new, do_sample=False, use_past_kv_cache=cached, verbose=False,
        stop_at_eos=False, **options,
    )  # fmt: skip


def test_padding_is_known_from_a_cache_of_fixed_size():
    """There the decoder is given what each position attends to, not which tokens are text."""
    model = LanguageModel.from_live(tiny_hf_model("llama"), None)
    one, short = dictionary(), torch.arange(5, 11)[None]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": "static"}
    with attach(model, one, error=False):
        alone = model.hf_model.generate(short, **options)
        beside = model.hf_model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(beside[:, 4:], alone)


def test_positions_are_counted_from_the_first_token():
    with attach(tiny_hf_model("llama"), dictionary()) as attached:
        for where in (slice(-1, None), slice(None, -1)):
            with pytest.raises(UsageError, match="counted from the first token"):
                attached.edit(SITE, Steer(7, 6.0, where))


@families("gpt2", "llama", "neox")
@both
@over(where=[None, slice(6), slice(6, None)])
def test_steering_while_generating(model, backend, ids, where):
    """With a cache, without one, and token by token by hand: the same text."""
    target, one, ids = place(model, backend), dictionary(), ids[:, :6]
    direction = 6 * one.W_dec[7]
    expected = ids
    for _ in range(8):
        hidden = model.activations(expected, [one.site])[one.site]
        taken = torch.zeros(expected.shape[1], dtype=torch.bool)
        taken[slice(None) if where is None else where] = True
        taken[0] = False
        with torch.no_grad():
            steered = model.resume(expected, one.site, hidden + taken[:, None] * direction)
        expected = torch.cat([expected, steered[:, -1:].argmax(2)], 1)
    alone = written(target, ids, 8)
    with attach(target, one) as attached:
        attached.edit(one.site, Steer(7, 6.0, where))
        for cached in caches(model, target):
            assert torch.equal(written(target, ids, 8, cached=cached), expected)
    assert not torch.equal(expected, alone)
    assert torch.equal(written(target, ids, 8), alone)


@families("gpt2", "llama", "neox")
@both
def test_padding_is_left_alone_and_counts_for_nothing(model, backend, ids):
    """A prompt padded on the left gives what it gives unpadded; its first real token is kept."""
    target, one = place(model, backend), dictionary()
    short = ids[:1, :5]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    padded = torch.cat([padded, ids[1:2, :9]])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    with attach(target, one, error=False) as attached:
        attached.edit(SITE, Steer(7, 3.0))
        together = written(target, padded, 6, mask)
        assert torch.equal(together[:1, 4:], written(target, short, 6))
        assert torch.equal(together[1:], written(target, ids[1:2, :9], 6))
        if backend == "transformers":
            target.hf_model(padded, attention_mask=mask)
        else:
            target(padded, attention_mask=mask)
        used = attached.latents(SITE).any(2)
    assert used.tolist() == [[False] * 5 + [True] * 4, [False] + [True] * 8]


@families("gpt2")
@both
def test_which_rows_are_touched(model, backend, ids):
    target = place(model, backend)
    norms = model.activations(ids, [Site.parse(SITE)])[Site.parse(SITE)].norm(dim=2)
    threshold = float(norms.median()) + 1e-3
    one = dictionary(massive_threshold=threshold, store={"packing": {"drop_positions": 3}})
    keep = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    with attach(target, one) as attached:
        logits(target, ids)
        used = attached.latents(SITE).any(2)
        assert torch.equal(used, (norms <= threshold) & (torch.arange(11) >= 3))
        attached.keep = keep
        logits(target, ids)
        assert torch.equal(attached.latents(SITE).any(2), keep & (norms <= threshold))
        attached.keep = keep[:, :4]  # behind its end everything may be changed
        logits(target, ids)
        used = torch.cat([keep[:, :4], torch.ones(3, 7, dtype=torch.bool)], 1)
        assert torch.equal(attached.latents(SITE).any(2), used & (norms <= threshold))
        attached.keep = torch.zeros(3, 11, dtype=torch.bool)
        clean, attached.error = logits(target, ids), False
        assert torch.equal(logits(target, ids), clean)
        assert attached.codes(SITE).values.sum() == 0
    assert torch.equal(logits(target, ids), clean)
