"""What a run takes: sizes beside those of a real one, times that grow with the work, and what does
not fit."""

import inspect
from dataclasses import replace

import pytest
import torch
from command_line import call, save_model, works
from tiny import tiny_model, write_jsonl

from llm_wsae import pipeline
from llm_wsae.data.config import HarvestConfig, StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.harvesting import harvest
from llm_wsae.model.prepacking import prepackable
from llm_wsae.model.site import Site
from llm_wsae.pipeline import run
from llm_wsae.planning import planning, sizes, speeds
from llm_wsae.planning.planning import plan
from llm_wsae.streaming import ActivationStreams
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import CHECKPOINT
from llm_wsae.training.config import BESIDE_BASELINES, TrainConfig
from llm_wsae.training.one_site import Training
from llm_wsae.training.trainer import Interrupted, train, train_sites
from llm_wsae.weighing import measure_inputs, measure_stream_inputs
from llm_wsae.weights.choosing import choose_weights

SITES = [Site.parse("blocks.0.hook_resid_post"), Site.parse("blocks.1.hook_resid_post")]
HARVEST = HarvestConfig(
    context_size=32, tokens=40_000, batch_tokens=2048, shard_tokens=8192, dtype="float32"
)
TRAIN = TrainConfig(expansion=16, batch_size=512, dtype="float32")
EVALUATE = EvaluateConfig(tokens=1000, batch_tokens=512, bootstraps=10)
ARMS = 5  # plain, of the paper's rule and whitened ones, and two of which one half is random
SETTINGS = {"harvest_config": HARVEST, "train_config": TRAIN, "evaluate_config": EVALUATE}


@pytest.fixture(scope="module")
def model():
    return tiny_model(width=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", [3000] * 16)


@pytest.fixture
def fixed(monkeypatch):
    """Speeds that do not depend on the machine."""
    known = dict(zip(SITES, (1e-3, 2e-3), strict=True))

    def measure(model, sites, *settings):
        evaluated = sum(known[site] for site in sites)
        return speeds.Speeds("here", True, 1e-4, 1e-6, 0.5, 1e-5, 0.25, evaluated, 1e-9)

    monkeypatch.setattr(planning, "measure", measure)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_rows_and_bytes_are_those_of_a_real_run(model, text, tmp_path, monkeypatch, fixed):
    contexts = Packer.for_model(model, HARVEST).contexts(Corpus.open(str(text), "train"))
    found = plan(model, SITES, contexts=contexts, out=tmp_path, **SETTINGS)
    store = harvest(model, Corpus.open(str(text), "train"), SITES, tmp_path / "store", HARVEST)
    inputs = measure_inputs(["whitening"], store, SITES[0])
    measure_inputs(["whitening"], store, SITES[1])
    assert found.rows == pytest.approx(store.num_rows, rel=1e-3)
    assert found.tokens == 40_000
    assert found.store_bytes == pytest.approx(size(tmp_path / "store"), rel=0.03)

    weights = choose_weights(inputs, ["uniform", "variance", "whitening"], [0.5])
    arms = make_arms(weights, [32], architectures=BESIDE_BASELINES)
    assert found.arms == len(arms) == ARMS and found.d_sae == 1024
    source, out = store.source(SITES[0]), tmp_path / "trained"

    def stop_with_a_checkpoint(self, step):
        self.save()
        raise Interrupted("enough", 2)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Training, "read_numbers", stop_with_a_checkpoint)
        train(source, arms, TRAIN, out)
    assert found.checkpoint_bytes == pytest.approx(size(out), rel=0.03)
    assert (out / CHECKPOINT).exists()
    train(source, arms, TRAIN, out)
    folders = sum(size(out / arm.name) for arm in arms)
    assert found.dictionary_bytes == pytest.approx(2 * folders, rel=0.03)
    most = found.store_bytes + found.dictionary_bytes // 2 + 2 * found.checkpoint_bytes
    assert found.disk_bytes == most


def test_without_a_text_rows_are_what_contexts_keep(model, fixed):
    found = plan(model, SITES[:1], **SETTINGS)
    assert found.rows == 1250 * 31 and found.trained_rows == 75 * 512
    short = replace(HARVEST, drop_positions=0, prepend_bos=False)
    found = plan(model, SITES[:1], **SETTINGS | {"harvest_config": short})
    assert found.rows == 40_000


def test_times_grow_with_tokens(model, fixed):
    once = plan(model, SITES, **SETTINGS)
    longer = replace(HARVEST, tokens=4 * 40_000)
    again = plan(model, SITES, **SETTINGS | {"harvest_config": longer}, price_per_hour=3.0)
    covariance = 2 * once.rows * 1e-6  # both sites
    assert once.seconds["harvest"] == pytest.approx(4.0 + covariance)
    assert once.seconds["evaluate"] == pytest.approx(3.0)  # both sites
    assert again.seconds["harvest"] == pytest.approx(16.0 + 4 * covariance)
    assert again.seconds["evaluate"] == pytest.approx(3.0)
    fixed_part = 2 * (0.25 + 1e-9 * once.dictionary_bytes / 2)
    steps = [p.seconds["train"] - fixed_part for p in (once, again)]
    assert steps[0] == pytest.approx(2 * 75 * 512 * 1e-5)
    assert steps[1] == pytest.approx(4 * steps[0], rel=0.02)
    assert again.total_seconds == pytest.approx(sum(again.seconds.values()))
    assert again.price == pytest.approx(3.0 * again.total_seconds / 3600)


def test_checkpoints_take_time(model, fixed):
    often = replace(TRAIN, checkpoint_seconds=0.1)  # 0.384 s of steps
    times = [
        plan(model, SITES[:1], **SETTINGS | {"train_config": config}).seconds["train"]
        for config in (TRAIN, often)
    ]
    one = plan(model, SITES[:1], **SETTINGS).checkpoint_bytes * 1e-9
    assert times[1] - times[0] == pytest.approx(3 * one)


def test_trials_of_alpha_are_counted(model, fixed):
    found = plan(model, SITES[:1], alphas=["auto", 0.5], architectures=("topk",), **SETTINGS)
    trials = 75 * 512 * 1e-5 + 10_000 * 1e-3
    assert found.seconds["choose α"] == pytest.approx(5 / 3 * trials)


def test_a_stream_keeps_no_rows_and_reads_its_first_tokens_before(model, fixed):
    stream = StreamConfig(context_size=32, buffer_tokens=4000, statistics_tokens=8000)
    stored = plan(model, SITES, **SETTINGS)
    found = plan(model, SITES, stream_config=stream, **SETTINGS)
    assert found.advice == "stream" and found.store_bytes < stored.store_bytes / 5
    own, one = found.dictionary_bytes // 2, found.checkpoint_bytes  # the one is larger
    assert found.disk_bytes == found.store_bytes + 3 * one
    assert stored.disk_bytes == stored.store_bytes + own + 2 * one
    tokens = 40_000 * found.trained_rows // found.rows + 2 * 8000  # whitening reads them twice
    rows = 8000 * found.rows // 40_000
    assert found.seconds["harvest"] == pytest.approx(1e-4 * tokens + 2 * rows * 1e-6, rel=1e-4)
    plain = plan(model, SITES, stream_config=stream, rules=["uniform"], **SETTINGS)
    once = 1e-4 * (tokens - 8000)
    assert (
        plain.seconds["harvest"] == pytest.approx(once, rel=1e-4) and "weigh" not in plain.seconds
    )
    assert found.seconds["weigh"] == stored.seconds["weigh"] == 2 * 0.5
    assert found.seconds["train"] == stored.seconds["train"]


def test_all_sites_of_a_stream_are_trained_at_once(model, text, tmp_path, monkeypatch, fixed):
    """In memory, on the disk, and in the time that checkpoints take."""
    stream = StreamConfig(context_size=32, batch_tokens=2048, buffer_tokens=4096)
    found, alone, stored = (
        plan(model, sites, stream_config=config, **SETTINGS, accelerator="h100")
        for sites, config in ((SITES, stream), (SITES[:1], stream), (SITES, None))
    )
    arms_bytes, dictionaries_bytes = ARMS * 26 * 64 * 1024, ARMS * 8 * 64 * 1024
    assert found.memory_bytes - alone.memory_bytes == arms_bytes
    assert alone.memory_bytes == stored.memory_bytes
    monkeypatch.setattr(planning, "peak_memory_bytes", lambda: 2**30)
    here, one = (
        plan(model, sites, stream_config=stream, **SETTINGS).memory_bytes
        for sites in (SITES, SITES[:1])
    )
    assert here - one == arms_bytes + dictionaries_bytes  # which are more than the rows
    saved = replace(TRAIN, checkpoint_seconds=0.1)  # 0.384 s of steps at a site
    times = [
        plan(model, SITES, stream_config=stream, **SETTINGS | {"train_config": config})
        .seconds["train"] for config in (TRAIN, saved)
    ]  # fmt: skip
    assert times[1] - times[0] == pytest.approx(7 * 2 * found.checkpoint_bytes * 1e-9)

    streams = ActivationStreams(model, Corpus.open(str(text), "train"), SITES, stream)
    inputs = measure_stream_inputs(["whitening"], streams, SITES[0])
    weights = choose_weights(inputs, ["uniform", "variance", "whitening"], [0.5])
    arms = {site: make_arms(weights, [32], architectures=BESIDE_BASELINES) for site in SITES}

    def stop_with_checkpoints(training, *given):
        for one in trainings:
            one.save()
        raise Interrupted("enough", 2)

    trainings = []
    begin = Training.begin
    monkeypatch.setattr(Training, "begin", lambda own: (begin(own), trainings.append(own)))
    monkeypatch.setattr(Training, "advance", stop_with_checkpoints)
    with pytest.raises(Interrupted):
        train_sites(streams, arms, replace(TRAIN, tokens=5120), tmp_path)
    files = [path.stat().st_size for path in tmp_path.rglob(CHECKPOINT)]
    assert sum(files) == pytest.approx(2 * found.checkpoint_bytes, rel=0.03) and len(files) == 2


def test_the_memory_of_an_evaluation_is_that_of_all_sites(model, monkeypatch, fixed):
    """Where the training takes less: of the dictionaries of all sites at once, the activations at
    these sites and at the model's end, and the model's end for each variant of a batch."""
    small = replace(TRAIN, expansion=2, batch_size=64)
    wide = EvaluateConfig(tokens=100_000, batch_tokens=8192)
    settings = {**SETTINGS, "train_config": small, "evaluate_config": wide}
    monkeypatch.setattr(planning, "peak_memory_bytes", lambda: 2**30)
    row, own = 64 * 4, ARMS * 8 * 64 * 128  # the dictionaries of a site

    def expected(sites, together):
        held = together * (2 * ARMS + 2) * 8192 * row
        return (sites + 1) * 100_000 * row + together * own + held

    def planned(sites, **more):
        return plan(model, SITES[:sites], **settings, **more).memory_bytes

    weights = planning.parameters_bytes(model.hf_model)
    copies = sum(one.weight.nbytes for one in prepackable(model.hf_model))  # on a CPU
    for sites in (1, 2):
        assert planned(sites) == 2**30 + copies + expected(sites, sites)
        assert planned(sites, accelerator="h100") == weights + expected(sites, sites)
    card = replace(speeds.ACCELERATORS["h100"], memory=8 * own - 1)  # room for those of one site
    monkeypatch.setitem(speeds.ACCELERATORS, "h100", card)
    assert planned(2, accelerator="h100") == weights + expected(2, 1)
    card = replace(card, memory=weights + 4 * own - 1)  # nor beside the model, in half of the rest
    monkeypatch.setitem(speeds.ACCELERATORS, "h100", card)
    monkeypatch.setattr(sizes, "sites_together", lambda *given: asked.append(given) or [1, 1])
    asked = []
    assert planned(2, accelerator="h100") == weights + expected(2, 1)
    assert asked == [([own, own], card.memory, card.memory - weights)]
    monkeypatch.setattr(sizes, "HELD_BYTES", 8192 * row)  # and that of the last dictionary
    others = 2 * (2 * ARMS + 2) * 8192 * row
    assert planned(2) == 2**30 + copies + expected(2, 2) - others + 3 * 8192 * row


def test_dictionaries_of_earlier_sites_stay_in_memory(model, monkeypatch, fixed):
    monkeypatch.setattr(planning, "peak_memory_bytes", lambda: 2**30)
    two, one = (plan(model, sites, **SETTINGS).memory_bytes for sites in (SITES, SITES[:1]))
    assert two - one == ARMS * 8 * 64 * 1024


def test_an_accelerator_is_computed_and_grows_with_arms(model, monkeypatch):
    monkeypatch.setattr(speeds, "_write", lambda rows, folder: 0.0)
    found = {
        count: plan(model, SITES, accelerator="h100", num_arms=count, **SETTINGS)
        for count in (3, 12)
    }
    few, many = found[3], found[12]
    assert few.times == "estimated" and few.device == "NVIDIA H100 SXM"
    assert few.memory_there == 80 * 10**9 and many.arms == 12
    assert few.disk_free is None and "free" not in few.table()
    assert few.why.startswith("it takes 26.") and "would do for one pass" in few.why
    one = 2 * few.trained_rows * _h100_row()
    assert few.seconds["train"] == pytest.approx(3 * one)
    assert many.seconds["train"] == pytest.approx(12 * one)
    assert many.checkpoint_bytes == 4 * few.checkpoint_bytes
    with pytest.raises(UsageError, match="no published numbers of 'h101' here; did you mean"):
        plan(model, SITES, accelerator="h101", **SETTINGS)


def _h100_row():
    """Seconds for a row and an arm: 64 → 1024, batches of 512, by hand."""
    product = 2 * 64 * 1024 * 512 / (0.4 * 989e12)
    moved = (2 * 64 * 1024 * 24 + 64 * 1024 * 2 + 512 * 1024 * 4) / (0.6 * 3.35e12)
    return (product + moved) / 512


def test_the_speed_of_an_accelerator_by_hand(model, tmp_path):
    weights = planning._stand_ins([planning.Rule.parse("uniform")], [], 64, planning.WeightConfig())
    arms = make_arms(weights, [32]) * 2
    card = speeds.ACCELERATORS["h100"]
    found = speeds.published(card, model, SITES, arms, tmp_path, 32, TRAIN)
    assert found.row == pytest.approx(2 * _h100_row())
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64  # attention, MLP, norms
    passed = 2 * block + 2 * 32 * 64
    rest = 2 * passed + 2 * 64 * 52
    last = rest - passed  # behind the second site
    dictionaries = 2 * 2 * 2 * 64 * 1024
    # the model itself once, up to the last site and on; zeros, the mean, raw dimensions and two
    # dictionaries
    every = (2 * passed + last) + 5 * rest + 5 * last + dictionaries
    assert found.evaluated == pytest.approx(every / (0.4 * 989e12))


def test_measuring_leaves_everything_as_it_was(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "SECONDS", 0.2)
    ids = torch.arange(40).reshape(2, 20)
    before, state = model.logits(ids), torch.get_rng_state()
    hooks = sum(len(m._forward_hooks) for m in model.hf_model.modules())
    contexts = Packer.for_model(model, HARVEST).contexts(Corpus.open(str(text), "train"))
    found = plan(model, SITES, contexts=contexts, out=tmp_path / "runs" / "x", **SETTINGS)
    assert found.times == "measured" and found.advice == "store"
    assert list(found.seconds) == ["harvest", "weigh", "train", "evaluate"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert torch.equal(model.logits(ids), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(len(m._forward_hooks) for m in model.hf_model.modules()) == hooks
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_said(model, monkeypatch, fixed):
    needed = plan(model, SITES, **SETTINGS)
    monkeypatch.setattr(planning, "free_space", lambda path: needed.disk_bytes - 1)
    found = plan(model, SITES, **SETTINGS)
    assert found.seconds == {} and found.price is None and found.times == "not measured"
    assert found.advice == "stream"
    assert "run --stream keeps no rows" in found.why and "0.99 × the tokens" in found.why
    with pytest.raises(LlmWsaeError, match=r"on the disk of .* \(about 39,9\d\d fit\)") as raised:
        found.check()
    assert raised.value.exit_code == 1
    assert "warning: the run would need" in found.text()
    monkeypatch.setattr(planning, "free_space", lambda path: needed.disk_bytes)
    monkeypatch.setattr(planning, "memory_of", lambda device: needed.memory_bytes // 2)
    with pytest.raises(LlmWsaeError, match=r"of memory, but cpu has .* in all; lower"):
        plan(model, SITES, **SETTINGS).check()


def test_requests_that_cannot_be_are_refused(model):
    far = Site.parse("blocks.9.hook_resid_post")
    for change, sentence in (
        ({"sites": []}, "there is no site to plan for"),
        ({"sites": [far]}, "there is no blocks.9.hook_resid_post: the model has 3 blocks"),
        ({"num_arms": 0}, "at least one dictionary"),
        ({"ks": [5000]}, "5000"),
        ({"harvest_config": replace(HARVEST, tokens=300)}, "less than one batch of 512"),
    ):
        with pytest.raises(UsageError, match=sentence):
            plan(model, **{"sites": SITES, **SETTINGS, **change})


def test_no_more_text_is_taken_than_the_run_would_read(model):
    huge = replace(HARVEST, batch_tokens=10**12)
    assert len(planning._sample(model, None, huge)) == huge.num_contexts


def test_a_stream_is_advised_only_where_the_rest_fits(model, monkeypatch, fixed):
    needed = plan(model, SITES, **SETTINGS)
    rest = needed.disk_bytes - needed.store_bytes
    for free, advice in ((needed.disk_bytes - 1, "stream"), (rest - 1, "store")):
        monkeypatch.setattr(planning, "free_space", lambda path, free=free: free)
        assert plan(model, SITES, **SETTINGS).advice == advice


def test_a_text_that_gives_no_row_is_refused(model, text):
    contexts = Packer.for_model(model, HARVEST).contexts(Corpus.open(str(text), "train"))
    none = (context._replace(keep=context.keep & False) for context in contexts)
    with pytest.raises(LlmWsaeError, match="gives a row; lower --drop-positions"):
        plan(model, SITES, contexts=none, **SETTINGS)


def test_defaults_are_those_of_run():
    own, theirs = (inspect.signature(f).parameters for f in (plan, run))
    shared = own.keys() & theirs.keys() - {"model", "sites", "out"}
    assert len(shared) == 11
    assert all(own[name].default == theirs[name].default for name in shared)


def test_a_run_says_what_it_takes_and_makes_the_same_bytes(
    model, text, tmp_path, monkeypatch, capsys
):
    settings = {**SETTINGS, "harvest_config": replace(HARVEST, tokens=4000), "rules": ["uniform"]}
    monkeypatch.setattr(speeds, "SECONDS", 0.2)
    made = {}
    for says in (True, False):
        if not says:
            monkeypatch.setattr(pipeline._Run, "announce", lambda *given: None)
        out = tmp_path / str(says)
        run(model, str(text), SITES[:1], out, **settings)
        said = capsys.readouterr().err
        assert said.count("takes up to") == said.count("takes about") == says
        made[says] = {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in sorted(out.rglob("*.safetensors"))
        }
        run(model, str(text), SITES[:1], out, **settings)
        assert "takes about" not in (again := capsys.readouterr().err)
        assert "takes up to" not in again
    assert len(made[True]) > 3 and made[True] == made[False]


def test_a_short_run_is_measured_on_a_tenth_of_it(model, text, monkeypatch):
    """And called rough. Its steps are those of most of the training, in which latents are dead."""
    read, kept_rows, step, steps = [], speeds.kept_rows, Training.step, []

    def counted(model, contexts, sites):
        read.append(len(contexts.ids))
        return kept_rows(model, contexts, sites)

    monkeypatch.setattr(speeds, "kept_rows", counted)
    monkeypatch.setattr(Training, "step", lambda *given: (steps.append(1), step(*given)))
    for tokens, contexts, warm_up, most in ((40_000, 125, 8, 7), (500_000, 512, 2, 50)):
        read.clear()
        steps.clear()
        longer = replace(HARVEST, tokens=tokens)
        found = plan(model, SITES[:1], **SETTINGS | {"harvest_config": longer})
        assert 1 < sum(read) <= contexts + 64  # and a pass to warm up
        assert warm_up + 3 <= len(steps) <= warm_up + most
        is_rough = tokens < 500_000
        assert ("; roughly measured)" in found.text()) == is_rough
        assert ("roughly measured, " in found.table()) == is_rough


WORDS = (
    "--tokens", 40_000, "--harvest.context-size", 32, "--harvest.batch-tokens", 2048,
    "--expansion", 16, "--train.batch-size", 512, "--eval-tokens", 1000,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), width=64)


def test_the_command_prints_a_table_or_json(folder, text, tmp_path, fixed):
    words = ("plan", "--model", folder, "--site", SITES[0], "--out", tmp_path / "runs", *WORDS)
    found = works(*words, "--corpus", text, "--arms", 5, "--price-per-hour", 2, "--json").json
    assert found["arms"] == 5 and found["d_sae"] == 1024 and found["times"] == "measured"
    assert found["price"] == pytest.approx(found["total_seconds"] * 2 / 3600)
    table = works(*words, "--k", 16, 32).out
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "38,750" in lines["rows"] and "10 × 1,024 latents" in lines["checkpoint"]
    assert "measured, 9,904 tokens/s" in lines["harvest"]  # covariance included
    assert "store: its " in table and not (tmp_path / "runs").exists()
    estimated = works(*words, "--device", "l4").out
    assert "estimated" in estimated and "on NVIDIA L4" in estimated


def test_the_command_refuses_in_a_sentence(folder, monkeypatch):
    words = ("plan", "--model", folder, *WORDS)
    sites = ("--site", SITES[0], "blocks.7.hook_resid_post")
    for more, sentence in (
        (sites, "there is no blocks.7.hook_resid_post: the model has 3 blocks"),
        ((*sites[:2], "--device", "abacus"), "there is no device 'abacus' on this machine"),
        ((*sites[:2], "--price-per-hour", -1), "--price-per-hour must be"),
    ):
        refused = call(*words, *more)
        assert refused.code == 2 and sentence in refused.err and refused.out == ""
    monkeypatch.setattr(planning, "free_space", lambda path: 2**20)
    refused = call(*words, *sites[:2], "--json")
    assert refused.code == 1 and refused.out == ""
    assert "1.0 MiB are free; train fewer or smaller ones, or choose a folder" in refused.err
