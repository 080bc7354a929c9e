"""Models that accelerate has spread over memory and disk compute what they do on one device."""

import pytest
import torch
from accelerate import cpu_offload
from tiny import BLOCKS, save_hf_model
from transformers import AutoModelForCausalLM

from llm_wsae.errors import UsageError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import POINTS, Site

SITES = [Site(block, point) for block in range(3) for point in POINTS]
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
def folder(request, tmp_path):
    return save_hf_model(tmp_path / request.param, request.param)


@pytest.fixture(params=["disk", "memory"])
def spread(request, folder, tmp_path):
    where = {"device_map": PARTS[folder.name], "offload_folder": tmp_path / "offloaded"}
    is_disk = request.param == "disk"
    hf_model = AutoModelForCausalLM.from_pretrained(folder, **where if is_disk else {})
    return hf_model.eval() if is_disk else cpu_offload(hf_model, torch.device("cpu")).eval()


def test_rows_logits_and_identity_are_those_of_one_device(folder, spread):
    model = LanguageModel.load(str(folder), device="cpu", dtype="float32")
    apart = LanguageModel.from_live(spread, model.tokenizer, folder.name)
    assert any(p.is_meta for p in spread.parameters())
    assert apart.identity() == model.identity()
    assert apart.device == torch.device("cpu")
    assert model.side_by_side and not apart.side_by_side
    sites = [site for site in SITES if site.point != "mid" or model._blocks.has_mid(site.block)]
    expected, found = model.activations(IDS, sites), apart.activations(IDS, sites)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-5, atol=1e-6)
        again = apart.resume(IDS, site, found[site])
        torch.testing.assert_close(again, model.logits(IDS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart.logits(IDS), model.logits(IDS), rtol=1e-5, atol=1e-6)
    assert torch.equal(apart.W_U, model.W_U) and torch.equal(apart.W_E, model.W_E)
    assert any(p.is_meta for p in spread.parameters())  # nothing has stayed
    with pytest.raises(UsageError, match="in training mode; call its eval"):
        LanguageModel.from_live(spread.train(), None)


def test_loading_by_name(folder):
    model = LanguageModel.load(str(folder), device="spread", dtype="float32")
    one = LanguageModel.load(str(folder), device="cpu", dtype="float32")
    assert torch.equal(model.logits(IDS), one.logits(IDS))
    assert model.identity() == one.identity()
