"""circuit-tracer draws the graph of a prompt from a set of transcoders, and an intervention on the
latent with the largest effect on the answer is compared with what the graph says of it.

    draw_graph.py SET MODEL PROMPT OUT     # in an environment with circuit-tracer

``SET`` is what ``llm-wsae export --to circuit-tracer`` wrote, ``MODEL`` a folder of transformers.
The graph goes to OUT.pt, its files for circuit-tracer's own server to the folder of OUT, and a
picture of its strongest latents to OUT.png.
"""

import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.utils.create_graph_files import create_graph_files

LATENTS, EDGES = 30, 60  # of the picture
COLOURS = {"embedding": "#666666", "logit": "#cc79a7"}


def opened(folder: Path, model: str) -> NNSightReplacementModel:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = {number: str(folder / name) for number, name in enumerate(config["transcoders"])}
    hooks = config["feature_input_hook"], config["feature_output_hook"]
    cpu, lazy = torch.device("cpu"), dict(lazy_encoder=False, lazy_decoder=False)
    found = load_transcoder_set(
        files, config["scan"], *hooks, device=cpu, dtype=torch.float32, **lazy
    )
    return NNSightReplacementModel.from_pretrained_and_transcoders(
        model, found, device=cpu, dtype=torch.float32
    )


def main(folder: str, path: str, prompt: str, out: str) -> None:
    model, began = opened(Path(folder), path), time.perf_counter()
    prompt = f"{model.tokenizer.bos_token}{prompt}"  # it would add one for the graph alone
    graph = attribute(prompt, model, max_n_logits=5, batch_size=64, max_feature_nodes=800)
    seconds = time.perf_counter() - began
    replacement, completeness = compute_graph_scores(graph)
    print(f"prompt        {prompt!r}")
    chance = graph.logit_probabilities[0]
    print(f"answer        {model.tokenizer.decode(graph.logit_token_ids[0])!r}, {chance:.3f}")
    print(f"graph         {len(graph.active_features):,} active latents, {seconds:.0f} s")
    print(f"replacement   {replacement:.3f}\ncompleteness  {completeness:.3f}")
    graph.to_pt(f"{out}.pt")
    create_graph_files(graph, slug="prompt", output_path=out)
    draw(json.loads(Path(out, "prompt.json").read_text()), model, f"{out}.png")

    # what the graph says of each latent's direct effect on the answer, less that on the mean token
    first, count = -len(graph.logit_targets), len(graph.selected_features)
    said = graph.adjacency_matrix[first, :count]
    largest = said.abs().topk(10).indices
    answer, layers = graph.logit_token_ids[0], range(len(model.transcoders))
    before = model.feature_intervention(prompt, [], return_activations=False)[0][0, -1]
    effects = []
    for number in largest.tolist():
        where = graph.active_features[graph.selected_features[number]].tolist()
        off = [(*where, 0.0)]
        after = model.feature_intervention(prompt, off, layers)[0][0, -1]
        change = (before - before.mean())[answer] - (after - after.mean())[answer]
        effects.append(change.item())
        print(f"latent {where}: the graph says {said[number]:+.4f}, without it {change:+.4f}")
    both = torch.stack([said[largest].cpu().float(), torch.tensor(effects)])
    print(f"correlation   {torch.corrcoef(both)[0, 1]:.4f}")


def draw(graph: dict, model: NNSightReplacementModel, out: str) -> None:
    """Tokens across, blocks up: the latents with the most influence, the answers, and
    the strongest edges between what is shown."""
    tokens, nodes = graph["metadata"]["prompt_tokens"], graph["nodes"]
    latents = sorted(
        (node for node in nodes if "transcoder" in node["feature_type"]),
        key=lambda node: node["influence"],  # the share of those before it and its own
    )[:LATENTS]
    ends = [node for node in nodes if node["feature_type"] in ("embedding", "logit")]
    top, place = len(model.transcoders._module.transcoders), {}
    figure, axes = plt.subplots(figsize=(11, 8), dpi=90, layout="constrained")
    cells = {}  # of each token and block, the nodes that share it
    for node in [*latents, *ends]:
        layer = {"embedding": -1, "logit": top}.get(node["feature_type"], node["layer"])
        cells.setdefault((node["ctx_idx"], int(layer)), []).append(node)
    levels = sorted({layer for _, layer in cells})  # blocks without a latent are left out
    for (token, layer), own in cells.items():
        step, level = min(0.4, 1.3 / len(own)), levels.index(layer)
        for number, node in enumerate(own):
            x = token + step * (number - (len(own) - 1) / 2)
            place[node["node_id"]] = x, level
            colour = COLOURS.get(node["feature_type"], "#0072b2")
            axes.plot(x, level, "o", color=colour, markersize=7, zorder=3)
            if text := said(node, model):
                up = (7, -15, 19, -27)[number % 4]
                at = dict(xytext=(0, up), textcoords="offset points", ha="center", fontsize=8)
                axes.annotate(text, (x, level), zorder=4, **at)
    edges = [one for one in graph["links"] if one["source"] in place and one["target"] in place]
    edges = sorted(edges, key=lambda one: -abs(one["weight"]))[:EDGES]
    most = abs(edges[0]["weight"])
    for one in edges:
        across, up = zip(place[one["source"]], place[one["target"]], strict=True)
        share = abs(one["weight"]) / most
        colour = "#009e73" if one["weight"] > 0 else "#d55e00"
        axes.plot(across, up, color=colour, alpha=0.25 + 0.7 * share, linewidth=0.5 + 3 * share)
    names = {-1: "tokens", top: "answers"}
    axes.set(xticks=range(len(tokens)), yticks=range(len(levels)))
    axes.set_yticklabels([names.get(layer, f"block {layer}") for layer in levels])
    axes.set_xticklabels([repr(token) for token in tokens])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def said(node: dict, model: NNSightReplacementModel) -> str:
    """The name of a node: of a latent in the last third of the blocks, the token whose logit its
    decoder row raises most; of one before it says little."""
    if node["feature_type"] == "logit":
        return node["clerp"].removeprefix("Output ").replace("(p=0.", "(.").replace('"', "")
    if node["feature_type"] == "embedding":
        return ""  # the axis names it
    layer, latent, _ = map(int, node["node_id"].split("_"))
    transcoders = model.transcoders._module.transcoders
    if layer < 2 * len(transcoders) / 3:
        return ""
    row = transcoders[layer].W_dec[latent]
    word = (model.unembed_weight.detach() @ row.detach()).argmax()
    text = model.tokenizer.decode(word)
    return f"{text.strip() or repr(text)} (#{latent})"


main(*sys.argv[1:])
