#!/usr/bin/env bash
# Installs what the feature `mpi` is built with and run on, on Debian, Ubuntu and their like: Open MPI with its headers and
# launcher, and libclang, by which its functions are found.  Needs root.  Does nothing where all is there.  An MPI that is
# there already, also one that did not come as a package, is left as it is.
set -euo pipefail
packages=(libclang-dev)
if ! command -v mpicc > /dev/null || ! command -v mpirun > /dev/null; then
    packages+=(libopenmpi-dev openmpi-bin)
elif ! command -v dpkg-query > /dev/null; then
    echo "MPI is here; whether libclang is cannot be asked without dpkg-query"
    packages=()
fi
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} != 0 ]; then
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
fi
mpirun --version | head -1
