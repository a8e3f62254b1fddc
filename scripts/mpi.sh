#!/usr/bin/env bash
# Installs what the feature `mpi` is built with and run on, on Debian, Ubuntu and their like: Open MPI with its headers and
# launcher, and libclang, by which its functions are found.  Needs root.  Does nothing where all is there.
set -euo pipefail
packages=(libopenmpi-dev openmpi-bin libclang-dev)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} != 0 ]; then
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
fi
mpirun --version | head -1
