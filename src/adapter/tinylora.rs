//! TinyLoRA: R = Σ_i v_i P_i with fixed random P and one v for every group of modules.

use super::projection::projection;
use super::spec::AdapterSpec;
use super::tying::Tying;

/// The fixed part of a TinyLoRA adapter.
#[derive(Debug, Clone)]
pub(super) struct TinyLora {
    u: usize,
    r: usize,
    scaling: f64,
    groups: Vec<usize>,
    /// P of every adapted module, row-major `[u, r, r]`.
    projections: Vec<Vec<f32>>,
}

impl TinyLora {
    pub fn new(spec: &AdapterSpec, tying: &Tying) -> Self {
        Self {
            u: spec.u,
            r: spec.r,
            scaling: spec.scaling,
            groups: tying.groups.clone(),
            projections: tying
                .modules
                .iter()
                .map(|&id| projection(spec, id))
                .collect(),
        }
    }

    /// `scaling · Σ_i v_i P_i` of adapted module `slot`, row-major `[r, r]`.
    pub fn core(&self, slot: usize, v: &[f32]) -> Vec<f64> {
        let v = &v[self.groups[slot] * self.u..][..self.u];
        let mut core = vec![0.0; self.r * self.r];
        for (&v, p) in v.iter().zip(self.matrices(slot)) {
            for (m, &p) in core.iter_mut().zip(p) {
                *m += self.scaling * f64::from(v) * f64::from(p);
            }
        }
        core
    }

    /// Adds `dv_i = scaling · <P_i, dM>` of adapted module `slot` to the flat gradient.
    pub fn add_gradient(&self, slot: usize, dm: &[f64], gradient: &mut [f64]) {
        let dv = &mut gradient[self.groups[slot] * self.u..][..self.u];
        for (dv, p) in dv.iter_mut().zip(self.matrices(slot)) {
            let dot: f64 = p.iter().zip(dm).map(|(&p, &d)| f64::from(p) * d).sum();
            *dv += self.scaling * dot;
        }
    }

    fn matrices(&self, slot: usize) -> impl Iterator<Item = &[f32]> {
        self.projections[slot].chunks_exact(self.r * self.r)
    }
}
