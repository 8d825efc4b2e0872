//! Where the decoder's backward pass leaves the gradient of the trained parameters.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::full::Places;
use crate::ops::cpu::weight_gradient;
use crate::ops::cpu_slice;
use crate::{Error, Result};

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
/// Sums run in a fixed order, so they do not depend on the number of threads; those in f64 not on
/// how pieces (a prompt with its completions) are packed into passes either: every piece is summed
/// by itself first.
#[derive(Debug, Clone)]
pub struct Gradients {
    num_parameters: usize,
    sums: Sums,
    /// x·Aᵀ and g·B of modules by slot, on a device: they are downloaded together.
    deferred: Vec<(usize, Tensor, Tensor)>,
}

#[derive(Debug, Clone)]
enum Sums {
    /// One row in f64: `tinylora` and `lora-xs`.
    Total {
        sum: Vec<f64>,
        pass: Option<Pass>,
        /// Pieces that are kept apart instead of being added to `sum`.
        apart: Option<Vec<Vec<f64>>>,
    },
    /// One row a sequence, `[sequences, parameters]` in f64.
    PerSequence { rows: Vec<f64> },
    /// One row in f32, as large as the trained weights: `lora`, and `full`, which finds the place
    /// of a weight by its name.
    Large {
        sum: Vec<f32>,
        places: Option<Arc<Places>>,
    },
}

/// The pieces of the pass in progress and their sums, `[pieces, parameters]`.
#[derive(Debug, Clone)]
struct Pass {
    pieces: Vec<Range<usize>>,
    sums: Vec<f64>,
}

impl Gradients {
    pub(super) fn total(num_parameters: usize) -> Self {
        Self {
            num_parameters,
            sums: Sums::Total {
                sum: vec![0.0; num_parameters],
                pass: None,
                apart: None,
            },
            deferred: Vec::new(),
        }
    }

    pub(super) fn per_sequence(num_parameters: usize, num_sequences: usize) -> Self {
        let rows = vec![0.0; num_parameters * num_sequences];
        Self {
            num_parameters,
            sums: Sums::PerSequence { rows },
            deferred: Vec::new(),
        }
    }

    pub(super) fn large(num_parameters: usize, places: Option<Arc<Places>>) -> Self {
        Self {
            num_parameters,
            sums: Sums::Large {
                sum: vec![0.0; num_parameters],
                places,
            },
            deferred: Vec::new(),
        }
    }

    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// Whether there is a row for every sequence.
    pub fn is_per_sequence(&self) -> bool {
        matches!(self.sums, Sums::PerSequence { .. })
    }

    /// The gradient summed over everything accumulated so far.
    pub fn sum(&self) -> Vec<f64> {
        match &self.sums {
            Sums::Total { sum, .. } => sum.clone(),
            Sums::Large { sum, .. } => sum.iter().map(|&x| f64::from(x)).collect(),
            Sums::PerSequence { rows } => {
                let mut sum = vec![0.0; self.num_parameters];
                for row in rows.chunks_exact(self.num_parameters) {
                    sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
                }
                sum
            }
        }
    }

    /// What follows is of a pass whose rows are these pieces, one after the other.
    pub fn begin_pass(&mut self, pieces: Vec<Range<usize>>) {
        if let Sums::Total { pass, .. } = &mut self.sums {
            let sums = vec![0.0; pieces.len() * self.num_parameters];
            *pass = Some(Pass { pieces, sums });
        }
    }

    /// Adds the pieces of the pass to the whole, in order, or keeps them apart.
    pub(super) fn end_pass(&mut self) {
        if let Sums::Total { sum, pass, apart } = &mut self.sums
            && let Some(pass) = pass.take()
        {
            for piece in pass.sums.chunks_exact(self.num_parameters.max(1)) {
                match apart {
                    Some(apart) => apart.push(piece.to_vec()),
                    None => add(sum, piece),
                }
            }
        }
    }

    /// From now on pieces (a prompt with its completions) are kept apart, for [`Self::take_pieces`].
    /// Without effect where there is no sum in f64.
    pub fn keep_pieces(&mut self) {
        if let Sums::Total { apart, .. } = &mut self.sums {
            apart.get_or_insert_default();
        }
    }

    /// The gradient of every piece so far, in the order of the passes.
    pub fn take_pieces(&mut self) -> Vec<Vec<f64>> {
        match &mut self.sums {
            Sums::Total { apart, .. } => apart.as_mut().map(std::mem::take).unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// Adds a piece that was kept apart, as if its pass ended here.
    ///
    /// # Errors
    /// `Error::Internal` when it is of another adapter.
    pub fn add_piece(&mut self, piece: &[f64]) -> Result<()> {
        match &mut self.sums {
            Sums::Total { sum, .. } if sum.len() == piece.len() => {
                add(sum, piece);
                Ok(())
            }
            _ => Err(missing("pieces of its own size")),
        }
    }

    /// Each sequence's own gradient, `[sequences, parameters]`, or `None` when only the sum is kept.
    pub fn rows(&self) -> Option<&[f64]> {
        match &self.sums {
            Sums::PerSequence { rows } => Some(rows),
            _ => None,
        }
    }

    /// What was accumulated so far, to be accumulated to somewhere else; what stays is of no use.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::total(0))
    }

    /// Forgets everything accumulated so far.
    pub fn clear(&mut self) {
        match &mut self.sums {
            Sums::Total { sum, pass, apart } => {
                sum.fill(0.0);
                *pass = None;
                if let Some(apart) = apart {
                    apart.clear();
                }
            }
            Sums::Large { sum, .. } => sum.fill(0.0),
            Sums::PerSequence { rows } => rows.fill(0.0),
        }
    }

    /// Keeps x·Aᵀ and g·B `[T, r]` of the module at `slot` until the pass ends.
    pub(super) fn defer(&mut self, slot: usize, lin: &LinearGrads<'_>) -> Result<()> {
        let (xa, gb) = lin.low_rank.ok_or_else(|| missing("x·Aᵀ and g·B"))?;
        self.deferred.push((slot, xa.clone(), gb.clone()));
        Ok(())
    }

    /// What [`Self::defer`] kept, in host memory after one download.
    pub(super) fn take_deferred(&mut self) -> Result<Vec<(usize, Tensor, Tensor)>> {
        let deferred = std::mem::take(&mut self.deferred);
        let sides = deferred.iter().flat_map(|(_, xa, gb)| [xa, gb]);
        let sides: Vec<Tensor> = sides
            .map(Tensor::flatten_all)
            .collect::<candle_core::Result<_>>()?;
        if sides.is_empty() {
            return Ok(Vec::new());
        }
        let all = Tensor::cat(&sides, 0)?.to_device(&Device::Cpu)?;
        let mut at = 0;
        let mut next = |like: &Tensor| -> Result<Tensor> {
            let len = like.elem_count();
            at += len;
            Ok(all.narrow(0, at - len, len)?.reshape(like.shape())?)
        };
        deferred
            .iter()
            .map(|(slot, xa, gb)| Ok((*slot, next(xa)?, next(gb)?)))
            .collect()
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
            Sums::Total { sum, pass, .. } => {
                let dm = |rows: Range<usize>| {
                    let mut dm = vec![0.0; r * r];
                    let (xa, gb) = (&xa[rows.start * r..], &gb[rows.start * r..]);
                    let pairs = xa.chunks_exact(r).zip(gb.chunks_exact(r));
                    pairs
                        .take(rows.len())
                        .for_each(|(x, g)| add_outer(&mut dm, g, x));
                    dm
                };
                let Some(Pass { pieces, sums }) = pass else {
                    core(&dm(0..tokens), sum);
                    return Ok(());
                };
                if pieces.last().map_or(0, |last| last.end) != tokens {
                    return Err(missing("a piece for every row"));
                }
                for (rows, sum) in pieces
                    .iter()
                    .zip(sums.chunks_exact_mut(self.num_parameters))
                {
                    core(&dm(rows.clone()), sum);
                }
                Ok(())
            }
            Sums::PerSequence { rows } => {
                if row_sequences.len() != tokens {
                    return Err(missing("a sequence number for every row"));
                }
                let sequences = row_sequences
                    .iter()
                    .max()
                    .map_or(0, |&last| last as usize + 1);
                let rows = rows
                    .get_mut(..sequences * self.num_parameters)
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

fn add(sum: &mut [f64], piece: &[f64]) {
    sum.iter_mut().zip(piece).for_each(|(s, x)| *s += x);
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
