"""circuit-tracer draws the graph of a prompt from a set of transcoders, and an intervention on the
latent with the largest effect on the answer is compared with what the graph says of it.

    draw_graph.py SET MODEL PROMPT OUT     # in an environment with circuit-tracer

``SET`` is what ``llm-wsae export --to circuit-tracer`` wrote, ``MODEL`` a folder of transformers.
The graph goes to OUT.pt, its files for circuit-tracer's own server to the folder of OUT.
"""

import sys
import time
from pathlib import Path

import torch
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.utils.create_graph_files import create_graph_files


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


main(*sys.argv[1:])
