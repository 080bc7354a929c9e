#!/usr/bin/env bash
# Linter, formatter, type checker, and every test that this machine can run, in an environment of
# their own. Some tests wait for processes that they start, so there is one more worker than cores.
# Arguments go to pytest: -m "not slow" is a quick round.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv-test test

.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check --quiet .
.venv-test/bin/mypy --no-error-summary
exec .venv-test/bin/python -m pytest -n $(($(nproc) + 1)) --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder "$@"
