#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a GPU, in eight minutes and without network.
#
#   benchmarks/on_gpu.sh              logs and bench.json go to build/on_gpu
#   OUT=DIR benchmarks/on_gpu.sh      they go to DIR
#   DRY_RUN=1 benchmarks/on_gpu.sh    prints the stages instead of running them
#
# Needs python3 (another one: PYTHON=...) with torch, triton, pytest, hypothesis, numpy, rich, pybind11
# and setuptools, and a C++ compiler. A stage that fails or runs out of time does not stop the others;
# the exit status is 1 then. No setting of the GPU is touched.
set -u
cd "$(dirname "$0")/.." || exit 2
export OUT PYTHON="${PYTHON:-python3}"
OUT=$(realpath -m "${OUT:-build/on_gpu}")
# Installed here, so that neither root nor a virtual environment is needed.
export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"

# A stage that Ctrl-C does not end has 15 seconds more.
TOTAL_S=460
DRY_RUN=${DRY_RUN:-}
rows=()
status=0

# stage NAME LIMIT COMMAND: bash runs COMMAND for LIMIT seconds at most; its output goes to NAME.log.
stage() {
  local name=$1 limit=$2 command=$3 begin=$SECONDS result code left=$((TOTAL_S - SECONDS))
  limit=$((limit < left ? limit : left))
  if [ -n "$DRY_RUN" ]; then
    printf '%s, at most %d s:\n%s\n\n' "$name" "$limit" "$command"
    return
  fi
  echo "$name, at most $limit s ..."
  # Ctrl-C first, on which pytest and the benchmark print what they have. A shell in the background
  # ignores it, and so would its children.
  timeout --signal=INT --kill-after=15 "$((limit > 1 ? limit : 1))" \
    env --default-signal=INT bash -c "$command" >"$OUT/$name.log" 2>&1
  code=$?
  case $code in
    0) result=ok ;;
    124 | 137) result="OUT OF TIME" ;;
    *) result="FAILED ($code)" ;;
  esac
  if [ "$code" -ne 0 ]; then
    status=1
    tail -n 15 "$OUT/$name.log"
  fi
  rows+=("| $name | $result | $((SECONDS - begin)) |")
}

[ -n "$DRY_RUN" ] || mkdir -p "$OUT"

# Where pip refuses, or setuptools is too old for pyproject.toml, the parts are put together by hand.
# The kernels are optional for setup.py, so only importing them proves that they were built.
stage build 80 '
rm -rf "$OUT/site" "$OUT/source"
"$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --target "$OUT/site" . || {
  mkdir -p "$OUT/source" && cp -r setup.py csrc "$OUT/source"
  (cd "$OUT/source" && "$PYTHON" setup.py -q build_ext --build-lib "$OUT/site")
  cp -r fused_optim/*.py fused_optim/cli triton_kernels "$OUT/site/fused_optim/"
}
cd "$OUT" && "$PYTHON" -c "
import torch, triton, fused_optim._C, fused_optim.triton_kernels.multi_tensor as kernels
print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), kernels.__file__)
" && "$PYTHON" -m fused_optim info'

# -P: the source tree has no kernels built, and must not hide the installed package.
pytest='"$PYTHON" -P -m pytest -q -p no:cacheprovider'
stage test_cuda 60 "$pytest tests/test_cuda.py"

if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  suite="$pytest -n 8 --ignore=tests/test_cuda.py"
else
  suite="ls tests/test_*.py | grep -v test_cuda.py |
  xargs -P 8 -I FILE bash -c '$pytest FILE'"
fi
stage suite 130 "export FUSED_OPTIM_TEST_DEVICE=cuda
$suite"

if [ -n "$DRY_RUN" ] || command -v compute-sanitizer >/dev/null; then
  # Without torch's pools of memory, whatever lies beside a tensor is nobody's.
  stage memcheck 40 '
script=$PWD/benchmarks/memcheck.py
cd "$OUT" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" "$script"'
else
  rows+=("| memcheck | no compute-sanitizer | 0 |")
fi

stage bench "$TOTAL_S" '
cd "$OUT" && "$PYTHON" -m fused_optim bench --device cuda --json "$OUT/bench.json"'

[ -z "$DRY_RUN" ] || exit 0
printf '\n| stage | result | seconds |\n|---|---|---|\n'
printf '%s\n' "${rows[@]}"
printf '\n'
sed -nE '/^\| work /,/^([^|]|$)/p' "$OUT/bench.log" | grep '^|'
exit $status
