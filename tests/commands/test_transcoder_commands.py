"""Transcoders from the text to another tool's folder, on a model of three blocks."""

import json

import pytest
import torch
from command_line import HARVEST, STREAM, call, content, works

from llm_wsae.dictionary.circuit_tracer import load_transcoder_set
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.model.site import Site

ALL = ("--site", "blocks.*.mlp")
NAME = "uniform-batch-topk-k4"
GRID = ("--rule", "uniform", "--architecture", "batch-topk", "topk", "--skip", True)


@pytest.fixture(scope="module")
def trained(model_and_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("transcoders") / "all"
    found = works("train", *model_and_corpus, *STREAM, *GRID, *ALL, "--out", out, "--json").json
    assert [*found] == [f"blocks.{block}.mlp" for block in range(3)]
    return out


@pytest.fixture(scope="module")
def folders(trained):
    return [trained / f"blocks.{block}.mlp" / NAME for block in range(3)]


def test_the_same_command_goes_on(trained, model_and_corpus):
    before = content(trained)
    works("train", *model_and_corpus, *STREAM, *GRID, *ALL, "--out", trained)
    assert content(trained).keys() == before.keys()
    works("verify", trained)


def test_a_store_of_both_points_gives_dictionaries_weights_and_a_page(
    folders, model_and_corpus, tmp_path
):
    store, weights = tmp_path / "store", tmp_path / "weights.safetensors"
    works("harvest", *model_and_corpus, *HARVEST, "--site", "blocks.1.mlp", "--out", store)
    place, short = ("--site", "blocks.1.mlp"), ("--expansion", 4, "--batch-size", 256, "--k", 4)
    works("weigh", store, *place, "--rule", "whitening", "--out", weights)
    out = ("--out", tmp_path / "out")
    works("train", store, *place, *short, "--weights", weights, *out)
    one = Dictionary.load(tmp_path / "out/whitening-a0.5-k4")
    assert one.site == Site(1, "mlp") and one.W_skip is None
    assert one.info.store["target"]["site"] == "blocks.1.hook_mlp_out"
    told = works("inspect", tmp_path / "out/whitening-a0.5-k4", "--store", store, "--latent", 0)
    assert "blocks.1.mlp" in told.out
    page = tmp_path / "page.html"
    works("dashboard", folders[1], "--store", store, *model_and_corpus[:2], "--out", page)
    assert "blocks.1.mlp" in page.read_text()
    elsewhere = ("--site", "blocks.0.mlp", "--out", tmp_path / "other")
    assert "has no blocks.0.hook_mlp_out" in call("train", store, *elsewhere, *short).err


def test_a_report_has_one_and_all_blocks(folders, model_and_corpus, tmp_path):
    report = tmp_path / "report.json"
    said = works("evaluate", *folders, *model_and_corpus, "--tokens", 300, "--out", report).out
    assert f"{NAME} in place of 3 MLPs at once: cross-entropy" in said
    found = json.loads(report.read_text())
    assert found["together"][NAME]["blocks"] == 3
    rows = found["dictionaries"]
    assert len(rows) == 6
    alone = next(name for name in rows if name.startswith("skip alone of"))
    assert rows[alone]["l0"] == 0 < rows[alone]["fvu"]


def test_the_set_is_exported_and_verified(trained, folders, tmp_path):
    out = tmp_path / "set"
    to = ("--to", "circuit-tracer", "--out", out)
    assert "blocks, for circuit-tracer" in works("export", *folders, *to).out
    again = load_transcoder_set(out)
    x = torch.randn(10, again[0].d_in)
    for one, folder in zip(again, folders, strict=True):
        torch.testing.assert_close(one(x), Dictionary.load(folder)(x), rtol=1e-4, atol=1e-4)
    works("verify", out)
    for words, said in (
        ([trained, *to], "TopK transcoder"),
        ([*folders[1:], *to], "none of block 0"),
        ([folders[0], *to, "--store", out], "omit --store"),
        ([folders[0], "--to", "neuronpedia", "--out", tmp_path / "n"], "give their --store and it"),
    ):
        result = call("export", *words)
        assert result.code and said in result.err, said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--site", "blocks.0.hook_resid_post", "--skip", True), "a skip is for transcoders"),
        ((*ALL, "--skip", True, "--architecture", "matryoshka"), "matryoshka takes no skip"),
        (("--site", "blocks.9.mlp"), "there is no blocks.9.mlp: the model has 3 blocks"),
        (("--site", "blocks.*.mpl"), "is not a site"),
    ],
)
def test_what_cannot_be_trained_is_said(model_and_corpus, tmp_path, words, said):
    result = call("train", *model_and_corpus, *STREAM, *words, "--out", tmp_path / "no")
    assert result.code == 2 and said in result.err and not (tmp_path / "no").exists()
