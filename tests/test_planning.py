"""The plan of a run: its sizes are those of a real one, and what does not fit is said."""

import inspect
from dataclasses import replace

import pytest
from command_line import call, save_model, works
from tiny import tiny_model, write_jsonl

from llm_wsae.data.config import HarvestConfig, StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.model.site import Site
from llm_wsae.pipeline import planning
from llm_wsae.pipeline import run as pipeline
from llm_wsae.pipeline.planning import plan, stand_ins
from llm_wsae.pipeline.run import run
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import CHECKPOINT
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.one_site import Training

SITES = [Site.parse(f"blocks.{block}.hook_resid_post") for block in (0, 1)]
HARVEST = HarvestConfig(tokens=8192, context_size=16, batch_tokens=512, shard_tokens=2048)
TRAIN = TrainConfig(batch_size=256, expansion=4, dtype="float32")
EVALUATE = EvaluateConfig(tokens=400, bootstraps=9)
CONFIGS = {"harvest_config": HARVEST, "train_config": TRAIN, "evaluate_config": EVALUATE}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", [40] * 400))


@pytest.fixture
def arms(model):
    return make_arms(stand_ins(("uniform", "whitening"), (0.5,), model.d_model), (4,), (), (0,))


@pytest.fixture
def planned(model, text, arms, tmp_path):
    def of(*, sites=SITES, arms=arms, **changes):
        return plan(model, Corpus.open(text, "train"), sites, arms, tmp_path, **CONFIGS | changes)

    return of


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_sizes_are_those_of_a_real_run(model, text, tmp_path, monkeypatch):
    """Roughly: a store this small is mostly headers."""
    found, checkpoints, finish, made = [], [], Training.finish, planning.plan

    def finish_and_look(training):
        training.save()
        checkpoints.append((training.out / CHECKPOINT).stat().st_size)
        finish(training)

    def plan_and_look(*given, **named):
        found.append(made(*given, **named))
        return found[-1]

    monkeypatch.setattr(Training, "finish", finish_and_look)
    monkeypatch.setattr(pipeline, "plan", plan_and_look)
    rules = {"rules": ("uniform", "whitening"), "ks": (4,)}
    run(model, text, SITES, tmp_path / "run", **rules, **CONFIGS)
    (takes,) = found
    one = next(iter((tmp_path / "run" / str(SITES[0])).glob("*/sae_weights.safetensors")))
    dictionaries = len(SITES) * takes.arms * one.stat().st_size
    assert takes.checkpoint_bytes == pytest.approx(checkpoints[0], rel=0.25)
    assert takes.dictionary_bytes == pytest.approx(dictionaries, rel=0.25)
    assert 0.3 * size(tmp_path / "run/store") < takes.store_bytes < size(tmp_path / "run/store")
    assert list(takes.seconds) == ["harvest", "train", "evaluate"]
    assert all(seconds > 0 for seconds in takes.seconds.values())


def test_a_store_is_its_rows_and_a_stream_keeps_none(planned):
    found = planned()
    assert found.rows == 512 * 15 and found.trained_rows == 512 * 15 // 256 * 256
    assert found.store_bytes > 2 * found.rows * 16 * 4
    streamed = planned(stream_config=StreamConfig(context_size=16))
    assert streamed.store_bytes == 0 and streamed.disk_bytes < found.disk_bytes
    longer = planned(train_config=replace(TRAIN, tokens=4 * found.rows))
    assert longer.trained_rows == 4 * found.rows and longer.store_bytes == found.store_bytes


def test_arms_are_those_that_will_be_trained():
    def names(*alphas):
        return [one.name for one in stand_ins(("uniform", "variance", "whitening"), alphas, 8)]

    assert len(names(0.5)) == 3 and len(names(0.25, 0.5)) == 5
    assert len(names("auto", 0.5)) == 3  # whitening's is chosen


def test_measuring_leaves_nothing_behind(planned, tmp_path):
    planned()
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_said_and_not_measured(planned, monkeypatch):
    monkeypatch.setattr(planning, "_first_tokens", pytest.fail)
    with monkeypatch.context() as patched:
        patched.setattr(planning, "free_space", lambda path: 10_000)
        found = planned()
        assert not found.seconds and "9.8 KiB are free; ask for fewer tokens" in found.shortage()
        with pytest.raises(LlmWsaeError, match="of disk"):
            found.check()
    monkeypatch.setattr(planning, "memory_of", lambda device: 10_000)
    assert "lower the expansion" in planned().shortage()


def test_requests_that_cannot_be_are_refused(planned, model, arms, tmp_path):
    with pytest.raises(UsageError, match="less than one batch of 256"):
        planned(harvest_config=replace(HARVEST, tokens=100))
    with pytest.raises(UsageError, match=r"blocks\.7"):
        planned(sites=[Site.parse("blocks.7.hook_resid_post")])
    nothing = write_jsonl(tmp_path / "few.jsonl", [1] * 3)
    config = replace(HARVEST, one_document_per_context=True, drop_positions=15)
    with pytest.raises(LlmWsaeError, match="gives a row"):
        plan(model, Corpus.open(str(nothing), "all"), SITES, arms, tmp_path / "o",
             **CONFIGS | {"harvest_config": config})  # fmt: skip


def test_defaults_are_those_of_run():
    own, of_run = (inspect.signature(verb).parameters for verb in (plan, run))
    for name in ("harvest_config", "stream_config", "train_config", "evaluate_config"):
        assert own[name].default == of_run[name].default


def test_the_command_prints_a_table_or_json(text, tmp_path):
    save_model(tmp_path / "model")
    words = ("plan", "--model", tmp_path / "model", "--corpus", text, "--site", SITES[0],
             "--tokens", 4096, "--harvest.context-size", 16, "--train.batch-size", 256,
             "--eval-tokens", 300, "--k", 4, "--out", tmp_path / "out")  # fmt: skip
    found = works(*words, "--json").json
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    table = works(*words).out
    for line in ("rows", "store", "checkpoint", "disk", "memory", "harvest", "train", "in all"):
        assert f"\n{line} " in table
    assert not (tmp_path / "out").exists()
    large = call(*words, "--train.expansion", 10**7)
    assert large.code == 1 and "\nllm-wsae: the run would need " in large.err
