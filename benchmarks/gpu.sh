#!/usr/bin/env bash
# One command for a GPU machine without network: builds in place, tests, checks memory, measures.
#
#   benchmarks/gpu.sh OUTDIR
#
# PYTHON names the interpreter (python3); it needs PyTorch with CUDA, ninja, pybind11, pytest and
# what the package depends on. Nothing is downloaded. Every step writes OUTDIR/<step>.log and has a
# limit of its own, about ten minutes together; a failing step does not stop the next, and the exit
# status is the number of steps that failed. CUDA is compiled for this machine's GPU alone, unless
# TORCH_CUDA_ARCH_LIST says otherwise.
#
#   PREBUILT=1     the extension was built elsewhere and lies in gsalign_kernels/
#   COMMIT         what to call the commit in the results, where there is no git
#   STEPS          the steps to run, as "tests benchmarks"; all of them otherwise
#   BENCHMARK      arguments of `python -m benchmarks`, as "--only warp", or for the whole network at
#                  batch 32 to 1024 "--only model --full --no-compile"
#   BENCHMARK_SECONDS  its limit (150); the whole network wants 500
#   PROFILE        operators whose kernels are profiled, as "warp_tokens warp_image"
set -u

if [ $# -ne 1 ]; then
  echo "usage: $0 OUTDIR" >&2
  exit 64
fi
mkdir -p "$1" || exit 73
out=$(cd "$1" && pwd) || exit 73
cd "$(dirname "$0")/.." || exit 70
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
: >"$out/summary.txt"

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2
  shift 2
  if [ -n "${STEPS:-}" ] && [[ " $STEPS " != *" $name "* ]]; then
    return
  fi
  local begin=$SECONDS status
  echo "== $name: $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  if [ $status -ne 0 ]; then
    tail -n 25 "$out/$name.log"
  fi
  echo "$name: exit $status, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

# The tool sits beside nvcc; a slim toolkit has none.
find_sanitizer() {
  command -v compute-sanitizer && return
  local home
  for home in "${CUDA_HOME:-}" /usr/local/cuda; do
    if [ -n "$home" ] && [ -x "$home/bin/compute-sanitizer" ]; then
      echo "$home/bin/compute-sanitizer"
      return
    fi
  done
}

if command -v nvidia-smi >/dev/null; then
  step machine 10 nvidia-smi
fi
target=${TORCH_CUDA_ARCH_LIST:-$("$python" -c \
  'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)}
if [ -z "${PREBUILT:-}" ]; then
  step build 120 env FORCE_CUDA=1 ${target:+TORCH_CUDA_ARCH_LIST="$target"} \
    "$python" setup.py build_ext --inplace
fi
step report 20 "$python" -c "import gsalign_kernels as k; print(k.kernel_report())"
# What needs no GPU is tested where there is none.
workers=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
# shellcheck disable=SC2086
step tests 180 "$python" -m pytest tests/kernels $workers -p no:cacheprovider -rf \
  -k "cuda or triton or gpu" \
  --ignore tests/kernels/test_gpu_targets.py --ignore tests/kernels/test_triton_interpreted.py
# shellcheck disable=SC2086
step benchmarks "${BENCHMARK_SECONDS:-150}" "$python" -m benchmarks --device cuda --out "$out/benchmarks.csv" \
  ${BENCHMARK:---no-compile}
if [ -s "$out/benchmarks.csv" ]; then
  step plots 20 "$python" -m benchmarks.plot "$out/benchmarks.csv" --out "$out/figures"
fi

profiler=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null)
if [ -n "${PROFILE:-}" ] && [ -n "$profiler" ]; then
  # shellcheck disable=SC2086
  step profile 90 "$profiler" --clock-control none --csv --page raw --log-file "$out/profile.csv" \
    --kernel-name "regex:^((warp|tps|pool|prototype)_|(forward|backward|taps|gather)_kernel)" \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
    --section Occupancy --section LaunchStats \
    "$python" -m benchmarks.touch --device cuda --measured-sizes --only $PROFILE
fi

sanitizer=$(find_sanitizer)
if [ -n "$sanitizer" ]; then
  # Without PyTorch's cache every tensor is its own allocation, so that a step over its end shows.
  for tool in memcheck racecheck initcheck; do
    step "$tool" 140 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$python" -m benchmarks.touch --device cuda &
  done
  wait
else
  echo "compute-sanitizer was not found: its checks are left out" | tee -a "$out/summary.txt"
fi

failed=$(grep -c ': exit [^0]' "$out/summary.txt")
echo "$failed failed; logs in $out" | tee -a "$out/summary.txt"
exit "$failed"
