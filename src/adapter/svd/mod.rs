//! Truncated singular value decomposition of the frozen weights.
//!
//! Accuracy, tested against an exact decomposition: singular values to 1e-5 relative, and the
//! spanned subspaces to an angle of 1e-3 where the gap behind the last value is at least 1 % of
//! the first. With a smaller gap the answer is still a fixed function of the weights: the start is
//! fixed and no sum depends on the number of threads.

mod cache;
mod krylov;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

pub use cache::{SvdCache, SvdKey, user_cache_dir};

use super::modules::ModuleId;
use super::spec::Sigma;
use crate::model::Placement;
use crate::ops::cpu::{self, PackedMatrix};
use crate::ops::linear::Matrix;
use crate::{Error, Result};

/// Changes whenever the decomposition of the same weights may change: part of a cache's key and of
/// a saved adapter.
pub const SVD_VERSION: u32 = 1;

/// The r largest singular triplets of a matrix `[out, in]`: W ≈ U Σ Vᵀ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Svd {
    /// `[out, r]`, row-major, orthonormal columns.
    u: Vec<f32>,
    /// Descending, length r.
    s: Vec<f32>,
    /// `[r, in]`, row-major, orthonormal rows whose largest |entry| is positive.
    vt: Vec<f32>,
}

impl Svd {
    /// From `u` `[out, r]`, `s` `[r]` and `vt` `[r, in]`; `None` when the lengths do not fit.
    pub fn new(u: Vec<f32>, s: Vec<f32>, vt: Vec<f32>) -> Option<Self> {
        let r = s.len();
        let fits = r > 0
            && [&u, &vt]
                .iter()
                .all(|m| !m.is_empty() && m.len().is_multiple_of(r));
        fits.then_some(Self { u, s, vt })
    }

    pub fn rank(&self) -> usize {
        self.s.len()
    }

    pub fn out_features(&self) -> usize {
        self.u.len() / self.rank()
    }

    pub fn in_features(&self) -> usize {
        self.vt.len() / self.rank()
    }

    /// The singular values, largest first.
    pub fn values(&self) -> &[f32] {
        &self.s
    }

    /// A `[r, in]` and B `[out, r]`, row-major, with the singular values where `sigma` says.
    pub fn factors(&self, sigma: Sigma) -> (Vec<f32>, Vec<f32>) {
        let (mut a, mut b) = (self.vt.clone(), self.u.clone());
        // The share of Σ on B's side, as an exponent; A has the rest.
        let share = match sigma {
            Sigma::Output => 1.0,
            Sigma::Input => 0.0,
            Sigma::Split => 0.5,
        };
        for (row, s) in a.chunks_exact_mut(self.in_features()).zip(&self.s) {
            let weight = s.powf(1.0 - share);
            row.iter_mut().for_each(|x| *x *= weight);
        }
        for row in b.chunks_exact_mut(self.rank()) {
            row.iter_mut()
                .zip(&self.s)
                .for_each(|(x, s)| *x *= s.powf(share));
        }
        (a, b)
    }
}

/// The `rank` largest singular triplets of `w`.
///
/// # Errors
/// `Error::Config` when the matrix has a side shorter than `rank`; `Error::Data` when it holds NaN
/// or infinite numbers.
pub fn truncated_svd(id: ModuleId, w: &PackedMatrix, rank: usize) -> Result<Svd> {
    let (m, n) = (w.out_features(), w.in_features());
    if rank > m.min(n) {
        return Err(Error::config(format!(
            "adapter.r = {rank} is more than {id} of shape [{m}, {n}] has singular values"
        )));
    }
    let krylov::Triplets {
        left,
        values,
        mut right,
    } = krylov::largest_triplets(w, rank);
    if values.iter().any(|x| !x.is_finite()) {
        return Err(Error::data(format!(
            "{id}.weight holds numbers that are not finite"
        )));
    }
    let mut u = vec![0.0; m * rank];
    for (k, (left, right)) in left
        .chunks_exact(m)
        .zip(right.chunks_exact_mut(n))
        .enumerate()
    {
        let sign = largest_entry(right).signum();
        right.iter_mut().for_each(|x| *x *= sign);
        left.iter()
            .enumerate()
            .for_each(|(i, x)| u[i * rank + k] = sign * x);
    }
    let s = values.iter().map(|&x| x as f32).collect();
    Ok(Svd { u, s, vt: right })
}

/// The entry of largest magnitude, the first of several.
fn largest_entry(row: &[f32]) -> f32 {
    row.iter().fold(
        0.0f32,
        |best, &x| if x.abs() > best.abs() { x } else { best },
    )
}

/// Decomposes every matrix, several at a time; `progress` is told (done, total).
///
/// # Errors
/// As [`truncated_svd`], the first in order.
pub fn decompose_all(
    maps: &[(ModuleId, &Matrix)],
    rank: usize,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Vec<Svd>> {
    let next = AtomicUsize::new(0);
    let finished = Mutex::new((0, (0..maps.len()).map(|_| None).collect::<Vec<_>>()));
    let decompose = |id: ModuleId, w: &Matrix| match w {
        Matrix::Packed(w) => truncated_svd(id, w, rank),
        Matrix::Dense(_) => repack(w).and_then(|packed| truncated_svd(id, &packed, rank)),
    };
    // Threads of their own, not rayon tasks: a rayon worker that waits for a product would start
    // on another matrix meanwhile, and hold the buffers of many at once.
    std::thread::scope(|scope| {
        for _ in 0..rayon::current_num_threads().min(maps.len()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&(id, w)) = maps.get(at) else { return };
                    let result = cpu::alone(|| decompose(id, w));
                    // A panic elsewhere ends the whole scope: its poison changes nothing here.
                    let mut finished = finished.lock().unwrap_or_else(PoisonError::into_inner);
                    finished.0 += 1;
                    finished.1[at] = Some(result);
                    progress(finished.0, maps.len());
                }
            });
        }
    });
    let (_, results) = finished
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    results.into_iter().flatten().collect()
}

/// As [`decompose_all`], from the cache when it has them.
pub(super) fn cached(
    cache: &SvdCache,
    base_hash: &str,
    placement: &Placement,
    maps: &[(ModuleId, &Matrix)],
    rank: usize,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Vec<Svd>> {
    let matrices = maps
        .iter()
        .map(|(id, w)| Ok((id.to_string(), <[usize; 2]>::from(w.dims()?))))
        .collect::<Result<Vec<_>>>()?;
    let key = SvdKey {
        base_hash,
        dtype: placement.dtype.as_str(),
        rank,
        matrices: &matrices,
    };
    let (kept, ranks) = (cache.load(&key), &cache.ranks);
    let everywhere = ranks.gather(Ok(vec![kept.is_some()]))?;
    match kept {
        Some(svds) if everywhere.iter().flatten().all(|&is_there| is_there) => Ok(svds),
        _ => {
            let own = decompose_all(&maps[ranks.share(maps.len())], rank, progress);
            let svds: Vec<Svd> = ranks.gather(own)?.into_iter().flatten().collect();
            cache.store(&key, &svds);
            Ok(svds)
        }
    }
}

/// A tensor on any device as the f32 matrix that the CPU kernels multiply with.
fn repack(w: &Matrix) -> Result<PackedMatrix> {
    let (out, inner) = w.dims()?;
    Ok(PackedMatrix::pack(&w.to_f32()?, out, inner))
}

#[cfg(test)]
mod tests;
