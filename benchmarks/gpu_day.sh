#!/usr/bin/env bash
# The first day with a GPU: the figures that results/PENDING.md waits for, in one command of under eight minutes, on a
# machine with torch and triton that has never seen this program.
#
#     benchmarks/gpu_day.sh [FOLDER]      writes FOLDER/gpu.md, gpu.json and tests.txt (default: build/gpu)
#     benchmarks/gpu_day.sh --smoke       on a CPU, tiny: that the script itself works; its times mean nothing
#
# PYTHON names another python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=build/gpu
smoke=()
for word in "$@"; do
  if [ "$word" = --smoke ]; then smoke=(--smoke); else out=$word; fi
done
mkdir -p "$out"
if ! "$python" -P -c 'import lox_stream' 2>/dev/null; then
  echo "gpu_day: installing lox-stream, without its dependencies, into build/here"
  "$python" -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/here .
  export PYTHONPATH="$PWD/build/here${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ ${#smoke[@]} = 0 ]; then
  timeout 300 "$python" -P -m pytest -p no:cacheprovider -q tests/test_gpu_kernels.py tests/test_on_card.py \
    tests/test_solver_on_gpu.py >"$out/tests.txt" 2>&1 || echo "gpu_day: the tests failed, or took over 300 s: $out/tests.txt"
  tail -n 5 "$out/tests.txt"
fi
exec "$python" benchmarks/gpu_day.py "${smoke[@]}" --results "$out/gpu.md"
