//! The bridge between candle tensors and the slices that the CPU kernels work on.

use std::ops::Deref;

use candle_core::{CpuStorage, Device, Shape, Storage, StorageRef, Tensor};

use crate::{Error, Result};

/// A read guard over the values of a contiguous f32 CPU tensor.
pub struct CpuSlice<'a> {
    guard: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Deref for CpuSlice<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.len],
            _ => unreachable!("checked when the guard was made"),
        }
    }
}

/// Borrows the values of `tensor` without a copy.
///
/// # Errors
/// When the tensor is not a contiguous f32 tensor in CPU memory: a bug of the caller.
pub fn cpu_slice(tensor: &Tensor) -> Result<CpuSlice<'_>> {
    let (guard, layout) = tensor.storage_and_layout();
    let contiguous = layout.contiguous_offsets();
    match (&*guard, contiguous) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(CpuSlice {
            guard,
            start,
            len: end - start,
        }),
        _ => Err(Error::Internal(format!(
            "a CPU kernel was given a {:?} {:?} tensor of shape {:?}",
            tensor.device().location(),
            tensor.dtype(),
            tensor.shape()
        ))),
    }
}

/// Wraps values computed by a CPU kernel, without a copy.
pub fn from_cpu(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// Changes the values of a contiguous f32 CPU tensor that nobody else holds, in place.
pub fn update(tensor: Tensor, change: impl Fn(&mut [f32])) -> Result<Tensor> {
    struct InPlace<F>(F);
    impl<F: Fn(&mut [f32])> candle_core::InplaceOp1 for InPlace<F> {
        fn name(&self) -> &'static str {
            "update"
        }

        fn cpu_fwd(
            &self,
            storage: &mut candle_core::CpuStorage,
            _: &candle_core::Layout,
        ) -> candle_core::Result<()> {
            match storage {
                candle_core::CpuStorage::F32(values) => (self.0)(values),
                _ => candle_core::bail!("an f32 tensor was expected"),
            }
            Ok(())
        }
    }
    tensor.inplace_op1(&InPlace(change)).map_err(Error::from)?;
    Ok(tensor)
}
