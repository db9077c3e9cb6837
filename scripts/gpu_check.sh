#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one command, without a network:
#   bash scripts/gpu_check.sh [--autotune] [--no-tests] [--no-bench] [-- BENCH ARGUMENTS]
#     tests      the GPU tests of the kernels, Transformers models with our experts, and the CPU
#                kernel's (the host may have instructions that other machines lack)
#     autotune   write kernels/dvpa_kernels/tuned/*.json for this GPU (before the benchmark uses it)
#     bench      scripts/bench_kernels.py --device cuda -> docs/benchmarks/kernels_gpu.json
#   OUT=dir      results go there instead of docs/benchmarks (tests.log, kernels_gpu.json, tuned/)
#   PYTHON=...   the interpreter with torch (default: .venv/bin/python if there, else python3)
# A stage that fails does not stop the next one; the exit code says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.."

run_tests=1 run_autotune=0 run_bench=1
while [ $# -gt 0 ]; do
    case "$1" in
        --autotune) run_autotune=1 ;;
        --no-tests) run_tests=0 ;;
        --no-bench) run_bench=0 ;;
        --) shift; break ;;
        *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift
done

python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH=".:train:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
results=${OUT:-docs/benchmarks}
mkdir -p "$results"
status=0

"$python" - <<'PY' || exit 1
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("gpu_check: PyTorch sees no CUDA GPU")
properties = torch.cuda.get_device_properties(0)
print(
    f"== {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
    f"{properties.multi_processor_count} multiprocessors; torch {torch.__version__}"
)
PY

if [ "$run_tests" = 1 ]; then
    log="$results/tests.log"
    [ -n "${OUT:-}" ] || log=/dev/null
    echo "== GPU tests"
    "$python" -m pytest -q -ra tests/test_gpu_kernel.py tests/test_experts_interface.py \
        tests/test_cpu_kernel.py tests/test_cpu_build.py 2>&1 \
        | tee "$log" || status=1
fi
if [ "$run_autotune" = 1 ]; then
    echo "== autotune"
    "$python" -m dvpa_kernels.tuning || status=1
    if [ -n "${OUT:-}" ]; then
        mkdir -p "$OUT/tuned" && cp kernels/dvpa_kernels/tuned/*.json "$OUT/tuned/" || status=1
    fi
fi
if [ "$run_bench" = 1 ]; then
    echo "== benchmark"
    "$python" scripts/bench_kernels.py --device cuda --out "$results/kernels_gpu.json" "$@" \
        || status=1
    "$python" scripts/bench_training.py --device cuda --model model/dvpa-1b.yaml --examples 8 \
        --length 1024 --out "$results/training_gpu.json" || status=1
fi
exit "$status"
