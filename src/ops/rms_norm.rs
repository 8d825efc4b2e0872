//! Root-mean-square normalisation: y = x / √(mean(x²) + ε) · w.

use candle_core::{D, DType, Tensor};

use super::{Backend, cpu, cpu_slice, from_cpu};
use crate::Result;

/// y `[T, h]` of x `[T, h]` and weight `[h]`.
pub fn forward(backend: Backend, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    match backend {
        Backend::Cpu => {
            let (rows, width) = x.dims2()?;
            let mut y = vec![0.0; rows * width];
            cpu::rms_norm(&cpu_slice(x)?, &cpu_slice(weight)?, eps as f32, &mut y);
            from_cpu(y, (rows, width))
        }
        // One kernel, which computes in f32; there is none for f64.
        Backend::Portable if x.dtype() != DType::F64 => {
            Ok(candle_nn::ops::rms_norm(x, weight, eps as f32)?)
        }
        Backend::Portable => {
            let (normalised, _) = normalise(x, eps)?;
            Ok(normalised
                .broadcast_mul(&wide(weight)?)?
                .to_dtype(x.dtype())?)
        }
    }
}

/// Gradients of [`forward`]: dx `[T, h]`, and dw `[h]` when `weight_gradient` is wanted.
///
/// With x̂ = x·s, s = 1/√(mean(x²)+ε), ĝ = g∘w: dx = s (ĝ − x̂ mean(ĝ∘x̂)), dw = Σ_rows g∘x̂.
pub fn backward(
    backend: Backend,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    g: &Tensor,
    weight_gradient: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    match backend {
        Backend::Cpu => {
            let (rows, width) = x.dims2()?;
            let mut dx = vec![0.0; rows * width];
            let mut dw = weight_gradient.then(|| vec![0.0; width]);
            cpu::rms_norm_backward(
                &cpu_slice(x)?,
                &cpu_slice(weight)?,
                eps as f32,
                &cpu_slice(g)?,
                &mut dx,
                dw.as_deref_mut(),
            );
            let dw = dw.map(|dw| from_cpu(dw, width)).transpose()?;
            Ok((from_cpu(dx, (rows, width))?, dw))
        }
        Backend::Portable => {
            let (normalised, scale) = normalise(x, eps)?;
            let g = wide(g)?;
            let weighted = g.broadcast_mul(&wide(weight)?)?;
            let mean = (&weighted * &normalised)?.mean_keepdim(D::Minus1)?;
            let dx = (weighted - normalised.broadcast_mul(&mean)?)?.broadcast_mul(&scale)?;
            let dw = if weight_gradient {
                Some((g * normalised)?.sum(0)?)
            } else {
                None
            };
            Ok((dx.to_dtype(x.dtype())?, dw))
        }
    }
}

/// x̂ and s, in at least f32.
fn normalise(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let x = wide(x)?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&scale)?, scale))
}

/// Half-precision tensors as f32, others as they are.
pub(super) fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.clone()),
        _ => Ok(x.to_dtype(DType::F32)?),
    }
}
