//! The gated activation of the feed-forward block: silu(gate) ∘ up.

use candle_core::Tensor;

use super::{Backend, cpu, cpu_slice, from_cpu};
use crate::Result;

/// silu(gate) ∘ up, all `[T, intermediate]`.
pub fn forward(backend: Backend, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match backend {
        Backend::Cpu => {
            let mut out = vec![0.0; gate.elem_count()];
            cpu::swiglu(&cpu_slice(gate)?, &cpu_slice(up)?, &mut out);
            from_cpu(out, gate.shape())
        }
        Backend::Portable => Ok((gate.silu()? * up)?),
    }
}

/// Gradients of [`forward`]: (dgate, dup).
///
/// With σ = sigmoid(gate): dup = g ∘ gate σ, dgate = g ∘ up ∘ σ (1 + gate (1 − σ)).
pub fn backward(
    backend: Backend,
    gate: &Tensor,
    up: &Tensor,
    g: &Tensor,
) -> Result<(Tensor, Tensor)> {
    match backend {
        Backend::Cpu => {
            let mut dgate = vec![0.0; gate.elem_count()];
            let mut dup = vec![0.0; gate.elem_count()];
            cpu::swiglu_backward(
                &cpu_slice(gate)?,
                &cpu_slice(up)?,
                &cpu_slice(g)?,
                &mut dgate,
                &mut dup,
            );
            Ok((from_cpu(dgate, gate.shape())?, from_cpu(dup, up.shape())?))
        }
        Backend::Portable => {
            let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
            let silu = (gate * &sigmoid)?;
            let slope = (&sigmoid + (&silu - (&silu * &sigmoid)?)?)?;
            Ok((((g * up)? * slope)?, (g * silu)?))
        }
    }
}
