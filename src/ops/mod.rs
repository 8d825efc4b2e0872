//! Forward and backward pairs of every operation of a decoder block, side by side.
//!
//! Each has a *portable* implementation made only of candle tensor operations, generic in the
//! dtype, which is what runs on CUDA and Metal, and a *CPU* one ([`cpu`]) that is fused and fast.

pub mod cpu;
pub mod random;
