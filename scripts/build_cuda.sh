#!/usr/bin/env bash
# Builds tinylora for NVIDIA GPUs on a machine that has neither a GPU nor a CUDA toolkit.
#
# The compiler comes from PyPI wheels (about 1.2 GB) and needs a C++ compiler beside it; the driver's
# library, which no toolkit has, is stood in for by a stub while linking. With a toolkit of one's own,
# `cargo build --release --features cuda` is all there is to do.
#
#   scripts/build_cuda.sh                   the release binary, for compute capability 9.0 (H100)
#   scripts/build_cuda.sh --check           also checks it: that it starts without a driver, and that a
#                                           training only asks for kernels that are there
#   CUDA_COMPUTE_CAP=80 scripts/build_cuda.sh       for another GPU: 80 A100, 86 RTX 30xx, 89 RTX 40xx
#
# TINYLORA_CUDA_DIR is where the toolkit, the stubs and cargo's target folder live (default
# ~/.cache/tinylora-cuda); they are used again. What a run has compiled the next one does not.
#
# Exit codes: 0 built, 75 the toolkit cannot be had here (no network, no Python, no C++ compiler), else
# that of what failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dir=${TINYLORA_CUDA_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/tinylora-cuda}
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
packages=(
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*'
    'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-nvrtc==13.0.*'
    'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.*'
)

unavailable() {
    echo "the CUDA toolkit cannot be had here: $1" >&2
    exit 75
}

# Wheels go into a folder of their own first, so that one cut off is never taken for a toolkit.
toolkit() {
    [ ! -x "$dir/toolkit/nvidia/cu13/bin/nvcc" ] || return 0
    command -v python3 >/dev/null || unavailable "no python3"
    python3 -m pip --version >/dev/null 2>&1 || unavailable "python3 has no pip"
    rm -rf "$dir/toolkit.part"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$dir/toolkit.part" \
        "${packages[@]}" || unavailable "pip could not install ${packages[*]}"
    rm -rf "$dir/toolkit"
    mv "$dir/toolkit.part" "$dir/toolkit"
}

# What the linker looks for under names that the wheels do not have, and the driver's functions.
stubs() {
    local home=$1 link=$2
    rm -rf "$link"
    mkdir -p "$link"
    for name in cublas cublasLt curand nvrtc; do
        ln -s "$home"/lib/lib$name.so.[0-9]* "$link/lib$name.so"
    done
    # The static runtime looks for the driver when it is called, not when the program is loaded.
    ln -s "$home/lib/libcudart_static.a" "$link/libcudart.a"
    grep -ohE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?\b' "$home/include/cuda.h" | sort -u |
        sed 's/.*/int &(void) { return 34; }/' >"$link/cuda.c" # CUDA_ERROR_STUB_LIBRARY
    cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$link/libcuda.so" "$link/cuda.c"
}

command -v c++ >/dev/null || unavailable "no C++ compiler"
mkdir -p "$dir"
toolkit
export CUDA_HOME=$dir/toolkit/nvidia/cu13
stubs "$CUDA_HOME" "$dir/link"
export PATH=$CUDA_HOME/bin:$PATH LIBRARY_PATH=$dir/link${LIBRARY_PATH:+:$LIBRARY_PATH}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$dir/target}
nvcc --version | sed -n 4p
cargo build --locked --release --features cuda
binary=$CARGO_TARGET_DIR/release/tinylora
echo "built $binary"

[ "${1:-}" = --check ] || exit 0

# It starts where there is nothing of CUDA, and says what is missing.
needed=$(readelf --dynamic "$binary" | grep -oE 'lib(cuda|cudart|cublas|cublasLt|curand|nvrtc)\.so[^]]*' || true)
if [ -n "$needed" ]; then
    echo "the program is linked to $needed: complete the lists in src/ops/cuda_driver.rs" >&2
    exit 1
fi
"$binary" doctor | grep -A4 '^GPU'

# Against a driver that counts (scripts/fake_cuda.c): a kernel that candle does not have for a number type
# ends the run. What comes out of it means nothing.
fake=$dir/fake
rm -rf "$fake"
mkdir -p "$fake"
# Functions that it does not define succeed and do nothing.
defined=$(grep -oE '\b(cu|cublas)[A-Z][A-Za-z0-9_]*\(' scripts/fake_cuda.c | tr -d '(' | sort -u)
grep -ohE '^ +(cu|cublas|curand|nvrtc)[A-Z][A-Za-z0-9_]*$' src/ops/cuda_driver.rs | tr -d ' ' | sort -u |
    comm -23 - <(echo "$defined") | sed 's/.*/int &(void) { return 0; }/' >"$fake/rest.c"
cc -shared -fPIC -O1 -Wl,-soname,libcuda.so.1 -o "$fake/libcuda.so.1" scripts/fake_cuda.c "$fake/rest.c" -lpthread
for name in cublas:13 cublasLt:13 curand:10 nvrtc:13; do
    ln -s libcuda.so.1 "$fake/lib${name%:*}.so.${name#*:}"
done
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
for dtype in f32 bf16; do
    for method in grpo sft; do
        log=$runs/$dtype-$method.log
        (
            cd "$runs"
            LD_LIBRARY_PATH=$fake TINYLORA_FAKE_CUDA_LOG=$log XDG_CACHE_HOME=$runs HF_HUB_OFFLINE=1 \
                "$binary" train --quiet --device cuda --dtype $dtype --run-dir "$dtype-$method" \
                --set method=$method --set train.max_steps=1 --set eval.limit=4 --set data.limit=32
        )
        echo "$dtype $method: $(head -n 1 "$log")"
    done
done
