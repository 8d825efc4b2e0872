#!/usr/bin/env bash
# What `cargo build --features mpi` needs on Debian and Ubuntu: an MPI with its headers and mpicc, and
# libclang, with which the bindings are made when the program is built.
#
#   scripts/install-mpi.sh            Open MPI
#   scripts/install-mpi.sh mpich      MPICH
#
# On a cluster take the MPI that is there (`module load openmpi`): mpicc has to be found, and
# LIBCLANG_PATH has to name the folder of libclang.so where the system has none.
set -euo pipefail

case ${1:-openmpi} in
openmpi) packages=(openmpi-bin libopenmpi-dev) ;;
mpich) packages=(mpich libmpich-dev) ;;
*)
    echo "usage: $0 [openmpi|mpich]" >&2
    exit 2
    ;;
esac

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends \
    "${packages[@]}" libclang-dev clang
mpirun --version | head -n 1
