"""Dictionaries in a running model: what they compute, and that nothing stays."""

import functools

import numpy as np
import pytest
import tiny
import torch
from looping import over
from refusals import fails, misused
from small_dictionaries import make_dictionary
from tiny import KNOWN, VOCAB, WIDTH, hooks_of, model_of, of_families, sites_of, tiny_hf_model

from llm_wsae.attaching import Ablate, Clamp, Scale, Steer, attach
from llm_wsae.data.packing import Context
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import evaluate
from llm_wsae.model.language_model import LanguageModel, scored_positions
from llm_wsae.model.site import Site

SITE = "blocks.1.hook_resid_post"
EARLIER = "blocks.1.hook_resid_pre"
no_grad = torch.no_grad()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(1))


def dictionary(site=SITE, seed=0, **info):
    """80 latents for the tiny models, 4 active; no row is massive unless told."""
    info = {"massive_threshold": None, **info}
    return make_dictionary(d_in=WIDTH, seed=seed, site=str(site), **info)


def stream_at(model, ids, one):
    return model.activations(ids, [one.site])[one.site]


@of_families(*KNOWN)
def test_with_the_error_and_no_edit_not_a_bit_changes(model, ids):
    expected, before = model.logits(ids), hooks_of(model)
    dictionaries = [dictionary(site, seed) for seed, site in enumerate(sites_of(model))]
    with attach(model, dictionaries) as attached:
        assert torch.equal(model.logits(ids), expected)
        assert hooks_of(model) != before
        for one in dictionaries:
            hidden = stream_at(model, ids, one)
            latents = attached.latents(one.site)
            assert latents.shape == (*ids.shape, 80) and not latents[:, 0].any()
            torch.testing.assert_close(latents[:, 1:], one.encode(hidden[:, 1:]), atol=1e-4, rtol=0)
    assert hooks_of(model) == before
    assert attached.sites == sites_of(model)


@of_families("gpt2", "llama", "neox", "gemma2")
def test_a_bridge_computes_what_its_model_does(model, ids):
    bridge, here = tiny.bridge_of(model), [dictionary(site) for site in sites_of(model)]
    with no_grad:
        clean = bridge(ids)
        for error in (True, False):
            with attach(model, here, error=error) as attached:
                attached.edit(here[0].site, Clamp(3, 5.0))
                expected, latents = model.logits(ids), attached.latents(here[1].site)
            with attach(bridge, here, error=error) as attached:
                attached.edit(here[0].site, Clamp(3, 5.0))
                torch.testing.assert_close(bridge(ids), expected, atol=1e-4, rtol=1e-4)
                found = attached.latents(here[1].site)
                torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)
        assert torch.equal(bridge(ids), clean) and not torch.allclose(clean, expected, atol=0.1)


@functools.cache
def contexts_of(model):
    """Text that the model wrote, so that a splice makes it worse at predicting it."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (12, 1), generator=draw)
    while ids.shape[1] < 10:
        chances = model.logits(ids)[:, -1].softmax(1)
        ids = torch.cat([ids, chances.multinomial(1, generator=draw)], 1)
    keep = torch.ones(12, 10, dtype=torch.bool)
    keep[:, 0] = False
    keep[3, 5] = keep[4, 1] = False  # a special token inside, a second one in front
    keep[5, 7:] = False  # padding
    return ids, keep


@of_families("gpt2", "llama", "neox")
@over(point=["pre", "mid", "post"])
def test_cross_entropy_is_what_evaluate_reports(model, point):
    if point == "mid" and not model.paths.mid:
        return  # parallel blocks have none
    ids, keep = contexts = contexts_of(model)
    site = Site(2, point)
    norms = model.activations(ids, [site])[site][keep].norm(dim=1)
    one = dictionary(site, massive_threshold=float(norms.quantile(0.85)))
    none, pairs = np.full(10, -1, np.int32), zip(*contexts, strict=True)
    given = [Context(own.int().numpy(), kept.numpy(), none, none) for own, kept in pairs]
    config = EvaluateConfig(tokens=int(keep.sum()), batch_tokens=120, bootstraps=10)
    report = evaluate({"one": one}, model, given, config).dictionaries["one"]
    assert report.massive_rows > 5 and report.ce_spliced > report.ce_clean + 0.1
    scored = scored_positions(keep)
    for error, expected in ((False, report.ce_spliced), (True, report.ce_clean)):
        with attach(model, one, error=error, keep=keep):
            found = model.logits(ids)[:, :-1].double().log_softmax(2)
        entropies = -found.gather(2, ids[:, 1:, None])[..., 0]
        assert float(entropies[scored].mean()) == pytest.approx(expected, abs=1e-5)


def at_places(own):
    """What the edits of some places make of latents."""
    own = own.clone()
    own[:, 3:6], own[:, 8:] = 5, 0
    return own


EDITS = {  # the edits, and what they do to dense latents [contexts, positions, some]
    "ablate": (lambda n: [Ablate(n)], lambda own: own * 0),
    "clamp": (lambda n: [Clamp(n, 3.0)], lambda own: own * 0 + 3),
    "in turn": (
        lambda n: [Steer(n, 2.0), Scale(n, 3.0), Steer(n, -1.0)],
        lambda own: 3 * (own + 2) - 1,
    ),
    "some places": (
        lambda n: [Clamp(n, 5.0, slice(3, 6)), Ablate(n, slice(8, None))],
        at_places,
    ),
}


@of_families("gpt2", "llama")
@over(name=EDITS, error=[True, False])
def test_edits(model, ids, name, error):
    one = dictionary()
    hidden = stream_at(model, ids, one)
    dense = one.encode(hidden)
    dense[:, 0] = 0
    common = dense.sum((0, 1)).topk(2).indices.tolist()
    silent = int((dense.sum((0, 1)) == 0).nonzero()[0])
    latents = [*common, silent]
    edits, by_hand = EDITS[name]
    new = dense.clone()
    new[:, 1:, latents] = by_hand(dense[..., latents])[:, 1:]
    assert not torch.equal(new, dense)
    expected = (hidden if error else one.decode(dense)) + (new - dense) @ one.W_dec
    expected[:, 0] = hidden[:, 0]
    clean = model.logits(ids)
    with attach(model, one, error=error) as attached:
        attached.edit(one.site, *edits(latents))
        found = model.logits(ids)
        torch.testing.assert_close(attached.latents(SITE), new, atol=1e-4, rtol=1e-4)
        assert attached.codes(SITE).indices.shape[:2] == ids.shape
        attached.clear(SITE)
        assert torch.equal(model.logits(ids), clean) == error
    with no_grad:
        wanted = model.resume(ids, one.site, expected)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    if error and name == "some places":  # in front of the first edit not a bit changes
        assert torch.equal(found[:, :3], clean[:, :3])


@of_families("gpt2")
def test_a_latent_of_an_edit_is_meant_once_whatever_its_type(model, ids):
    one, found = dictionary(), []
    for latent in (7, [7, 7], torch.tensor(7), torch.tensor([7]), []):
        with attach(model, one) as attached:
            attached.edit(one.site, Clamp(latent, 2.0))
            found.append(model.logits(ids))
            assert (float(attached.latents(SITE)[..., 7].max()) == 2) == (latent != [])
    assert all(torch.equal(other, found[0]) for other in found[1:-1])
    assert torch.equal(found[-1], model.logits(ids))


@of_families("gpt2", "llama")
@over(error=[True, False])
def test_a_function_sees_and_changes_all_latents(model, ids, error):
    one, seen = dictionary(), []

    def fill(latents):
        return latents + (latents == 0) * 0.25

    with attach(model, one, error=error) as attached:
        untouched = model.logits(ids)
        attached.edit(SITE, seen.append)  # returns None: it only looks
        assert torch.equal(model.logits(ids), untouched)
        (own,) = seen
        torch.testing.assert_close(own, attached.latents(SITE), atol=0, rtol=0)
        assert own.shape == (*ids.shape, 80) and not own[:, 0].any()
        attached.edit(SITE, lambda latents: latents.mul_(2), fill)  # the first in place
        mapped, after = model.logits(ids), attached.latents(SITE)
        torch.testing.assert_close(after[:, 1:], fill(own * 2)[:, 1:])  # in the order given
        assert torch.equal(own, seen[-1]) and not after[:, 0].any()
        attached.clear()
        firing = own.any(1).any(0).nonzero()[:, 0]
        attached.edit(SITE, Scale(firing, 2.0), fill)  # another way to say the same
        torch.testing.assert_close(model.logits(ids), mapped, atol=1e-3, rtol=1e-3)


@of_families("gpt2", "llama")
def test_several_sites_and_nested_blocks(model, ids):
    early, late = dictionary("blocks.0.hook_resid_mid"), dictionary("blocks.2.hook_resid_pre", 1)
    again = dictionary("blocks.0.hook_resid_mid", 2)
    with attach(model, [late, early], error=False) as attached:
        together = model.logits(ids)
        assert [str(site) for site in attached.sites] == [early.info.site, late.info.site]
    with attach(model, late, error=False):
        alone = model.logits(ids)
        with attach(model, early, error=False):
            assert torch.equal(model.logits(ids), together)
        assert torch.equal(model.logits(ids), alone)

    with attach(model, early, error=False), attach(model, again, error=False) as inner:
        both_there = model.logits(ids)
        latents = inner.latents(again.site)
    hidden = stream_at(model, ids, early)
    first = early(hidden)[:, 1:]  # the inner one sees the stream that the outer one leaves
    torch.testing.assert_close(latents[:, 1:], again.encode(first), atol=1e-4, rtol=1e-4)
    hidden[:, 1:] = again(first)
    with no_grad:
        expected = model.resume(ids, early.site, hidden)
    torch.testing.assert_close(both_there, expected, atol=1e-3, rtol=1e-3)


def test_what_is_asked_of_the_model_itself_is_no_pass_of_the_outer_block(ids):
    """A nested block and a resumption first look at how the model is built, on two tokens."""
    model = LanguageModel.from_live(tiny_hf_model("llama"), None)
    keep, seen = torch.ones(ids.shape, dtype=torch.bool), []
    outer, inner = dictionary("blocks.2.hook_resid_pre"), dictionary("blocks.0.hook_resid_mid", 1)
    with attach(model.hf_model, outer, keep=keep) as attached:
        attached.edit(outer.site, lambda latents: seen.append(latents.shape))
        with attach(model.hf_model, inner):
            model.hf_model(ids)
    assert {shape[:2] for shape in seen} == {ids.shape}
    hidden = stream_at(model, ids, outer)
    with attach(model, outer, keep=keep):
        model.resume(ids, outer.site, hidden)


def test_a_live_model_is_hooked_itself_and_stays_as_it_is(ids):
    hf_model, one = tiny_hf_model("llama").train(), dictionary()
    with no_grad:
        clean = hf_model(ids).logits
    with attach(hf_model, one, error=False), no_grad:
        spliced = hf_model(input_ids=ids).logits
    assert hf_model.training and all(p.requires_grad for p in hf_model.parameters())
    with no_grad:
        assert torch.equal(hf_model(ids).logits, clean)
    model = LanguageModel.from_live(hf_model, None)
    with attach(model, one, error=False):
        assert torch.equal(model.logits(ids), spliced)
        with no_grad:
            assert torch.equal(hf_model(ids).logits, clean)  # that is another model


@over(point=["pre", "mid", "post"])
def test_gradients_flow_through_the_reconstruction(ids, point):
    model = model_of("llama")
    one = dictionary(f"blocks.1.hook_resid_{point}")
    strength = torch.zeros((), requires_grad=True)

    def total(value):
        with attach(model, one, error=False) as attached:
            attached.edit(one.site, lambda latents: latents + value * (torch.arange(80) == 5))
            return model.hf_model(ids).logits.logsumexp(-1).sum()

    total(strength).backward()
    with no_grad:
        slope = float((total(1e-2).double() - total(-1e-2).double()) / 2e-2)
    assert float(strength.grad) == pytest.approx(slope, rel=2e-2)


@over(family=["llama", "gemma2"])
def test_mid_is_refused_where_the_block_reads_two_streams(family, ids):
    """As of an architecture that casts the stream before the norm."""
    model, site = LanguageModel.from_live(tiny_hf_model(family), None), Site(1, "mid")
    norm = model.hf_model.get_submodule(model.paths.blocks)[1].get_submodule(model.paths.mid)
    norm.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    before = hooks_of(model)
    said = r"blocks\.1\.hook_resid_mid cannot be replaced"
    with pytest.raises(LlmWsaeError, match=said), attach(model, dictionary(site)):
        pass
    fails(said, model.resume, ids, site, torch.zeros(*ids.shape, WIDTH))
    assert hooks_of(model) == before


@of_families("gpt2", "neox")
def test_bad_requests_are_sentences(model, ids):
    before = hooks_of(model)

    def refused(match, dictionaries, target=model, **options):
        with pytest.raises(UsageError, match=match), attach(target, dictionaries, **options):
            model.logits(ids)

    refused("the model has 4 blocks", dictionary("blocks.4.hook_resid_pre"))
    refused("two dictionaries belong to blocks.1", [dictionary(), dictionary(seed=1)])
    refused("12 dimensions, but .* has 32", make_dictionary())
    refused("keep is for 2 contexts", dictionary(), keep=torch.ones(2, 11, dtype=torch.bool))
    for thing in (torch.nn.Linear(2, 2), "gpt2"):
        refused(f"^{type(thing).__name__} is not .*; pass what Auto", dictionary(), thing)
    if not model.paths.mid:
        refused("no blocks.1.hook_resid_mid", dictionary("blocks.1.hook_resid_mid"))
    with attach(model, dictionary()) as attached:
        misused("no latent 80; .* has latents 0 to 79", attached.edit, SITE, Ablate([3, 80]))
        for part in (slice(-1, None), slice(None, -1)):
            misused("from the first token", attached.edit, SITE, Steer(7, 6.0, part))
        misused("a step of -1", attached.edit, SITE, Steer(7, 6.0, slice(0, 9, -1)))
        misused(r"no forward pass has reached blocks\.1", attached.codes, SITE)
        misused(r"did you mean 'blocks\.1\.hook_resid_post'", attached.latents, EARLIER)
        attached.edit(SITE, lambda latents: latents[:, 1:])
        misused(r"returned \[3, 10, 80\]", model.logits, ids)
        attached.clear()
        attached.edit(SITE, lambda latents: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.logits(ids)
    assert hooks_of(model) == before


# --- while the model writes ---


def written(model, ids, new, mask=None, **options):
    """``ids`` with ``new`` tokens of greedy generation behind them."""
    mask = torch.ones_like(ids) if mask is None else mask
    options |= {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.hf_model.generate(ids, attention_mask=mask, **options)


@of_families("gpt2", "llama", "neox")
@over(where=[None, slice(6), slice(6, None)])
def test_steering_while_generating(model, ids, where):
    """With a cache, without one, and token by token by hand: the same text."""
    one, ids = dictionary(), ids[:, :6]
    direction = 6 * one.W_dec[7]
    expected = ids
    for _ in range(8):
        hidden = stream_at(model, expected, one)
        taken = torch.zeros(expected.shape[1], dtype=torch.bool)
        taken[slice(None) if where is None else where] = True
        taken[0] = False
        with no_grad:
            steered = model.resume(expected, one.site, hidden + taken[:, None] * direction)
        expected = torch.cat([expected, steered[:, -1:].argmax(2)], 1)
    alone = written(model, ids, 8)
    with attach(model, one) as attached:
        attached.edit(one.site, Steer(7, 6.0, where))
        for cached in (False, True):
            assert torch.equal(written(model, ids, 8, use_cache=cached), expected)
    assert not torch.equal(expected, alone)
    assert torch.equal(written(model, ids, 8), alone)


@of_families("gpt2", "llama", "neox")
def test_padding_is_left_alone_and_counts_for_nothing(model, ids):
    """A prompt padded on the left gives what it gives unpadded; its first real token is kept.

    With a cache of fixed size the decoder is told what each position attends to, not which tokens
    are text."""
    one, short = dictionary(), ids[:1, :5]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    padded = torch.cat([padded, ids[1:2, :9]])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    with attach(model, one, error=False) as attached:
        attached.edit(SITE, Steer(7, 3.0))
        for options in ({}, {"cache_implementation": "static"}):
            together = written(model, padded, 6, mask, **options)
            assert torch.equal(together[:1, 4:], written(model, short, 6, **options))
            assert torch.equal(together[1:], written(model, ids[1:2, :9], 6, **options))
        model.hf_model(padded, attention_mask=mask)
        used = attached.latents(SITE).any(2)
    assert used.tolist() == [[False] * 5 + [True] * 4, [False] + [True] * 8]


@of_families("gpt2")
def test_which_rows_are_touched(model, ids):
    norms = model.activations(ids, [Site.parse(SITE)])[Site.parse(SITE)].norm(dim=2)
    threshold = float(norms.median()) + 1e-3
    usual = norms <= threshold
    one = dictionary(massive_threshold=threshold, store={"packing": {"drop_positions": 3}})
    keep = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    with attach(model, one) as attached:
        for mask, used in (
            (None, (torch.arange(11) >= 3).expand(3, 11)),
            (keep, keep),
            # behind its end everything may be changed
            (keep[:, :4], torch.cat([keep[:, :4], torch.ones(3, 7, dtype=torch.bool)], 1)),
        ):
            attached.keep = mask
            model.logits(ids)
            assert torch.equal(attached.latents(SITE).any(2), used & usual)
        attached.keep = torch.zeros(3, 11, dtype=torch.bool)
        clean, attached.error = model.logits(ids), False
        assert torch.equal(model.logits(ids), clean)
        assert attached.codes(SITE).values.sum() == 0
    assert torch.equal(model.logits(ids), clean)
