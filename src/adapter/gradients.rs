//! Where the decoder's backward pass leaves the gradient of the trained parameters.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::full::Places;
use crate::ops::cpu::weight_gradient;
use crate::ops::cpu_slice;
use crate::{Error, Result};

/// Row of a micro-batch that belongs to no single sequence: the prompt a whole group shares.
pub const SHARED_ROW: u32 = u32::MAX;

/// What the backward pass of one adapted linear map knows. T = tokens of the micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct LinearGrads<'a> {
    /// Input of the map, `[T, in]`.
    pub x: &'a Tensor,
    /// Gradient of the loss with respect to its output, `[T, out]`.
    pub g: &'a Tensor,
    /// `x · Aᵀ` `[T, r]` and `g · B` `[T, r]`; absent for kind `full`.
    pub low_rank: Option<(&'a Tensor, &'a Tensor)>,
}

/// Gradient of the flat parameters, summed over micro-batches.
///
/// Sums run in a fixed order, so they do not depend on the number of threads.
#[derive(Debug, Clone)]
pub struct Gradients {
    num_parameters: usize,
    sums: Sums,
}

#[derive(Debug, Clone)]
enum Sums {
    /// One row in f64: `tinylora` and `lora-xs`.
    Total(Vec<f64>),
    /// One row a sequence, `[sequences, parameters]` in f64. `offset` is added to the sequence
    /// numbers of the current micro-batch.
    PerSequence { rows: Vec<f64>, offset: usize },
    /// One row in f32, as large as the trained weights: `lora`, and `full`, which finds the place
    /// of a weight by its name.
    Large {
        sum: Vec<f32>,
        places: Option<Arc<Places>>,
    },
}

impl Gradients {
    pub(super) fn total(num_parameters: usize) -> Self {
        Self {
            num_parameters,
            sums: Sums::Total(vec![0.0; num_parameters]),
        }
    }

    pub(super) fn per_sequence(num_parameters: usize, num_sequences: usize) -> Self {
        let rows = vec![0.0; num_parameters * num_sequences];
        Self {
            num_parameters,
            sums: Sums::PerSequence { rows, offset: 0 },
        }
    }

    pub(super) fn large(num_parameters: usize, places: Option<Arc<Places>>) -> Self {
        Self {
            num_parameters,
            sums: Sums::Large {
                sum: vec![0.0; num_parameters],
                places,
            },
        }
    }

    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// Sequence `s` of the following micro-batches is sequence `offset + s` of the step. Without
    /// effect when only the sum is kept.
    pub fn set_sequence_offset(&mut self, value: usize) {
        if let Sums::PerSequence { offset, .. } = &mut self.sums {
            *offset = value;
        }
    }

    /// The gradient summed over everything accumulated so far.
    pub fn sum(&self) -> Vec<f64> {
        match &self.sums {
            Sums::Total(sum) => sum.clone(),
            Sums::Large { sum, .. } => sum.iter().map(|&x| f64::from(x)).collect(),
            Sums::PerSequence { rows, .. } => {
                let mut sum = vec![0.0; self.num_parameters];
                for row in rows.chunks_exact(self.num_parameters) {
                    sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
                }
                sum
            }
        }
    }

    /// Adds the sums of another one of the same adapter.
    ///
    /// # Errors
    /// `Error::Internal` when one of them has rows for sequences, or their sizes differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        match (&mut self.sums, &other.sums) {
            (Sums::Total(sum), Sums::Total(other)) if sum.len() == other.len() => {
                sum.iter_mut().zip(other).for_each(|(s, x)| *s += x);
                Ok(())
            }
            _ => Err(missing("two sums of equal size")),
        }
    }

    /// Each sequence's own gradient, or `None` when only the sum is kept.
    pub fn rows(&self) -> Option<impl Iterator<Item = &[f64]>> {
        match &self.sums {
            Sums::PerSequence { rows, .. } => Some(rows.chunks_exact(self.num_parameters)),
            _ => None,
        }
    }

    /// Forgets everything accumulated so far.
    pub fn clear(&mut self) {
        match &mut self.sums {
            Sums::Total(sum) => sum.fill(0.0),
            Sums::Large { sum, .. } => sum.fill(0.0),
            Sums::PerSequence { rows, offset } => {
                rows.fill(0.0);
                *offset = 0;
            }
        }
    }

    /// Adds the gradient of the r×r core of one module.
    ///
    /// `core(sequence's gbᵀ·xa as row-major [r, r], that sequence's parameters)` turns dM into the
    /// parameters' gradient; it is called once, or once a sequence.
    pub(super) fn add_core(
        &mut self,
        lin: &LinearGrads<'_>,
        row_sequences: &[u32],
        mut core: impl FnMut(&[f64], &mut [f64]),
    ) -> Result<()> {
        let (xa, gb) = lin.low_rank.ok_or_else(|| missing("x·Aᵀ and g·B"))?;
        let (tokens, r) = xa.dims2()?;
        if gb.dims2()? != (tokens, r) {
            return Err(missing("equal shapes of x·Aᵀ and g·B"));
        }
        let (xa, gb) = (host(xa)?, host(gb)?);
        match &mut self.sums {
            Sums::Large { .. } => Err(missing("a sum in f64")),
            Sums::Total(sum) => {
                let mut dm = vec![0.0; r * r];
                for (x, g) in xa.chunks_exact(r).zip(gb.chunks_exact(r)) {
                    add_outer(&mut dm, g, x);
                }
                core(&dm, sum);
                Ok(())
            }
            Sums::PerSequence { rows, offset } => {
                if row_sequences.len() != tokens {
                    return Err(missing("a sequence number for every row"));
                }
                let sequences = match row_sequences.iter().max() {
                    None => return Ok(()),
                    Some(&SHARED_ROW) => return Err(missing("rows of one sequence each")),
                    Some(&last) => last as usize + 1,
                };
                let first = *offset * self.num_parameters;
                let end = first + sequences * self.num_parameters;
                let rows = rows
                    .get_mut(first..end)
                    .ok_or_else(|| missing("enough rows"))?;
                let mut dm = vec![0.0; sequences * r * r];
                for (t, &sequence) in row_sequences.iter().enumerate() {
                    let at = sequence as usize * r * r;
                    add_outer(
                        &mut dm[at..at + r * r],
                        &gb[t * r..][..r],
                        &xa[t * r..][..r],
                    );
                }
                for (row, dm) in rows
                    .chunks_exact_mut(self.num_parameters)
                    .zip(dm.chunks_exact(r * r))
                {
                    core(dm, row);
                }
                Ok(())
            }
        }
    }

    /// Adds gᵀ · x, for g `[T, n]` and x `[T, k]`, to the matrix `[n, k]` at `place`.
    pub(super) fn add_product(
        &mut self,
        place: Range<usize>,
        g: &Tensor,
        x: &Tensor,
    ) -> Result<()> {
        let (n, k) = (g.dim(1)?, x.dim(1)?);
        let sum = self.large_at(place)?;
        if sum.len() != n * k || g.dim(0)? != x.dim(0)? {
            return Err(missing("factors that fit its matrix"));
        }
        if let (Ok(g), Ok(x)) = (cpu_slice(g), cpu_slice(x)) {
            weight_gradient(&g, &x, n, k, sum, true);
            return Ok(());
        }
        add_values(sum, &g.t()?.matmul(x)?)
    }

    /// Where the named weights lie, when it is they that are trained.
    pub(super) fn places(&self) -> Option<Arc<Places>> {
        match &self.sums {
            Sums::Large { places, .. } => places.clone(),
            _ => None,
        }
    }

    /// The part of the sum at `place`.
    pub(super) fn large_at(&mut self, place: Range<usize>) -> Result<&mut [f32]> {
        match &mut self.sums {
            Sums::Large { sum, .. } => sum.get_mut(place),
            _ => None,
        }
        .ok_or_else(|| missing("a sum as large as its weights"))
    }
}

pub(super) fn add_values(sum: &mut [f32], gradient: &Tensor) -> Result<()> {
    let values = host_f32(gradient)?;
    if values.len() != sum.len() {
        return Err(missing("the shape of its tensor"));
    }
    sum.iter_mut().zip(values).for_each(|(s, x)| *s += x);
    Ok(())
}

pub(super) fn host_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// `dm[i, j] += g[i] · x[j]`.
fn add_outer(dm: &mut [f64], g: &[f64], x: &[f64]) {
    for (row, &gi) in dm.chunks_exact_mut(x.len()).zip(g) {
        for (d, &xj) in row.iter_mut().zip(x) {
            *d += gi * xj;
        }
    }
}

fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn missing(what: &str) -> Error {
    Error::Internal(format!("the gradient of an adapter needs {what}"))
}
