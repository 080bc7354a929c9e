#!/usr/bin/env bash
# The main job on a real model and real text, from nothing: an environment, the embedded materials
# (SmolLM2-135M-Instruct and every State of the Union address), then harvest → weigh → train →
# evaluate, and a page to look at. The output ends with what was found. A half-random dictionary is
# trained beside the others, which should do better. Every row is trained on twice, and their number
# follows the processor's speed: the whole took five minutes on two cores of a Zen 4, seven on those
# of a Zen 3, which gets the fewest rows and spends most on the evaluation. Half of the 240
# addresses are held out, so that what is measured is of a hundred of them.
# Arguments go to `llm-wsae run`, e.g. --tokens 200000 for a shorter run, or --eval-tokens 50000 for
# narrower intervals.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
model=$(embedded_model .venv)
out=runs/quickstart site=blocks.9.hook_resid_post

[[ " $* " == *" --eval-tokens"* ]] || set -- --eval-tokens 20000 "$@"  # of 100 documents
[[ " $* " == *" --architecture"* ]] || set -- --architecture topk frozen-encoder "$@"
if [[ " $* " != *" --tokens"* ]]; then
  # As many tokens as the time allows: 200,000 where a thread computes a small product in 2.4 ms,
  # as on an AMD Zen 4, and 50,000 where it takes twice as long. A run that was stopped keeps its
  # number.
  mkdir -p runs
  [ -s "$out.tokens" ] || .venv/bin/python -c '
from llm_wsae.machine.hardware import product_seconds
share = 0.0024 / min(product_seconds("encoder").values())
print(50_000 * max(1, min(4, round(6 * share - 2))))' > "$out.tokens"
  set -- --tokens "$(<"$out.tokens")" --train.tokens $((2 * $(<"$out.tokens"))) "$@"
fi

results=$(.venv/bin/llm-wsae run \
  --model "$model" --corpus sotu --heldout-fraction 0.5 --site "$site" --out "$out" "$@")
sed '/: the weights /d; /^next: /,$d' <<< "$results"  # the page is next, and all else after it
shopt -s extglob
dictionaries=("$out/$site"/!(*-frozen-*|variance-*)/wsae.json)  # the whitened beside the plain one
{
  grep ': the weights ' <<< "$results" && echo
  .venv/bin/llm-wsae dashboard "${dictionaries[@]%/wsae.json}" --store "$out/store" \
    --model "$model" --rows 100000 --out "$out/page.html" \
    --prompt "The state of our Union is strong."
} | tee "$out/found.txt"
