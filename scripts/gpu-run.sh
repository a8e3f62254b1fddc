#!/usr/bin/env bash
# Runs the bundle that lies beside this file on the GPU of this machine: parity of every kernel, solves
# against the CPU, the sanitizer where there is one, and the benchmark.  Full results go into RESULTS.
#
#   run.sh [RESULTS]
set -uo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
results=${1:-$bundle/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
for packed in "$bundle"/*.xz; do
    name=$(basename "$packed" .xz)
    if command -v xz > /dev/null; then
        xz -dc "$packed" > "$work/$name"
    else
        python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$packed" "$work/$name"
    fi
    chmod +x "$work/$name"
done

# CUDA's libraries: of the toolkit, of Python packages, of the driver.
folders=$(python3 -c 'import glob, nvidia
print(":".join(f for p in nvidia.__path__ for f in glob.glob(p + "/cu13/lib") + glob.glob(p + "/*/lib")))' 2> /dev/null)
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda/targets/x86_64-linux/lib /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
    [ -d "$folder" ] && folders=$folders:$folder
done
export LD_LIBRARY_PATH=$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
missing=$(for name in "$work"/*; do ldd -r "$name" 2>&1; done | grep -E 'not found|undefined' | sort -u)
if [ -n "$missing" ]; then
    printf 'libraries that are missing:\n%s\n' "$missing" | tee "$results/missing.txt"
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$results/card.txt" 2>&1
export CANDLE_DIFFEQ_NEEDS_GPU=1 RUST_BACKTRACE=0

summary=$results/summary.txt
: > "$summary"
step() { # name, command …
    local name=$1 started=$SECONDS status
    shift
    timeout "${LIMIT:-400}" "$@" > "$results/$name.log" 2>&1
    status=$?
    printf '%-28s %-9s %4d s  %s\n' "$name" "$([ $status = 0 ] && echo passed || echo "failed($status)")" $((SECONDS - started)) \
        "$(grep -E '^test result' "$results/$name.log" | tail -1)" >> "$summary"
}
# One thread: candle gives every thread a stream of its own.
step kernels "$work/unit" --test-threads=1 ops::
step solves "$work/cuda" --test-threads=1
CARGO_MANIFEST_DIR=$bundle step oracles "$work/oracles" --test-threads=1
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        LIMIT=150 step "kernels-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/unit" --test-threads=1 ops::cuda
    done
    LIMIT=150 step solves-memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$work/cuda" --test-threads=1 low_precision
    LIMIT=150 step solves-racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$work/cuda" --test-threads=1 low_precision
else
    echo 'no compute-sanitizer here' >> "$summary"
fi
step benchmark "$work/gpu" --json "$results/benchmark.json"

for log in "$results"/*.log; do
    grep -hE '^test .*FAILED|panicked|========= (Invalid|Error|ERROR)|Race' -A2 "$log" | head -12
done
cat "$results/card.txt"
cat "$results/benchmark.log"
cat "$bundle/commit" 2> /dev/null
cat "$summary"
! grep -q failed "$summary"
