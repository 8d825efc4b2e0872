//! LoRA-XS: a free r×r matrix R in every module.

use super::spec::AdapterSpec;
use crate::ops::random::Stream;

/// Keeps the start of R apart from other users of the same seed.
const DOMAIN: u32 = 2;

/// The fixed part of a LoRA-XS adapter. Parameters: R of every adapted module, row-major, in
/// model order.
#[derive(Debug, Clone)]
pub(super) struct LoraXs {
    size: usize,
    scaling: f64,
}

impl LoraXs {
    pub fn new(spec: &AdapterSpec) -> Self {
        Self {
            size: spec.r * spec.r,
            scaling: spec.scaling,
        }
    }

    /// R at the start: normal numbers of standard deviation `init_std` (zeros by default).
    pub fn initial(spec: &AdapterSpec, num_modules: usize) -> Vec<f32> {
        let size = num_modules * spec.r * spec.r;
        if spec.init_std == 0.0 {
            return vec![0.0; size];
        }
        let stream = Stream {
            seed: spec.projection_seed,
            domain: DOMAIN,
            index: 0,
        };
        stream
            .normals(size)
            .into_iter()
            .map(|z| (spec.init_std * z) as f32)
            .collect()
    }

    /// `scaling · R` of every module, row-major `[modules, r, r]`.
    pub fn cores(&self, parameters: &[f32]) -> Vec<f64> {
        parameters
            .iter()
            .map(|&x| self.scaling * f64::from(x))
            .collect()
    }

    /// Adds `dR = scaling · dM` of adapted module `slot` to the flat gradient.
    pub fn add_gradient(&self, slot: usize, dm: &[f64], gradient: &mut [f64]) {
        let dr = &mut gradient[slot * self.size..][..self.size];
        dr.iter_mut()
            .zip(dm)
            .for_each(|(dr, &dm)| *dr += self.scaling * dm);
    }
}
