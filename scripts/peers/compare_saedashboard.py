"""Our batch files beside those that SAEDashboard makes of the same dictionary, model and tokens.

``job.json`` in the folder that is given leads from the name of a case to: ``dictionary``, ``model``
and ``ours``, the export (folders); ``tokens`` (a safetensors file); ``features``, how many of the
first; ``ignored``, the ids and positions that give no row; ``massive``, the multiple of the median
norm beyond which a row gives none; ``rope``, the rotary base, where TransformerLens does not read
it; ``skipped``, quantities that cannot be compared. ``results.json`` gets, for each case, the
largest difference by quantity and what was counted.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformer_lens.loading_from_pretrained as loading
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from written import OUT, done

Pairs = Iterator[tuple[str, float]]
BOTH = "contexts of both: activation of every token"
BOUNDS = ("bin_min", "bin_max")
ACTIVATION = {*BOUNDS, "bin_contains", "tokens", "values", "qualifying_token_index"}
ATTENTION = {"dfa_values", "dfa_maxValue", "dfa_targetIndex"}  # empty elsewhere
convert = loading.convert_hf_model_config
loading.get_official_model_name = lambda name: name  # a folder is a model too


def load_model(case: dict[str, Any]) -> HookedSAETransformer:
    """The model with its norms folded and its unembedding centred; the stream stays as it is."""
    rope = {} if case["rope"] is None else {"rotary_base": case["rope"]}
    loading.convert_hf_model_config = lambda name, **options: convert(name, **options) | rope
    return HookedSAETransformer.from_pretrained(
        case["model"],
        hf_model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(case["model"]),
        center_writing_weights=False,
        device="cpu",
    )


def word(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """A token as text, if it is text; SAEDashboard shows the bytes of what is not ASCII."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


def theirs(case: dict[str, Any]) -> dict[str, Any]:
    """A batch, made as ``NeuronpediaRunner.run`` makes it, of the tokens that we name."""
    model, sae = load_model(case), SAE.load_from_disk(case["dictionary"])
    if sae.cfg.architecture() == "topk":  # rows have length 1: folding lengths changes nothing
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)), atol=1e-4)
        sae.cfg.rescale_acts_by_decoder_norm = True
    tokens = load_file(case["tokens"])["tokens"].long()
    sequences = SequencesConfig(
        buffer=None, n_quantiles=5, top_acts_group_size=20, quantile_group_size=5
    )
    panels = ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig()
    config = SaeVisConfig(
        hook_point=sae.cfg.metadata.hook_name,
        features=list(range(case["features"])),
        minibatch_size_features=case["features"],
        minibatch_size_tokens=32,
        feature_centric_layout=SaeVisLayoutConfig(
            columns=[Column(sequences, *panels, FeatureTablesConfig(n_rows=3))]
        ),
        ignore_tokens=set(case["ignored"]["tokens"]),
        ignore_positions=case["ignored"]["positions"],
        ignore_high_activation_norm_multiple=case["massive"],
    )
    found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    names = NeuronpediaRunnerConfig(
        sae_set="set",
        sae_path="",
        outputs_dir="",
        n_prompts_total=len(tokens),
        n_tokens_in_prompt=tokens.shape[1],
        huggingface_dataset_path="text",
        model_id="model",
        layer=0,
    )
    words = {i: word(model.tokenizer, i) for i in range(model.cfg.d_vocab)}
    return json.loads(NeuronpediaConverter.convert_to_np_json(model, found, names, words))


def differences(ours: dict[str, Any], other: dict[str, Any]) -> Pairs:
    """Quantities of one latent and how far they are apart."""
    yield "density", abs(ours["frac_nonzero"] - other["frac_nonzero"])
    for name, what in (("freq", "activation histogram"), ("logits", "logit histogram")):
        key = f"{name}_hist_data_bar"
        yield f"{what}: centres", apart(ours[f"{key}_values"], other[f"{key}_values"])
        one, two = (np.array(batch[f"{key}_heights"]) for batch in (ours, other))
        yield f"{what}: share in another bin", np.abs(one - two).sum() / 2 / max(two.sum(), 1)
    for name in ("pos", "neg"):
        what, values = "tokens promoted and suppressed", f"{name}_values"
        yield f"{what}: logits", apart(ours[values], other[values])
        yield f"{what}: others", others(ours, other, f"{name}_str", values)
    for kind, numbers, values in (
        ("neuron_alignment", "cosine, share of L1", "values"),
        ("correlated_neurons", "Pearson, cosine", "pearson"),
        ("correlated_features", "Pearson, cosine", "pearson"),
    ):
        what, values = kind.replace("_", " "), f"{kind}_{values}"
        yield f"{what}: {numbers}", apart(ours[values], other[values])
        yield f"{what}: others", others(ours, other, f"{kind}_indices", values)
        if ours[f"{kind}_indices"] == other[f"{kind}_indices"]:
            yield f"{what}: {numbers}", apart(ours[f"{kind}_l1"], other[f"{kind}_l1"])
    yield from contexts(ours["activations"], other["activations"])


def contexts(ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> Pairs:
    """The groups of contexts, the strongest contexts, and activations where both show a context.

    SAEDashboard shows a context again for each of its strongest tokens, takes silent tokens too,
    and never shows the first token, even if it is the one for which the context was chosen.
    """
    if not ours:
        yield "density", max((max(one["values"]) for one in other), default=0)
        return
    skip = len(ours[0]["tokens"]) - len(other[0]["tokens"])
    mine, groups = ({tuple(one[bound] for bound in BOUNDS): one["bin_contains"] for one in every}
                    for every in (ours, other))  # fmt: skip
    for bounds, share in mine.items():
        two = min(groups, key=lambda one: abs(one[0] - bounds[0]) + abs(one[1] - bounds[1]))
        yield "groups of contexts: bounds", apart(bounds, two)
        yield "groups of contexts: share of tokens", abs(share - groups[two])
    strongest: list[dict[tuple[str, ...], float | None]] = [{}, {}]
    texts: dict[tuple[str, ...], list[float]] = {}
    for one in other:
        at, text = one["qualifying_token_index"], tuple(one["tokens"])
        texts[text] = one["values"]
        if one["bin_min"] < 0 and (at < 0 or one["values"][at] > 0):
            strongest[1].setdefault(text, None if at < 0 else one["values"][at])
    for one in ours:
        at, text = one["qualifying_token_index"], tuple(one["tokens"][skip:])
        if one["bin_min"] < 0:
            strongest[0].setdefault(text, None if at < skip else one["values"][at])
        if text in texts:
            yield BOTH, apart(one["values"][skip:], texts[text])
    one, two = ([value for value in found.values() if value is not None] for found in strongest)
    yield "strongest contexts: activation", apart(one[: len(two)], two)


def apart(ours: Sequence[float], other: Sequence[float]) -> float:
    """The largest |a − b| / (1 + |b|); infinite if they are not as many."""
    if len(ours) != len(other):
        return float("inf")
    one, two = np.array(ours, dtype=float), np.array(other, dtype=float)
    return float((np.abs(one - two) / (1 + np.abs(two))).max(initial=0))


def others(ours: dict[str, Any], other: dict[str, Any], names: str, values: str) -> int:
    """How many are named by one only, although their value is not that of the last in the list."""
    last = min(other[values], key=abs, default=0)
    return sum(
        name not in two[names] and abs(value - last) > 2e-3 * (1 + abs(value))
        for one, two in ((ours, other), (other, ours))
        for name, value in zip(one[names], one[values], strict=True)
    )


results = {}
for name, case in json.loads((OUT / "job.json").read_text()).items():
    other = theirs(case)
    files = sorted(Path(case["ours"]).glob("batch-*.json"), key=lambda path: int(path.stem[6:]))
    batches = [json.loads(path.read_text()) for path in files]
    assert all(batch.keys() == other.keys() for batch in batches)
    ours = [feature for batch in batches for feature in batch["features"]][: case["features"]]
    largest: dict[str, float] = {}
    in_both = 0
    for one, two in zip(ours, other["features"], strict=True):
        assert one.keys() == two.keys() and one["feature_index"] == two["feature_index"]
        assert all(set(each) == ACTIVATION for each in one["activations"])
        assert all(set(each) == ACTIVATION | ATTENTION for each in two["activations"])
        for what, difference in differences(one, two):
            in_both += what == BOTH
            if what not in case["skipped"]:
                largest[what] = max(largest.get(what, 0.0), float(difference))
    results[name] = {"largest": largest, "latents": len(ours), "contexts": in_both}
(OUT / "results.json").write_text(json.dumps(results))
done("sae-dashboard", "sae-lens", "transformer-lens")
