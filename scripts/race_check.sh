#!/usr/bin/env bash
# Looks for data races in the kernels and in what starts threads by itself, with ThreadSanitizer:
#
#   scripts/race_check.sh [libtest options…]
#
# It covers src/ops/cpu (every kernel, all through its own tests, on pools of several threads: shared
# output buffers, packed weights, scratch space) and src/bounded.rs. The rest of the program shares data
# between threads only through rayon's iterators, std::thread::scope, channels and locks in safe code,
# where the compiler rules races out; these are the places with `unsafe` and threads.
#
# They are compiled as a crate of their own together with rayon and the standard library, all of it
# instrumented: what is not would hide how threads wait for each other, and harmless code would be
# reported. A stable toolchain does, with the library's sources (`rustup component add rust-src`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/kernels_alone.sh
if [ ! -d "$(rustc --print sysroot)/lib/rustlib/src/rust/library" ]; then
    echo "needs the sources of the standard library: rustup component add rust-src" >&2
    exit 2
fi
kernels_alone target/race
target=$(rustc -vV | sed -n 's/^host: //p')
export RAYON_NUM_THREADS=4
cd target/race
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=thread"
cargo test --release -Zbuild-std --target "$target" --lib -- "$@"
echo "no data race"
