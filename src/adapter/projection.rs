//! The fixed random matrices P of TinyLoRA.
//!
//! Law `philox`: entry `n` of module `index`, in row-major order of `[u, r, r]`, is
//! `projection_std` × the n-th standard normal of the Philox stream
//! (`seed = projection_seed`, `domain = 1`, `index = module index in the model`), rounded to f32.
//! The module index counts all seven maps of every block, adapted or not, so that a module keeps
//! its P when `target_modules` changes.
//!
//! Law `peft`: what PEFT (0.20 and later) draws, `torch.normal(0, 1/√r, (u, r, r))` on a CPU
//! generator seeded with `projection_seed` + the module's number among the adapted ones.

use super::modules::ModuleId;
use super::spec::{AdapterSpec, Projection};
use super::torch_normal::torch_normals;
use crate::ops::random::Stream;

/// Keeps P apart from other users of the same seed.
const DOMAIN: u32 = 1;

/// P of one module: `u · r · r` numbers, row-major `[u, r, r]`.
pub fn projection(spec: &AdapterSpec, id: ModuleId) -> Vec<f32> {
    match spec.projection {
        Projection::Philox => {
            let stream = Stream {
                seed: spec.projection_seed,
                domain: DOMAIN,
                index: id.index() as u32,
            };
            let draws = stream.normals(spec.u * spec.r * spec.r);
            draws
                .into_iter()
                .map(|z| (spec.projection_std * z) as f32)
                .collect()
        }
        Projection::Peft => {
            let targets = &spec.target_modules;
            let before = targets.iter().filter(|&&kind| kind < id.kind).count();
            let number = id.layer * targets.len() + before;
            peft_projection(spec.projection_seed, number, spec.u, spec.r)
        }
    }
}

/// PEFT's P of the module with this number among the adapted ones, row-major `[u, r, r]`.
pub(super) fn peft_projection(seed: u64, number: usize, u: usize, r: usize) -> Vec<f32> {
    let std = 1.0 / (r as f64).sqrt();
    torch_normals(seed.wrapping_add(number as u64), u * r * r)
        .into_iter()
        .map(|z| (std * z) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::modules::ModuleKind;
    use super::*;

    #[test]
    fn modules_and_seeds_have_their_own_p_with_the_stated_spread() {
        let spec = AdapterSpec {
            u: 3,
            r: 40,
            projection_std: 0.5,
            ..Default::default()
        };
        let id = ModuleId::new(1, ModuleKind::K);
        let p = projection(&spec, id);
        assert_eq!(p.len(), 3 * 40 * 40);
        let variance = p.iter().map(|x| f64::from(x * x)).sum::<f64>() / p.len() as f64;
        assert!((variance - 0.25).abs() < 0.02, "{variance}");
        assert_eq!(p, projection(&spec, id));
        assert_ne!(p, projection(&spec, ModuleId::new(1, ModuleKind::V)));
        assert_ne!(
            p,
            projection(
                &AdapterSpec {
                    projection_seed: 43,
                    ..spec
                },
                id
            )
        );
    }

    #[test]
    fn the_law_never_changes() {
        // Saved adapters carry no P: these numbers are part of the file format.
        let p = projection(&AdapterSpec::default(), ModuleId::new(2, ModuleKind::Up));
        // Compared loosely: another platform's sine may differ in the last bit.
        for (actual, expected) in p
            .iter()
            .zip([1.0257004, -0.24376434, 0.08989839, -0.5948341])
        {
            assert!((actual - expected).abs() < 1e-6, "{p:?}");
        }
    }
}
