#!/usr/bin/env bash
# The first day with a GPU: the figures that results/PENDING.md waits for, in one command of under eight minutes, on a
# machine with torch, triton and the other needs of lox-stream that has never seen this program.
#
#     benchmarks/gpu_day.sh [FOLDER]            writes FOLDER/gpu.md, gpu.json and tests.txt (default: build/gpu)
#     benchmarks/gpu_day.sh --smoke [FOLDER]    on a CPU, tiny: that the script itself works; its times mean nothing
#
# SECONDS_IN_ALL (default: 480) is the time that all of it may take, and PYTHON another python3. What does not fit is
# left out, and said. Exit code 1: a test failed or a result was wrong; 124: it hung, and was ended.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
seconds=${SECONDS_IN_ALL:-480}
folder=
smoke=()
for word in "$@"; do
  case $word in
    --smoke) smoke=(--smoke) ;;
    -*) echo "gpu_day: $word is no option; expected --smoke or a folder" >&2; exit 2 ;;
    *) [ -z "$folder" ] || { echo "gpu_day: $folder and $word are given, expected one folder" >&2; exit 2; }; folder=$word ;;
  esac
done
out=$(realpath -m "${folder:-$repository/build/gpu${smoke:+-smoke}}")
mkdir -p "$out" && : >"$out/tests.txt" || { echo "gpu_day: $out cannot be written" >&2; exit 1; }
missing=
for name in torch triton safetensors numpy xxhash yaml click rich pytest hypothesis; do
  "$python" -P -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$name') is None)" || missing+=" $name"
done
if [ -n "$missing" ]; then
  echo "gpu_day: $python lacks$missing. Install them first (yaml is PyYAML)" >&2
  exit 1
fi
cd "$repository"
if ! "$python" -P -c 'import lox_stream' 2>/dev/null; then
  echo "gpu_day: installing lox-stream, without its dependencies, into build/here"
  "$python" -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/here .
  export PYTHONPATH="$PWD/build/here${PYTHONPATH:+:$PYTHONPATH}"
fi
left=$((seconds - SECONDS))
[ "$left" -gt 0 ] || { echo "gpu_day: nothing is left of $seconds seconds" >&2; exit 1; }
# whatever hangs on the way is ended; what was measured before is in gpu.md and gpu.json by then
exec timeout --kill-after=15 "$left" "$python" benchmarks/gpu_day.py "${smoke[@]}" --seconds "$left" --results "$out/gpu.md"
