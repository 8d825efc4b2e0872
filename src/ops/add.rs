//! The sum of two activations: residual connections and the gradients that meet there.

use candle_core::Tensor;

use super::{Backend, cpu_slice, from_cpu};
use crate::{Error, Result};

/// a + b, of equal shapes.
///
/// On the CPU a plain loop: memory bound, and small beside the products around it. Candle would
/// hand it to a second pool of threads that wait by spinning, which takes the cores away from the
/// kernels' own pool.
pub fn forward(backend: Backend, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match backend {
        Backend::Cpu => {
            if a.shape() != b.shape() {
                return Err(Error::Internal(format!(
                    "a sum of tensors of shapes {:?} and {:?}",
                    a.shape(),
                    b.shape()
                )));
            }
            let (x, y) = (cpu_slice(a)?, cpu_slice(b)?);
            let sum = x.iter().zip(y.iter()).map(|(x, y)| x + y).collect();
            from_cpu(sum, a.shape())
        }
        Backend::Portable => Ok((a + b)?),
    }
}
