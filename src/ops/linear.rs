//! Linear maps with a frozen weight and a low-rank side path:
//! y = x Wᵀ + b + ((x Aᵀ) Mᵀ) Bᵀ, so that ΔW = B M A is never folded into W.

use std::ops::Range;

use candle_core::Tensor;

use super::cpu::{self, PackedMatrix};
use super::{cpu_slice, from_cpu, update};
use crate::Result;
use crate::adapter::{Side, SidePart, SideProducts};

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
    /// x Aᵀ of the rows that have a side path.
    pub xa: SideProducts,
}

/// y and x Aᵀ: the frozen product of all rows, and the side path of each.
pub fn forward(x: &Tensor, linear: &Linear, side: &Side<'_>) -> Result<Output> {
    let y = linear.weight.forward(x, linear.bias.as_ref())?;
    let (y, xa) = match linear.weight {
        Matrix::Packed(_) => {
            let parts = side.parts.iter().map(|part| {
                Ok(CpuPart {
                    rows: &part.rows,
                    inward: part.a().clone(),
                    cores: part.cores(|m| Ok(m.clone()))?,
                    outward: part.b().clone(),
                })
            });
            add_on_cpu(y, x, &parts.collect::<Result<Vec<_>>>()?)?
        }
        Matrix::Dense(_) => add_parts(y, side, |part, y| {
            let xa = rows_of(x, &part.rows)?.matmul(&part.a().t()?)?;
            let update = match part.row_cores()? {
                None => xa.matmul(&part.first().scaled_b()?.t()?)?,
                Some(cores) => mix(&xa, &cores.t()?)?.matmul(&part.b().t()?)?,
            };
            Ok(((y + update)?, xa))
        })?,
    };
    Ok(Output { y, xa })
}

/// x Aᵀ alone, with the bits of [`forward`]: what backward needs when y is not wanted.
pub fn side_input(x: &Tensor, linear: &Linear, side: &Side<'_>) -> Result<SideProducts> {
    let mut products = SideProducts::default();
    for part in &side.parts {
        let x = rows_of(x, &part.rows)?;
        let xa = match linear.weight {
            Matrix::Packed(_) => down(&x, part.a())?,
            Matrix::Dense(_) => x.matmul(&part.a().t()?)?,
        };
        products.push(part.rows.clone(), xa);
    }
    Ok(products)
}

/// dx `[T, in]` = g W + ((g B) M) A, and g B of the rows that have a side path.
pub fn backward(g: &Tensor, linear: &Linear, side: &Side<'_>) -> Result<(Tensor, SideProducts)> {
    let dx = linear.weight.backward(g)?;
    match linear.weight {
        Matrix::Packed(_) => {
            let transposed = |t: &Tensor| Ok(t.t()?.contiguous()?);
            let parts = side.parts.iter().map(|part| {
                Ok(CpuPart {
                    rows: &part.rows,
                    inward: transposed(part.b())?,
                    cores: part.cores(transposed)?,
                    outward: transposed(part.a())?,
                })
            });
            add_on_cpu(dx, g, &parts.collect::<Result<Vec<_>>>()?)
        }
        Matrix::Dense(_) => add_parts(dx, side, |part, dx| {
            let g = rows_of(g, &part.rows)?;
            let gb = g.matmul(part.b())?;
            let through = match part.row_cores()? {
                // g (B M) A: the gradient of M alone needs g B.
                None => g.matmul(part.first().scaled_b()?)?,
                Some(cores) => mix(&gb, &cores)?,
            };
            Ok(((dx + through.matmul(part.a())?)?, gb))
        }),
    }
}

/// Rows of a matrix, without a copy.
fn rows_of(x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    if *rows == (0..x.dim(0)?) {
        return Ok(x.clone());
    }
    Ok(x.narrow(0, rows.start, rows.len())?)
}

/// A side path with its factors in the order in which rows go through them: A, M, B on the way forward,
/// Bᵀ, Mᵀ, Aᵀ on the way back.
struct CpuPart<'a> {
    rows: &'a Range<usize>,
    /// `[r, in]`
    inward: Tensor,
    /// `[r, r]` of every run of rows.
    cores: Vec<(Range<usize>, Tensor)>,
    /// `[out, r]`
    outward: Tensor,
}

/// y + ((x Aᵀ) Mᵀ) Bᵀ of the rows of every part, and x Aᵀ, on the CPU path.
fn add_on_cpu(y: Tensor, x: &Tensor, parts: &[CpuPart<'_>]) -> Result<(Tensor, SideProducts)> {
    let mut products = SideProducts::default();
    let mut ready = Vec::with_capacity(parts.len());
    for part in parts {
        let xa = down(&rows_of(x, part.rows)?, &part.inward)?;
        let mut mixed = vec![0.0; xa.elem_count()];
        let rank = xa.dim(1)?;
        {
            let xa = cpu_slice(&xa)?;
            for (run, core) in &part.cores {
                let at = (run.start - part.rows.start) * rank..(run.end - part.rows.start) * rank;
                let core = cpu_slice(core)?;
                cpu::low_rank_down(&xa[at.clone()], &core, rank, &mut mixed[at]);
            }
        }
        products.push(part.rows.clone(), xa);
        ready.push((part.rows, mixed, rank, cpu_slice(&part.outward)?));
    }
    if ready.is_empty() {
        return Ok((y, products));
    }
    let width = y.dim(1)?;
    let y = update(y, |y| {
        for (rows, mixed, rank, outward) in &ready {
            let y = &mut y[rows.start * width..rows.end * width];
            cpu::low_rank_up(mixed, outward, *rank, y);
        }
    })?;
    Ok((y, products))
}

/// x Aᵀ for A `[r, in]`, on the CPU path.
fn down(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    let (rows, rank) = (x.dim(0)?, a.dim(0)?);
    let mut xa = vec![0.0; rows * rank];
    cpu::low_rank_down(&cpu_slice(x)?, &cpu_slice(a)?, rank, &mut xa);
    from_cpu(xa, (rows, rank))
}

/// Every part's rows of y as `add` makes them from what they are, with the product that it gives.
fn add_parts(
    y: Tensor,
    side: &Side<'_>,
    mut add: impl FnMut(&SidePart<'_>, Tensor) -> Result<(Tensor, Tensor)>,
) -> Result<(Tensor, SideProducts)> {
    let mut products = SideProducts::default();
    let rows = y.dim(0)?;
    let mut pieces = Vec::new();
    let mut next = 0;
    for part in &side.parts {
        if next < part.rows.start {
            pieces.push(rows_of(&y, &(next..part.rows.start))?);
        }
        let (piece, product) = add(part, rows_of(&y, &part.rows)?)?;
        pieces.push(piece);
        products.push(part.rows.clone(), product);
        next = part.rows.end;
    }
    if next < rows {
        pieces.push(rows_of(&y, &(next..rows))?);
    }
    let y = match pieces.len() {
        1 => pieces.remove(0),
        _ => Tensor::cat(&pieces, 0)?,
    };
    Ok((y, products))
}

/// Row `t` of z `[T, r]` times matrix `t` of `cores` `[T, r, r]`, in the precision of the latter.
fn mix(z: &Tensor, cores: &Tensor) -> Result<Tensor> {
    let rows = z.to_dtype(cores.dtype())?.unsqueeze(1)?;
    Ok(rows.matmul(cores)?.squeeze(1)?.to_dtype(z.dtype())?)
}
