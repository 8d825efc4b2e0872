#!/usr/bin/env bash
# Runs the tests of the kernels in Miri, an interpreter that stops at undefined behaviour:
#
#   scripts/miri.sh [libtest options…]      for example a filter: team::
#
# It covers src/ops/cpu as a crate of its own: accesses outside of what a pointer may
# reach, unaligned or uninitialised reads, references that alias, and data races on the interleavings that
# it tries. What it runs is the plain Rust of every kernel, since Miri has none of the instruction sets with
# kernels of their own; those differ in the operations on a vector (src/ops/cpu/x86.rs) and share all that
# computes a pointer. Tests take smaller sizes there (`size` in src/ops/cpu/testing.rs) and everything is
# handed to several threads.
#
# The tests of src/ops/cpu/team.rs, threads that wait for each other by polling, run again with other
# interleavings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/kernels_alone.sh
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "needs Miri: rustup component add miri rust-src --toolchain nightly" >&2
    exit 2
fi
kernels_alone target/miri
cd target/miri
# Tree Borrows, and casts between integers and pointers, are for crossbeam-epoch, which rayon steals jobs
# with; threads of the global pool are never joined, which counts as a leak; and tests that ask for the same
# bits twice need a libm that gives them.
flags="-Zmiri-tree-borrows -Zmiri-permissive-provenance -Zmiri-ignore-leaks -Zmiri-deterministic-floats"
MIRIFLAGS="$flags" cargo +nightly miri test --lib -- "$@"
if [ $# = 0 ]; then
    MIRIFLAGS="$flags -Zmiri-many-seeds=1..9" cargo +nightly miri test --lib -- team::
fi
echo "no undefined behaviour"
