"""The export for Neuronpedia: every number against a direct computation in float64."""

import gzip
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import SITE, call, content, works
from tiny import WIDTH, WORDS, tiny_hf_model, tiny_tokenizer

from llm_wsae import export_neuronpedia
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, Score, keep_explanations
from llm_wsae.dictionary.sparsity import JumpReLU
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.readout import Readout
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pages import collecting, neuronpedia
from llm_wsae.pages.collecting import context_of_every_row

PLAIN = "trained/uniform-k4"
TOP, BANDS = 4, 3
SIZES = {"top": TOP, "bands": BANDS}
ATOL = 0.6e-5  # half of the fifth decimal
NAMES = [*WORDS, "<s>", "</s>"]


@pytest.fixture(scope="module")
def store(world):
    return ActivationStore.open(world / "store")


@pytest.fixture(scope="module")
def model(world):
    return LanguageModel.load(str(world / "model"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several files, and tiles that end within contexts."""
    monkeypatch.setattr(neuronpedia, "LATENTS_AT_ONCE", 24)
    monkeypatch.setattr(neuronpedia, "_FILES_AT_ONCE", 2)
    monkeypatch.setattr(collecting, "ROWS_AT_ONCE", 700)


def dictionary_of(world, store, kind: str) -> Dictionary:
    """The plain dictionary with rows of other lengths, and a latent that never fires; or one with
    thresholds in the place of k, to which a twentieth of the rows are massive."""
    one = Dictionary.load(world / PLAIN)
    parts = {name: getattr(one, name).clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    parts["W_dec"] *= torch.linspace(0.5, 2, one.d_sae)[:, None]
    parts["W_enc"] *= 100  # activations of some units, so that five decimals say much
    parts["b_enc"] *= 100
    parts["b_enc"][5] = -1e4
    if kind == "topk":
        info = replace(one.info, massive_threshold=None)
        return Dictionary(**parts, info=info, sparsity=one.sparsity)
    norms = store.rows(one.site, 0, store.num_rows).float().norm(dim=1)
    info = replace(one.info, massive_threshold=float(norms.quantile(0.95)))
    threshold = torch.full((one.d_sae,), 1.5)
    return Dictionary(**parts, info=info, sparsity=JumpReLU(), threshold=threshold)


def features_of(folder) -> list[dict]:
    files = sorted(folder.glob("batch-*.json"), key=lambda path: int(path.stem[6:]))
    return [one for path in files for one in json.loads(path.read_text())["features"]]


def near(found, expected) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    apart = np.abs(found - expected) - ATOL - 1e-5 * np.abs(expected)
    assert not (apart > 0).any(), (found, expected)


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and counts of 50 bins."""
    counts, edges = np.histogram(values, bins=50)
    return (edges[1:] + edges[:-1]) / 2, counts


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_every_number_is_that_of_a_direct_computation(world, store, model, kind, tmp_path):
    dictionary = dictionary_of(world, store, kind)
    done = export_neuronpedia(dictionary, store, model, tmp_path / "out", **SIZES)
    assert (done.files, done.latents) == (3, 64)
    features = features_of(done.path)
    assert [one["feature_index"] for one in features] == list(range(64))

    x = store.rows(Site.parse(SITE), 0, store.num_rows).float()
    usable = x.norm(dim=1) <= (dictionary.info.massive_threshold or torch.inf)
    assert usable.float().mean() == pytest.approx(1 if kind == "topk" else 0.95, abs=1e-3)
    acts = dictionary.encode(x).where(usable[:, None], 0).double()
    acts = (acts * dictionary.W_dec.double().norm(dim=1)).numpy()
    assert 2 < (acts > 0).sum(1).mean() < 30 and (acts > 0).any(0).sum() > 50 and acts.max() > 1
    unit = torch.nn.functional.normalize(dictionary.W_dec.double(), dim=1)
    hf = model.hf_model
    logits = unit * hf.model.norm.weight.double() @ hf.lm_head.weight.double().T
    logits = (logits - logits.mean(1, keepdim=True)).numpy()
    unit = unit.numpy()
    positions = store.manifest.num_contexts * store.context_size
    for latent, one in enumerate(features):
        own = acts[:, latent]
        fires = own[own > 0]
        near(one["frac_nonzero"], len(fires) / positions)
        assert (one["n_prompts_total"], one["n_tokens_in_prompt"]) == (positions // 16, 16)
        assert one["dataset"] == "text.jsonl" and one["vector"] == one["decoder_weights_dist"] == []
        heights, centres = (one[f"freq_hist_data_bar_{what}"] for what in ("heights", "values"))
        assert sum(heights) == len(fires) and len(heights) == len(centres)
        if len(fires):  # all but the first and last bin, which are open, are half an octave wide
            apart = np.log2(np.average(centres, weights=heights) / fires.mean())
            assert abs(apart) < 0.25 or len(fires) < 5
        centres, counts = histogram(logits[latent])
        near(one["logits_hist_data_bar_values"], centres)
        # A value at an edge may be on its other side in float32.
        assert np.abs(counts - one["logits_hist_data_bar_heights"]).sum() <= 4
        order = np.argsort(logits[latent])
        near(one["neg_values"], logits[latent][order[:10]])
        near(one["pos_values"], logits[latent][order[:-11:-1]])
        assert one["neg_str"] == [NAMES[i] for i in order[:10]]
        assert one["pos_str"] == [NAMES[i] for i in order[:-11:-1]]
        best = np.argsort(-unit[latent])[:3]
        assert one["neuron_alignment_indices"] == best.tolist()
        near(one["neuron_alignment_values"], unit[latent][best])
        near(one["neuron_alignment_l1"], np.abs(unit[latent][best]) / np.abs(unit[latent]).sum())
        assert all(one[key] == [] for key in one if key.startswith("correlated"))
        check_activations(one, own, fires, positions, store)


def check_activations(one, own, fires, positions, store) -> None:
    """The strongest contexts, one of each band, and the activation on every token of them."""
    where = store.locate(torch.arange(len(own)))
    context, position, ids = where.context.numpy(), where.position.numpy(), where.ids.numpy()
    examples = one["activations"]
    top = [shown for shown in examples if shown["bin_min"] == -1]
    best = sorted((own[context == c].max() for c in np.unique(context[own > 0])), reverse=True)
    near([shown["values"][shown["qualifying_token_index"]] for shown in top], best[:TOP])
    (largest,) = {shown["bin_max"] for shown in top} or {0}
    assert all(shown["bin_contains"] == -1 for shown in top) and largest == pytest.approx(
        max(own), 1e-5, ATOL
    )
    assert len(examples) - len(top) <= BANDS
    below = np.inf
    for shown in examples:
        value = shown["values"][shown["qualifying_token_index"]]
        slack = 2 * ATOL + 1e-5 * value
        assert shown["bin_min"] - slack <= value <= shown["bin_max"] + slack
        if shown["bin_min"] >= 0:
            near(shown["bin_contains"], len(fires) / positions / BANDS)
            assert shown["bin_max"] <= below
            below = shown["bin_min"]
        assert len(shown["tokens"]) == len(shown["values"]) <= store.context_size
        fitting = []
        for row in np.flatnonzero(np.abs(own - value) < slack):
            first = position[row] - shown["qualifying_token_index"]
            here = slice(first, first + len(shown["tokens"]))
            expected = np.zeros(store.context_size)
            same = context == context[row]
            expected[position[same]] = own[same]
            if [NAMES[i] for i in ids[row, here]] == shown["tokens"]:
                fitting.append(np.abs(expected[here] - shown["values"]).max() < 1e-4)
        assert any(fitting)


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


def test_the_command_resumes_and_ends_with_the_same_bytes(world, monkeypatch, tmp_path):
    names = ("--model-id", "tiny", "--sae-set", "res-test", "--sae-id-suffix", "k4")
    ask = ("export", world / PLAIN, "--store", world / "store", "--model", world / "model",
           "--to", "neuronpedia", "--contexts", 100, "--top", 2, *names)  # fmt: skip
    whole = works(*ask, "--out", tmp_path / "whole", "--json").json
    assert whole == {"path": str(tmp_path / "whole"), "files": 3, "latents": 64, "explained": 0}
    first = json.loads((tmp_path / "whole/batch-0.json").read_text())
    assert {k: v for k, v in first.items() if k != "features"} == {
        "model_id": "tiny", "layer": 1, "sae_set": "res-test", "sae_id_suffix": "k4"
    }  # fmt: skip
    assert first["features"][0]["n_prompts_total"] == 100
    written = neuronpedia.write_text

    def killed(path, text):
        if path.name == "batch-1.json":
            raise KeyboardInterrupt
        written(path, text)

    monkeypatch.setattr(neuronpedia, "write_text", killed)
    assert call(*ask, "--out", tmp_path / "cut").code == 130
    files = set(content(tmp_path / "cut"))
    assert {"export.json", "batch-0.json"} <= files and "batch-1.json" not in files
    monkeypatch.setattr(neuronpedia, "write_text", written)
    (tmp_path / "cut/batch-0.json").write_text("")
    works(*ask, "--out", tmp_path / "cut")
    files = content(tmp_path / "cut")
    assert set(files) == {".lock", "export.json", *(f"batch-{i}.json" for i in range(3))}
    for name in files.keys() - {"export.json"}:
        assert files[name] == (tmp_path / "whole" / name).read_bytes()
    other = call(*ask, "--top", 3, "--out", tmp_path / "cut")
    assert other.code == 1 and "use the same settings to resume it" in other.err
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
        result = call(*words)
        assert result.code in (1, 2) and said in result.err and result.out == "", words
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
    assert context_of_every_row(store)[-1] == store.manifest.num_contexts - 1
