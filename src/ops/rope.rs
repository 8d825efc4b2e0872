//! Rotary position embedding in the half-rotation form of Hugging Face's Qwen2 and Llama.

use std::sync::{Arc, RwLock};

use candle_core::{DType, Device, Tensor};

use super::{Backend, cpu, update};
use crate::Result;

/// Cosines and sines of every position, grown on demand.
///
/// Angles are computed as transformers does, in f32: position × inverse frequency.
#[derive(Debug)]
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
    rows: RwLock<Arc<Rows>>,
    /// The same on a device, `[len, head_dim / 2]` each.
    on_device: RwLock<Option<(Tensor, Tensor)>>,
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
    /// Only on the portable path.
    tensors: Option<OnDevice>,
}

/// A rotation on the portable path.
#[derive(Debug, Clone)]
struct OnDevice {
    /// Position of every row, `[T]`.
    index: Tensor,
    /// `[T, head_dim / 2]`
    cos: Tensor,
    /// `[T, head_dim / 2]`
    sin: Tensor,
}

impl RopeTable {
    /// `inverse_frequencies` has `head_dim / 2` entries, with any rope scaling applied.
    pub fn new(inverse_frequencies: Vec<f32>) -> Self {
        Self {
            inverse_frequencies,
            rows: RwLock::default(),
            on_device: RwLock::default(),
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
                let (cos, sin) = self.table(&rows, dtype, device)?;
                let index = Tensor::new(&positions[..], device)?;
                Some(OnDevice {
                    cos: cos.index_select(&index, 0)?,
                    sin: sin.index_select(&index, 0)?,
                    index,
                })
            }
        };
        Ok(Rotation {
            positions: Arc::new(positions),
            rows,
            tensors,
        })
    }

    /// The whole table on the device, uploaded when it has grown: a pass then uploads its positions
    /// alone.
    fn table(&self, rows: &Rows, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let fits = |table: &Tensor| {
            table.dims().first() == Some(&rows.len)
                && table.dtype() == dtype
                && table.device().same_device(device)
        };
        {
            let table = self.on_device.read().unwrap_or_else(|e| e.into_inner());
            if let Some((cos, sin)) = table.as_ref().filter(|(cos, _)| fits(cos)) {
                return Ok((cos.clone(), sin.clone()));
            }
        }
        let place = |values: &[f32]| -> Result<Tensor> {
            let shape = (rows.len, self.inverse_frequencies.len());
            Ok(Tensor::from_slice(values, shape, device)?.to_dtype(dtype)?)
        };
        let table = (place(&rows.cos)?, place(&rows.sin)?);
        *self.on_device.write().unwrap_or_else(|e| e.into_inner()) = Some(table.clone());
        Ok(table)
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
///
/// On the CPU in the memory of `x`, which nobody else may hold.
pub fn forward(backend: Backend, x: Tensor, rotation: &Rotation, heads: usize) -> Result<Tensor> {
    rotate(backend, x, rotation, heads, false)
}

/// Gradient of [`forward`]: the inverse rotation.
pub fn backward(backend: Backend, g: Tensor, rotation: &Rotation, heads: usize) -> Result<Tensor> {
    rotate(backend, g, rotation, heads, true)
}

impl Rotation {
    /// Position of every row `[T]` on the device, on the portable path.
    pub fn index(&self) -> Option<&Tensor> {
        self.tensors.as_ref().map(|tensors| &tensors.index)
    }
}

fn rotate(
    backend: Backend,
    x: Tensor,
    rotation: &Rotation,
    heads: usize,
    inverse: bool,
) -> Result<Tensor> {
    let (t, width) = x.dims2()?;
    match (backend, &rotation.tensors) {
        (Backend::Portable, Some(OnDevice { cos, sin, .. })) => {
            let x = x.reshape((1, t, heads, width / heads))?;
            let sin = if inverse { sin.neg()? } else { sin.clone() };
            Ok(candle_nn::rotary_emb::rope_thd(&x, cos, &sin)?.reshape((t, width))?)
        }
        _ => {
            let (cos, sin) = (&rotation.rows.cos, &rotation.rows.sin);
            let positions = &rotation.positions;
            update(x, |y| match inverse {
                true => cpu::rope_backward(y, heads, positions, cos, sin),
                false => cpu::rope(y, heads, positions, cos, sin),
            })
        }
    }
}
