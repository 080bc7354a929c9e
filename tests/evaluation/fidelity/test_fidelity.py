"""Every number of fidelity against its definition, written out naively in float64."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from looping import over
from refusals import fails
from small_dictionaries import of_matrices
from tiny import random_llama

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import ReLU, TopK
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity import next_token
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator, Moments, _ratio, evaluate
from llm_wsae.evaluation.fidelity.next_token import next_token_sums
from llm_wsae.model import forward
from llm_wsae.model.language_model import LanguageModel, scored_positions
from llm_wsae.model.site import Site
from llm_wsae.statistics.measures import FIDELITY
from llm_wsae.statistics.uncertainty import Bootstrap

D, VOCAB, CONTEXTS, POSITIONS = 16, 53, 12, 10
CONFIG = EvaluateConfig(tokens=80, batch_tokens=40, bootstraps=200)
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CARD = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])


@pytest.fixture(scope="module")
def model():
    return fresh_model()


def fresh_model(vocab: int = VOCAB) -> LanguageModel:
    """What it computes matters for what it predicts."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    hf_model = random_llama(vocab, D, 24, initializer_range=0.3, **heads)
    return LanguageModel.from_live(hf_model, None, "tiny")


@pytest.fixture(scope="module")
def contexts(model):
    """Text that the model itself wrote, so that ablation makes it worse at predicting it."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (CONTEXTS, 1), generator=draw)
    while ids.shape[1] < POSITIONS:
        chances = model.logits(ids)[:, -1].softmax(1)
        ids = torch.cat([ids, chances.multinomial(1, generator=draw)], 1)
    keep = torch.ones(CONTEXTS, POSITIONS, dtype=torch.bool)
    keep[:, 0] = False
    keep[3, 5] = keep[4, 1] = False  # a special token inside, a second one in front
    keep[5, 7:] = False  # padding
    return [
        SimpleNamespace(ids=i.numpy().astype(np.int32), keep=k.numpy())
        for i, k in zip(ids, keep, strict=True)
    ]


def identity(**options) -> Dictionary:
    eye = torch.cat([torch.eye(D), -torch.eye(D)])
    return of_matrices(eye.T, eye, **options)


def nothing(**options) -> Dictionary:
    """Zeros, or ``b_dec``, for every row; its latents never fire."""
    return of_matrices(torch.zeros(D, 24), torch.zeros(24, D), **options)


def trained(seed=0, sparsity=TopK(6), **options) -> Dictionary:  # noqa: B008 - frozen
    """Something between: a random dictionary with few active latents."""
    W = torch.randn(40, D, generator=torch.Generator().manual_seed(seed)) / D**0.5
    return of_matrices(W.T, W, sparsity=sparsity, **options)


def by_hand(model, contexts, one: Dictionary, threshold: float) -> dict:
    """Every number again, context by context, with plain hooks, in float64."""
    hf = copy.deepcopy(model.hf_model).double()
    one = copy.deepcopy(one).double()
    block = hf.model.layers[one.site.block]

    def run(ids, change=None):
        seen = []

        def hook(_, args, output):
            seen.append(output if isinstance(output, torch.Tensor) else output[0])
            return None if change is None else change[None]

        handle = block.register_forward_hook(hook)
        try:
            with torch.no_grad():
                return hf(input_ids=ids[None]).logits[0].log_softmax(1), seen[0][0]
        finally:
            handle.remove()

    cases = []
    for context in contexts:
        ids, keep = torch.as_tensor(context.ids).long(), torch.as_tensor(context.keep)
        clean, hidden = run(ids)
        cases.append((ids, keep, keep & ~(hidden.norm(dim=1) > threshold), clean, hidden))
    every = torch.cat([h[keep] for _, keep, _, _, h in cases])
    x = torch.cat([h[rows] for _, _, rows, _, h in cases])
    mean, y, z = x.mean(0), one(x), one.encode(x)
    names = ("clean", "zero", "mean", "spliced")
    ce, kl, scored = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0
    for ids, keep, rows, clean, hidden in cases:
        first = int(keep.nonzero()[0])
        places = [t for t in range(first, len(ids) - 1) if keep[t + 1]]
        scored += len(places)
        values = (hidden, 0 * hidden, mean.expand_as(hidden), one(hidden))
        for name, value in zip(names, values, strict=True):
            predicted, _ = run(ids, value.where(rows[:, None], hidden))
            ce[name] -= sum(float(predicted[t, ids[t + 1]]) for t in places)
            kl[name] += float((clean.exp() * (clean - predicted))[places].sum())
    density, again = (z > 0).double().mean(0), one.encode(y)
    fires, both = z > 0, (z > 0) & (again > 0)
    ce, kl = ({name: total / scored for name, total in sums.items()} for sums in (ce, kl))

    def fvu(x, y):
        return float((x - y).square().sum() / (x - x.mean(0)).square().sum())

    return {
        "rows": len(x),
        "massive_rows": len(every) - len(x),
        "fvu": fvu(x, y),
        "fvu_with_massive": fvu(every, one(every)),
        "cosine": float(F.cosine_similarity(x, y).mean()),
        "l2_ratio": float((y.norm(dim=1) / x.norm(dim=1)).mean()),
        "l0": float(fires.sum(1).double().mean()),
        "dead_share": float((density == 0).double().mean()),
        "dense_share": float((density > 0.1).double().mean()),
        "vanished": float(1 - both.sum() / fires.sum()),
        "shrunk": float((1 - again / z)[both].mean()),
        "false_latents": float(((again > 0) & ~fires).sum()) / len(x),
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_zero_ablated": ce["zero"],
        "ce_mean_ablated": ce["mean"],
        "ce_recovered": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "ce_recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
        "kl": kl["spliced"],
        "kl_zero_ablated": kl["zero"],
        "kl_mean_ablated": kl["mean"],
        "fvu_per_dimension": ((x - y).square().sum(0) / (x - mean).square().sum(0)).tolist(),
        "latent_density": density.tolist(),
        "num_scored": scored,
    }


def rows_of(model, contexts) -> torch.Tensor:
    """The activations at the site that are kept."""
    ids = torch.tensor(np.stack([one.ids for one in contexts]))
    keep = torch.tensor(np.stack([one.keep for one in contexts]))
    return model.activations(ids, [identity().site])[identity().site][keep]


@over(case=((None, TopK(6)), (0.9, TopK(6)), (None, ReLU())))
def test_every_number_equals_a_naive_float64_reference(model, contexts, case):
    quantile, sparsity = case
    norms = rows_of(model, contexts).norm(dim=1)
    threshold = 1e9 if quantile is None else float(norms.quantile(quantile))
    one = trained(sparsity=sparsity, massive_threshold=threshold)
    report = evaluate({"one": one}, model, contexts, EvaluateConfig(tokens=103, batch_tokens=40))
    found = report.dictionaries["one"]
    expected = by_hand(model, contexts, one, threshold)
    assert report.num_scored == expected.pop("num_scored") < CONTEXTS * (POSITIONS - 2)
    assert report.num_contexts == CONTEXTS
    assert (found.massive_rows > 3) == (quantile is not None)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert found.explained_variance == 1 - found.fvu
    assert (found.fvu_with_massive == found.fvu) == (quantile is None)
    for middle, (low, high) in (
        (found.kl, found.kl_interval),
        (found.ce_recovered, found.ce_recovered_interval),
    ):
        assert low < middle < high


def test_a_perfect_dictionary_an_empty_one_and_the_mean(model, contexts):
    used = contexts[:10]
    rows = rows_of(model, used)
    config = EvaluateConfig(tokens=len(rows), batch_tokens=30, bootstraps=50)
    known = {"clean": identity(), "nothing": nothing(), "mean": nothing(b_dec=rows.mean(0))}

    def no_more():
        yield from used
        pytest.fail("read on")

    report = evaluate(known, model, no_more(), config)
    perfect, empty, average = report.dictionaries.values()
    assert report.num_contexts == 10
    assert perfect.fvu < 1e-10 and perfect.l0 == pytest.approx(D)
    assert perfect.ce_spliced == pytest.approx(perfect.ce_clean, abs=1e-6)
    assert perfect.ce_recovered_interval == pytest.approx((1, 1), abs=1e-4)
    assert perfect.kl == pytest.approx(0, abs=1e-6)
    assert empty.ce_spliced == empty.ce_zero_ablated > empty.ce_clean
    assert empty.ce_recovered == 0 and empty.ce_recovered_interval == (0, 0)
    assert empty.kl == empty.kl_zero_ablated > 0.01 and empty.dead_share == 1
    assert math.isnan(empty.vanished) and math.isnan(empty.shrunk)
    assert average.fvu_per_dimension == pytest.approx([1.0] * D, abs=1e-4)
    assert average.ce_recovered_mean == pytest.approx(0, abs=1e-4)


def test_which_predictions_count():
    keep = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    scored = scored_positions(keep.bool())
    assert scored.tolist() == [[False, False, True, False, True, False], [False] * 6, [True] * 6]


@pytest.mark.parametrize("device", ["cpu", CARD])
@over(dtype=(torch.float32, torch.float64))
def test_the_sums_are_those_of_all_logits_in_float64(dtype, device):
    """Of several tiles and runs of the vocabulary. (There is no kernel for float64.)"""
    vocab, shape = 2 * forward.RUN + 500, (170, 7)
    model, last = fresh_model(vocab), Site(2, "post")
    draw = torch.Generator().manual_seed(0)
    clean, *variants = torch.randn(3, *shape, D, generator=draw).unbind(0)
    ids = torch.randint(vocab, shape, generator=draw)
    scored = torch.rand(170, 6, generator=draw) > 0.3
    scored[1] = False
    ids[1] = vocab - 1
    exact = LanguageModel.from_live(copy.deepcopy(model.hf_model).double(), None, "exact")
    log_p, *others = (
        exact.resume(ids, last, end.double()).log_softmax(2)[:, :-1] for end in (clean, *variants)
    )
    here = LanguageModel.from_live(copy.deepcopy(model.hf_model).to(device, dtype), None, "here")
    asked = [one.to(device, dtype) for one in (clean, *variants)]
    ids, scored = ids.to(device), scored.to(device)
    entropy, found = next_token_sums(here, asked[0], asked[1:], ids, scored)
    target, scored = ids.cpu()[:, 1:, None], scored.cpu()
    entropies = entropy, *(ce for ce, _ in found)
    for ce, log_q in zip(entropies, (log_p, *others), strict=True):
        wanted = -(log_q.gather(2, target)[..., 0] * scored).sum(1)
        torch.testing.assert_close(ce, wanted, rtol=1e-5, atol=0)
    for (_, kl), log_q in zip(found, others, strict=True):
        wanted = ((log_p.exp() * (log_p - log_q)).sum(2) * scored).sum(1)
        torch.testing.assert_close(kl, wanted, rtol=1e-5, atol=0)
    entropy, found = next_token_sums(here, asked[0], asked[1:], ids, (scored & False).to(device))
    assert not entropy.any() and len(found) == 2


def measured(target, *streams, width):
    """−log p(target) and KL of rows of logits, of which so many columns come at a time."""
    starts = range(0, streams[0].shape[1], width)
    runs = [lambda logits, at=start: logits[:, at : at + width] for start in starts]
    as_it_is = forward.Unembedding(lambda logits: logits, runs)
    return next_token._measure_tile(as_it_is, streams, target)


@over(dtype=(torch.float32, torch.bfloat16, torch.float64), width=(5003, 200))
def test_excluded_tokens_and_small_divergences(dtype, width):
    """Tokens that are excluded, row by row: by both, by the clean one, by the other one; an
    unlikely one by the other one. In the last row the two hardly differ; then one is NaN."""
    draw = torch.Generator().manual_seed(0)
    clean, own = (torch.randn(5, 5003, generator=draw).to(dtype) for _ in range(2))
    clean[:2, 7:300] = own[0, 7:300] = own[2, 1000] = own[3, 1001] = -torch.inf
    clean[3, 1001] = -500
    own[4] = clean[4] + 0.02 * own[4]
    target = torch.full((5,), 3)
    log_p, log_q = (one.double().log_softmax(1) for one in (clean, own))
    terms = log_p.exp() * (log_p - log_q)
    wanted = terms.where(~clean.isneginf(), 0).sum(1)
    wanted[3] = torch.inf  # p = e^-508, which even the terms in float64 may lose
    assert wanted.isfinite().tolist() == [True, True, False, False, True] and wanted[4] < 1e-3
    (entropy, _), (ce, kl), (_, none) = measured(target, clean, own, clean, width=width)
    torch.testing.assert_close(kl, wanted, rtol=1e-5, atol=2e-7)
    for found, log in ((entropy, log_p), (ce, log_q)):
        torch.testing.assert_close(found, -log[:, 3], rtol=1e-5, atol=0)
    assert none.abs().max() < 1e-6
    own[4, 4000] = torch.nan
    assert measured(target, clean, own, width=width)[1, :, 4].isnan().all()


def test_variance_keeps_its_digits_far_from_zero():
    rows = 1e6 + torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double()
    moments, rest = Moments(rows[0]), Moments(rows[0])
    moments.update(rows[:200])
    rest.update(rows[200:])
    expected = rows.var(0, correction=0) * 500
    torch.testing.assert_close(moments.deviation(rest), expected, rtol=1e-9, atol=0)
    assert math.isnan(_ratio(torch.ones(2), torch.zeros(2)))  # constant rows have no FVU


def test_resamplings_in_blocks_are_those_of_one_draw():
    items, count = 20_000, 1800  # numbers that one block does not hold
    columns = {"a": np.arange(items) % 7.0, "b": np.ones(items)}
    found = Bootstrap(items, count, 3).interval(lambda totals: totals["a"] / totals["b"], columns)
    draw = np.random.default_rng(3)
    values = [columns["a"][draw.integers(items, size=items)].mean() for _ in range(count)]
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), rel=1e-12)


def test_report_is_json_and_a_table(model, contexts, tmp_path):
    other = nothing(model={"weights_sha256": "other"})
    report = evaluate({"plain": trained(), "weighted α=0.5": other}, model, contexts, CONFIG)
    report.write(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    found = report.dictionaries["plain"]
    assert read["dictionaries"]["plain"]["fvu"] == found.fvu and read["config"]["tokens"] == 80
    lines = report.table().splitlines()
    low, high = found.ce_recovered_interval
    assert lines[2].startswith("plain")
    assert f"{found.ce_recovered:.3f} [{low:.3f}, {high:.3f}]" in lines[2]
    for one in FIDELITY:
        assert one.title in lines[0]
        assert any(line.startswith(one.title) and one.meaning in line for line in lines[4:])
    said = "\n".join(lines)
    assert "trained on other weights" in said and "documents, fewer than 20" in said


def test_a_weighted_dictionary_is_compared_with_the_plain_one_beside_it(model, contexts):
    rows = {"sha256": "of rows"}
    made = {"training": {"k": 4}, "store": rows}
    known = {
        "plain": trained(**made),
        "same": trained(**made, rule="variance"),
        "empty": nothing(**made, rule="variance"),
        "other seed": nothing(**made, seed=1, rule="variance"),
        "other k": nothing(training={"k": 8}, store=rows, rule="variance"),
    }
    found = evaluate(known, model, contexts, CONFIG)
    assert list(found.from_plain) == ["same", "empty"]
    same, empty = found.from_plain.values()
    assert same.kl_interval == same.ce_recovered_interval == (0, 0) and same.fvu == 0
    plain, other = (found.summaries()[name] for name in ("plain", "empty"))
    for measure in ("kl", "ce_recovered", "fvu"):
        assert getattr(empty, measure) == other[measure] - plain[measure]
    # zeros recover nothing in every resampling: what is left is the plain one's interval
    low, high = plain["ce_recovered_interval"]
    assert empty.ce_recovered_interval == pytest.approx((-high, -low))
    assert empty.kl_interval[0] < empty.kl < empty.kl_interval[1] and empty.plain == "plain"
    level, harm = found.answers
    assert level.startswith("same: KL +0.0 % [+0.0, +0.0] beside plain: the weights make no ")
    assert harm.startswith("empty: KL +") and harm.endswith(
        "beside plain: the weights do harm here."
    )


def test_bad_requests(model, contexts):
    cut = SimpleNamespace(ids=contexts[1].ids[:7], keep=contexts[1].keep[:7])
    last = np.arange(POSITIONS) == POSITIONS - 1  # as with drop_positions = context_size − 1
    single = [SimpleNamespace(ids=one.ids, keep=last) for one in contexts]
    for kind, said, known, text, tokens in (
        (UsageError, "no dictionary", {}, contexts, 80),
        (UsageError, "the model has 3 blocks", identity(site="blocks.3.hook_resid_post"), [], 80),
        (UsageError, "of 10 and of 7 tokens; pack or pad", identity(), [contexts[0], cut], 12),
        (UsageError, "no context .* has two rows, so no predict", identity(), single, 5),
    ):
        known = {"a": known} if known else {}
        with pytest.raises(kind, match=said):
            evaluate(known, model, text, EvaluateConfig(tokens=tokens))
    assert evaluate({"a": identity()}, model, contexts, EvaluateConfig(tokens=5)).num_contexts == 2
    two = SimpleNamespace(ids=contexts[1].ids, keep=last | (np.arange(POSITIONS) == 3))
    report = evaluate({"a": identity()}, model, [*single[:3], two], EvaluateConfig(tokens=5))
    assert report.num_scored == 1


def test_activations_and_predictions_that_are_not_numbers(contexts):
    """Found at once or later on; where nothing is scored, they do not matter."""
    model, said = fresh_model(), r"^predictions of tiny are NaN.*--model-dtype float32"
    ids = torch.tensor(np.stack([c.ids for c in contexts]))
    clean = torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(0))
    clean[3, 4] = torch.nan
    scored = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    fails(said, next_token_sums, model, clean, [], ids, scored)
    scored[3, 4] = False
    assert next_token_sums(model, clean, [], ids, scored)[0].min() > 1
    with torch.no_grad():
        model.hf_model.model.layers[2].mlp.down_proj.weight[0] = torch.nan  # behind the site
    fails(said, evaluate, {"a": identity()}, model, contexts, CONFIG)
    with torch.no_grad():
        model.hf_model.get_input_embeddings().weight[int(contexts[0].ids[2])] = torch.nan
    with pytest.raises(LlmWsaeError, match=r"activations of the model at .* are NaN or inf"):
        evaluate({"a": identity()}, model, contexts, CONFIG)


def test_a_model_that_excludes_tokens_is_the_same_when_it_is_resumed(contexts):
    model = fresh_model()
    never = max({*range(VOCAB)} - {int(i) for c in contexts for i in c.ids})

    def exclude(_module, _inputs, logits):
        logits[..., never] = -torch.inf

    model.hf_model.lm_head.register_forward_hook(exclude)
    found = evaluate({"a": identity()}, model, contexts, CONFIG).dictionaries["a"]
    assert 0.1 < found.ce_clean < 5 and found.ce_spliced == pytest.approx(found.ce_clean, abs=1e-6)


def test_blocks_that_pass_on_more_than_the_stream_are_refused(contexts):
    """At each site: at the end of the last block every model makes its own predictions."""
    made, passed = fresh_model(), {}
    layers = made.hf_model.model.layers
    layers[1].mlp.register_forward_hook(lambda *_: passed.update(on=3.0))
    layers[2].mlp.register_forward_hook(lambda _, __, end: end + passed.pop("on", 0.0))
    sites = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    broken, sound = ({site: identity(site=site)} for site in sites)
    alone = evaluate(sound, made, contexts, CONFIG)
    evaluator = FidelityEvaluator(made, contexts, CONFIG)
    fails(r"resumed at blocks\.1\..*more than the residual str", evaluator.evaluate, sound | broken)
    assert evaluator.evaluate(sound).to_dict() == alone.to_dict()


def test_what_depends_on_the_text_alone_is_measured_once(contexts):
    """Dictionaries one after the other get the numbers of all at once, also when a pass between
    them was broken off, and zeros and the mean are put in once for each threshold."""
    made, passes, last = fresh_model(), [], [-1]

    def count(*_):
        passes.append(1)
        if len(passes) == last[0]:
            raise KeyboardInterrupt

    made.hf_model.model.layers[2].mlp.register_forward_hook(count)
    known = {f"k{k}": identity(sparsity=TopK(k)) for k in (2, 4)}
    together = evaluate(known, made, contexts, CONFIG).dictionaries
    evaluator = FidelityEvaluator(made, contexts, CONFIG)
    passes.clear()
    last[0] = 6
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(known)
    last[0], counts = -1, []
    for name, one in (*known.items(), ("other", identity(massive_threshold=1e6))):
        passes.clear()
        found = evaluator.evaluate({name: one}).dictionaries[name]
        assert found == together.get(name, found)
        counts.append(len(passes))
    # Of three batches. At first two passes say that the model can be resumed. Of the first batch
    # its own predictions are known; then zeros, the mean, the dictionary.
    assert counts == [2 + 4 * 3 - 1, 3, 2 + 3 * 3]


def test_sites_and_batches_do_not_change_a_number(model, contexts):
    """Dictionaries of the same names, a weighted one beside the plain one, with massive rows at the
    first site; and notes on those of the second."""
    early, late = Site.parse("blocks.0.hook_resid_post"), Site.parse("blocks.2.hook_resid_mid")
    ids = torch.stack([torch.as_tensor(context.ids) for context in contexts])
    threshold = float(model.activations(ids, [early])[early].norm(dim=2).quantile(0.9))
    rows, other = {"store": {"sha256": "of rows"}}, {"weights_sha256": "other"}
    first = {"site": str(early), "massive_threshold": threshold, **rows}
    second = {"site": str(late), "massive_threshold": 1e9, "model": other, **rows}
    known = {
        late: {"plain": trained(1, **second), "weighted": trained(2, rule="variance", **second)},
        early: {"plain": trained(3, **first), "weighted": nothing(rule="variance", **first)},
    }
    alone = {site: evaluate(own, model, contexts, CONFIG) for site, own in known.items()}
    found = dict(FidelityEvaluator(model, contexts, CONFIG).evaluate_sites(known))
    assert list(found) == list(known)
    for site, report in found.items():
        assert json.dumps(report.to_dict()) == json.dumps(alone[site].to_dict())
        assert report.from_plain.keys() == {"weighted"}
    many = {f"{name} {site}": one for site, own in known.items() for name, one in own.items()}
    together = evaluate(many, model, contexts, replace(CONFIG, batch_tokens=20))
    assert list(together.dictionaries) == list(many)
    for name, one in together.dictionaries.items():
        arm, site = name.split()
        for key, value in vars(alone[Site.parse(site)].dictionaries[arm]).items():
            if isinstance(value, float):
                assert getattr(one, key) == pytest.approx(value, 1e-4, 1e-5, nan_ok=True), key
