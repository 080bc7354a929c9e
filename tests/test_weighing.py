"""RuleInputs against brute force, on the store of a tiny model."""

import io
import shutil
from unittest.mock import patch

import pytest
import torch
from refusals import fails
from several import run
from small_dictionaries import make_dictionary
from tiny import tiny_model, write_jsonl
from torch.nn.functional import pad

from llm_wsae.commands.verifying import verify
from llm_wsae.data import rows as rows_module
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.rows import ArrayRows, RowReader
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import shrunk
from llm_wsae.weights.config import RuleInputConfig
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.rules import RULES
from llm_wsae.weights.weighing import fisher_information, measure_inputs

SITE = Site(1, "post")
HARVEST = HarvestConfig(context_size=12, tokens=1200, batch_tokens=48, shard_tokens=300)
NO_MEASUREMENTS = shutil.ignore_patterns("evidence")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    text = write_jsonl(folder / "text.jsonl", [7 * i % 50 + 1 for i in range(90)])
    return harvest(model, Corpus.open(str(text)), [SITE], folder / "store", HARVEST)


@pytest.fixture
def copy(tmp_path, store):
    """The store, without what was measured before."""
    folder = shutil.copytree(store.folder, tmp_path / "store", ignore=NO_MEASUREMENTS)
    return ActivationStore.open(folder)


def test_sensitivity_is_measured_on_the_stores_text(model, store):
    def fisher(tokens):
        config = RuleInputConfig(sensitivity_tokens=tokens)
        return measure_inputs(["sensitivity"], store, SITE, model=model, config=config).fisher

    contexts = list(store.some_text(10**6))
    ids, keep = (torch.cat(parts) for parts in zip(*contexts, strict=True))
    assert int(keep.sum()) == store.num_rows
    everything = fisher(10**6)
    expected = fisher_information(model, zip(ids.split(8), keep.split(8), strict=True), SITE)
    torch.testing.assert_close(everything, expected, rtol=1e-4, atol=1e-9)
    part = fisher(100)
    chosen = torch.linspace(0, len(ids) - 1, -(-100 * len(ids) // store.num_rows)).round().long()
    assert int(keep[chosen].sum()) == pytest.approx(100, abs=24)
    wanted = fisher_information(model, [(ids[chosen], keep[chosen])], SITE)
    assert float((part - wanted).norm() / wanted.norm()) < 0.6  # other draws of the labels
    assert float((part - everything).norm()) > 0


def test_nothing_more_is_measured_than_is_needed(model, store):
    """Of a dictionary, the decoder of what fires."""
    first = make_dictionary("first", d_in=16, d_sae=40, sparsity=TopK(2), site=str(SITE))
    first.b_enc[-2:] = -1e4  # two never fire
    given = {"model": model, "dictionary": first}
    found = measure_inputs(["variance", "participation"], store, SITE, **given)
    assert found.fisher is None
    codes = first.encode(found.statistics.usual_sample).double()
    fires = (codes > 0).any(0)
    assert 2 < int(fires.sum()) <= 38
    assert torch.equal(found.decoder, first.W_dec[fires])
    torch.testing.assert_close(found.energy, codes.square().mean(0)[fires], rtol=1e-6, atol=0)
    other = make_dictionary("first", d_in=16, site="blocks.0.hook_resid_post")
    with pytest.raises(UsageError, match=r"'first' explains blocks\.0.*, not blocks\.1"):
        measure_inputs(["participation"], store, SITE, dictionary=other)
    found = measure_inputs(["rotated:sensitivity"], store, SITE, **given)
    assert found.decoder is None and found.fisher.shape == (store.d_in, store.d_in)
    other = RuleInputConfig(seed=3)  # of which nothing is kept
    with pytest.raises(UsageError, match="--model"):
        RULES["sensitivity"].apply(measure_inputs(["sensitivity"], store, SITE, config=other))


def test_rows_of_ones_own_are_weighed_as_those_of_a_store(store):
    """By every rule that needs no model; any source that knows its moments can be weighed."""
    first = make_dictionary("first", d_in=16, sparsity=TopK(2), site=str(SITE))
    rules = ["kurtosis", "whitening", "participation"]
    own = ArrayRows(store.rows(SITE, 0, store.num_rows), SITE)
    found, theirs = (
        measure_inputs(rules, rows, dictionary=first) for rows in (own, store.source(SITE))
    )
    for rule in (*rules, "uniform", "variance"):
        one, other = (weights_from_rule(rule, 0.5, inputs).gamma for inputs in (found, theirs))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    with pytest.raises(UsageError, match="the rule 'sensitivity' needs the model"):
        RULES["sensitivity"].apply(measure_inputs(["sensitivity"], own))


def test_what_was_measured_is_kept(model, copy):
    def fisher(rule="sensitivity", seed=0, model=None):
        config = RuleInputConfig(sensitivity_tokens=50, seed=seed)
        return measure_inputs([rule], copy, SITE, model=model, config=config).fisher

    first = fisher(model=model)
    assert torch.equal(first, fisher("rotated:sensitivity"))  # without the model
    assert fisher(seed=1) is None
    (path,) = (copy.folder / "evidence").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert fisher() is None
    assert torch.equal(fisher(model=model), first)
    assert verify(copy.folder).problems == []
    fails("was made by tiny", fisher, model=tiny_model(seed=1), seed=1)


def test_the_covariance_is_of_all_usual_rows_and_needs_no_model(copy):
    rows = copy.rows(SITE, 0, copy.num_rows).double()
    rows = rows[rows.norm(dim=1) <= copy.statistics(SITE).massive_threshold]
    found = measure_inputs(["permuted:whitening"], copy, SITE)
    assert found.second_moment.count == len(rows)
    expected = shrunk(torch.cov(rows.T, correction=0), len(rows))
    torch.testing.assert_close(found.covariance, expected, rtol=1e-5, atol=1e-7)
    (path,) = (copy.folder / "evidence").iterdir()
    kept = path.read_bytes()
    path.write_bytes(kept[:-9])
    assert torch.equal(measure_inputs(["whitening"], copy, SITE).covariance, found.covariance)
    assert path.read_bytes() == kept and verify(copy.folder).problems == []
    assert measure_inputs(["variance"], copy, SITE).second_moment is None


def test_nothing_is_measured_of_rows_that_are_too_few_or_do_not_vary():
    few, still = ArrayRows(torch.randn(16, 16), SITE), ArrayRows(torch.ones(99, 16), SITE)
    for source, rule, sentence in (
        (few, "whitening", "16 rows are too few for the covariance of 16 dimensions; take at"),
        (still, "whitening", "the rows do not vary in any dimension; take other rows"),
        (still, "sensitivity", "the rows do not vary in any dimension; take other rows"),
    ):
        with patch.object(source, "second_moment", pytest.fail):
            fails(sentence, measure_inputs, [rule], source)


@pytest.mark.parametrize("is_full", [False, True])
def test_several_processes_sum_the_covariance_together(copy, store, is_full):
    """Each reads its parts of the rows, and rank 0 keeps the sum; if it cannot, it says so."""
    folder = copy.folder
    alone = measure_inputs(["whitening"], store, SITE).covariance.tolist()
    found = run(3, measured, folder, is_full)
    read, said, covariances = zip(*found, strict=True)
    assert sum(read) == store.num_rows and all(read)
    assert covariances == (alone,) * 3  # to the last bit
    assert said[0].count("the measurement is not kept: the disk is full") == is_full
    assert said[1:] == ("", "") and (folder / "evidence").exists() == (not is_full)
    again = run(2, measured, folder, False)
    assert sum(read for read, *_ in again) == (store.num_rows if is_full else 0)


def measured(folder, is_full):
    """One process's part: the rows that it reads, what it says, the covariance."""
    read, rows, said = [0], RowReader.rows, io.StringIO()

    def counted(reader, start, stop):
        read[0] += stop - start
        return rows(reader, start, stop)

    RowReader.rows = counted
    if is_full:
        rows_module.save_own_tensors = full
    rows_module.tqdm.write = lambda sentence, file: said.write(sentence)
    inputs = measure_inputs(["whitening"], ActivationStore.open(folder), SITE)
    return read[0], said.getvalue(), inputs.covariance.tolist()


def full(*given):
    raise LlmWsaeError("the disk is full")


def random_contexts(model, number: int):
    """Of four positions, of which the first does not count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(model.W_E), (number, 4), generator=generator)
    return ids, (torch.arange(4) > 0).expand(number, 4)


def exact_fisher(model, ids, keep, site):
    """Σ over predictions and labels of p(y) g gᵀ, by one backward pass each; of one context."""
    hidden = model.activations(ids, [site])[site].requires_grad_()
    log_p = model.resume(ids, site, hidden)[0].float().log_softmax(-1)
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    for one in log_p.flatten():
        (g,) = torch.autograd.grad(one, hidden, retain_graph=True)
        g = g[keep].double()
        total += float(one.detach().exp()) * g.T @ g
    return total / int(keep.sum())


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"])
def test_fisher_equals_the_sum_over_all_labels(model, name):
    """Labels are drawn, so the estimate is compared on many draws; its error falls as 1/√draws."""
    site = Site.parse(name)
    ids, keep = random_contexts(model, 1)
    want = exact_fisher(model, ids, keep, site)
    draws = [(ids.repeat(3000, 1), keep.repeat(3000, 1))]
    found = fisher_information(model, draws, site, seed=1)
    assert (found - want).norm() < 0.05 * want.norm()
    assert torch.equal(found, found.T) and torch.linalg.eigvalsh(found).min() > -1e-12


def test_fisher_does_not_depend_on_padding(model):
    ids, keep = (pad(part, (0, 6)) for part in random_contexts(model, 8))
    others = ids.clone()
    others[:, 4:] = 7
    first, second = (fisher_information(model, [(one, keep)], SITE) for one in (ids, others))
    assert torch.equal(first, second)


def test_fisher_refuses_bad_requests(model):
    ids, keep = random_contexts(model, 1)
    with pytest.raises(UsageError, match=r"blocks\.7"):
        fisher_information(model, [(ids, keep)], Site.parse("blocks.7.hook_resid_post"))
    fails("no text", fisher_information, model, [(ids, torch.zeros_like(keep))], SITE)
    overflowing = tiny_model()
    overflowing.hf_model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(LlmWsaeError, match=r"predictions of .* are not finite; load the model in"):
        fisher_information(overflowing, [(ids, keep)], SITE)
