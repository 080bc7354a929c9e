"""The export for Neuronpedia: every number against a direct computation in float64."""

import gzip
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import SITE, content, refused, works
from small_dictionaries import like
from tiny import WIDTH, WORDS, tiny_hf_model, tiny_tokenizer

from llm_wsae import export_neuronpedia
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, Score, keep_explanations
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.directions import Readout
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.pages.collecting import collect, windows

PLAIN = "trained/uniform-k4"
TOP, BANDS = 4, 3
ATOL = 0.6e-5  # half of the fifth decimal
NAMES = [*WORDS, "<s>", "</s>"]


def features_of(folder) -> list[dict]:
    files = sorted(folder.glob("batch-*.json"), key=lambda path: int(path.stem[6:]))
    return [one for path in files for one in json.loads(path.read_text())["features"]]


def near(found, expected) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    apart = np.abs(found - expected) - ATOL - 1e-5 * np.abs(expected)
    assert not (apart > 0).any(), (found, expected)


def test_what_is_collected_is_written_under_their_keys(world, store, model, tmp_path):
    one = Dictionary.load(world / PLAIN)
    b_enc = one.b_enc * 100
    b_enc[5] = -1e4  # it never fires
    lengths = torch.linspace(0.5, 2, one.d_sae)[:, None]
    # activations of some units, so that five decimals say much
    dictionary = like(one, W_enc=one.W_enc * 100, W_dec=one.W_dec * lengths, b_enc=b_enc)
    done = export_neuronpedia(dictionary, store, model, tmp_path / "out", top=TOP, bands=BANDS)
    assert (done.files, done.latents) == (1, 64)
    features = features_of(done.path)
    assert [one["feature_index"] for one in features] == list(range(64))
    found = collect(store, {"": dictionary}, TOP, BANDS)[""]
    around = store.context_size - 1
    texts = windows(store, dictionary, torch.arange(64), found.row, found.floor, around, around)
    positions = store.manifest.num_contexts * store.context_size
    for latent, one in enumerate(features):
        assert (one["n_prompts_total"], one["n_tokens_in_prompt"]) == (positions // 16, 16)
        assert one["dataset"] == "text.jsonl" and one["vector"] == one["decoder_weights_dist"] == []
        assert all(one[key] == [] for key in one if key.startswith("correlated"))
        length, count = float(dictionary.W_dec[latent].norm()), int(found.count[latent])
        near(one["frac_nonzero"], count / positions)
        heights, centres = (one[f"freq_hist_data_bar_{what}"] for what in ("heights", "values"))
        assert sum(heights) == count and len(heights) == len(centres)
        if count >= 5:  # all but the first and last bin, which are open, are half an octave wide
            mean = float(found.total[latent]) / count * length
            assert abs(np.log2(np.average(centres, weights=heights) / mean)) < 0.25
        edges = (found.edges[latent].double() * length).tolist()
        ranks = torch.where(found.row[latent] >= 0)[0].tolist()
        for rank, shown in zip(ranks, one["activations"], strict=True):
            ids = texts.ids[latent * (TOP + BANDS) + rank]
            values = texts.activation[latent * (TOP + BANDS) + rank][ids >= 0] * length
            assert shown["tokens"] == [NAMES[i] for i in ids[ids >= 0]]
            near(shown["values"], values)
            at = shown["qualifying_token_index"]
            near(shown["values"][at], float(found.value[latent, rank]) * length)
            bounds = [-1, edges[0], -1]
            if rank >= TOP:
                band = rank - TOP
                bounds = [edges[band + 1], edges[band], count / positions / BANDS]
            near([shown[key] for key in ("bin_min", "bin_max", "bin_contains")], bounds)
    assert features[5]["activations"] == [] and sum(len(f["activations"]) for f in features) > 200


def test_directions_are_read_as_in_a_direct_computation(world, store, model, tmp_path):
    done = export_neuronpedia(world / PLAIN, store, model, tmp_path / "out", top=1, contexts=50)
    unit = Dictionary.load(world / PLAIN).W_dec.double()
    unit = torch.nn.functional.normalize(unit, dim=1)
    hf = model.hf_model
    logits = unit * hf.model.norm.weight.double() @ hf.lm_head.weight.double().T
    logits = (logits - logits.mean(1, keepdim=True)).numpy()
    for own, row, one in zip(logits, unit.numpy(), features_of(done.path), strict=True):
        counts, edges = np.histogram(own, bins=50)
        near(one["logits_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2)
        # A value at an edge may be on its other side in float32.
        assert np.abs(counts - one["logits_hist_data_bar_heights"]).sum() <= 4
        order = np.argsort(own)
        for name, best in (("neg", order[:10]), ("pos", order[:-11:-1])):
            near(one[f"{name}_values"], own[best])
            assert one[f"{name}_str"] == [NAMES[i] for i in best]
        best = np.argsort(-row)[:3]
        assert one["neuron_alignment_indices"] == best.tolist()
        near(one["neuron_alignment_values"], row[best])
        near(one["neuron_alignment_l1"], np.abs(row[best]) / np.abs(row).sum())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_logits_are_those_of_folded_weights(family):
    """Norms with and without a mean, with biases, with weights that are kept as weight − 1."""
    hf = tiny_hf_model(family)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(len(parameter)) / 3)
    model = LanguageModel.from_live(hf, tiny_tokenizer())
    weight = next(p for n, p in hf.named_parameters()
                  if n in ("transformer.ln_f.weight", "model.norm.weight",
                           "gpt_neox.final_layer_norm.weight")).detach().double()  # fmt: skip
    directions = torch.randn(3, WIDTH) * 4
    x = torch.nn.functional.normalize(directions.double(), dim=1)
    x = x * (1 + weight) if family == "gemma2" else (x - x.mean(1, keepdim=True)) * weight
    expected = x @ model.W_U.double()
    expected -= expected.mean(1, keepdim=True)
    found = Readout(model).effects(directions)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_command_resumes_and_ends_with_the_same_bytes(world, tmp_path):
    """Of a dictionary of several files: the plain one five times, ever stronger."""
    one, times = Dictionary.load(world / PLAIN), torch.arange(1, 6).repeat_interleave(64) / 5
    parts = {"W_enc": one.W_enc.repeat(1, 5) * times, "W_dec": one.W_dec.repeat(5, 1)}
    wide = tmp_path / "wide"
    like(one, **parts, b_enc=one.b_enc.repeat(5)).save(wide)
    names = ("--model-id", "tiny", "--sae-set", "res-test", "--sae-id-suffix", "k4")
    ask = ("export", wide, "--store", world / "store", "--model", world / "model",
           "--to", "neuronpedia", "--contexts", 100, "--top", 2, *names)  # fmt: skip
    whole = works(*ask, "--out", tmp_path / "whole", "--json").json
    assert whole == {"path": str(tmp_path / "whole"), "files": 3, "latents": 320, "explained": 0}
    first = json.loads((tmp_path / "whole/batch-0.json").read_text())
    assert {k: v for k, v in first.items() if k != "features"} == {
        "model_id": "tiny", "layer": 1, "sae_set": "res-test", "sae_id_suffix": "k4"
    }  # fmt: skip
    assert first["features"][0]["n_prompts_total"] == 100
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")  # as after a kill
    (tmp_path / "cut/batch-0.json").write_text("")
    for name in ("batch-1.json", "batch-2.json"):
        (tmp_path / "cut" / name).unlink()
    works(*ask, "--out", tmp_path / "cut")
    files = content(tmp_path / "cut")
    assert set(files) == {".lock", "export.json", *(f"batch-{i}.json" for i in range(3))}
    assert files == content(tmp_path / "whole")
    refused((*ask, "--top", 3, "--out", tmp_path / "cut"), "use the same settings to resume it")
    assert content(tmp_path / "cut") == files


def test_explanations_are_written_as_neuronpedia_and_delphi_keep_them(
    world, store, model, tmp_path
):
    explained = tmp_path / "explained"
    shutil.copytree(world / PLAIN, explained)
    scores = {"detection": Score(0.8125, (0.7, 0.9), 40, 38)}
    said = "the words «w1»\n& w2"
    keep_explanations(explained, [Explanation(3, said, "judge", scores),
                                  Explanation(4, None, "judge", {})])  # fmt: skip
    done = export_neuronpedia(explained, store, model, tmp_path / "out", top=1, sae_set="s")
    assert done.explained == 1
    packed = (done.path / "explanations/batch-0.jsonl.gz").read_bytes()
    (row,) = map(json.loads, gzip.decompress(packed).decode().splitlines())
    assert len(row.pop("id")) == len(row.pop("authorId")) == 25
    assert row == {"modelId": "model", "layer": "1-s", "index": "3", "description": said,
                   "explanationModelName": "judge", "notes": "detection 0.812"}  # fmt: skip
    (file,) = (done.path / "delphi/explanations").iterdir()
    (file.parent / "mine.txt").write_text("mine")
    assert file.name == f"{SITE}_latent3.txt" and json.loads(file.read_text()) == said
    again = export_neuronpedia(explained, store, model, tmp_path / "out", top=1, sae_set="s")
    assert again == done and (file.parent / "mine.txt").read_text() == "mine"
    assert (done.path / "explanations/batch-0.jsonl.gz").read_bytes() == packed


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(world, store, model, tmp_path):
    ask = ("export", world / PLAIN, "--store", world / "store", "--model", world / "model",
           "--to", "neuronpedia")  # fmt: skip
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for words, said in (
        ((*ask, "--out", mine), "holds other files (notes.txt)"),
        ((*ask, "--out", mine / "notes.txt"), "is the name of a folder"),
        ((*ask, "--out", tmp_path / "new", "--top", 0), "must be at least 1"),
        ((*ask, "--out", tmp_path / "new", "--contexts", 0), "must be at least 1"),
        ((*ask, "--out", tmp_path / "new", "--sae-set", "a/b"), "part of an address"),
        ((*ask[:-1], "elsewhere", "--out", tmp_path / "new"), "neuronpedia"),
        (("export", world / "nowhere", *ask[2:], "--out", tmp_path / "new"), "nowhere"),
    ):
        refused(words, said)
    one = Dictionary.load(world / PLAIN)
    one.info = replace(one.info, site="blocks.0.hook_resid_post")
    with pytest.raises(UsageError, match=r"has no blocks\.0\.hook_resid_post"):
        export_neuronpedia(one, store, model, tmp_path / "new")
    shutil.copytree(world / "store", tmp_path / "damaged")
    shard = next((tmp_path / "damaged" / SITE).glob("0000?.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(LlmWsaeError, match=shard.name):
        export_neuronpedia(world / PLAIN, tmp_path / "damaged", model, tmp_path / "half")
    assert {p.name for p in (tmp_path / "half").iterdir()} == {".lock", "export.json"}
    assert content(mine) == {"notes.txt": b"mine"} and not (tmp_path / "new").exists()
