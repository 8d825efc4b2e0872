# Sourced by the checks that compile the kernels without the rest of the program, which takes a
# fraction of the time and leaves out what such tools do not know (C libraries, the network):
#
#   kernels_alone PLACE     writes a crate into PLACE: src/ops/cpu, src/bounded.rs and what they need
kernels_alone() {
    local root=$PWD place=$1
    mkdir -p "$place/src"
    cat >"$place/Cargo.toml" <<TOML
[package]
name = "kernels"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
candle-core = "0.11.1"
half = "2"
memmap2 = "0.9"
rayon = "1"
thiserror = "2"

[dev-dependencies]
tempfile = "3"

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
    #[path = "random.rs"]
    pub mod random;
    #[path = "cpu/mod.rs"]
    pub mod cpu;
}
#[cfg(debug_assertions)]
#[path = "$root/src/run"]
pub mod run {
    #[path = "faults.rs"]
    pub mod faults;
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
}
