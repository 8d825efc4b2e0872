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
root=$PWD
if [ ! -d "$(rustc --print sysroot)/lib/rustlib/src/rust/library" ]; then
    echo "needs the sources of the standard library: rustup component add rust-src" >&2
    exit 2
fi
place=$root/target/race
mkdir -p "$place/src"
cat >"$place/Cargo.toml" <<TOML
[package]
name = "race"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
half = "2"
memmap2 = "0.9"
rayon = "1"
thiserror = "2"

[profile.release]
debug = "line-tables-only"
TOML
cat >"$place/src/lib.rs" <<RUST
#![allow(dead_code, unused_imports)]

#[path = "$root/src/bounded.rs"]
pub mod bounded;
#[path = "$root/src/ops"]
pub mod ops {
    #[path = "layout.rs"]
    mod layout;
    pub use layout::{Layout, Segment, Span};
    #[path = "cpu/mod.rs"]
    pub mod cpu;
}
/// As much of the program's error type as is needed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Data(String),
    #[error("{0}")]
    Internal(String),
}
impl Error {
    pub fn data(message: impl std::fmt::Display) -> Self {
        Self::Data(message.to_string())
    }
}
pub type Result<T, E = Error> = std::result::Result<T, E>;
RUST
cp Cargo.lock "$place/Cargo.lock"
target=$(rustc -vV | sed -n 's/^host: //p')
export RAYON_NUM_THREADS=4
cd "$place"
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=thread"
cargo test --release -Zbuild-std --target "$target" --lib -- "$@"
echo "no data race"
