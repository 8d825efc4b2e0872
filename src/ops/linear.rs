//! Linear maps with a frozen weight and a low-rank side path:
//! y = x Wᵀ + b + ((x Aᵀ) Mᵀ) Bᵀ, so that ΔW = B M A is never folded into W.

use candle_core::Tensor;

use super::cpu::{self, PackedMatrix};
use super::{cpu_slice, from_cpu, update};
use crate::Result;
use crate::adapter::LowRank;

/// A weight `[out, in]` in the form its backend multiplies with.
#[derive(Debug, Clone)]
pub enum Matrix {
    Packed(PackedMatrix),
    Dense(Tensor),
}

/// A linear map of the model: weight `[out, in]` and bias `[out]`.
#[derive(Debug, Clone)]
pub struct Linear {
    pub weight: Matrix,
    pub bias: Option<Tensor>,
}

impl Matrix {
    /// `(out, in)`
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Packed(w) => Ok((w.out_features(), w.in_features())),
            Self::Dense(w) => Ok(w.dims2()?),
        }
    }

    /// Bytes of memory held by the weights.
    pub fn bytes(&self) -> Result<usize> {
        match self {
            Self::Packed(w) => Ok(w.bytes()),
            Self::Dense(w) => Ok(w.elem_count() * w.dtype().size_in_bytes()),
        }
    }

    /// y `[T, out]` = x `[T, in]` · Wᵀ (+ bias).
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Packed(w) => {
                let rows = x.dim(0)?;
                let mut y = vec![0.0; rows * w.out_features()];
                let bias = bias.map(cpu_slice).transpose()?;
                w.forward(&cpu_slice(x)?, rows, bias.as_deref(), &mut y);
                from_cpu(y, (rows, w.out_features()))
            }
            Self::Dense(w) => {
                let y = x.matmul(&w.t()?)?;
                match bias {
                    Some(bias) => Ok(y.broadcast_add(bias)?),
                    None => Ok(y),
                }
            }
        }
    }

    /// dx `[T, in]` = g `[T, out]` · W.
    pub fn backward(&self, g: &Tensor) -> Result<Tensor> {
        match self {
            Self::Packed(w) => {
                let rows = g.dim(0)?;
                let mut dx = vec![0.0; rows * w.in_features()];
                w.backward(&cpu_slice(g)?, rows, &mut dx, false);
                from_cpu(dx, (rows, w.in_features()))
            }
            Self::Dense(w) => Ok(g.matmul(w)?),
        }
    }

    /// Rows `ids` of the matrix, `[ids.len(), in]`: the token embedding.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Packed(w) => {
                let width = w.in_features();
                let mut out = vec![0.0; ids.len() * width];
                for (row, &id) in out.chunks_exact_mut(width).zip(ids) {
                    w.row(id as usize, row);
                }
                from_cpu(out, (ids.len(), width))
            }
            Self::Dense(w) => {
                let ids = Tensor::new(ids, w.device())?;
                Ok(w.index_select(&ids, 0)?)
            }
        }
    }

    /// The same matrix, packed ones in f32.
    pub fn widened(&self) -> Result<Self> {
        match self {
            Self::Packed(w) => {
                let (out, input) = (w.out_features(), w.in_features());
                Ok(Self::Packed(PackedMatrix::pack(&w.unpack(), out, input)))
            }
            Self::Dense(w) => Ok(Self::Dense(w.copy()?)),
        }
    }

    /// Replaces the weight by `values`, row-major `out × in`, rounded to the stored dtype.
    pub fn replace(&mut self, values: &[f32]) -> Result<()> {
        match self {
            Self::Packed(w) => w.repack_from(values),
            Self::Dense(w) => {
                *w = Tensor::from_slice(values, w.shape(), w.device())?.to_dtype(w.dtype())?;
            }
        }
        Ok(())
    }

    /// The weight row-major in f32, `out × in` values.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self {
            Self::Packed(w) => Ok(w.unpack()),
            Self::Dense(w) => Ok(w
                .to_dtype(candle_core::DType::F32)?
                .flatten_all()?
                .to_vec1()?),
        }
    }
}

/// What [`forward`] leaves for [`backward`] and for the adapter's gradient.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[T, out]`
    pub y: Tensor,
    /// x Aᵀ `[T, r]`, when there is a side path.
    pub xa: Option<Tensor>,
}

/// y and, with a side path, x Aᵀ.
pub fn forward(x: &Tensor, linear: &Linear, side: Option<&LowRank>) -> Result<Output> {
    let y = linear.weight.forward(x, linear.bias.as_ref())?;
    let Some(side) = side else {
        return Ok(Output { y, xa: None });
    };
    let (xa, y) = match linear.weight {
        Matrix::Packed(_) => add_side(y, x, &side.a, &side.m, &side.b)?,
        Matrix::Dense(_) => {
            let xa = x.matmul(&side.a.t()?)?;
            let y = (y + xa.matmul(&side.scaled_b()?.t()?)?)?;
            (xa, y)
        }
    };
    Ok(Output { y, xa: Some(xa) })
}

/// x Aᵀ `[T, r]` alone, with the bits of [`forward`]: what backward needs when y is not wanted.
pub fn side_input(x: &Tensor, linear: &Linear, side: &LowRank) -> Result<Tensor> {
    match linear.weight {
        Matrix::Packed(_) => down(x, &side.a),
        Matrix::Dense(_) => Ok(x.matmul(&side.a.t()?)?),
    }
}

/// dx `[T, in]` = g W + ((g B) M) A and, with a side path, g B `[T, r]`.
pub fn backward(
    g: &Tensor,
    linear: &Linear,
    side: Option<&LowRank>,
) -> Result<(Tensor, Option<Tensor>)> {
    let dx = linear.weight.backward(g)?;
    let Some(side) = side else {
        return Ok((dx, None));
    };
    let (gb, dx) = match linear.weight {
        Matrix::Packed(_) => {
            let [a, m, b] = [&side.a, &side.m, &side.b].map(|t| t.t()?.contiguous());
            add_side(dx, g, &b?, &m?, &a?)?
        }
        // g (B M) A: the gradient of M alone needs g B.
        Matrix::Dense(_) => {
            let dx = (dx + g.matmul(side.scaled_b()?)?.matmul(&side.a)?)?;
            (g.matmul(&side.b)?, dx)
        }
    };
    Ok((dx, Some(gb)))
}

/// (x Aᵀ, y + ((x Aᵀ) Mᵀ) Bᵀ) for A `[r, in]`, M `[r, r]`, B `[out, r]`, on the CPU path.
fn add_side(y: Tensor, x: &Tensor, a: &Tensor, m: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let xa = down(x, a)?;
    let (rows, rank) = xa.dims2()?;
    let mut mixed = vec![0.0; rows * rank];
    cpu::low_rank_down(&cpu_slice(&xa)?, &cpu_slice(m)?, rank, &mut mixed);
    let b = cpu_slice(b)?;
    let y = update(y, |y| cpu::low_rank_up(&mixed, &b, rank, y))?;
    Ok((xa, y))
}

/// x Aᵀ for A `[r, in]`, on the CPU path.
fn down(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    let (rows, rank) = (x.dim(0)?, a.dim(0)?);
    let mut xa = vec![0.0; rows * rank];
    cpu::low_rank_down(&cpu_slice(x)?, &cpu_slice(a)?, rank, &mut xa);
    from_cpu(xa, (rows, rank))
}
