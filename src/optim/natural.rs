//! The natural gradient of a policy with few parameters, from the scores of its own samples.
//!
//! With s_i = ∇_v log π(y_i), the gradient of completion i's log-probability, and n completions:
//!
//! - the Fisher matrix is F = 1/n Σ s_i s_iᵀ, exact for the batch; the divergence between the
//!   policies before and after a step Δv is KL ≈ ½ Δvᵀ F Δv, in nats per completion;
//! - the gradient of the loss is g = Σ c_i s_i, c_i = dL/dlogp of every token of completion i;
//! - the step that lowers the loss most at KL = δ is Δv = −√(2δ / gᵀF̃⁻¹g) · F̃⁻¹g.
//!
//! F̃ = F + λ·diag(F): damping in the units of each parameter. So nothing depends on the scale of
//! P, Σ, `scaling` or v: a parameter written in other units takes the same step.
//!
//! The gradient is an estimate, and a step of fixed length would follow its noise where there is
//! nothing left to learn. Its noise in the same metric is N = Σ c_i² s_iᵀF̃⁻¹s_i (rows of mean
//! zero), the share of gᵀF̃⁻¹g that is there without any signal; the step is shortened by
//! √max(0, 1 − N / gᵀF̃⁻¹g), the positive part of James and Stein's factor.

use crate::config::OptimConfig;
use crate::ops::cpu::symmetric_eigen;
use crate::{Error, Result};

/// Most parameters for which the exact matrix is worth its p² memory and p³ time.
pub const MAX_PARAMETERS: usize = 1024;

/// How the natural gradient steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NaturalParams {
    /// δ: divergence of a full step, nats per completion.
    pub kl_per_step: f64,
    /// λ.
    pub damping: f64,
    /// Decay of the running means of F and g.
    pub momentum: f64,
}

impl From<&OptimConfig> for NaturalParams {
    fn from(config: &OptimConfig) -> Self {
        Self {
            kl_per_step: config.kl_per_step,
            damping: config.damping,
            momentum: config.momentum,
        }
    }
}

/// Running means of the gradient and of the Fisher matrix, stored in f32 and computed in f64.
#[derive(Debug, Clone)]
pub struct Natural {
    params: NaturalParams,
    /// g, `[p]`.
    gradient: Vec<f32>,
    /// F and the noise of g's estimate, Σ c_i² s_i s_iᵀ: `[2, p, p]`.
    curvature: Vec<f32>,
}

/// A proposed step.
#[derive(Debug, Clone, PartialEq)]
pub struct Direction {
    /// Δv at full length, `[p]`.
    pub step: Vec<f64>,
    /// δ: divergence of a full step, nats per completion.
    pub kl_per_step: f64,
    /// −g·Δv of the batch's own gradient: what the linear model of the loss promises.
    pub predicted_improvement: f64,
    /// Largest over smallest eigenvalue of F̃ with its diagonal scaled to 1.
    pub condition_number: f64,
    /// What the noise left of the step's length, 0 to 1.
    pub shrinkage: f64,
    /// ‖g‖ of the batch, for the log.
    pub grad_norm: f64,
}

impl Natural {
    pub fn new(params: NaturalParams, num_parameters: usize) -> Self {
        Self {
            params,
            gradient: vec![0.0; num_parameters],
            curvature: vec![0.0; 2 * num_parameters * num_parameters],
        }
    }

    pub fn num_parameters(&self) -> usize {
        self.gradient.len()
    }

    /// Update number `t` (from 1), with step length `factor` of the full one: takes in the scores
    /// `[n, p]` with their coefficients `[n]` and proposes a step.
    ///
    /// # Errors
    /// [`Error::Diverged`] when scores or coefficients are not finite; nothing is changed then.
    pub fn propose(
        &mut self,
        scores: &[f64],
        coefficients: &[f64],
        t: u64,
        factor: f64,
    ) -> Result<Direction> {
        let p = self.num_parameters();
        let n = coefficients.len().max(1) as f64;
        if scores.iter().chain(coefficients).any(|x| !x.is_finite()) {
            return Err(Error::Diverged(format!(
                "a completion's gradient is not finite in update {t}; lower optim.kl_per_step"
            )));
        }
        let (mut gradient, mut noise, mut fisher) =
            (vec![0.0; p], vec![0.0; p * p], vec![0.0; p * p]);
        for (score, &c) in scores.chunks_exact(p).zip(coefficients) {
            for i in 0..p {
                gradient[i] += c * score[i];
                for j in 0..p {
                    let product = score[i] * score[j];
                    fisher[i * p + j] += product / n;
                    noise[i * p + j] += c * c * product;
                }
            }
        }
        let beta = self.params.momentum;
        let corrected = 1.0 - beta.powf(t as f64);
        let mean = average(&mut self.gradient, &gradient, beta, 1.0 - beta, corrected);
        let (fishers, noises) = self.curvature.split_at_mut(p * p);
        let fisher = average(fishers, &fisher, beta, 1.0 - beta, corrected);
        // The variance of a weighted sum adds up with the squares of the weights.
        let square = [beta, 1.0 - beta, corrected].map(|x| x * x);
        let noise = average(noises, &noise, square[0], square[1], square[2]);
        let metric = Metric::new(&fisher, p, self.params.damping);
        let solved = metric.solve(&mean);
        let signal = dot(&mean, &solved);
        let noise = metric.trace(&noise);
        let shrinkage = match signal > 0.0 {
            true => (1.0 - noise / signal).max(0.0).sqrt(),
            false => 0.0,
        };
        let length = match signal > 0.0 {
            true => factor * shrinkage * (2.0 * self.params.kl_per_step / signal).sqrt(),
            false => 0.0,
        };
        let step: Vec<f64> = solved.iter().map(|x| -length * x).collect();
        Ok(Direction {
            kl_per_step: self.params.kl_per_step,
            predicted_improvement: -dot(&gradient, &step),
            condition_number: metric.condition_number(),
            shrinkage,
            grad_norm: dot(&gradient, &gradient).sqrt(),
            step,
        })
    }

    /// What [`Self::set_means`] takes: the running means.
    pub fn means(&self) -> (&[f32], &[f32]) {
        (&self.gradient, &self.curvature)
    }

    pub(super) fn set_means(&mut self, gradient: Vec<f32>, curvature: Vec<f32>) {
        self.gradient = gradient;
        self.curvature = curvature;
    }
}

/// Takes `new` into a running mean, and gives the mean freed of its start at 0.
fn average(running: &mut [f32], new: &[f64], decay: f64, weight: f64, corrected: f64) -> Vec<f64> {
    let pairs = running.iter_mut().zip(new);
    pairs
        .map(|(old, new)| {
            *old = (decay * f64::from(*old) + weight * new) as f32;
            f64::from(*old) / corrected
        })
        .collect()
}

/// F̃ by the eigenvectors of D^−½ F̃ D^−½, D its diagonal. A parameter without any effect (a zero
/// on the diagonal) is left out: its share of every solution is 0.
struct Metric {
    p: usize,
    /// 1/√D, 0 where D is.
    scale: Vec<f64>,
    /// Descending.
    values: Vec<f64>,
    /// Rows.
    vectors: Vec<f64>,
}

/// Eigenvalues below this share of the largest hold little but the rounding of f32.
const SINGULAR: f64 = 1e-6;

impl Metric {
    fn new(fisher: &[f64], p: usize, damping: f64) -> Self {
        let scale: Vec<f64> = (0..p)
            .map(|i| match fisher[i * p + i] {
                x if x > 0.0 => 1.0 / x.sqrt(),
                _ => 0.0,
            })
            .collect();
        let mut matrix = vec![0.0; p * p];
        for i in 0..p {
            for j in 0..p {
                matrix[i * p + j] = fisher[i * p + j] * scale[i] * scale[j];
            }
            matrix[i * p + i] = if scale[i] > 0.0 { 1.0 + damping } else { 0.0 };
        }
        let (values, vectors) = symmetric_eigen(matrix, p);
        Self {
            p,
            scale,
            values,
            vectors,
        }
    }

    /// Eigenvalues that count, with their vectors.
    fn pairs(&self) -> impl Iterator<Item = (f64, &[f64])> {
        let floor = self.values.first().copied().unwrap_or(0.0) * SINGULAR;
        self.values
            .iter()
            .copied()
            .zip(self.vectors.chunks_exact(self.p))
            .filter(move |(value, _)| *value > floor)
    }

    /// F̃⁻¹ x.
    fn solve(&self, x: &[f64]) -> Vec<f64> {
        let scaled: Vec<f64> = x.iter().zip(&self.scale).map(|(x, s)| x * s).collect();
        let mut solution = vec![0.0; self.p];
        for (value, vector) in self.pairs() {
            let share = dot(vector, &scaled) / value;
            for ((out, v), s) in solution.iter_mut().zip(vector).zip(&self.scale) {
                *out += share * v * s;
            }
        }
        solution
    }

    /// Trace of F̃⁻¹ M.
    fn trace(&self, m: &[f64]) -> f64 {
        let mut sum = 0.0;
        for (value, vector) in self.pairs() {
            for i in 0..self.p {
                let row = &m[i * self.p..][..self.p];
                let scaled = row.iter().zip(&self.scale).map(|(m, s)| m * s);
                let inner: f64 = scaled.zip(vector).map(|(m, v)| m * v).sum();
                sum += vector[i] * self.scale[i] * inner / value;
            }
        }
        sum
    }

    fn condition_number(&self) -> f64 {
        let mut pairs = self.pairs();
        let largest = pairs.next().map_or(1.0, |(value, _)| value);
        largest / pairs.last().map_or(largest, |(value, _)| value)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: NaturalParams = NaturalParams {
        kl_per_step: 0.02,
        damping: 0.0,
        momentum: 0.0,
    };

    /// Scores of `n` completions with a common pull, and their coefficients.
    fn batch(n: usize, p: usize) -> (Vec<f64>, Vec<f64>) {
        let wave = |i: usize, k: f64| (i as f64 * k).sin();
        let scores: Vec<f64> = (0..n * p)
            .map(|i| wave(i, 1.7) + 0.3 * wave(i, 0.41))
            .collect();
        let coefficients = (0..n)
            .map(|i| -(scores[i * p] + 0.1 * wave(i, 2.3)) / n as f64)
            .collect();
        (scores, coefficients)
    }

    fn propose(params: NaturalParams, scores: &[f64], coefficients: &[f64]) -> Direction {
        let p = scores.len() / coefficients.len();
        Natural::new(params, p)
            .propose(scores, coefficients, 1, 1.0)
            .unwrap()
    }

    #[test]
    fn a_step_has_the_divergence_asked_for_and_solves_the_dense_system() {
        let (n, p) = (200, 4);
        let (scores, coefficients) = batch(n, p);
        let direction = propose(PARAMS, &scores, &coefficients);
        let step = &direction.step;
        // KL ≈ ½ mean (s·Δv)², shortened by the shrinkage.
        let kl: f64 = scores
            .chunks_exact(p)
            .map(|s| 0.5 * dot(s, step).powi(2) / n as f64)
            .sum();
        let expected = PARAMS.kl_per_step * direction.shrinkage.powi(2);
        assert!((kl - expected).abs() < 1e-5 * expected, "{kl} {expected}");
        assert!(direction.shrinkage > 0.9 && direction.shrinkage < 1.0);
        assert!(direction.predicted_improvement > 0.0);
        // F Δv is a multiple of g, against the gradient.
        let applied: Vec<f64> = (0..p)
            .map(|i| {
                scores
                    .chunks_exact(p)
                    .map(|s| s[i] * dot(s, step) / n as f64)
                    .sum()
            })
            .collect();
        let gradient: Vec<f64> = (0..p)
            .map(|i| {
                let rows = scores.chunks_exact(p).zip(&coefficients);
                rows.map(|(s, c)| c * s[i]).sum()
            })
            .collect();
        let factor = dot(&applied, &gradient) / dot(&gradient, &gradient);
        assert!(factor < 0.0);
        for (a, g) in applied.iter().zip(&gradient) {
            assert!((a - factor * g).abs() < 1e-5, "{a} {g}");
        }
    }

    #[test]
    fn the_units_of_a_parameter_do_not_matter() {
        let (n, p) = (100, 3);
        let params = NaturalParams {
            damping: 0.1,
            ..PARAMS
        };
        let (scores, coefficients) = batch(n, p);
        let units = [1.0, 1e-3, 50.0];
        let other: Vec<f64> = scores
            .chunks_exact(p)
            .flat_map(|row| row.iter().zip(units).map(|(s, u)| s * u))
            .collect();
        let (a, b) = (
            propose(params, &scores, &coefficients),
            propose(params, &other, &coefficients),
        );
        for ((a, b), unit) in a.step.iter().zip(&b.step).zip(units) {
            assert!((a - b * unit).abs() < 1e-4 * a.abs(), "{a} {b}");
        }
        let (a, b) = (a.predicted_improvement, b.predicted_improvement);
        assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
    }

    #[test]
    fn pure_noise_takes_a_short_step_and_no_signal_none() {
        let (n, p) = (64, 3);
        let (scores, _) = batch(n, p);
        // Signs that have nothing to do with the scores.
        let mut total = 0.0;
        for seed in 0..50u64 {
            let coefficients: Vec<f64> = (0..n as u64)
                .map(|i| {
                    let hash = (i + 64 * seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    if hash >> 40 & 1 == 0 { 1.0 } else { -1.0 }
                })
                .collect();
            total += propose(PARAMS, &scores, &coefficients).shrinkage;
        }
        assert!(total / 50.0 < 0.5, "{}", total / 50.0);
        let none = propose(PARAMS, &scores, &vec![0.0; n]);
        assert_eq!(none.step, vec![0.0; p]);
    }

    #[test]
    fn a_parameter_without_effect_and_a_repeated_one_are_no_trouble() {
        let (n, p) = (100, 4);
        let (scores, coefficients) = batch(n, 2);
        let wide: Vec<f64> = scores
            .chunks_exact(2)
            .flat_map(|s| [s[0], s[1], s[1], 0.0])
            .collect();
        let direction = propose(PARAMS, &wide, &coefficients);
        assert_eq!(direction.step.len(), p);
        assert!(direction.step.iter().all(|x| x.is_finite()));
        assert!((direction.step[1] - direction.step[2]).abs() < 1e-5);
        assert_eq!(direction.step[3], 0.0);
    }

    #[test]
    fn a_restored_one_goes_on_bit_for_bit_and_what_is_not_finite_is_refused() {
        let params = NaturalParams {
            momentum: 0.8,
            ..PARAMS
        };
        let (scores, coefficients) = batch(40, 3);
        let mut whole = Natural::new(params, 3);
        whole.propose(&scores, &coefficients, 1, 1.0).unwrap();
        let mut resumed = Natural::new(params, 3);
        let (gradient, curvature) = whole.means();
        resumed.set_means(gradient.to_vec(), curvature.to_vec());
        let bad = [f64::NAN; 40];
        let error = whole.propose(&scores, &bad, 2, 1.0).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert_eq!(
            whole.propose(&scores, &coefficients, 2, 1.0).unwrap(),
            resumed.propose(&scores, &coefficients, 2, 1.0).unwrap()
        );
    }
}
