//! Rotary position embedding in the half-rotation form of Hugging Face's Qwen2 and Llama.

use std::sync::{Arc, RwLock};

use candle_core::{DType, Device, Tensor};

use super::{Backend, cpu, cpu_slice, from_cpu};
use crate::Result;

/// Cosines and sines of every position, grown on demand.
///
/// Angles are computed as transformers does, in f32: position × inverse frequency.
#[derive(Debug)]
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
    rows: RwLock<Arc<Rows>>,
}

/// cos and sin of positions `0..len`, each `[len, head_dim / 2]` row-major.
#[derive(Debug, Default)]
struct Rows {
    len: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// The cosines and sines of the rows of one batch, shared by all layers.
#[derive(Debug, Clone)]
pub struct Rotation {
    positions: Arc<Vec<u32>>,
    rows: Arc<Rows>,
    /// `[T, 1, head_dim / 2]` each, only on the portable path.
    tensors: Option<(Tensor, Tensor)>,
}

impl RopeTable {
    /// `inverse_frequencies` has `head_dim / 2` entries, with any rope scaling applied.
    pub fn new(inverse_frequencies: Vec<f32>) -> Self {
        Self {
            inverse_frequencies,
            rows: RwLock::default(),
        }
    }

    /// The rotation of a batch whose row `t` stands at `positions[t]`.
    pub fn rotation(
        &self,
        backend: Backend,
        positions: Vec<u32>,
        dtype: DType,
        device: &Device,
    ) -> Result<Rotation> {
        let needed = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let rows = self.rows(needed);
        let tensors = match backend {
            Backend::Cpu => None,
            Backend::Portable => {
                let half = self.inverse_frequencies.len();
                let gather = |table: &[f32]| -> Result<Tensor> {
                    let values: Vec<f32> = positions
                        .iter()
                        .flat_map(|&p| &table[p as usize * half..][..half])
                        .copied()
                        .collect();
                    let tensor = Tensor::from_vec(values, (positions.len(), 1, half), device)?;
                    Ok(tensor.to_dtype(dtype)?)
                };
                Some((gather(&rows.cos)?, gather(&rows.sin)?))
            }
        };
        Ok(Rotation {
            positions: Arc::new(positions),
            rows,
            tensors,
        })
    }

    fn rows(&self, needed: usize) -> Arc<Rows> {
        {
            let rows = self.rows.read().unwrap_or_else(|e| e.into_inner());
            if rows.len >= needed {
                return rows.clone();
            }
        }
        let len = needed.next_power_of_two().max(256);
        let angles = (0..len).flat_map(|p| {
            self.inverse_frequencies
                .iter()
                .map(move |f| f64::from(p as f32 * f))
        });
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        let grown = Arc::new(Rows { len, cos, sin });
        *self.rows.write().unwrap_or_else(|e| e.into_inner()) = grown.clone();
        grown
    }
}

/// Rotates x `[T, heads × head_dim]`: (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin) where x₁, x₂
/// are the halves of each head.
pub fn forward(backend: Backend, x: &Tensor, rotation: &Rotation, heads: usize) -> Result<Tensor> {
    rotate(backend, x, rotation, heads, false)
}

/// Gradient of [`forward`]: the inverse rotation.
pub fn backward(backend: Backend, g: &Tensor, rotation: &Rotation, heads: usize) -> Result<Tensor> {
    rotate(backend, g, rotation, heads, true)
}

fn rotate(
    backend: Backend,
    x: &Tensor,
    rotation: &Rotation,
    heads: usize,
    inverse: bool,
) -> Result<Tensor> {
    let (t, width) = x.dims2()?;
    match (backend, &rotation.tensors) {
        (Backend::Portable, Some((cos, sin))) => {
            let x = x.reshape((t, heads, width / heads))?;
            let half = width / heads / 2;
            let (x1, x2) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let sin = if inverse { sin.neg()? } else { sin.clone() };
            let y1 = (x1.broadcast_mul(cos)? - x2.broadcast_mul(&sin)?)?;
            let y2 = (x2.broadcast_mul(cos)? + x1.broadcast_mul(&sin)?)?;
            Ok(Tensor::cat(&[y1, y2], 2)?.reshape((t, width))?)
        }
        _ => {
            let mut y = cpu_slice(x)?.to_vec();
            let (cos, sin) = (&rotation.rows.cos, &rotation.rows.sin);
            if inverse {
                cpu::rope_backward(&mut y, heads, &rotation.positions, cos, sin);
            } else {
                cpu::rope(&mut y, heads, &rotation.positions, cos, sin);
            }
            from_cpu(y, (t, width))
        }
    }
}
