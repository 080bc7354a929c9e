"""The plan of a run: its sizes are those of a real one, and what does not fit is said."""

from dataclasses import replace

import pytest
from command_line import call, content, save_model, works
from refusals import misused
from tiny import tiny_model, write_jsonl

from llm_wsae import ModelConfig, Run, RunGrid, TextConfig, plan, run
from llm_wsae.data.config import HarvestConfig
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.model.site import Site
from llm_wsae.pipeline import planning
from llm_wsae.training.checkpoint import CHECKPOINT
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import Training
from llm_wsae.weights.config import WeightConfig

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
HARVEST = HarvestConfig(tokens=8192, context_size=16, batch_tokens=512, shard_tokens=2048)
TRAIN = TrainConfig(batch_size=256, expansion=4, dtype="float32")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def asked(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [40] * 400)
    return Run(
        site=SITES,
        out=tmp_path / "out" / "run",
        model=ModelConfig(model="model"),
        corpus=TextConfig(corpus=str(text)),
        grid=RunGrid(rule=("uniform", "whitening"), k=(4,), architecture=("topk",)),
        harvest=HARVEST,
        train=TRAIN,
        evaluate=EvaluateConfig(tokens=400, bootstraps=9),
    )


def test_sizes_are_those_of_a_real_run(model, asked, monkeypatch):
    """Roughly: a store this small is mostly headers."""
    takes, checkpoints, finish = plan(asked, model), [], Training.finish
    assert not asked.folder.exists()  # measuring leaves nothing behind

    def finish_and_look(training):
        training.save()
        checkpoints.append((training.out / CHECKPOINT).stat().st_size)
        finish(training)

    monkeypatch.setattr(Training, "finish", finish_and_look)
    run(asked, model)
    one = next(iter((asked.folder / SITES[0]).glob("*/sae_weights.safetensors")))
    dictionaries = len(SITES) * takes.arms * one.stat().st_size
    store = sum(map(len, content(asked.folder / "store").values()))
    assert takes.checkpoint_bytes == pytest.approx(checkpoints[0], rel=0.25)
    assert takes.dictionary_bytes == pytest.approx(dictionaries, rel=0.25)
    assert 0.3 * store < takes.store_bytes < store
    assert list(takes.seconds) == ["harvest", "train", "evaluate"]
    assert all(seconds > 0 for seconds in takes.seconds.values())


def test_evaluation_passes_through_what_is_behind_the_sites(model):
    """Of three blocks, and with four baselines beside one dictionary."""
    second, both = (
        planning._passes(model, [*map(Site.parse, sites)], 1) for sites in (SITES[1:], SITES)
    )
    block = sum(one.numel() for one in model.hf_model.model.layers[0].parameters())
    head = model.W_U.numel() / block
    assert second == pytest.approx(5 * (1 + head) / 2, rel=0.01)
    assert both == pytest.approx(5 * (2 + head + 1 + head) / 2, rel=0.01)


def test_a_store_is_its_rows_and_a_stream_keeps_none(model, asked, monkeypatch):
    monkeypatch.setattr(planning, "SECONDS", 0.01)
    found, rows = plan(asked, model), 512 * 15
    assert found.rows == rows and found.trained_rows == rows // 256 * 256
    assert found.store_bytes > 2 * rows * 16 * 4
    streamed = plan(replace(asked, stream=True), model)
    assert streamed.store_bytes == 0 and streamed.disk_bytes < found.disk_bytes
    buffered = plan(replace(asked, stream=True, buffer_tokens=2**26), model)
    assert buffered.memory_bytes - streamed.memory_bytes >= 2**25 * len(SITES) * 16 * 4
    longer = plan(replace(asked, train=replace(TRAIN, tokens=4 * rows)), model)
    assert longer.trained_rows == 4 * rows and longer.store_bytes == found.store_bytes


def test_arms_are_those_that_will_be_trained():
    for alphas, count in (((0.5,), 3), ((0.25, 0.5), 5), (("auto", 0.5), 3)):
        rules = ("uniform", "variance", "whitening")
        grid = RunGrid(rule=rules, alpha=alphas, architecture=("topk",))
        assert len(grid.likely_arms(WeightConfig(), 8)) == count


def test_what_does_not_fit_is_said_and_not_measured(model, asked):
    found = plan(replace(asked, train=replace(TRAIN, expansion=10**7)), model)
    assert not found.seconds and found.shortage().startswith("the run would need ")
    fits = replace(found, disk_bytes=10**5, memory_bytes=10**6)
    assert fits.shortage() is None
    assert "lower the expansion" in replace(fits, memory_there=10_000).shortage()
    short = replace(fits, disk_free=10_000)
    assert "9.8 KiB are free; ask for fewer tokens" in short.shortage()


def test_requests_that_cannot_be_are_refused(model, asked, tmp_path):
    misused("less than one batch of 256", replace, asked, harvest=replace(HARVEST, tokens=100))
    misused(r"blocks\.7", plan, replace(asked, site=("blocks.7.hook_resid_post",)), model)
    nothing = write_jsonl(tmp_path / "few.jsonl", [1] * 30)
    packing = replace(HARVEST, one_document_per_context=True, drop_positions=15)
    with pytest.raises(LlmWsaeError, match="gives a row"):
        plan(replace(asked, corpus=TextConfig(corpus=str(nothing)), harvest=packing), model)


def test_the_command_prints_a_table_or_json(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [40] * 400)
    words = ("plan", "--model", save_model(tmp_path / "model"), "--corpus", text, "--site",
             SITES[0], "--tokens", 4096, "--harvest.context-size", 16, "--train.batch-size", 256,
             "--eval-tokens", 300, "--k", 4, "--out", tmp_path / "out")  # fmt: skip
    found = works(*words, "--json").json
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    table = works(*words).out
    for line in ("rows", "store", "checkpoint", "disk", "memory", "harvest", "train", "in all"):
        assert f"\n{line} " in table
    assert not (tmp_path / "out").exists()
    large = call(*words, "--train.expansion", 10**7)
    assert large.code == 1 and "\nllm-wsae: the run would need " in large.err
