#!/bin/sh
# Fuzzes the graders with libFuzzer on a stable toolchain:
#
#     scripts/fuzz.sh [SECONDS] [libFuzzer options…]
#
# `cargo fuzz` needs a nightly toolchain for its sanitizers. Safe Rust needs none of them to find a
# panic, a hang or a contradiction, so that the coverage flags alone do; C++ is needed for libFuzzer.
set -eu
cd "$(dirname "$0")/../fuzz"
seconds=${1:-600}
[ $# -eq 0 ] || shift
target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions \
-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
# A named target keeps the flags away from build scripts.
cargo build --release --target "$target"
mkdir -p corpus/graders artifacts/graders
exec "target/$target/release/graders" corpus/graders -dict=graders.dict \
    -artifact_prefix=artifacts/graders/ -max_len=4096 -timeout=10 \
    -max_total_time="$seconds" -print_final_stats=1 "$@"
