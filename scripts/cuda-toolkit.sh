#!/usr/bin/env bash
# Puts a minimal CUDA 13.0 toolkit into a folder: compiler and headers from NVIDIA's PyPI wheels, and
# stub libraries to link against.  Needs python3 with pip, gcc and cargo; no GPU, driver or root.
#
#   scripts/cuda-toolkit.sh FOLDER && . FOLDER/env.sh && cargo build --features cuda
#
# The release is pinned: PTX of a newer compiler is refused by drivers of CUDA 13.0.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: scripts/cuda-toolkit.sh FOLDER}
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
toolkit=$folder/toolkit

compiler() {
    fresh=$(mktemp -d "$folder/fetch.XXXX")
    trap 'rm -rf "$fresh"' EXIT
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$fresh/wheels" "${wheels[@]}"
    for wheel in "$fresh"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$fresh/files"; done
    rm -rf "$toolkit"
    mv "$fresh/files/nvidia/cu13" "$toolkit"
    # What unpacking a wheel loses, and what only its installer would add.
    chmod +x "$toolkit"/bin/* "$toolkit"/nvvm/bin/*
    ln -sfn lib "$toolkit/lib64"
    ln -sfn libcudart.so.13 "$toolkit/lib/libcudart.so"
    rm -f "$toolkit/lib/libnvvm.so.4"
}

# Names of the functions that cudarc may call in a library.
functions() { # module, prefix
    local cudarc
    cudarc=$(cargo metadata --format-version 1 --features cuda |
        python3 -c 'import json, sys; print(*[p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"])')
    grep -ohE "pub (unsafe )?fn $2[A-Za-z0-9_]+" "$(dirname "$cudarc")/src/$1/sys/"*.rs | sed -E 's/.*fn //' | sort -u
}

# A library with the names of the real one, in which every call fails.
stub() { # module, prefix, library, soname, error, symbol version
    functions "$1" "$2" > "$folder/stubs/$3.names"
    awk -v error="$5" '{ print "__attribute__((weak)) int " $1 "(void) { return " error "; }" }' "$folder/stubs/$3.names" > "$folder/stubs/$3.c"
    local version=()
    if [ -n "${6:-}" ]; then
        echo "$6 { global: *; };" > "$folder/stubs/$3.map"
        version=("-Wl,--version-script=$folder/stubs/$3.map")
    fi
    gcc -shared -fPIC -O1 -w -fno-builtin "-Wl,-soname,$4" "${version[@]}" -o "$folder/stubs/$4" "$folder/stubs/$3.c"
    ln -sfn "$4" "$folder/stubs/lib$3.so"
}

[ -x "$toolkit/bin/nvcc" ] || compiler
mkdir -p "$folder/stubs"
stub driver   cu[A-Z]  cuda     libcuda.so.1      100    # no device
stub nvrtc    nvrtc    nvrtc    libnvrtc.so.13    7   libnvrtc.so.13
stub curand   curand   curand   libcurand.so.10   101 libcurand.so.10
stub cublas   cublas   cublas   libcublas.so.13   1   libcublas.so.13
stub cublaslt cublasLt cublasLt libcublasLt.so.13 1   libcublasLt.so.13
stub nccl     nccl     nccl     libnccl.so.2      2    # a system error
rm -rf "$toolkit/lib/stubs"
ln -sfn "$folder/stubs" "$toolkit/lib/stubs"

cat > "$folder/env.sh" <<END
export CUDA_HOME="$toolkit" CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
export PATH="$toolkit/bin:\$PATH"
export LIBRARY_PATH="$toolkit/lib:$folder/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export CUDA_STUBS="$folder/stubs"
END
"$toolkit/bin/nvcc" --version | sed -n 4p
