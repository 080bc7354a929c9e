#!/usr/bin/env bash
# Every test that this machine can run, in an environment of its own, a file to a core. Arguments go
# to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv-test test

.venv-test/bin/ruff check .
exec .venv-test/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
