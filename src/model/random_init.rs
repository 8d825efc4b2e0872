//! Weights made at random for a directory that has a configuration but no weights: for tests and
//! benchmarks, and only when asked for.

use half::{bf16, f16};
use rayon::prelude::*;

use super::config::Dtype;
use super::weights::RawTensor;

/// Standard deviation of matrices, that of Qwen2 and Llama before training.
const STD: f64 = 0.02;
/// Elements made by one task.
const CHUNK: usize = 1 << 14;

/// A recipe: the same recipe and shape give the same elements on every run and thread count.
#[derive(Debug, Clone)]
pub(super) struct RandomTensor {
    kind: Kind,
    dtype: Dtype,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Zeros,
    Ones,
    /// Normal deviates with a key that depends on seed and tensor name.
    Normal {
        key: u64,
    },
}

impl RandomTensor {
    /// Ones for norms, zeros for biases, N(0, 0.02²) for the rest.
    pub fn new(seed: u64, name: &str, dtype: Dtype) -> Self {
        let kind = if name.ends_with("norm.weight") {
            Kind::Ones
        } else if name.ends_with(".bias") {
            Kind::Zeros
        } else {
            let key = name
                .bytes()
                .fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
            Kind::Normal { key }
        };
        Self { kind, dtype }
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn generate(&self, shape: &[usize]) -> RawTensor<'static> {
        let len = shape.iter().product();
        match self.dtype {
            Dtype::F32 => RawTensor::F32(self.fill(len, |x| x).into()),
            Dtype::F16 => RawTensor::F16(self.fill(len, f16::from_f32).into()),
            Dtype::Bf16 => RawTensor::Bf16(self.fill(len, bf16::from_f32).into()),
        }
    }

    fn fill<T: Copy + Default + Send>(
        &self,
        len: usize,
        round: impl Fn(f32) -> T + Sync,
    ) -> Vec<T> {
        let mut out = vec![T::default(); len];
        out.par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(chunk, out)| match self.kind {
                Kind::Zeros => out.fill(round(0.0)),
                Kind::Ones => out.fill(round(1.0)),
                Kind::Normal { key } => {
                    let first_pair = (chunk * CHUNK / 2) as u64;
                    for (pair, out) in out.chunks_mut(2).enumerate() {
                        let deviates = normal_pair(key, first_pair + pair as u64);
                        for (out, deviate) in out.iter_mut().zip(deviates) {
                            *out = round((STD * deviate) as f32);
                        }
                    }
                }
            });
        out
    }
}

/// Two independent standard normal deviates (Box–Muller) from draw `counter` of stream `key`.
fn normal_pair(key: u64, counter: u64) -> [f64; 2] {
    let uniform = |n: u64| (mix(key.wrapping_add(n)) >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * (1.0 - uniform(2 * counter)).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * uniform(2 * counter + 1)).sin_cos();
    [radius * cos, radius * sin]
}

/// The output function of SplitMix64, applied to a counter: neighbouring inputs give
/// unrelated outputs.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_have_the_stated_moments_and_names_differ() {
        let shape = [400, 500];
        let made = |name: &str, seed| {
            RandomTensor::new(seed, name, Dtype::F32)
                .generate(&shape)
                .into_f32()
        };
        let a = made("model.layers.0.mlp.up_proj.weight", 1);
        let n = a.len() as f64;
        let mean = a.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let std = (a.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 4.0 * STD / n.sqrt(), "mean {mean}");
        assert!((std / STD - 1.0).abs() < 0.01, "std {std}");
        assert_eq!(a, made("model.layers.0.mlp.up_proj.weight", 1));
        let unlike = [
            made("model.layers.1.mlp.up_proj.weight", 1),
            made("model.layers.0.mlp.up_proj.weight", 2),
        ];
        for b in unlike {
            let dot: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(x * y)).sum();
            let correlation = dot / (n * STD * STD);
            assert!(
                correlation.abs() < 5.0 / n.sqrt(),
                "correlation {correlation}"
            );
        }
    }

    #[test]
    fn norms_are_one_and_biases_zero() {
        let norm = RandomTensor::new(3, "model.norm.weight", Dtype::Bf16).generate(&[5]);
        assert_eq!(norm.into_f32(), [1.0; 5]);
        let bias = RandomTensor::new(3, "model.layers.0.self_attn.q_proj.bias", Dtype::F16);
        assert_eq!(bias.generate(&[3]).into_f32(), [0.0; 3]);
    }
}
