//! Adam with decoupled weight decay, step for step as torch.optim.AdamW.
//!
//! p ← p·(1 − lr·λ) − lr · m̂ / (√v̂ + ε), with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ).
//! Stored in f32, computed in f64.

use std::ops::Range;

use rayon::prelude::*;

use crate::config::OptimConfig;

/// Parameters a thread takes at a time; every one is independent of the others.
const CHUNK: usize = 16_384;

/// The moments of one flat vector of parameters.
#[derive(Debug, Clone)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Sorted; weight decay is left out there.
    without_decay: Vec<Range<usize>>,
}

impl AdamW {
    pub fn new(config: &OptimConfig, num_parameters: usize) -> Self {
        Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            first: vec![0.0; num_parameters],
            second: vec![0.0; num_parameters],
            without_decay: Vec::new(),
        }
    }

    /// Leaves weight decay out for these parameters.
    pub fn without_decay(mut self, mut ranges: Vec<Range<usize>>) -> Self {
        ranges.sort_by_key(|r| r.start);
        self.without_decay = ranges;
        self
    }

    /// Update number `t` (from 1).
    pub fn step(&mut self, parameters: &mut [f32], gradient: &[f64], learning_rate: f64, t: u64) {
        let (beta1, beta2, epsilon) = (self.beta1, self.beta2, self.epsilon);
        let step_size = learning_rate / (1.0 - beta1.powf(t as f64));
        let root = (1.0 - beta2.powf(t as f64)).sqrt();
        let keep = 1.0 - learning_rate * self.weight_decay;
        let without_decay = &self.without_decay;
        parameters
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(self.first.par_chunks_mut(CHUNK))
            .zip(self.second.par_chunks_mut(CHUNK))
            .enumerate()
            .for_each(|(c, (((p, g), m), v))| {
                for i in 0..p.len() {
                    let mean = beta1 * f64::from(m[i]) + (1.0 - beta1) * g[i];
                    let square = beta2 * f64::from(v[i]) + (1.0 - beta2) * g[i] * g[i];
                    let keep = if covers(without_decay, c * CHUNK + i) {
                        1.0
                    } else {
                        keep
                    };
                    let denominator = square.sqrt() / root + epsilon;
                    p[i] = (f64::from(p[i]) * keep - step_size * mean / denominator) as f32;
                    m[i] = mean as f32;
                    v[i] = square as f32;
                }
            });
    }

    /// First and second moments.
    pub fn moments(&self) -> (&[f32], &[f32]) {
        (&self.first, &self.second)
    }

    pub(super) fn set_moments(&mut self, first: Vec<f32>, second: Vec<f32>) {
        self.first = first;
        self.second = second;
    }
}

fn covers(sorted: &[Range<usize>], index: usize) -> bool {
    let after = sorted.partition_point(|r| r.start <= index);
    after > 0 && sorted[after - 1].contains(&index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::clip::clip_grad_norm;
    use serde_json::Value;

    fn numbers(value: &Value) -> Vec<f64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect()
    }

    #[test]
    fn agrees_with_torch() {
        let text = include_str!("../../tests/fixtures/torch_optim.json");
        let fixture: Value = serde_json::from_str(text).unwrap();
        for case in fixture["adamw"].as_array().unwrap() {
            let number = |key: &str| case[key].as_f64().unwrap();
            let config = OptimConfig {
                adam_beta1: number("beta1"),
                adam_beta2: number("beta2"),
                adam_epsilon: number("epsilon"),
                weight_decay: number("weight_decay"),
                ..OptimConfig::default()
            };
            let mut parameters: Vec<f32> = numbers(&fixture["start"])
                .iter()
                .map(|p| *p as f32)
                .collect();
            let mut adamw = AdamW::new(&config, parameters.len());
            let norms = numbers(&case["grad_norms"]);
            for (t, gradient) in fixture["gradients"].as_array().unwrap().iter().enumerate() {
                let mut gradient = numbers(gradient);
                let norm = clip_grad_norm(&mut gradient, number("max_grad_norm"));
                if let Some(expected) = norms.get(t) {
                    assert!((norm - expected).abs() < 1e-12 * expected);
                }
                adamw.step(
                    &mut parameters,
                    &gradient,
                    number("learning_rate"),
                    t as u64 + 1,
                );
                for (p, expected) in parameters.iter().zip(numbers(&case["parameters"][t])) {
                    assert!(
                        (f64::from(*p) - expected).abs() < 1e-6,
                        "{t}: {p} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn decay_spares_the_given_ranges_across_chunks() {
        let config = OptimConfig {
            weight_decay: 1.0,
            ..OptimConfig::default()
        };
        let spared = [CHUNK + 2..CHUNK + 3, 1..2];
        let mut adamw = AdamW::new(&config, CHUNK + 4).without_decay(spared.to_vec());
        let mut parameters = vec![1.0; CHUNK + 4];
        adamw.step(&mut parameters, &vec![0.0; CHUNK + 4], 0.5, 1);
        for (i, p) in parameters.iter().enumerate() {
            let expected = if spared.iter().any(|r| r.contains(&i)) {
                1.0
            } else {
                0.5
            };
            assert_eq!(*p, expected, "{i}");
        }
    }
}
