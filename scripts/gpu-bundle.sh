#!/usr/bin/env bash
# Packs what proves the CUDA path on a machine with a GPU, which needs no cargo there: tests, the
# benchmark, its peers in Python, and a run.sh that runs them.
#
#   . TOOLKIT/env.sh && scripts/gpu-bundle.sh [FOLDER]      # default: target/gpu-bundle
#   RAMPDE=CHECKOUT scripts/gpu-bundle.sh                   # with rampde, for a machine that lacks it
#   FOLDER/run.sh                                           # there
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-target/gpu-bundle}
export NVCC=${NVCC:-$PWD/scripts/lean-nvcc} CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}

rm -rf "$folder"
mkdir -p "$folder"
executables() { # cargo's messages on stdin: name and path of each
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        kind = "unit" if message["profile"]["test"] and "lib" in message["target"]["kind"] else message["target"]["name"]
        print(kind, message["executable"])'
}
{
    cargo test --release --features cuda --no-run --lib --test cuda --test graphs --test oracles --message-format=json
    cargo build --release --features cuda --example gpu --message-format=json
} | executables | while read -r name executable; do
    case $name in unit | cuda | graphs | oracles | gpu) strip -o "$folder/$name" "$executable"; xz -T0 -6 "$folder/$name" ;; esac
done
git describe --always --dirty --abbrev=12 > "$folder/commit" 2> /dev/null || true
mkdir -p "$folder/tests/data" "$folder/peers"
cp -r tests/data/discrete tests/data/demo_f16 "$folder/tests/data"
cp benches/peers/{gpu,gpu_report,report,machine,workload,field,torch_peers}.py "$folder/peers"
if [ -n "${RAMPDE:-}" ]; then
    mkdir -p "$folder/python/rampde"
    cp "$RAMPDE"/rampde/*.py "$folder/python/rampde"
fi
cp scripts/gpu-run.sh "$folder/run.sh"
chmod +x "$folder/run.sh"
du -ch "$folder"/* | sort -h
