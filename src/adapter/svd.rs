//! Truncated singular value decomposition of the frozen weights.

use super::spec::Sigma;

/// The r largest singular triplets of a matrix `[out, in]`: W ≈ U Σ Vᵀ.
#[derive(Debug, Clone, PartialEq)]
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
