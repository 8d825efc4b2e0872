//! The causal mask of the portable path: a part of one triangle that stays on the device, so that no
//! pass uploads a mask and decoding takes the rows of all its sequences with one kernel.

use std::sync::RwLock;

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// Side of the smallest triangle.
const SMALLEST: usize = 256;

/// 0 where the column is at most the row, −∞ above; grown on demand.
#[derive(Debug, Default)]
pub struct CausalTable {
    triangle: RwLock<Option<Tensor>>,
}

impl CausalTable {
    /// At least `len` rows and columns, f32 (f64 where `dtype` is).
    pub fn triangle(&self, len: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let dtype = match dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        {
            let triangle = self.triangle.read().unwrap_or_else(|e| e.into_inner());
            let fits = |t: &&Tensor| {
                t.dims()[0] >= len && t.dtype() == dtype && t.device().same_device(device)
            };
            if let Some(triangle) = triangle.as_ref().filter(fits) {
                return Ok(triangle.clone());
            }
        }
        let len = len.max(SMALLEST).next_power_of_two();
        let numbers = Tensor::arange(0, len as u32, device)?;
        let seen = numbers.unsqueeze(0)?.broadcast_le(&numbers.unsqueeze(1)?)?;
        let zero = Tensor::zeros((len, len), dtype, device)?;
        let never = Tensor::full(f32::NEG_INFINITY, (len, len), device)?.to_dtype(dtype)?;
        let fresh = seen.where_cond(&zero, &never)?;
        *self.triangle.write().unwrap_or_else(|e| e.into_inner()) = Some(fresh.clone());
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_sees_itself_and_what_comes_before() {
        let table = CausalTable::default();
        for (len, dtype) in [(3, DType::F32), (300, DType::BF16), (2, DType::F64)] {
            let triangle = table.triangle(len, dtype, &Device::Cpu).unwrap();
            let corner = triangle.narrow(0, 0, 2).unwrap().narrow(1, 0, 3).unwrap();
            let corner = corner
                .to_dtype(DType::F32)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            let never = f32::NEG_INFINITY;
            assert_eq!(corner, [[0.0, never, never], [0.0, 0.0, never]]);
            assert!(triangle.dims()[0] >= len);
        }
    }
}
