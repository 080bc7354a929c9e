"""The faster number format, as measured; what was begun goes on in its own."""

import json

import pytest
import torch
from command_line import HARVEST, SITE, call, content, works

from llm_wsae.artifact import provenance
from llm_wsae.data.manifest import Manifest
from llm_wsae.machine import number_format
from llm_wsae.machine.number_format import fast_dtype, name_of

CPU = torch.device("cpu")
TRAIN = ("--site", SITE, "--expansion", 4, "--batch-size", 256, "--k", 4)


def measured(monkeypatch, of_float32, amx=False):
    """As on a processor with bfloat16 where float32 takes so many times its time."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    seconds = {torch.float32: 1e-3 * of_float32, torch.bfloat16: 1e-3}
    products = ("layers", "unembedding", "encoder")
    monkeypatch.setattr(number_format, "product_seconds", lambda: dict.fromkeys(products, seconds))


@pytest.mark.parametrize("kind", ["model", "encoder"])
@pytest.mark.parametrize(
    ("of_float32", "faster"),
    [(2, torch.bfloat16), (0.96, torch.bfloat16), (0.94, torch.float32), (0.5, torch.float32)],
)
def test_the_faster_one_is_chosen_and_a_tie_takes_less_memory(
    kind, of_float32, faster, monkeypatch
):
    measured(monkeypatch, of_float32)
    monkeypatch.setattr(provenance, "number_formats", {})
    assert fast_dtype(CPU, kind) == faster
    reason = provenance.number_formats[kind]
    assert reason.startswith(f"{name_of(faster)}: measured to be")


def test_the_measurement_takes_little_and_leaves_the_threads():
    number_format.product_seconds.cache_clear()
    threads = torch.get_num_threads()
    found = number_format.product_seconds()
    assert found is number_format.product_seconds() and torch.get_num_threads() == threads
    assert found.keys() == {"layers", "unembedding", "encoder"}
    for seconds in found.values():
        assert seconds.keys() == {torch.float32, torch.bfloat16}
        assert all(0 < one < 1 for one in seconds.values())


def test_without_the_instructions_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(number_format, "product_seconds", lambda: 1 / 0)
    assert fast_dtype(CPU) == torch.float32


def test_what_was_begun_goes_on_in_its_format(made_world, tmp_path, monkeypatch):
    """A harvest, then a training that is stopped: the second measurement finds the opposite."""
    text = ("--model", made_world / "model", "--corpus", made_world / "text.jsonl")
    store, out = tmp_path / "store", tmp_path / "out"
    harvest = ("harvest", *text, *HARVEST, "--out", store)
    train = ("train", store, *TRAIN, "--out", out)
    measured(monkeypatch, 0.5)
    works(*harvest)
    works(*train)
    made = [json.loads((out / name).read_text()) for name in ("training.json", "train.json")]
    assert made[0]["request"]["dtype"] == "float32" == Manifest.load(store).model["dtype"]
    assert made[1]["number_formats"]["encoder"] == "float32: measured to be the faster one here"
    measured(monkeypatch, 2)
    before = content(out / "uniform-k4")
    works(*train)  # finished: it would be refused in another format
    assert content(out / "uniform-k4") == before
    works(*harvest, "--tokens", 6000)
    assert Manifest.load(store).model["dtype"] == Manifest.load(store).dtype == "float32"
    record = json.loads((store / "harvest.json").read_text())
    assert record["number_formats"]["model"] == "float32: as recorded when this was begun"
    assert call(*harvest, "--model-dtype", "bfloat16").code == 1


def test_a_stream_goes_on_in_its_format(made_world, tmp_path, monkeypatch):
    text = ("--model", made_world / "model", "--corpus", made_world / "text.jsonl")
    streamed = ("train", *text, *TRAIN, "--context-size", 16, "--tokens", 2560)
    measured(monkeypatch, 0.5)
    works(*streamed, "--out", tmp_path)
    before = content(tmp_path / "uniform-k4")
    measured(monkeypatch, 2)
    works(*streamed, "--out", tmp_path)
    assert content(tmp_path / "uniform-k4") == before
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["number_formats"] == {
        kind: "float32: as recorded when this was begun" for kind in ("model", "encoder")
    }
