"""Our readers on dictionaries that the real tools wrote, and our dictionaries in the real tools.

    python scripts/interop.py                       # every part; docs/interop is written
    python scripts/interop.py sparsify saebench     # some of them; the others stay as they are

Each tool runs in an environment of its own (``LLM_WSAE_PEERS``), where a script of ``peers/`` lets
the tool write dictionaries and note what it makes of some rows. Here the same rows go through what
our readers make of the same files; that is how everything in the file was found. Ends with an error
if anything differs by more than 1e-5, or what SAEDashboard shows by more than its own rounding.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import ROOT, embedded_model, write_section
from interop_checks import SITE, K, Part, ours_in_saelens, peer, plugin, read_all, saebench, tests
from safetensors.torch import save_file

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary, load_pretrained
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK
from llm_wsae.harvesting import harvest
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pages.neuronpedia import export_neuronpedia

REPORTS = ROOT / "docs/interop"
READ, WRITTEN = "read.md", "written.md"


def saelens(out: Path) -> Part:
    """All that SAELens writes."""
    version = peer("saelens", "in_saelens.py write", out)
    for other in out.glob("finished/*"):  # the way to what a checkpoint means, not a case
        if other.is_file():
            other.unlink()
    refused = {"layer-norm", "abstopk", "matching-pursuit", "transcoder", "jumprelu-transcoder"}
    found = read_all(out, {f"written/{name}" for name in refused})
    text = f"""## SAELens → here

{version}. `written`: `save_model` of random weights; `trained`: `save_inference_model` after thirty
steps of its `SAETrainer`; `checkpoint`: what the same trainer left half-way, compared with what
SAELens would have made of it in the end.

{found.text}"""
    return Part(text, found.ok)


def saelens_before_6(out: Path) -> Part:
    """The layouts of older versions, by their own writers."""
    versions = [peer(f"saelens{old}", "write_saelens_old.py", out / old) for old in ("5", "3")]
    found = read_all(
        out, {f"{old}/{name}" for old in ("5", "3") for name in ("layer-norm", "hook-z")}
    )
    text = f"""## SAELens before version 6 → here

{" and ".join(versions)}, random weights, `save_model`.

{found.text}"""
    return Part(text, found.ok)


def sparsify(out: Path) -> Part:
    """All that sparsify writes."""
    version = peer("sparsify", "write_sparsify.py", out)
    refused = {f"{name}/layers.3" for name in ("groupmax", "transcoder", "skip")}
    found = read_all(out, refused)
    return Part(f"## sparsify → here\n\n{version}, `save_to_disk`.\n\n{found.text}", found.ok)


def dictionary_learning(out: Path) -> Part:
    """All that dictionary_learning's trainers write."""
    version = peer("dictionary_learning", "write_dictionary_learning.py", out)
    found = read_all(out, set())
    text = f"""## dictionary_learning → here

{version}. Forty steps of `trainSAE` with each trainer, on normalised activations; compared with its
`load_dictionary`.

{found.text}"""
    return Part(text, found.ok)


# --- the export for Neuronpedia, beside what SAEDashboard makes of the same ---

THREE, FIVE, NONE = 6e-4, 1.1e-5, 0  # SAEDashboard rounds to three decimals, shares to five
ANOTHER_BIN = 0.02  # a value at an edge may be on its other side
ALLOWED = {  # largest difference of each quantity
    "density": FIVE,
    "activation histogram: centres": THREE,
    "activation histogram: share in another bin": ANOTHER_BIN,
    "logit histogram: centres": THREE,
    "logit histogram: share in another bin": ANOTHER_BIN,
    "tokens promoted and suppressed: logits": THREE,
    "tokens promoted and suppressed: others": NONE,
    "neuron alignment: cosine, share of L1": THREE,
    "neuron alignment: others": NONE,
    "correlated neurons: Pearson, cosine": THREE,
    "correlated neurons: others": NONE,
    "correlated features: Pearson, cosine": THREE,
    "correlated features: others": NONE,
    "groups of contexts: bounds": THREE,
    "groups of contexts: share of tokens": FIVE,
    "strongest contexts: activation": THREE,
    "contexts of both: activation of every token": THREE,
}


def saedashboard(out: Path) -> Part:
    """Random dictionaries on a random model, and a trained one on SmolLM2."""
    out.mkdir(parents=True)
    job = {**random_cases(out), "SmolLM2": smollm2_case(out / "smollm2")}
    (out / "job.json").write_text(json.dumps(job))
    version = peer("saedashboard", "compare_saedashboard.py", out)
    results = json.loads((out / "results.json").read_text())
    lines = ["| | latents | contexts | quantities | nearest to what is allowed |",
             "|---|--:|--:|--:|---|"]  # fmt: skip
    every = True
    for name, found in results.items():
        apart, skipped = found["largest"], job[name]["skipped"]
        every = every and apart.keys() == ALLOWED.keys() - skipped
        every = every and all(value <= ALLOWED[quantity] for quantity, value in apart.items())
        nearest = max((q for q in apart if ALLOWED[q]), key=lambda q: apart[q] / ALLOWED[q])
        lines.append(
            f"| {name} | {found['latents']:,} | {found['contexts']:,} | {len(apart)} "
            f"| {nearest}: {apart[nearest]:.1e} of {ALLOWED[nearest]:g} |"
        )
    text = f"""## Here → Neuronpedia

{version}. `llm-wsae export --to neuronpedia` beside the batch that SAEDashboard's `SaeVisRunner`
and `NeuronpediaConverter` make of the same dictionary, model and tokens: random dictionaries of 128
latents on a random GPT-2, where every position gives a row; and `uniform-k32` on SmolLM2-135M after
block 9, its first 256 latents, without correlations, for which SAEDashboard counts other rows. A
difference is |a − b| / (1 + |b|). Allowed is what SAEDashboard rounds (three decimals, shares five)
and, for histograms, two values in a hundred in the next bin; tokens, neurons and features that
either names are the same.{"" if every else " **NO**"}

""" + "\n".join(lines)
    return Part(text, every)


def random_cases(out: Path) -> dict[str, Any]:
    """Random words through a random GPT-2 of four blocks."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tiny import tiny_hf_model, tiny_tokenizer, write_jsonl

    hf_model = tiny_hf_model("gpt2")
    hf_model.config.n_ctx = 32  # TransformerLens asks for it
    model = LanguageModel.from_live(hf_model, tiny_tokenizer(), "tiny")
    corpus = Corpus.open(str(write_jsonl(out / "words.jsonl", [60] * 150)), "all")
    every = HarvestConfig(
        32, prepend_bos=False, drop_positions=0, drop_special=False, tokens=6400, dtype="float32"
    )
    store = harvest(model, corpus, [Site.parse(SITE)], out / "store", every)
    x = store.rows(store.sites[0], 0, store.num_rows)
    cases = {}
    for name, sparsity in {"topk": TopK(K), "standard": ReLU(), "jumprelu": JumpReLU()}.items():
        torch.manual_seed(len(name))
        directions = torch.nn.functional.normalize(torch.randn(128, store.d_in))
        spread = ((x - x.mean(0)) @ directions.T).std(0)
        lengths = torch.ones(128) if name == "topk" else 0.5 + torch.rand(128)
        dictionary = Dictionary(
            W_enc=directions.T / spread,
            W_dec=directions * lengths[:, None],
            b_enc=-(x.mean(0) @ directions.T) / spread - 1.5 * torch.rand(128),
            b_dec=x.mean(0),
            threshold=torch.rand(128) if sparsity.has_threshold else None,
            sparsity=sparsity,
            info=DictionaryInfo(site=SITE, name=name, model={"name": "tiny"}),
        )
        cases[name] = exported(dictionary, store, model, out / name)
    return cases


def smollm2_case(out: Path) -> dict[str, Any]:
    """A trained dictionary; first positions and special tokens give no row, so that SAEDashboard's
    correlations, which count them, cannot be compared."""
    model = LanguageModel.load(embedded_model(), dtype="float32", device="cpu")
    dictionary = load_pretrained("smollm2-135m/blocks.9.hook_resid_post/uniform-k32")
    dictionary.info = replace(dictionary.info, model={"name": "SmolLM2"})  # not in bfloat16 here
    dictionary.W_dec.data /= dictionary.W_dec.norm(dim=1, keepdim=True)  # rounded in its file
    few = HarvestConfig(tokens=8192, dtype="float32")
    store = harvest(model, Corpus.open("sotu", "train"), [dictionary.site], out / "store", few)
    return exported(dictionary, store, model, out / "uniform-k32") | {
        "features": 256,
        "ignored": {"tokens": model.tokenizer.all_special_ids, "positions": [0]},
        "massive": 10,
        "rope": model.hf_model.config.rope_parameters["rope_theta"],
        "skipped": [quantity for quantity in ALLOWED if quantity.startswith("correlated")],
    }


def exported(
    dictionary: Dictionary, store: ActivationStore, model: LanguageModel, folder: Path
) -> dict[str, Any]:
    """The export, and what ``compare_saedashboard.py`` asks for; its packages are older than ours
    and read a tokenizer by another name."""
    place = store.folder.parent / "model"
    model.hf_model.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    shards = range(len(store.manifest.shards))
    tokens = torch.cat([torch.from_numpy(store.contexts(shard).ids) for shard in shards])
    save_file({"tokens": tokens}, f"{folder}.tokens.safetensors")
    dictionary.save(folder)
    export_neuronpedia(dictionary, store, model, f"{folder}.export")
    return {
        "dictionary": str(folder),
        "model": str(place),
        "ours": f"{folder}.export",
        "tokens": f"{folder}.tokens.safetensors",
        "features": dictionary.d_sae,
        "ignored": {"tokens": [], "positions": []},
        "massive": None,
        "rope": None,
        "skipped": [],
    }


PARTS: dict[str, tuple[Callable[[Path], Part], str]] = {
    "saelens": (saelens, READ),
    "saelens-before-6": (saelens_before_6, READ),
    "sparsify": (sparsify, READ),
    "dictionary-learning": (dictionary_learning, READ),
    "ours-in-saelens": (ours_in_saelens, WRITTEN),
    "saebench": (saebench, WRITTEN),
    "saedashboard": (saedashboard, WRITTEN),
    "plugin": (plugin, WRITTEN),
    "tests": (tests, WRITTEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all by default")
    wanted = parser.parse_args().parts or list(PARTS)
    failed = []
    for name in wanted:
        print(f"{name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            part, page = PARTS[name]
            text, ok = part(Path(folder).resolve() / name)
        print(text)
        write_section(name, text, REPORTS / page)
        failed += [] if ok else [name]
    if failed:
        sys.exit(f"differences in {', '.join(failed)}: see **NO** in {REPORTS}")


if __name__ == "__main__":
    main()
