"""The model's own forward, cut and spliced, against ``hidden_states`` and TransformerLens; logits
of chosen rows, and prepacked weights: the same numbers, and nothing left behind."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock, patch

import pytest
import tiny
import torch
from looping import over
from refusals import fails
from tiny import BLOCKS, FAMILIES, KNOWN, VOCAB, WIDTH, hooks_of, model_of, of_families, sites_of
from torch import nn
from transformers import BertForMaskedLM

from llm_wsae.machine.hardware import onednn_is_faster
from llm_wsae.machine.threads import parallel_map
from llm_wsae.model import forward
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

THREADS = torch.get_num_threads()


def drawn(contexts):
    return torch.randint(0, VOCAB, (contexts, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ids():
    return drawn(3)


@pytest.fixture
def cores():
    yield torch.set_num_threads
    torch.set_num_threads(THREADS)


def blocks_of(model):
    return model.hf_model.get_submodule(model.paths.blocks)


def test_several_threads_may_ask_at_once(ids):
    """Each has hooks of its own on the same modules."""
    model = model_of("llama")
    hidden = model.activations(ids, [Site(0, "pre"), Site(1, "post"), Site(3, "post")])
    logits, interval = model.logits(ids), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def ask(site):
        for _ in range(12):
            assert torch.equal(model.activations(ids, [site])[site], hidden[site])
            assert torch.equal(model.resume(ids, site, hidden[site]).detach(), logits)

    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, hidden))
    finally:
        sys.setswitchinterval(interval)


@of_families(*FAMILIES)
@over(contexts=[3, 100])
def test_rows_equal_hidden_states_however_contexts_are_divided(model, contexts, cores):
    """All in one pass, or 93 on one core and 7 on another."""
    ids = drawn(contexts)
    # the last entry of hidden_states is behind the final norm
    behind = {Site(block, "post"): block + 1 for block in range(BLOCKS - 1)}
    behind |= {Site(block, "pre"): block for block in range(BLOCKS)}
    sites = list(behind)
    cores(1)  # as each part has; several round a product otherwise
    with torch.no_grad():
        states = model.hf_model(ids, output_hidden_states=True).hidden_states
    cores(THREADS)
    before = hooks_of(model)
    rows = model.activations(ids, sites)
    assert list(rows) == sites and hooks_of(model) == before
    for site, number in behind.items():
        assert torch.equal(rows[site], states[number])
        assert not rows[site].requires_grad
    assert rows[Site(1, "post")].ne(rows[Site(1, "pre")]).any(-1).float().mean() > 0.99
    assert torch.get_num_threads() == THREADS


def test_visits_see_all_contexts_at_once():
    model, ids, last = model_of("llama"), drawn(100), Site(2, "post")
    visit = Mock(side_effect=lambda hidden: hidden + 1)
    with model.visiting([(Site(1, "post"), visit)]):
        rows = model.activations(ids, [last])[last]
    assert [call.args[0].shape[:2] for call in visit.call_args_list] == [ids.shape]
    assert not torch.equal(rows, model.activations(ids, [last])[last])


@of_families(*KNOWN)
def test_sites_embeddings_and_replaced_streams_are_those_of_transformer_lens(model, ids):
    bridge = tiny.bridge_of(model)
    assert model.W_E.shape == (VOCAB, WIDTH) and model.W_U.shape == (WIDTH, VOCAB)
    assert torch.equal(model.W_E, bridge.W_E) and torch.equal(model.W_U, bridge.W_U)
    _, cache = bridge.run_with_cache(ids)
    for site, rows in model.activations(ids, sites_of(model)).items():
        torch.testing.assert_close(rows, cache[str(site)], rtol=1e-4, atol=1e-4)
    clean = model.logits(ids)
    for site in sites_of(model):
        new = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(site.block))
        hooks = [(str(site), lambda stream, hook, new=new: new)]
        expected = bridge.run_with_hooks(ids, fwd_hooks=hooks)
        assert not torch.allclose(expected, clean, atol=1e-2)
        found = model.resume(ids, site, new)
        # a bridge's hook on the input of the MLP's norm misses the residual branch
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) == (site.point != "mid")
    if not model.paths.mid:
        assert "blocks.1.hook_resid_mid" not in bridge.hook_dict


@of_families("gpt2", "llama", "neox-sequential")
def test_resume_at_mid_reaches_the_residual_branch(model, ids):
    """Block output = new + mlp(norm(new))."""
    new, block = torch.randn(*ids.shape, WIDTH), blocks_of(model)[1]
    with torch.no_grad():
        expected = new + block.mlp(block.get_submodule(model.paths.mid)(new))
    with_new = model.resume(ids, Site(1, "mid"), new)
    assert torch.equal(with_new, model.resume(ids, Site(1, "post"), expected))


@of_families(*FAMILIES)
@over(point=["pre", "post"])
def test_only_the_blocks_that_are_needed_run(model, ids, point):
    ran, rows = [], torch.randn(*ids.shape, WIDTH)
    model.resume(ids, Site(0, "pre"), rows)  # the first one looks at the model once
    handles = [
        next(block.children()).register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(blocks_of(model))
    ]
    model.activations(ids, [Site(0, "pre"), Site(2, point)])
    assert ran == ([0, 1] if point == "pre" else [0, 1, 2])
    ran.clear()
    model.resume(ids, Site(2, point), rows)
    assert ran == ([2, 3] if point == "pre" else [3])
    if model.paths.mid:
        norm = blocks_of(model)[1].get_submodule(model.paths.mid)
        handles.append(norm.register_forward_hook(lambda *_: 1 / 0))
        model.activations(ids, [Site(1, "mid")])
    for handle in handles:
        handle.remove()


@of_families(*FAMILIES)
def test_resume_with_the_clean_activation_changes_nothing_and_leaves_nothing_behind(model, ids):
    before = hooks_of(model)
    with torch.no_grad():
        expected = model.hf_model(ids).logits
    for site in sites_of(model, (0, 1, BLOCKS - 1)):
        rows = model.activations(ids, [site])[site]
        assert torch.equal(model.resume(ids, site, rows), expected), site
    failing = blocks_of(model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
    for call in (
        lambda: model.activations(ids, [Site(3, "post")]),
        lambda: model.resume(ids, Site(1, "post"), rows),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    failing.remove()
    assert hooks_of(model) == before
    assert torch.equal(model.logits(ids), expected)


@of_families(*FAMILIES)
def test_resume_is_differentiable_in_the_activation(model, ids):
    for site in sites_of(model, (2,)):

        def loss(rows, site=site):
            return model.resume(ids, site, rows).double().logsumexp(-1).sum()

        rows = torch.randn(*ids.shape, WIDTH, requires_grad=True)
        step = 1e-3 * torch.randn(*ids.shape, WIDTH)
        loss(rows).backward()
        apart = (loss(rows + step) - loss(rows - step)).item() / 2
        assert (rows.grad * step).sum().item() == pytest.approx(apart, rel=2e-2, abs=5e-7)


def test_a_live_model_is_left_as_it_is():
    hf_model = tiny.tiny_hf_model("gpt2").train()
    model = LanguageModel.from_live(hf_model, tiny.tiny_tokenizer(), name="mine")
    assert hf_model.training and all(p.requires_grad for p in hf_model.parameters())
    assert not model.hf_model.training
    assert not any(p.requires_grad for p in model.hf_model.parameters())
    assert (model.name, model.device.type, model.dtype) == ("mine", "cpu", torch.float32)
    assert (model.num_blocks, model.d_model, model.max_context) == (BLOCKS, WIDTH, 32)
    assert model.bos_token_id == tiny.BOS
    with torch.no_grad():
        hf_model.lm_head.weight.mul_(2)
    assert torch.equal(model.W_U, hf_model.lm_head.weight.T)


@of_families("gpt2", "llama", "neox")
def test_a_bridge_is_the_model_that_it_wraps(model, ids):
    bridge = tiny.bridge_of(model)
    taken = LanguageModel.from_live(bridge)
    assert taken.tokenizer is bridge.tokenizer and taken.bos_token_id == tiny.BOS
    assert taken.identity()["weights_sha256"] == model.identity()["weights_sha256"]
    torch.testing.assert_close(taken.logits(ids), model.logits(ids), atol=1e-5, rtol=1e-5)
    own = tiny.tiny_tokenizer(bos=False)
    assert LanguageModel.from_live(bridge, own).tokenizer is own


def test_bad_requests_are_sentences(ids):
    model = LanguageModel.from_live(tiny.tiny_hf_model("gpt2"), None)
    encoder, mid = BertForMaskedLM(tiny.tiny_encoder()[0].config), Site(1, "mid")
    too_long, unknown = torch.zeros(1, 33, dtype=torch.long), torch.tensor([[9999, 0]])
    fails("the model has 4 blocks", model.activations, ids, [Site(4, "pre")])
    fails("33 tokens are too long for .* reads at most 32", model.logits, too_long)
    fails("^Flatten is not .*; pass what AutoModel", LanguageModel.from_live, nn.Flatten())
    fails("BertForMaskedLM is an encoder", LanguageModel.from_live, encoder, None)
    fails("no site to record at", model.activations, ids, [])
    fails("at least one context of one token", model.logits, ids[:, :0])
    fails("was given ids from 0 to 9999; use its own", model.logits, unknown)
    fails("hook_resid_mid: its blocks run .* in parallel", model_of("neox").check_site, mid)
    for point in ("mlp", "mlp_in", "mlp_out"):
        site = Site(1, point)
        fails("mixtures of experts, which is not supported", model_of("experts").check_site, site)
    fails("hook_resid_mid: TransformerLens does not know", model_of("unknown").check_site, mid)


def test_identity_recognises_a_model_wherever_it_lies(tmp_path):
    def digest(hf_model):
        return LanguageModel.from_live(hf_model, None).identity()["weights_sha256"]

    hf_model, folder = tiny.tiny_hf_model("llama"), tiny.save_hf_model(tmp_path / "model")
    saved = LanguageModel.load(str(folder), dtype="float32").identity()
    assert saved == json.loads(json.dumps(saved))
    assert (saved["name"], saved["dtype"]) == ("model", "float32")
    assert (saved["architecture"], saved["d_model"]) == ("LlamaForCausalLM", WIDTH)
    coarse = LanguageModel.load(str(folder.rename(tmp_path / "other")), dtype="bfloat16")
    assert coarse.identity()["weights_sha256"] == saved["weights_sha256"] == digest(hf_model)
    hf_model.config.rms_norm_eps = 1e-3
    others = (hf_model, tiny.tiny_hf_model("llama", 1), tiny.tiny_hf_model("neox"))
    assert len({saved["weights_sha256"], *map(digest, others)}) == 4


@over(count=[1, 2, 5], pieces=[0, 1, 2, 7])
def test_results_come_in_order_and_cores_are_shared_out(cores, count, pieces):
    cores(count)
    workers = max(1, min(count, pieces))
    meeting = threading.Barrier(workers, timeout=60)

    def work(piece):
        if piece < workers:
            meeting.wait()  # alone it would wait in vain
        return piece, torch.get_num_threads()

    found = parallel_map(work, range(pieces))
    assert found == [(piece, count // workers) for piece in range(pieces)]
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda piece: 1 // (3 - piece), range(5))
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == count


# --- Logits of chosen rows, and prepacked weights

SITE = Site.parse("blocks.0.hook_resid_post")
PREPACKED = [one for one in (torch.float32, torch.bfloat16) if onednn_is_faster(one)]
needs_layout = pytest.mark.skipif(not PREPACKED, reason="oneDNN is not faster here")


@pytest.fixture(params=PREPACKED or [torch.float32], ids=str)
def llama(request):
    return LanguageModel.from_live(tiny.tiny_hf_model("llama").to(request.param).eval(), None)


def inputs_of(model):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.W_E), (16, 32), generator=draw)
    return ids, torch.randn(16, 32, model.d_model, generator=draw).to(model.dtype)


def ends_and_logits(model):
    end = model.resume_to_end(inputs_of(model)[0], SITE, inputs_of(model)[1])
    with torch.no_grad(), model.unembedding() as unembedding:
        return end, unembedding(end.flatten(0, 1))


def layers(model):
    return [layer for layer in model.hf_model.modules() if type(layer) is nn.Linear]


def are_as_they_were(model):
    return all("forward" not in layer.__dict__ for layer in layers(model))


def agree(one, other):
    precision = 2**-8 if one.dtype == torch.bfloat16 else 2**-20
    return bool((one - other).float().norm() <= precision * other.float().norm())


@over(family=FAMILIES, run=[2048, 7])
def test_logits_of_chosen_rows_are_those_of_resume(family, run):
    """Up to the last block in contexts of their own, after it in rows of their own, whose
    vocabulary is divided into runs."""
    model, draw = model_of(family), torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (3, 11), generator=draw)
    for site in (Site(0, "pre"), Site(2, "post"), Site(BLOCKS - 1, "post")):
        new = torch.randn(*ids.shape, WIDTH, generator=draw)
        expected = model.resume(ids, site, new).detach().flatten(0, 1)[3:]
        end = model.resume_to_end(ids, site, new)
        with patch.object(forward, "RUN", run), torch.no_grad(), model.unembedding() as logits:
            assert len(logits.runs) == -(-model.W_U.shape[1] // run)
            found = logits(end.flatten(0, 1)[3:])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_layout
def test_products_are_those_of_the_weights(llama):
    expected, laid_out = ends_and_logits(llama), []
    with llama.prepacked(), llama.prepacked():  # the inner one does nothing
        for found, wanted in zip(ends_and_logits(llama), expected, strict=True):
            assert agree(found, wanted)
        laid_out += llama._prepacked._copies
        assert len(laid_out) == len(set(laid_out)) > 7  # blocks behind the site, and the head
    for found, wanted in zip(ends_and_logits(llama), expected, strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        layers(llama)[-1].weight.mul_(2)
    expected = ends_and_logits(llama)[1]
    with llama.prepacked():  # weights that have changed are read again
        assert agree(ends_and_logits(llama)[1], expected)
    assert are_as_they_were(llama) and llama._prepacked._copies is None
    exact = LanguageModel.from_live(tiny.tiny_hf_model("llama").double().eval(), None)
    with exact.prepacked():  # which oneDNN does not multiply faster
        assert are_as_they_were(exact)


@needs_layout
@over(whole_first=[True, False])
def test_the_head_and_its_runs_have_copies_of_their_own(llama, whole_first):
    ids, _ = inputs_of(llama)
    expected = llama.logits(ids)
    with patch.object(forward, "RUN", 20), llama.prepacked():
        if whole_first:
            assert agree(llama.logits(ids), expected)
        end = llama.activations(ids, [Site(llama.num_blocks - 1, "post")]).popitem()[1]
        with torch.no_grad(), llama.unembedding() as made:
            assert len(made.runs) == 3
            assert agree(made(end.flatten(0, 1)), expected.flatten(0, 1))
        assert agree(llama.logits(ids), expected)


@needs_layout
def test_gradients_and_few_rows_take_the_weights(llama):
    ids, hidden = inputs_of(llama)
    hidden.requires_grad_()
    with llama.prepacked():
        llama.logits(ids[:1, :4])
        llama.resume(ids, SITE, hidden).float().square().mean().backward()
        assert not llama._prepacked._copies
    assert hidden.grad.isfinite().all() and hidden.grad.any()


@needs_layout
def test_it_is_closed_behind_the_passes_of_other_threads(llama):
    """One closes what it opened while another unembeds: both leave the modules as they were."""
    opened, unembeds = threading.Event(), threading.Event()

    def first():
        with llama.prepacked():
            opened.set()
            unembeds.wait(10)

    def second():
        opened.wait(10)
        with llama.unembedding():
            unembeds.set()
            time.sleep(0.2)  # the first one waits for its turn

    with ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(first), pool.submit(second)):
            done.result(20)
    assert are_as_they_were(llama)
