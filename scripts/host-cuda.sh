#!/usr/bin/env bash
# Builds libraries that stand in for NVIDIA's driver, cuBLAS and cuRAND and run kernels on the CPU,
# compiled from the same sources (ours and candle's), so that what a kernel computes, and how it is
# launched, is tested where there is no GPU.  Needs a folder filled by scripts/cuda-toolkit.sh.
#
#   scripts/host-cuda.sh FOLDER && LD_LIBRARY_PATH=FOLDER/host:FOLDER/toolkit/lib cargo test --features cuda
set -euo pipefail
folder=$(cd "${1:?usage: scripts/host-cuda.sh FOLDER}" && pwd)
cd "$(dirname "$0")/.."
host=$folder/host
mkdir -p "$host"
flags=(-std=c++17 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -w -Itests/host-cuda/include)

candle=$(cargo metadata --format-version 1 --features cuda |
    python3 -c 'import json, os, sys; print(*[os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"])')
# Files of the registry have an old date, whatever their version.
[ "$(cat "$host/candle" 2> /dev/null)" = "$candle" ] || rm -f "$host"/candle_*.o
echo "$candle" > "$host/candle"
sources=(kernels/*.cu)
for name in affine binary cast conv fill indexing reduce ternary unary; do sources+=("$candle/src/$name.cu"); done

# The kernels of one file, and a table of them.
kernels() { # source, name
    {
        echo "#include \"device.h\""
        # Modules may define functions of the same name.
        echo "namespace $2 {"
        echo "#include \"$(realpath "$1")\""
        g++ "${flags[@]}" -I"$(dirname "$1")" -D__global__=KERNEL -E -x c++ -include device.h "$1" | tr '\n' ' ' |
            grep -oE 'extern "C" +KERNEL +void +[A-Za-z0-9_]+' | awk '{ print "REGISTER(" $NF ")" }'
        echo "}"
    } > "$host/$2.cpp"
    g++ "${flags[@]}" -I"$(dirname "$1")" -c "$host/$2.cpp" -o "$host/$2.o"
}

jobs=()
for source in "${sources[@]}"; do
    case $source in kernels/*) name=our_$(basename "$source" .cu) ;; *) name=candle_$(basename "$source" .cu) ;; esac
    object=$host/$name.o
    if [ ! -e "$object" ] || [ -n "$(find "$source" kernels tests/host-cuda scripts/host-cuda.sh -newer "$object" -print -quit)" ]; then
        kernels "$source" "$name" &
        jobs+=($!)
    fi
    if [ "${#jobs[@]}" -ge "$(nproc)" ]; then wait "${jobs[0]}"; jobs=("${jobs[@]:1}"); fi
done
for job in "${jobs[@]}"; do wait "$job"; done

# Functions that are not written here fail, as in the stubs.
library() { # name, soname, source, objects …
    local version=()
    [ ! -e "$folder/stubs/$1.map" ] || version=("-Wl,--version-script=$folder/stubs/$1.map")
    gcc -fPIC -O1 -w -fno-builtin -c "$folder/stubs/$1.c" -o "$host/$1.rest.o"
    g++ "${flags[@]}" -shared -Wl,-Bsymbolic "-Wl,-soname,$2" "${version[@]}" -o "$host/$2" "$3" "${@:4}" "$host/$1.rest.o"
}
library cuda libcuda.so.1 tests/host-cuda/driver.cpp "$host"/our_*.o "$host"/candle_*.o
library cublas libcublas.so.13 tests/host-cuda/blas.cpp
library curand libcurand.so.10 tests/host-cuda/random.cpp
ln -sfn "$folder"/stubs/libnvrtc.so.13 "$folder"/stubs/libcublasLt.so.13 "$host"
