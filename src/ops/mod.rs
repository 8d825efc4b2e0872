//! Forward and backward pairs of every operation of a decoder block, side by side.
//!
//! Each has a *portable* implementation made only of candle tensor operations, generic in the
//! dtype, which is what runs on CUDA and Metal, and a *CPU* one ([`cpu`]) that is fused and fast.
//! Shapes: `T` packed rows (tokens of several sequences, without padding), `h` hidden size.

pub mod add;
pub mod attention;
pub mod causal;
pub mod cpu;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod cuda_driver;
pub mod device;
pub mod head;
#[cfg(test)]
mod kernels_tests;
pub mod lanes;
mod layout;
pub mod linear;
pub mod random;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod tensor;

pub use layout::{Layout, Segment, Span};
pub use tensor::{CpuSlice, cpu_slice, from_cpu, update};

/// Which implementation of every operation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Fused f32 kernels on slices ([`cpu`]).
    Cpu,
    /// Candle tensor operations, on any device and in any float dtype.
    Portable,
}
