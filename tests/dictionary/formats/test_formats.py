"""Every reader on files in the published layout (on those of the real tools: interop.py)."""

import json

import pytest
import torch
from command_line import content
from foreign_folders import (
    D_IN,
    SITE,
    WRITERS,
    K,
    base,
    draw,
    learning,
    place,
    saelens,
    saelens_old,
    sparsify,
    topk,
    write_json,
)
from looping import over
from safetensors.torch import load_file, save_file

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub.transfer import list_dictionaries, pull, push
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.errors import LlmWsaeError, UsageError


@over(layout=WRITERS)
def test_it_computes_what_the_other_tool_does_also_saved_as_ours(tmp_path, capsys, layout):
    folder = place(tmp_path, layout)
    expected = WRITERS[layout](folder)
    dictionary = Dictionary.load(folder)
    for path in folder.iterdir():  # as a tool writes a file again in its place
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert expected.latents.count_nonzero() > 50 and (expected.latents == 0).sum() > 50
    latents = dictionary.encode(expected.x)
    torch.testing.assert_close(latents.double(), expected.latents, atol=1e-5, rtol=1e-5)
    for made in (dictionary(expected.x), dictionary.decode(latents)):
        torch.testing.assert_close(made.double(), expected.reconstruction, atol=1e-5, rtol=1e-5)
    dictionary.save(tmp_path / "ours")
    again = Dictionary.load(tmp_path / "ours")
    assert again.info == dictionary.info and again.sparsity == dictionary.sparsity
    assert torch.equal(again(expected.x), dictionary(expected.x))
    assert capsys.readouterr().err.count("nothing in it is run") == layout.startswith("learning")


@over(layout=["saelens-topk", "saelens-old", "saelens-gated"])
def test_a_dictionary_of_a_centred_stream_sees_its_own_in_any_stream(tmp_path, layout):
    """As SAELens trained them on TransformerLens models with centred weights."""
    plain, centred = place(tmp_path / "plain", layout), place(tmp_path / "centred", layout)
    WRITERS[layout](plain)
    x = WRITERS[layout](centred).x
    cfg = json.loads((centred / "cfg.json").read_text())
    cfg.get("metadata", cfg)["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    (centred / "cfg.json").write_text(json.dumps(cfg))
    one, other = Dictionary.load(plain), Dictionary.load(centred)
    expected = one.encode(x - x.mean(-1, keepdim=True))
    torch.testing.assert_close(other.encode(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.encode(x + 3), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one.encode(x), expected, atol=1e-2)
    assert other.info.model["center_writing_weights"] is True
    assert "center_writing_weights" not in one.info.model


def test_old_dictionaries_of_gpt2_saw_a_centred_stream(tmp_path):
    """The most used ones of all do not say so themselves."""
    uncentred = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    for name, loaded, centred in (
        ("gpt2-small", {}, True),
        ("gemma-2b", {}, False),
        ("gpt2-small", uncentred, False),
    ):
        saelens_old(tmp_path / "d", model_name=name, **loaded)
        info = Dictionary.load(tmp_path / "d").info
        assert info.model.get("center_writing_weights", False) is centred, name


def changed(path, part: str, **values) -> None:
    """Change a part of a JSON file."""
    config = json.loads(path.read_text())
    config[part] |= values
    path.write_text(json.dumps(config))


def test_the_site_and_model_are_found(tmp_path):
    saelens(tmp_path / "saelens", "topk")
    ours = {"rule": "variance", "alpha": -0.25}  # of our plugin
    changed(tmp_path / "saelens/cfg.json", "metadata", llm_wsae=ours)
    saelens_old(tmp_path / "old")
    learning(tmp_path / "learning", "BatchTopKSAE")
    for name, rule in (("saelens", "variance"), ("old", "uniform"), ("learning", "uniform")):
        info = Dictionary.load(tmp_path / name).info
        assert (info.name, info.site, info.context_size, info.rule) == (name, SITE, 64, rule)
        assert info.model["name"] in ("tiny", "owner/tiny")
    for name in ("layers.3", "gpt_neox.layers.3", "h.3"):
        sparsify(tmp_path / name)
        assert Dictionary.load(tmp_path / name).info.site == SITE


def test_a_site_can_be_given_where_none_is_said(tmp_path):
    """dictionary_learning may name a block alone, which may mean any of its parts."""
    sparsify(tmp_path / "one")
    learning(tmp_path / "other", "AutoEncoderTopK", submodule_name=None)
    for mine in (tmp_path / "one", tmp_path / "other"):
        with pytest.raises(LlmWsaeError, match=r'does not say where.*site="blocks\.N\.hook_resid'):
            Dictionary.load(mine)
        assert Dictionary.load(mine, site=SITE).info.site == SITE
        with pytest.raises(LlmWsaeError, match=r"'blocks\.3' is not a site"):
            Dictionary.load(mine, site="blocks.3")
    changed(tmp_path / "other/config.json", "trainer", submodule_name="resid_mid_layer_3")
    assert Dictionary.load(tmp_path / "other").info.site == "blocks.3.hook_resid_mid"
    saelens(tmp_path / "said", "topk")
    Dictionary.load(tmp_path / "said", site=SITE).save(tmp_path / "own")
    for folder in (tmp_path / "said", tmp_path / "own"):
        with pytest.raises(UsageError, match=f"says that it belongs to {SITE}, not to blocks.4"):
            Dictionary.load(folder, site="blocks.4.hook_resid_post")


def test_a_dictionary_of_what_an_mlp_writes_is_read(tmp_path):
    saelens(tmp_path / "one", "standard", metadata={"hook_name": "blocks.3.hook_mlp_out"})
    sparsify(tmp_path / "layers.3.mlp")
    for name in ("one", "layers.3.mlp"):
        assert Dictionary.load(tmp_path / name).info.site == "blocks.3.hook_mlp_out"


def test_what_belongs_to_no_site_is_refused(tmp_path):
    elsewhere = r"is not supported; there are|is not a site|does not say"
    for name, write, said in (
        ("a", lambda f: saelens(f, "standard", metadata={"hook_name": "blocks.3.attn.hook_q"}),
         elsewhere),
        ("b", lambda f: saelens_old(f, hook_point="blocks.3.attn.hook_z"), elsewhere),
        ("c", lambda f: learning(f, "AutoEncoder", submodule_name="mlp_out_layer_3"), elsewhere),
        ("layers.3", lambda f: sparsify(f, transcode=True), elsewhere),
        ("d", lambda f: saelens(f, "standard", architecture="crosscoder"),
         "does not read SAELens' architecture"),
    ):  # fmt: skip
        write(tmp_path / name)
        with pytest.raises(LlmWsaeError, match=said):
            Dictionary.load(tmp_path / name)
        with pytest.raises(LlmWsaeError, match=f"says that it belongs to|not a site|{said}"):
            Dictionary.load(tmp_path / name, site=SITE)
    learning(tmp_path / "e", "AutoEncoder")
    for io in ("in_and_out", "in_to_out"):
        changed(tmp_path / "e/config.json", "buffer", io=io)
        with pytest.raises(LlmWsaeError, match=f"{io}.*does not reconstruct its own input"):
            Dictionary.load(tmp_path / "e")


def test_a_gate_that_never_opens_and_thresholds_below_zero(tmp_path):
    """BatchTopK before its threshold was ever set is a plain ReLU."""
    expected = learning(tmp_path / "d", "BatchTopKSAE")
    weights = torch.load(tmp_path / "d" / "ae.pt", weights_only=True)
    torch.save(weights | {"threshold": torch.tensor(-1.0)}, tmp_path / "d" / "ae.pt")
    dictionary = Dictionary.load(tmp_path / "d")
    assert torch.equal(dictionary.threshold, torch.zeros(dictionary.d_sae))
    b_dec = weights["b_dec"]
    pre = (expected.x - b_dec) @ weights["encoder.weight"].T + weights["encoder.bias"]
    torch.testing.assert_close(dictionary.encode(expected.x), pre.relu(), atol=1e-5, rtol=1e-5)


def test_half_precision_is_read(tmp_path):
    expected = saelens(tmp_path / "d", "topk")
    path = tmp_path / "d" / "sae_weights.safetensors"
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_file({name: w.to(dtype) for name, w in load_file(path).items()}, path)
        dictionary = Dictionary.load(tmp_path / "d")
        assert dictionary.W_enc.dtype == torch.float32
        error = (dictionary(expected.x) - expected.reconstruction).norm()
        assert error < 0.1 * expected.reconstruction.norm()


def test_an_unknown_layout_is_one_sentence_with_the_known_ones(tmp_path):
    saelens(tmp_path / "lost", "topk")
    (tmp_path / "lost/cfg.json").unlink()
    for folder, there in ((tmp_path, "lost"), (tmp_path / "lost", "sae_weights.safetensors")):
        with pytest.raises(LlmWsaeError) as error:
            Dictionary.load(folder)
        for name in (there, "wsae.json", "SAELens (cfg.json", "sparsify", "dictionary_learning"):
            assert name in str(error.value) and "\n" not in str(error.value)


FOLDERS = {
    "a/topk": "saelens-topk-rescaled",
    "b/trainer_0": "learning-BatchTopKSAE",
    "c": "saelens-checkpoint",  # with its scale in a file of its own
    "layers.3": "sparsify",
}


def test_on_the_hub_they_are_listed_and_become_ours(hub, plain, tmp_path):
    """The dictionaries of three tools beside other files, and one at the top of a repository."""
    mixed, top, out = "user/mixed", "user/one", tmp_path / "out"
    written = {(mixed, name): WRITERS[FOLDERS[name]](tmp_path / name) for name in FOLDERS}
    written[top, "."] = WRITERS["saelens-jumprelu"](tmp_path / "one")
    for name, data in content(tmp_path).items():
        if name.startswith("one/"):
            hub.put(top, name.removeprefix("one/"), data)
        elif name.startswith(tuple(FOLDERS)):
            hub.put(mixed, name, data)
    hub.put(mixed, "README.md", b"# theirs\n")
    hub.put(mixed, "b/trainer_0/checkpoints/ae_100.pt", b"unused")
    found = list_dictionaries(mixed)
    assert [d.sae_id for d in found] == sorted(FOLDERS) and found[0].model == "tiny"
    assert {(d.info.site, d.d_in, d.d_sae) for d in found} == {(SITE, 12, 48)}
    kinds = ["TopK, k = 5", "JumpReLU", "BatchTopK", "TopK, k = 5"]
    assert [d.sparsity for d in found] == kinds
    assert hub.count("GET", "/storage/") == 0  # no tensor was asked for
    folders = {(repo, name): at for repo in (mixed, top) for name, at in pull(repo, out).items()}
    assert folders[top, "."] == out / "one" and folders.keys() == written.keys()
    for key, expected in written.items():
        assert (folders[key] / "wsae.json").is_file()
        for dictionary in (Dictionary.from_pretrained(*key), Dictionary.load(folders[key])):
            made = dictionary(expected.x).double()
            torch.testing.assert_close(made, expected.reconstruction, atol=1e-5, rtol=1e-5)
    assert pull(mixed, out).items() <= {name: at for (_, name), at in folders.items()}.items()
    assert not any("ae_100" in path for _, path in hub.requests)

    push([plain], mixed)  # the card speaks only of our own
    card = hub.content(mixed, "README.md").decode()
    assert "plain-k4" in card and "# theirs" in card
    assert "trainer_0" not in card and "layers.3" not in card
    assert len(list_dictionaries(mixed)) == 5


def test_transcoders_of_saelens_and_sparsify(tmp_path):
    """What those tools compute: no bias subtracted from the input, a skip added."""
    w, x, skip = base(), draw(11, 20, D_IN), draw(12, D_IN, D_IN)
    threshold = draw(13, len(w["b_enc"])).abs()
    pre = x @ w["W_enc"] + w["b_enc"]
    hooks = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    for name, own, latents in (
        ("transcoder", {}, pre.relu()),
        ("skip_transcoder", {"W_skip": skip}, pre.relu()),
        ("jumprelu_transcoder", {"threshold": threshold}, pre.relu() * (pre > threshold)),
    ):
        write_json(tmp_path / name / "cfg.json", {
            "architecture": name, "d_in": D_IN, "d_out": D_IN, "d_sae": len(w["b_enc"]),
            "apply_b_dec_to_input": False, "normalize_activations": "none", "metadata": hooks,
        })  # fmt: skip
        save_file({**w, **own}, tmp_path / name / "sae_weights.safetensors")
        read = Dictionary.load(tmp_path / name)
        expected = latents @ w["W_dec"] + w["b_dec"] + (x @ skip.T if "W_skip" in own else 0)
        assert read.info.site == "blocks.3.mlp"
        torch.testing.assert_close(read(x), expected, rtol=1e-5, atol=1e-4)
        read.save(tmp_path / f"again-{name}")
        again = json.loads((tmp_path / f"again-{name}/cfg.json").read_text())
        assert again["architecture"] == name and again["metadata"].items() >= hooks.items()
        assert torch.equal(Dictionary.load(tmp_path / f"again-{name}")(x), read(x))
    folder = tmp_path / "layers.3.mlp"
    sparsify(folder, transcode=True, skip_connection=True)
    tensors = load_file(folder / "sae.safetensors") | {"W_skip": skip}
    save_file(tensors, folder / "sae.safetensors")
    expected = topk(pre) @ w["W_dec"] + w["b_dec"] + x @ skip.T
    read = Dictionary.load(folder)
    assert read.info.site == "blocks.3.mlp" and read.sparsity == TopK(K)
    torch.testing.assert_close(read(x), expected, rtol=1e-5, atol=1e-4)
    elsewhere = tmp_path / "transcoder/cfg.json"
    for about, said in (
        ({"hook_name": SITE}, rf"{SITE} to blocks\.3\.hook_mlp_out"),
        ({"hook_name_out": None}, f"{SITE} to nowhere"),
    ):
        changed(elsewhere, "metadata", **about)
        for site in (None, SITE):
            with pytest.raises(LlmWsaeError, match=said):
                Dictionary.load(tmp_path / "transcoder", site=site)
