"""Plants in a store whose every feature is known: what is planted, seen and measured."""

import copy
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from refusals import fails, misused
from small_dictionaries import make_dictionary, make_info

from llm_wsae.data.harvesting import StoreWriter, finish_store
from llm_wsae.data.packing import Contexts
from llm_wsae.data.rows import CHUNK_ROWS, ActivationSource
from llm_wsae.data.store import ActivationStore, Manifest
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import ReLU
from llm_wsae.errors import UsageError
from llm_wsae.lab import planting
from llm_wsae.lab.config import PlantConfig
from llm_wsae.lab.planting import PlantedSource, Plants, make_plants, measure_recovery
from llm_wsae.model.site import Site
from llm_wsae.weights.scoring import RuleInputs

SITE, D_IN, POSITIONS, SHARDS = Site.parse("blocks.0.hook_resid_post"), 24, 64, 3
CONFIG = PlantConfig(per_cell=4, strengths=(0.5, 1.0), rarest=0.01, commonest=0.05, token_share=0.5)
NUM_PLANTS = 7 * 2 * 4
NATURAL = 6


def write_store(folder, scale=1.0):
    """7 chunks and a bit: sparse features on the first 6 axes, a little noise on all; 40 tokens."""
    draw, shape = np.random.default_rng(5), (40, POSITIONS)
    packing = {"context_size": POSITIONS, "prepend_bos": False, "drop_positions": 0}
    packing |= {"drop_special": False, "one_document_per_context": False}
    model = dict.fromkeys(("name", "dtype", "weights_sha256"), "")
    manifest = Manifest(
        model, {"name": ""}, [str(SITE)], "float32", D_IN, packing, None, 40, 40, SHARDS * 40
    )
    for name in (str(SITE), "tokens"):
        (folder / name).mkdir(parents=True)
    with StoreWriter(folder, manifest) as writer:
        for shard in range(SHARDS):
            ids = draw.integers(0, 40, shape).astype(np.int32)
            nothing = np.zeros(shape, dtype=np.int32)
            keep = draw.random(shape) < 0.98
            rows = draw.standard_normal((int(keep.sum()), D_IN)) * np.linspace(0.01, 0.1, D_IN)
            on = draw.random((len(rows), NATURAL)) < 0.2
            rows[:, :NATURAL] += on * draw.uniform(0.5, 1.5, on.shape)
            contexts = Contexts(ids, keep, nothing, nothing, (0, 0), (0, 0), {})
            writer.add(shard, contexts, {str(SITE): torch.from_numpy(rows * scale).float()})
        writer.wait()
    manifest.save(folder)
    finish_store(folder, manifest)
    return ActivationStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("planting") / "store")


@pytest.fixture(scope="module")
def source(store):
    return PlantedSource(store, SITE, CONFIG)


def read(source, start=0, stop=None):
    """Planted rows of a source's store, with the truth as a dense table."""
    reader = source.reader()
    rows = torch.empty((stop or reader.num_rows) - start, D_IN)
    found = reader.read(start, rows)
    truth = torch.zeros(len(rows), len(source.plants), dtype=torch.float64)
    truth[found.row, found.plant] = torch.from_numpy(found.strength)
    return rows, truth


def test_rows_are_the_stores_plus_what_is_said_to_be_planted_however_they_are_read(store, source):
    rows, truth = read(source)
    planted = truth.float() @ source.plants.directions
    natural = store.rows(SITE, 0, store.num_rows)
    torch.testing.assert_close(rows, natural + planted, atol=1e-6, rtol=1e-5)
    assert isinstance(source, ActivationSource) and source.prepends_bos is False
    for start, stop in ((0, 5), (1000, 1100), (3 * CHUNK_ROWS - 1, 5 * CHUNK_ROWS + 2)):
        piece, true = read(source, start, stop)
        assert torch.equal(piece, rows[start:stop]) and torch.equal(true, truth[start:stop])


def test_plants_fire_as_often_and_as_strongly_as_they_should(store, source):
    _, truth = read(source)
    plants, fires = source.plants, truth > 0
    contexts = [store.contexts(shard) for shard in range(SHARDS)]
    tokens = torch.cat([torch.from_numpy(one.ids[one.keep]) for one in contexts])
    for plant in range(len(plants)):
        token, p = int(plants.token[plant]), float(plants.probability[plant])
        where = torch.ones(len(truth), dtype=torch.bool) if token < 0 else tokens == token
        rate, n = float(fires[where, plant].double().mean()), int(where.sum())
        assert abs(rate - p) < 5 * (p / n) ** 0.5
        assert not bool(fires[~where, plant].any())
        ratio = truth[fires[:, plant], plant] / plants.strength[plant]
        assert ratio.min() >= 1 - planting.SPREAD and ratio.max() <= 1 + planting.SPREAD
    tied = plants.token >= 0
    assert int(tied.sum()) == NUM_PLANTS / 2
    assert (plants.probability[tied] == planting.ON_TOKEN).all()
    assert len(plants.token[tied].unique()) == int(tied.sum())
    assert plants.probability[~tied].min() >= 0.01 and plants.probability[~tied].max() <= 0.05


def test_strata_are_what_they_say(store, source):
    plants = source.plants
    variance = store.statistics(SITE).robust_variance
    order = variance.argsort()
    of = {name: plants.directions[[s == name for s in plants.stratum]] for name in plants.stratum}
    assert len(of) == 7 and {len(own) for own in of.values()} == {8}
    torch.testing.assert_close(plants.directions.norm(dim=1), torch.ones(NUM_PLANTS))
    for name, dimensions in (("quiet dimension", order[:8]), ("loud dimension", order[-8:])):
        assert torch.equal(of[name].abs().argmax(1).sort().values, dimensions.sort().values)
    covariance = store.statistics(SITE).robust_covariance
    quiet, loud = (
        (own @ covariance * own).sum(1)
        for own in (of["quiet component"].double(), of["loud component"].double())
    )
    assert quiet.max() < loud.min()
    pairs = of["antipodal"].view(4, 2, D_IN)
    torch.testing.assert_close(pairs[:, 0], -pairs[:, 1])
    corner = of["triangle"][:3]
    torch.testing.assert_close(corner @ corner.T, 1.5 * torch.eye(3) - 0.5, atol=1e-6, rtol=0)
    usual = store.statistics(SITE).usual_sample.double()
    norm = (usual - usual.mean(0)).norm(dim=1).median()
    wanted = torch.tensor(plants.relative_strength, dtype=torch.float64) * norm
    torch.testing.assert_close(plants.strength, wanted)


def test_resumed_or_shared_or_opened_again_batches_have_the_same_plants(store, source):
    whole = list(islice(source.batches(500, seed=3), 12))
    again = PlantedSource(store, SITE, CONFIG)
    assert again.identity() == source.identity()
    for one, other in zip(whole[4:], again.batches(500, seed=3, start=4), strict=False):
        assert torch.equal(one, other)
    parts = [islice(source.batches(500, 3, 0, (n, 3)), 12) for n in range(3)]
    for one, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(one.sort(0).values, torch.cat(shares).sort(0).values)
    other = PlantedSource(store, SITE, replace(CONFIG, seed=1))
    assert other.identity() != source.identity()


def test_held_out_rows_are_in_no_batch_and_in_no_statistic(store, source):
    rows, _ = read(source)
    assert source.num_rows == (store.num_rows // CHUNK_ROWS - 2) * CHUNK_ROWS
    trained = rows[: source.num_rows]
    batches = islice(source.batches(CHUNK_ROWS, seed=0), source.num_rows // CHUNK_ROWS)
    epoch = torch.cat(list(batches))
    assert torch.equal(epoch.sort(0).values, trained.sort(0).values)
    held = torch.cat([piece for piece, _ in source.heldout()])
    assert torch.equal(held, rows[source.num_rows :])
    statistics, moment = source.statistics(), source.second_moment()
    assert statistics.count == moment.count == source.num_rows
    torch.testing.assert_close(statistics.mean, trained.double().mean(0))
    found = RuleInputs(statistics, second_moment=moment).covariance
    exact = torch.cov(trained.double().T, correction=0)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=1e-3)


def perfect(source, gain=1.0, bias=0.0):
    """Latents 5 and up: one for each plant, read along the dual directions; 5 that never fire."""
    natural = torch.eye(D_IN, dtype=torch.float64)[:NATURAL]
    directions = torch.cat([source.plants.directions.double(), natural])
    encoder = torch.linalg.pinv(directions) if len(directions) <= D_IN else directions.T
    encoder = torch.cat([torch.zeros(D_IN, 5, dtype=torch.float64), encoder], 1)
    decoder = torch.cat([torch.zeros(5, D_IN, dtype=torch.float64), directions])
    return Dictionary(
        W_enc=encoder.float() * gain,
        W_dec=decoder.float(),
        b_enc=torch.full((len(decoder),), -bias),
        b_dec=torch.zeros(D_IN),
        sparsity=ReLU(),
        info=make_info(site=str(SITE)),
    )


@pytest.fixture(scope="module")
def few(store):
    """Few plants, so that a linear reading separates them: two each of axes and components."""
    source = PlantedSource(store, SITE, replace(CONFIG, per_cell=1, strengths=(1.0,), seed=2))
    plants, keep = source.plants, [0, 4]  # a quiet axis and a random direction
    often, untied = torch.tensor([0.05, 0.03], dtype=torch.float64), torch.tensor([-1, -1])
    known = plants.directions[keep], plants.strength[keep], (1.0, 1.0)
    strata = tuple(plants.stratum[i] for i in keep)
    source.plants = Plants(*known, often, untied, strata, plants.seed)
    return source


def test_what_knows_the_features_recovers_them_and_noise_recovers_nothing(few):
    found = measure_recovery(perfect(few, bias=0.4), few)
    assert found.recovered.tolist() == [1.0, 1.0] and float(found.f1.min()) > 0.97
    assert float(found.cosine.min()) > 0.999 and float(found.vanished.max()) < 0.03
    shrunk = measure_recovery(perfect(few, gain=0.5, bias=0.2), few)
    torch.testing.assert_close(shrunk.slope, found.slope / 2, rtol=0.02, atol=0)
    assert shrunk.l_gt == pytest.approx(found.l_gt, abs=0.01)  # which fits one scale
    assert found.l_gt < 0.1 and found.dead == pytest.approx(5 / (5 + 2 + NATURAL))
    facts = found.to_dict()
    assert facts["recovered"] == 1.0 and facts["plants"]["stratum"] == ["quiet dimension", "random"]
    noise = measure_recovery(make_dictionary(d_in=D_IN, d_sae=64, site=str(SITE)), few)
    assert noise.recovered.tolist() == [0.0, 0.0] and float(noise.f1.max()) < 0.5
    for site, width in (("blocks.9.hook_resid_post", D_IN), (str(SITE), 7)):
        other = make_dictionary(d_in=width, site=site)
        misused(f"the dictionary is for {width} dimensions of {site}", measure_recovery, other, few)


def test_the_measures_are_their_definitions(few):
    """Beside a slow count of everything, for a dictionary that is neither good nor bad."""
    dictionary = perfect(few, gain=0.8, bias=0.55)
    found, pieces = measure_recovery(dictionary, few), list(few.heldout())
    tables = []
    for half in (pieces[::2], pieces[1::2]):
        truths = [torch.zeros(len(rows), 2, dtype=torch.float64) for rows, _ in half]
        for truth, (_, firings) in zip(truths, half, strict=True):
            strength = torch.from_numpy(firings.strength).float().double()
            truth[firings.row, firings.plant] = strength
        codes = dictionary.encode(torch.cat([rows for rows, _ in half])).double()
        tables.append((torch.cat(truths), codes))
    decoder, power, product, total = dictionary.W_dec.double(), 0.0, 0.0, 0.0
    for plant in range(2):
        x, z = tables[0][0][:, plant], tables[0][1]
        both = ((x > 0)[:, None] & (z > 0)).sum(0)
        best = int((2 * both / ((x > 0).sum() + (z > 0).sum(0)).clamp(min=1)).argmax())
        x, z = tables[1][0][:, plant], tables[1][1][:, best]
        on, hit = x > 0, (x > 0) & (z > 0)
        along = float(decoder[best] @ few.plants.directions[plant].double())
        for measure, wanted in {
            "f1": 2 * hit.sum() / (on.sum() + (z > 0).sum()),
            "vanished": 1 - hit.sum() / on.sum(),
            "slope": along * (x * z)[hit].sum() / x[hit].square().sum(),
        }.items():
            assert float(getattr(found, measure)[plant]) == pytest.approx(float(wanted))
        length = float(decoder[best].norm())
        power += float(z.square().sum()) * length**2
        product += float((x * z).sum()) * length
        total += float(x.square().sum())
    assert found.l_gt == pytest.approx(1 - product**2 / power / total)


def test_of_what_never_fires_nothing_is_known(few):
    """A plant, or every latent."""
    rare = copy.copy(few)
    rare.plants = replace(few.plants, probability=torch.tensor([0.05, 0.0]).double())
    found = measure_recovery(perfect(rare, bias=0.4), rare)
    assert found.f1[1].isnan() and found.recovered[1].isnan() and found.vanished[1].isnan()
    assert found.to_dict()["plants"]["f1"][1] is None and found.means()["recovered"] == 1.0
    found = measure_recovery(perfect(few, bias=1e9), few)
    assert found.cosine.isnan().all() and found.slope.isnan().all() and found.l_gt == 1.0
    assert (found.f1 == 0).all() and (found.vanished == 1).all()


def test_of_a_plant_that_fires_in_one_half_alone_nothing_is_known(few):
    """The half where the latents are chosen: every other piece of the held-out rows."""
    dictionary = perfect(few, bias=0.4)
    whole, heldout = measure_recovery(dictionary, few), list(few.heldout())
    for rows, firings in heldout[::2]:
        mine = firings.plant == 0
        firings.strength[mine] = 0.0
        rows[firings.row[mine]] = 0.0
    silenced = copy.copy(few)
    silenced.heldout = lambda: heldout
    found = measure_recovery(dictionary, silenced)
    for measure in ("f1", "cosine", "slope", "vanished", "recovered"):
        assert getattr(found, measure).isnan().tolist() == [True, False]
    assert found.l_gt == pytest.approx(whole.l_gt, abs=0.1)


def test_what_cannot_be_planted_is_refused_in_a_sentence(store, tmp_path):
    with pytest.raises(UsageError, match="has 24 dimensions that vary, too few to plant along 16"):
        PlantedSource(store, SITE, replace(CONFIG, per_cell=8))
    strength, probability = "strengths must be at least 1e-06", "plants fire with prob"
    misused(f"{strength}.* would drown the stream; not 1.5", PlantConfig, strengths=(1.5,))
    misused(f"{strength}, or a plant is lost .* not 0.2, 0.0", PlantConfig, strengths=(0.2, 0.0))
    misused(f"{strength}.* not 1e-40", PlantConfig, strengths=(1e-40,))
    misused("strengths is nan, but must be a number", PlantConfig, strengths=(float("nan"),))
    misused(f"{strength}.*; not none", PlantConfig, strengths=())
    misused(f"{probability}.*from 0.2 to 0.01; these must rise", PlantConfig, rarest=0.2)
    misused(f"{probability}.*from 1e-30 to 0.01; .* at least 1e-06", PlantConfig, rarest=1e-30)
    misused(probability, PlantConfig, commonest=1.0)
    misused("seed is -1", PlantConfig, seed=-1)
    misused("per-cell is 0", PlantConfig, per_cell=0)
    misused("token-share must be from 0 to 1", PlantConfig, token_share=2.0)
    misused("heldout-share between 0 and 1", PlantConfig, heldout_share=0.0)
    often = replace(CONFIG, strengths=(1.0,), rarest=0.9, commonest=0.99)
    misused(r"together \d+\.\d times as long as the rows", PlantedSource, store, SITE, often)
    few = ActivationStore.open(store.folder)
    few.num_rows = 3 * CHUNK_ROWS - 1
    for own, config, sentence in (
        (few, CONFIG, "3,071 rows, 2,048 would be held out .* trained on; harvest more tokens"),
        (store, replace(CONFIG, heldout_share=0.99), r"held out .* trained on; lower heldout-sha"),
    ):
        misused(sentence, PlantedSource, own, SITE, config)
    with pytest.raises(UsageError, match="have 27 different tokens, too few to tie each of 28 "):
        make_plants(store.statistics(SITE), dict.fromkeys(range(27), 9), CONFIG)
    make_plants(store.statistics(SITE), dict.fromkeys(range(28), 9), CONFIG)
    flat = write_store(tmp_path / "flat", scale=0.0)
    sentence = "the rows do not vary in any dimension; take other rows"
    fails(sentence, make_plants, flat.statistics(SITE), {1: 1})
