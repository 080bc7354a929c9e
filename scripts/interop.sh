#!/usr/bin/env bash
# Our readers on dictionaries that the real tools wrote, and our dictionaries in the real tools.
# Makes an environment for each tool (LLM_WSAE_PEERS says where), and writes docs/interop.
# Arguments are names of parts; all of them by default.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv-test test

exec .venv-test/bin/python scripts/interop.py "$@"
