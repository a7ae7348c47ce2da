#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in less than ten minutes and without network.
#
#   benchmarks/on_gpu.sh                             what a first run there has time for
#   STAGES="memcheck suite" benchmarks/on_gpu.sh     these: build, or build and some of ALL
#   DRY_RUN=1 benchmarks/on_gpu.sh                   prints the stages instead of running them
#
# OUT (build/on_gpu) gets logs.gz, with all that was printed, sweep.json and bench.json. The package goes to
# SITE (build/on_gpu_site), and is built unless one for this Python and these sources lies there.
#
# Needs python3 (another one: PYTHON=...) with torch, triton, pytest, hypothesis, the bench extra, pybind11
# and setuptools, and a C++ compiler. A stage that fails or runs out of time does not stop the others;
# the exit status is 1 then. No setting of the GPU is touched.
set -u
cd "$(dirname "$0")/.." || exit 2
export OUT PYTHON="${PYTHON:-python3}" SITE="${SITE:-$PWD/build/on_gpu_site}"
OUT=$(realpath -m "${OUT:-build/on_gpu}")
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FUSED_OPTIM_TEST_DEVICE=cuda

# A stage that Ctrl-C does not end has 15 seconds more.
TOTAL_S=${TOTAL_S:-560}
ALL="smoke cuda bits sweep bench memcheck suite bench_all"
STAGES="build ${STAGES:-smoke cuda bits sweep bench suite}"
for name in $STAGES; do
  [[ " build $ALL " == *" $name "* ]] || { echo "STAGES: there is no $name, only $ALL" >&2 && exit 2; }
done
DRY_RUN=${DRY_RUN:-}
log=$OUT/stage.log
rows=()
status=0

# The benchmark's first table.
table() {
  sed -nE '/^\| work /,/^([^|]|$)/p' "$log" | grep '^|'
}

# What a stage says it has done: the last such line.
proof() {
  case $1 in
    bench*) echo "$(table | tail -n +3 | wc -l) rows measured" ;;
    *) grep -aE '(^| )[0-9]+ (built|ok|passed|failed|skipped|configurations measured|cases checked)' "$log" |
      tail -n 1 | cut -c1-90 ;;
  esac
}

# What to read first.
digest() {
  case $1 in
    build) [ "$2" = ok ] || { grep -aE -A 3 'error:' "$log" | head -n 20 && tail -n 3 "$log"; } ;;
    smoke) grep -avE '^bits .* ok ' "$log" ;;
    sweep) awk '/^$/ {n = 0} n++ < 9' "$log" ;;
    bench*) table || tail -n 15 "$log" ;;
    memcheck) tail -n 15 "$log" ;;
    *) # failures by test function, and the first tracebacks
      grep -aE '^(FAILED|ERROR) ' "$log" | sed -E 's/ - .*//; s/\[.*//' | sort | uniq -c | sort -rn | head -n 12
      awk '/^=+ (FAILURES|ERRORS) =+$/ {on = 1} on && n++ < 40' "$log"
      [ "$2" = ok ] || tail -n 3 "$log" ;;
  esac | cut -c1-150 | head -c 2500
}

# stage NAME LIMIT COMMAND: bash runs COMMAND for LIMIT seconds at most. Something must have passed.
stage() {
  local name=$1 limit=$2 command=$3 begin=$SECONDS left=$((TOTAL_S - SECONDS)) result=ok proof code
  [[ " $STAGES " == *" $name "* ]] || return
  limit=$((limit < left ? limit : left))
  limit=$((limit > 1 ? limit : 1))
  if [ -n "$DRY_RUN" ]; then
    printf '%s, at most %d s:\n%s\n\n' "$name" "$limit" "$command"
    return
  fi
  echo "$name, at most $limit s ..."
  # Ctrl-C first, on which pytest and the benchmark print what they have. A shell in the background
  # ignores it, and so would its children.
  timeout --signal=INT --kill-after=15 "$limit" \
    env --default-signal=INT bash -c "$command" >"$log" 2>&1
  code=$?
  proof=$(proof "$name")
  case $code in
    0) [[ $proof =~ (^|[^0-9])[1-9][0-9]*\ (built|ok|passed|rows|configurations|cases) ]] || result="NOTHING PASSED" ;;
    124 | 137) result="OUT OF TIME" ;;
    *) result="FAILED ($code)" ;;
  esac
  [ "$result" = ok ] || status=1
  digest "$name" "$result"
  { echo "=== $name: $result"; cat "$log"; } | gzip >>"$OUT/logs.gz"
  rm "$log"
  rows+=("| $name | $result | $proof | $((SECONDS - begin)) |")
}

if [ -z "$DRY_RUN" ]; then
  mkdir -p "$OUT" && rm -f "$OUT"/{logs.gz,sweep.json,bench.json}
fi

# Not by pip, which hides the compiler's errors: the kernels are optional for setup.py. -P: the source tree has no
# kernels built, and must not hide the package.
stage build 300 'mkdir -p "$SITE/fused_optim" && rm -rf "$SITE"/fused_optim/{*.py,bench,cli,codegen,triton_kernels}
cp -r fused_optim/*.py fused_optim/{bench,cli,codegen} triton_kernels "$SITE/fused_optim/"
kernels() {
  "$PYTHON" -P -c "
import os, fused_optim._C as kernels, fused_optim.triton_kernels.launch as launch
for module in (kernels, launch):
    assert module.__file__.startswith(os.environ[\"SITE\"]), module"
}
sources=$({ "$PYTHON" -c "import sys; print(sys.implementation.cache_tag)"; cat setup.py csrc/*.* csrc/*/*; } | sha256sum)
if [ "$(cat "$SITE/sources")" != "$sources" ] || ! kernels; then
  rm -f "$SITE"/fused_optim/_C*
  "$PYTHON" setup.py build_ext --force --build-lib "$SITE" --build-temp build/on_gpu_temp
  echo "$sources" >"$SITE/sources"
fi
kernels && echo "1 built"'

stage smoke 75 '"$PYTHON" benchmarks/smoke.py'

pytest='OMP_NUM_THREADS=1 "$PYTHON" -P -m pytest -q --tb=short -p no:cacheprovider'
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  pytest+=' -n 12 --dist worksteal'
fi
# Tests for the CPU alone would only skip themselves.
on_device() {
  grep -LE '^pytestmark = \[?needs_cpu_kernels|stub_gpu' "$@" | tr '\n' ' '
}
stage cuda 75 "$pytest tests/gpu/test_cuda.py"
stage bits 110 "$pytest $(on_device tests/gpu/test_triton_*.py)"

stage sweep 130 '"$PYTHON" benchmarks/sweep.py --cases float32 bfloat16 int8 --seconds 45 --json "$OUT/sweep.json"'

bench='"$PYTHON" -P -m fused_optim bench --device cuda --json "$OUT/bench.json"'
stage bench 75 "$bench --only billion small gpt2-host small-host gpt2-bf16"

# Without torch's pools of memory, whatever lies beside a tensor is nobody's. Calls of the driver that fail are
# no errors: torch makes some on purpose.
stage memcheck 90 'PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "$PYTHON" benchmarks/memcheck.py'

# What makes tensors on cases.py's DEVICE, by itself or with the help of others.
mapfile -t users < <(grep -lE '^from support\.(twins|surgeries|numerics|phases) import|^from support\.cases import .*DEVICE' \
  $(ls tests/*/test_*.py | grep -vE '/test_(cuda|triton_)'))
stage suite 300 "$pytest $(on_device "${users[@]}")"

stage bench_all "$TOTAL_S" "$bench"

[ -z "$DRY_RUN" ] || exit 0
printf '\n| stage | result | what it says | seconds |\n|---|---|---|---|\n'
printf '%s\n' "${rows[@]}"
exit $status
