"""Features planted upstream, carried by a model that is known: its blocks do nothing, so all that
is planted arrives as it was."""

import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from refusals import fails, misused
from several import run
from small_dictionaries import make_info
from tiny import VOCAB, random_llama, tiny_tokenizer, write_jsonl

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import ReLU
from llm_wsae.lab.config import UpstreamConfig
from llm_wsae.lab.planting import measure_recovery
from llm_wsae.lab.upstream import MEASURED, known_rows, plant_upstream, probe_f1
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

SITE, WIDTH = Site.parse("blocks.2.hook_resid_post"), 32
CONFIG = UpstreamConfig(
    block=0, per_strength=2, strengths=(0.6, 1.0), rarest=0.03, commonest=0.1, heldout_tokens=12_000
)
ROWS = HarvestConfig(tokens=12_000, context_size=16, dtype="float32", shard_tokens=4096)


def linear_model():
    """A model whose attention and MLPs write nothing, so that its stream is the embedding."""
    hf_model = random_llama(VOCAB, WIDTH, 2 * WIDTH)
    with torch.no_grad():
        for block in hf_model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        hf_model.lm_head.weight.mul_(50)
    return LanguageModel.from_live(hf_model, tiny_tokenizer(), "linear")


def parts(path):
    return [Corpus.open(str(path), part, 0.5) for part in ("train", "heldout")]


@pytest.fixture(scope="module")
def linear():
    return linear_model()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", [400] * 80)


@pytest.fixture(scope="module")
def text(path):
    return parts(path)


@pytest.fixture(scope="module")
def planted(linear, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("upstream") / "out"
    return out, plant_upstream(linear, *text, SITE, out, CONFIG, ROWS)


def test_rows_are_those_of_the_model_plus_what_is_said_to_be_planted(linear, planted):
    source, plants = planted[1], planted[1].model.plants
    each = (one for n in range(3) for one in source.rows.contexts(n).each())
    ids, keep = (
        np.stack(part) for part in zip(*((one.ids, one.keep) for one in each), strict=True)
    )
    clean = linear.activations(torch.from_numpy(ids), [SITE])[SITE][torch.from_numpy(keep)]
    rows, strengths = zip(*known_rows(source.rows, SITE, plants), strict=True)
    added = torch.from_numpy(np.concatenate(strengths)) @ plants.directions
    torch.testing.assert_close(torch.cat(rows), clean + added, atol=1e-5, rtol=1e-4)
    fires = np.concatenate(strengths) > 0
    assert fires.mean(0) == pytest.approx(plants.probability, rel=0.2)
    assert not plants.strengths(ids[0])[0].any()


def test_what_arrives_in_a_linear_model_is_what_was_planted(planted):
    source = planted[1]
    plants, found = source.model.plants, source.plants
    assert len(source.measured) == len(found) == 4
    torch.testing.assert_close(found.directions, plants.directions, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.strength, torch.from_numpy(plants.strength), rtol=1e-3, atol=0)
    assert found.relative_strength == pytest.approx(plants.relative_strength, rel=0.1)
    assert min(plant.probe_f1 for plant in source.measured) > 0.95
    assert min(plant.effect for plant in source.measured) > 0.05


def test_what_reads_the_plants_recovers_them(planted):
    source = planted[1]
    tokens = source.statistics().usual_sample
    found = source.plants.directions @ torch.linalg.pinv(torch.cov(tokens.T))
    scale = (found * source.plants.directions).sum(1, keepdim=True)
    encoder = (found / scale).T
    dictionary = Dictionary(
        W_enc=encoder.contiguous(),
        W_dec=source.plants.directions,
        b_enc=-(tokens.mean(0) @ encoder) - source.plants.strength.float() / 2,
        b_dec=torch.zeros(WIDTH),
        sparsity=ReLU(),
        info=make_info(site=str(SITE)),
    )
    recovery = measure_recovery(dictionary, source)
    assert recovery.latent.tolist() == [0, 1, 2, 3]
    assert float(recovery.f1.min()) > 0.8 and float(recovery.cosine.min()) > 0.999


def test_the_logits_are_those_with_plants_and_resuming_adds_none(linear, planted):
    model, ids = planted[1].model, torch.randint(0, 50, (2, 16))
    hidden = model.activations(ids, [SITE])[SITE]
    torch.testing.assert_close(model.logits(ids), linear.resume(ids, SITE, hidden))
    assert torch.equal(model.resume(ids, SITE, hidden), linear.resume(ids, SITE, hidden))
    assert not torch.equal(model.logits(ids), linear.logits(ids))


def batches(source):
    return torch.cat(list(islice(source.batches(100, seed=0), 5)))


def test_the_same_call_resumes_and_other_plants_are_refused(linear, text, planted, tmp_path):
    out = shutil.copytree(planted[0], tmp_path / "out")
    (out / MEASURED).unlink()
    shutil.rmtree(out / "store")
    again = plant_upstream(linear, *text, SITE, out, CONFIG, ROWS)
    assert again.measured == planted[1].measured
    assert torch.equal(batches(again), batches(planted[1]))
    before = again.measured
    more = replace(CONFIG, heldout_tokens=13_000)  # so they are measured anew
    assert plant_upstream(linear, *text, SITE, out, more, ROWS).measured != before
    other = replace(CONFIG, seed=1)
    fails("other settings.*planted", plant_upstream, linear, *text, SITE, out, other, ROWS)
    fails("other plants", again.rows.check_model, linear.identity())


def plant_in_a_process(path, out):
    return batches(plant_upstream(linear_model(), *parts(path), SITE, out, CONFIG, ROWS)).tolist()


def test_several_processes_plant_the_same(path, planted, tmp_path):
    for found in run(2, plant_in_a_process, path, tmp_path / "out"):
        assert found == batches(planted[1]).tolist()


def test_what_no_plant_reaches_or_nothing_finds_is_refused(linear, text, planted, tmp_path):
    early = Site.parse("blocks.0.hook_resid_post")
    ids = torch.zeros(1, 4, dtype=torch.long)
    misused("do not reach blocks.0", planted[1].model.activations, ids, [early])
    for said, site, changed in (
        ("do not reach blocks.0.hook_resid_post", early, {}),
        (
            "drown the stream; lower strengths, commonest or per-strength",
            SITE,
            {"per_strength": 99},
        ),
        ("there is no blocks.7", Site(8, "post"), {"block": 7}),
    ):
        asked = replace(CONFIG, **changed)
        misused(said, plant_upstream, linear, *text, site, tmp_path, asked, ROWS)
    assert not list(tmp_path.iterdir())
    weak = replace(CONFIG, strengths=(0.001,))
    fails("none of 2 .* counts", plant_upstream, linear, *text, SITE, tmp_path, weak, ROWS)


def test_a_probe_finds_what_is_linear_and_not_what_is_absent():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 12, generator=generator)
    fires = torch.rand(4000, 2, generator=generator) < 0.1
    rows[fires[:, 0], 3] += 8
    found = probe_f1(rows[:2000], fires[:2000], rows[2000:], fires[2000:])
    assert found[0] > 0.98 and found[1] < 0.4
