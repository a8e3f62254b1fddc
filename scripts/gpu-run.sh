#!/usr/bin/env bash
# Runs the bundle that lies beside this file on the GPU of this machine.
#
#   run.sh [PART …] [-- ARGUMENTS OF gpu.py]
#
# tests      parity of every kernel, solves against the CPU, oracles             2 minutes
# sanitizer  the kernels under compute-sanitizer, where there is one              15
# peers      the benchmark in turn with PyTorch, rampde and torchdiffeq          at most BUDGET=480 s
# cells      the benchmark alone, against its own f64: no Python needed           2
# products   rates of matrix products alone                                      seconds
# training   whether memory is flat over 1000 iterations                         seconds
#
# Without a part: tests, then peers, or cells, products and training where python3 has no torch with CUDA.
# PYTHON names another python3; RAMPDE=CHECKOUT has rampde; results go to RESULTS=FOLDER (default: results
# beside this file) as they come: logs, JSON, and DATE-gpu.md to be kept.  SMOKE=1 is a try with small
# problems, the peers on the CPU.
set -uo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
results=${RESULTS:-$bundle/results}
python=${PYTHON:-python3}
parts=()
while [ $# -gt 0 ]; do
    case $1 in
        tests | sanitizer | peers | cells | products | training) parts+=("$1") ;;
        --) shift; break ;;
        *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
    esac
    shift
done
more=("$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
results=$(cd "$results" && pwd)
export PYTHONPATH=${RAMPDE:+$RAMPDE:}$bundle/python${PYTHONPATH:+:$PYTHONPATH}
if [ ${#parts[@]} = 0 ]; then
    parts=(tests cells products training)
    if "$python" -c 'import numpy, safetensors, torch; assert torch.cuda.is_available()' 2> /dev/null; then
        parts=(tests peers)
    fi
fi

for packed in "$bundle"/*.xz; do
    name=$(basename "$packed" .xz)
    if command -v xz > /dev/null; then
        xz -dc "$packed" > "$work/$name"
    else
        "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$packed" "$work/$name"
    fi
    chmod +x "$work/$name" && [ -s "$work/$name" ] || exit 1
done

# CUDA's libraries: of the toolkit, of Python packages, of the driver.
folders=$("$python" -c 'import glob, nvidia
print(":".join(f for p in nvidia.__path__ for f in glob.glob(p + "/cu13/lib") + glob.glob(p + "/*/lib")))' 2> /dev/null)
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda/targets/x86_64-linux/lib /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
    [ -d "$folder" ] && folders=$folders:$folder
done
libraries=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folders
missing=$(for name in "$work"/*; do LD_LIBRARY_PATH=$libraries ldd -r "$name" 2>&1; done | grep -E 'not found|undefined' | sort -u)
if [ -n "$missing" ]; then
    printf 'libraries that are missing:\n%s\n' "$missing" | tee "$results/missing.txt"
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$results/card.txt" 2>&1
commit=$(cat "$bundle/commit" 2> /dev/null || echo unknown)
export CANDLE_DIFFEQ_NEEDS_GPU=1 RUST_BACKTRACE=0

small=() tiny=()
if [ -n "${SMOKE:-}" ]; then small=(--smoke) tiny=(--small --device cpu); fi
summary=$work/summary
failed=0
: > "$summary"
step() { # name, command …: its output goes to NAME.log, its outcome to the summary
    local name=$1 started=$SECONDS status outcome=passed
    shift
    timeout "${LIMIT:-400}" "$@" > "$results/$name.log" 2>&1
    status=$?
    [ $status = 0 ] || { outcome="failed($status)"; failed=1; }
    printf '%-28s %-11s %4d s  %s\n' "$name" "$outcome" $((SECONDS - started)) \
        "$(grep -E '^test result' "$results/$name.log" | tail -1)" | tee -a "$summary"
}
ours() { # name, program, arguments …: the same of one of ours, with CUDA's libraries
    step "$1" env LD_LIBRARY_PATH="$libraries" CARGO_MANIFEST_DIR="$bundle" "${@:2}"
}

# One thread: candle gives every thread a stream of its own.
run() { # part
    case $1 in
        tests)
            ours kernels "$work/unit" --test-threads=1 ops::
            ours solves "$work/cuda" --test-threads=1
            ours graphs "$work/graphs" --test-threads=1
            ours oracles "$work/oracles" --test-threads=1
            ;;
        sanitizer)
            if ! command -v compute-sanitizer > /dev/null; then
                echo 'no compute-sanitizer here' | tee -a "$summary"
                return
            fi
            for tool in memcheck racecheck initcheck synccheck; do
                LIMIT=150 ours "kernels-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/unit" --test-threads=1 ops::cuda
                LIMIT=150 ours "solves-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/cuda" --test-threads=1 low_precision_is
                LIMIT=300 ours "rows-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/cuda" --test-threads=1 \
                    adaptive_launch a_tolerance_of_each_element overflow_of_the_adjoint_of_rows
            done
            ;;
        peers)
            LIMIT=$((${BUDGET:-480} + 60)) step peers "$python" "$bundle/peers/gpu.py" --out "$results" --commit "$commit" \
                --budget "${BUDGET:-480}" --ours "env LD_LIBRARY_PATH=$libraries $work/gpu" "${tiny[@]}" "${more[@]}"
            ;;
        cells) ours cells "$work/gpu" "${small[@]}" --unfused --graphs --kept --json "$results/cells.jsonl" ;;
        products) ours products "$work/gpu" "${small[@]}" --products --json "$results/products.jsonl" ;;
        training) ours training "$work/gpu" "${small[@]}" --training 1000 --json "$results/training.jsonl" ;;
    esac
}
for part in "${parts[@]}"; do run "$part"; done

# What is kept, one section to a call: outcomes, what failed, tables.
report=$results/$(date -u +%F)-gpu.md
[ -e "$report" ] || printf '# GPU, %s, %s\n' "$(date -u +%F)" "$(cat "$results/card.txt")" > "$report"
section=$work/section
{
    printf '\n## run.sh %s, commit %s\n\n```\n' "${parts[*]} ${more[*]}" "$commit"
    cat "$summary"
    cut -c1-28 "$summary" | while read -r name _; do
        [ ! -e "$results/$name.log" ] ||
            grep -hE '^test .*FAILED|panicked|========= (Invalid|Error|ERROR)|Race|^error' -A2 "$results/$name.log" | head -12
    done
    printf '```\n\n'
    for part in "${parts[@]}"; do
        case $part in peers) cat "$results/peers.md" ;; cells | products | training) cat "$results/$part.log" ;; esac
    done
} > "$section"
cat "$section" >> "$report"
cat "$section"
# Once more, where an end is all that is seen.
cat "$summary"
sed -n '/^| | measured/,/^$/p' "$section"
exit $failed
