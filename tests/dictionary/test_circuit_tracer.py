"""The transcoders of a model in circuit-tracer's folder, there and back."""

import shutil

import pytest
import torch
import yaml
from looping import over
from refusals import fails, misused
from safetensors.torch import load_file, save_file

from llm_wsae.dictionary.circuit_tracer import load_transcoder_set, save_transcoder_set
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, Sparsity, TopK

D, LATENTS, JUMP = 8, 24, JumpReLU()


def transcoder(
    block: int, sparsity: Sparsity = JUMP, skip: bool = True, width: int = LATENTS, **info
) -> Dictionary:
    draw = torch.Generator().manual_seed(block)
    shapes = {"W_enc": (D, width), "W_dec": (width, D), "b_enc": (width,), "b_dec": (D,)}
    shapes |= {"W_skip": (D, D)} if skip else {}
    shapes |= {"threshold": (width,)} if sparsity.has_threshold else {}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    named = {"site": f"blocks.{block}.mlp", "model": {"name": "owner/tiny"}, **info}
    return Dictionary(**tensors, sparsity=sparsity, info=DictionaryInfo(**named))


def as_there(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What circuit-tracer computes with a file."""
    pre = torch.nn.functional.linear(x, tensors["W_enc"], tensors["b_enc"])
    threshold = tensors.get("activation_function.threshold")
    acts = pre.relu() if threshold is None else pre * (pre > threshold)
    y = acts @ tensors["W_dec"] + tensors["b_dec"]
    return y + x @ tensors["W_skip"].T if "W_skip" in tensors else y


@over(sparsity=(JumpReLU(), ReLU()), skip=(True, False))
def test_a_set_computes_the_same_there_and_when_read_again(tmp_path, sparsity, skip):
    folder = tmp_path / f"{sparsity.architecture}{skip}"
    blocks = [transcoder(block, sparsity, skip) for block in (2, 0, 1)]
    path = save_transcoder_set(blocks, folder)
    config = yaml.safe_load(path.read_text())
    assert config["model_kind"] == "transcoder_set" and config["model_name"] == "owner/tiny"
    hooks = [config[f"feature_{end}_hook"] for end in ("input", "output")]
    assert hooks == ["mlp.hook_in", "hook_mlp_out"]
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(9))
    again = load_transcoder_set(folder)
    for block, (name, found) in enumerate(zip(config["transcoders"], again, strict=True)):
        (ours,) = (one for one in blocks if one.site.block == block)
        torch.testing.assert_close(as_there(load_file(folder / name), x), ours(x))
        torch.testing.assert_close(found(x), ours(x))
        assert found.site == ours.site and found.info.model == {"name": "owner/tiny"}
    save_transcoder_set(blocks, folder)  # it is there already
    fails("other settings", save_transcoder_set, [transcoder(0, ReLU())], folder)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([transcoder(0, TopK(3))], "is a TopK transcoder.*--architecture batch-topk"),
        ([transcoder(0), transcoder(2)], "none of block 1"),
        ([transcoder(1)], "none of block 0"),
        ([transcoder(0), transcoder(0)], "several of block 0"),
        ([], "there is none"),
        ([transcoder(0), transcoder(1, width=16)], "one size, but these have 8 → 16 and 8 → 24"),
        ([transcoder(0), transcoder(1, skip=False)], "all transcoders of a set have a skip or non"),
        ([transcoder(0), transcoder(1, model={"name": "other"})], "of several models: 'owner/tiny"),
        ([transcoder(0, skip=False, site="blocks.0.hook_mlp_out")], "is no transcoder"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path, blocks, said):
    misused(said, save_transcoder_set, blocks, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_what_is_damaged_or_stands_elsewhere_is_refused(tmp_path):
    whole = tmp_path / "whole"
    save_transcoder_set([transcoder(0), transcoder(1)], whole)

    def changed(number: int, **values) -> object:
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | values))
        return folder

    fails("hook_resid_mid' to 'hook_mlp_out'; only", load_transcoder_set,
          changed(0, feature_input_hook="hook_resid_mid"))  # fmt: skip
    fails("names no transcoders", load_transcoder_set, changed(3, transcoders=5))
    for number, name in enumerate(("hf://a/b/layer_0.safetensors", "../x", 5), 4):
        found = changed(number, transcoders=[name])
        fails("only files beside it", load_transcoder_set, found)
    renamed = changed(7, transcoders=["first.safetensors", "layer_1.safetensors"])
    (renamed / "layer_0.safetensors").rename(renamed / "first.safetensors")
    assert len(load_transcoder_set(renamed)) == 2
    missing = changed(1)
    (missing / "layer_1.safetensors").unlink()
    fails("layer_1.safetensors", load_transcoder_set, missing)
    odd = changed(2)
    tensors = load_file(odd / "layer_0.safetensors")
    save_file(
        {**tensors, "W_dec": tensors["W_dec"][:, :4].contiguous()}, odd / "layer_0.safetensors"
    )
    fails("layer_0.safetensors cannot be used: W_dec has", load_transcoder_set, odd)
    for text in ("!!python/object/apply:os.system ['true']", "[" * 20_000, "day: 2026-13-45"):
        (odd / "config.yaml").write_text(text)
        fails("config.yaml cannot be read.*name the folder", load_transcoder_set, odd)
    fails("cannot be read", load_transcoder_set, tmp_path / "nowhere")
