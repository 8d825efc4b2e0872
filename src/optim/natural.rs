//! The natural gradient of a policy with few parameters, from the scores of its own samples.
//!
//! With s_i = ∇_v log π(y_i), the gradient of completion i's log-probability, and n completions:
//!
//! - the Fisher matrix is F = 1/n Σ s_i s_iᵀ, exact for the batch; the divergence between the
//!   policies before and after a step Δv is KL ≈ ½ Δvᵀ F Δv, in nats per completion;
//! - the gradient of the loss is g = Σ c_i s_i, c_i = dL/dlogp of every token of completion i;
//! - the step that lowers the loss most at KL = δ is along −F⁻¹g; taken is −F̃⁻¹g at that length.
//!
//! F̃ = F + λ·m·I, m the mean of F's diagonal, so that nothing depends on the scale of P, `scaling` or
//! v: parameters all written in other units take the same step.
//!
//! Earlier batches count again, importance-weighted to the policy of now ([`ScoredBatch`]): g and F are
//! means over the last few, batch k of them with weight βᵏ times its effective share. One whose share
//! has fallen below [`LEAST_SHARE`] is left out.

use std::collections::VecDeque;

use super::metric::{Metric, dot};
use super::scored::{Moments, ScoredBatch, weighted_mean};
use crate::config::OptimConfig;
use crate::{Error, Result};

/// Most parameters for which the exact matrix is worth its p² memory and p³ time.
pub const MAX_PARAMETERS: usize = 1024;

/// Effective share of its completions below which an earlier batch says too little of the policy of now.
pub const LEAST_SHARE: f64 = 0.5;

/// How the natural gradient steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NaturalParams {
    /// δ: divergence of a full step, nats per completion.
    pub kl_per_step: f64,
    /// λ.
    pub damping: f64,
    /// β.
    pub momentum: f64,
    /// Earlier batches that are kept.
    pub reuse: usize,
}

impl From<&OptimConfig> for NaturalParams {
    fn from(config: &OptimConfig) -> Self {
        Self {
            kl_per_step: config.kl_per_step,
            damping: config.damping,
            momentum: config.momentum,
            reuse: config.reuse,
        }
    }
}

/// The rule with the batches it remembers.
#[derive(Debug, Clone)]
pub struct Natural {
    params: NaturalParams,
    num_parameters: usize,
    /// Newest first.
    earlier: VecDeque<ScoredBatch>,
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
    /// The same of the gradient over all batches that count; never negative.
    pub promised_improvement: f64,
    /// Largest over smallest eigenvalue of F̃.
    pub condition_number: f64,
    /// Completions at which the batch's gradient would be as large as its noise (McCandlish et al.,
    /// arXiv 1812.06162, in the metric F̃); absent where this batch shows nothing but noise.
    pub noise_scale: Option<f64>,
    /// Completions of earlier batches that counted, by their effective shares.
    pub reused: f64,
    /// ‖g‖ of the batch, for the log.
    pub grad_norm: f64,
}

impl Natural {
    pub fn new(params: NaturalParams, num_parameters: usize) -> Self {
        Self {
            params,
            num_parameters,
            earlier: VecDeque::new(),
        }
    }

    /// Update number `t` (from 1), with step length `factor` of the full one: takes in a batch sampled
    /// at the parameters of now and proposes a step.
    ///
    /// # Errors
    /// [`Error::Diverged`] when scores or advantages are not finite; nothing is changed then.
    pub fn propose(&mut self, batch: ScoredBatch, t: u64, factor: f64) -> Result<Direction> {
        if !batch.is_finite() {
            return Err(Error::Diverged(format!(
                "a completion's gradient is not finite in update {t}; lower optim.kl_per_step"
            )));
        }
        let own = batch.moments_at(&batch.parameters);
        let (gradient, fisher, reused) = self.means(&batch.parameters, &own);
        let metric = Metric::new(&fisher, self.num_parameters, self.params.damping);
        let along = metric.solve(&gradient);
        let squared = dot(&along, &product(&fisher, &along));
        let length = match squared > 0.0 {
            true => factor * (2.0 * self.params.kl_per_step / squared).sqrt(),
            false => 0.0,
        };
        let step: Vec<f64> = along.iter().map(|x| -length * x).collect();
        let noise = metric.trace(&own.noise());
        let signal = dot(&own.gradient, &metric.solve(&own.gradient)) - noise;
        let direction = Direction {
            kl_per_step: self.params.kl_per_step,
            predicted_improvement: -dot(&own.gradient, &step),
            promised_improvement: length * dot(&gradient, &along),
            condition_number: metric.condition_number(),
            noise_scale: (signal > 0.0).then(|| batch.len() as f64 * noise / signal),
            reused,
            grad_norm: dot(&own.gradient, &own.gradient).sqrt(),
            step,
        };
        self.earlier.push_front(batch);
        self.earlier.truncate(self.params.reuse);
        Ok(direction)
    }

    /// g and F, the weighted means over this batch (`own`, sampled at `parameters`) and the earlier ones,
    /// and how many completions of the latter counted.
    fn means(&self, parameters: &[f32], own: &Moments) -> (Vec<f64>, Vec<f64>, f64) {
        let (mut weights, mut reused) = (vec![1.0], 0.0);
        let mut moments = Vec::new();
        for (age, earlier) in self.earlier.iter().enumerate() {
            let at = earlier.moments_at(parameters);
            if at.effective_share >= LEAST_SHARE {
                let decay = self.params.momentum.powi(age as i32 + 1);
                reused += at.effective_share * earlier.len() as f64;
                weights.push(decay * at.effective_share);
                moments.push(at);
            }
        }
        let all = || {
            let moments = std::iter::once(own).chain(&moments);
            weights.iter().copied().zip(moments)
        };
        let gradient = weighted_mean(all().map(|(w, m)| (w, &m.gradient)));
        let fisher = weighted_mean(all().map(|(w, m)| (w, &m.fisher)));
        (gradient, fisher, reused)
    }

    /// The batches it remembers, for [`Self::restore`].
    pub(super) fn saved(&self) -> Vec<f32> {
        let mut numbers = Vec::new();
        self.earlier
            .iter()
            .for_each(|batch| batch.flatten(&mut numbers));
        numbers
    }

    /// # Errors
    /// [`Error::Data`] when the numbers are no such batches.
    pub(super) fn restore(&mut self, mut saved: &[f32]) -> Result<()> {
        let mut earlier = VecDeque::new();
        while !saved.is_empty() {
            let batch = ScoredBatch::unflatten(&mut saved, self.num_parameters);
            earlier.push_back(batch.ok_or_else(|| {
                Error::data("the saved optimizer state is not that of the natural gradient")
            })?);
        }
        self.earlier = earlier;
        Ok(())
    }
}

/// M x, M `[p, p]`.
fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix
        .chunks_exact(x.len())
        .map(|row| dot(row, x))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: NaturalParams = NaturalParams {
        kl_per_step: 0.02,
        damping: 0.0,
        momentum: 0.8,
        reuse: 0,
    };

    fn wave(i: usize, k: f64) -> f64 {
        (i as f64 * k).sin()
    }

    /// Pairs of completions with a common pull: within a pair, what has the larger first score is
    /// better, and a little chance.
    fn batch(n: usize, p: usize, phase: usize) -> ScoredBatch {
        let scores: Vec<f32> = (phase..phase + n * p)
            .map(|i| (wave(i, 1.7) + 0.3 * wave(i, 0.41)) as f32)
            .collect();
        let reward = |i: usize| f64::from(scores[i * p]) + 0.1 * wave(i, 2.3);
        ScoredBatch {
            parameters: vec![0.0; p],
            advantages: (0..n).map(|i| (reward(i) - reward(i ^ 1)) as f32).collect(),
            weights: vec![1.0 / n as f32; n],
            group: 2,
            scores,
        }
    }

    fn propose(params: NaturalParams, batch: &ScoredBatch) -> Direction {
        Natural::new(params, batch.parameters.len())
            .propose(batch.clone(), 1, 1.0)
            .unwrap()
    }

    #[test]
    fn a_step_has_the_divergence_asked_for_and_goes_downhill() {
        let (n, p) = (200, 4);
        let batch = batch(n, p, 0);
        let direction = propose(PARAMS, &batch);
        // KL ≈ ½ mean (s·Δv)².
        let rows = batch.scores.chunks_exact(p);
        let along = rows.map(|row| {
            let row: Vec<f64> = row.iter().copied().map(f64::from).collect();
            dot(&row, &direction.step)
        });
        let kl = along.map(|x| 0.5 * x * x / n as f64).sum::<f64>();
        let expected = PARAMS.kl_per_step;
        assert!((kl - expected).abs() < 1e-5 * expected, "{kl} {expected}");
        assert!(direction.predicted_improvement > 0.0);
        assert!(
            direction
                .noise_scale
                .is_some_and(|scale| scale > 1.0 && scale < n as f64)
        );
        let half = Natural::new(PARAMS, p).propose(batch, 1, 0.5).unwrap();
        let halves = half.step.iter().zip(&direction.step);
        halves.for_each(|(half, whole)| assert!((2.0 * half - whole).abs() < 1e-12));
    }

    #[test]
    fn the_units_of_the_parameters_do_not_matter() {
        // All in the same other units; or, without damping, each in its own.
        for (damping, units) in [(1.0, [1e3; 3]), (0.0, [1.0, 1e-2, 50.0])] {
            let params = NaturalParams { damping, ..PARAMS };
            let batch = batch(100, 3, 0);
            let mut other = batch.clone();
            let cells = other.scores.iter_mut().zip(units.iter().cycle());
            cells.for_each(|(s, unit)| *s *= unit);
            let (a, b) = (propose(params, &batch), propose(params, &other));
            for ((a, b), unit) in a.step.iter().zip(&b.step).zip(units) {
                assert!((a - b * f64::from(unit)).abs() < 1e-4 * a.abs(), "{a} {b}");
            }
            let (a, b) = (a.predicted_improvement, b.predicted_improvement);
            assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
        }
    }

    #[test]
    fn damping_holds_back_what_has_little_effect() {
        // A tenth of the effect in the second parameter, and the same advantage of it.
        let n = 100;
        let mut batch = batch(n, 2, 0);
        batch.scores.chunks_exact_mut(2).for_each(|s| s[1] *= 0.1);
        let reward = |i: usize| f64::from(batch.scores[2 * i] + 10.0 * batch.scores[2 * i + 1]);
        batch.advantages = (0..n).map(|i| (reward(i) - reward(i ^ 1)) as f32).collect();
        let share = |damping| {
            let step = propose(NaturalParams { damping, ..PARAMS }, &batch).step;
            (step[1] / step[0]).abs()
        };
        let (free, damped) = (share(0.0), share(1.0));
        assert!(free > 3.0 && damped < 0.5, "{free} {damped}");
    }

    #[test]
    fn without_a_signal_there_is_no_step() {
        let mut flat = batch(64, 3, 0);
        flat.advantages.fill(0.0);
        let none = propose(PARAMS, &flat);
        assert_eq!((none.step, none.noise_scale), (vec![0.0; 3], None));
    }

    #[test]
    fn a_parameter_without_effect_and_a_repeated_one_are_no_trouble() {
        let mut wide = batch(100, 2, 0);
        wide.parameters = vec![0.0; 4];
        let rows = wide.scores.chunks_exact(2);
        wide.scores = rows.flat_map(|s| [s[0], s[1], s[1], 0.0]).collect();
        let direction = propose(PARAMS, &wide);
        assert_eq!(direction.step.len(), 4);
        assert!(direction.step.iter().all(|x| x.is_finite()));
        assert!((direction.step[1] - direction.step[2]).abs() < 1e-5);
        assert_eq!(direction.step[3], 0.0);
        // A batch of nothing but such parameters stays where it is.
        wide.scores.fill(0.0);
        assert_eq!(propose(PARAMS, &wide).step, [0.0; 4]);
    }

    #[test]
    fn earlier_batches_count_while_they_say_something_of_now() {
        let params = NaturalParams { reuse: 2, ..PARAMS };
        let (p, mut natural) = (3, Natural::new(params, 3));
        let reused: Vec<f64> = (0..4)
            .map(|t| {
                let batch = batch(40, p, 1000 * t);
                natural.propose(batch, t as u64 + 1, 1.0).unwrap().reused
            })
            .collect();
        // At the same parameters every completion counts whole.
        let expected = [0.0, 40.0, 80.0, 80.0];
        let pairs = reused.iter().zip(expected);
        pairs.for_each(|(got, expected)| assert!((got - expected).abs() < 1e-9, "{reused:?}"));
        // Far away they say nothing.
        let far = ScoredBatch {
            parameters: vec![30.0; p],
            ..batch(40, p, 5000)
        };
        assert_eq!(natural.propose(far, 5, 1.0).unwrap().reused, 0.0);
    }

    #[test]
    fn an_earlier_batch_has_its_say_in_the_direction() {
        let params = NaturalParams {
            reuse: 1,
            momentum: 1.0,
            ..PARAMS
        };
        let mut natural = Natural::new(params, 3);
        let first = batch(40, 3, 0);
        let mut opposite = first.clone();
        opposite.advantages.iter_mut().for_each(|a| *a = -*a);
        natural.propose(first, 1, 1.0).unwrap();
        assert_eq!(natural.propose(opposite, 2, 1.0).unwrap().step, [0.0; 3]);
    }

    #[test]
    fn what_is_not_finite_is_refused_and_changes_nothing() {
        let params = NaturalParams { reuse: 1, ..PARAMS };
        let mut natural = Natural::new(params, 3);
        let mut bad = batch(40, 3, 0);
        bad.advantages[7] = f32::NAN;
        let error = natural.propose(bad, 2, 1.0).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(natural.saved().is_empty());
    }

    #[test]
    fn a_restored_one_goes_on_bit_for_bit() {
        let params = NaturalParams { reuse: 2, ..PARAMS };
        let mut whole = Natural::new(params, 3);
        for t in 1..4 {
            whole.propose(batch(40, 3, 100 * t), t as u64, 1.0).unwrap();
        }
        let mut resumed = Natural::new(params, 3);
        resumed.restore(&whole.saved()).unwrap();
        let next = batch(40, 3, 7000);
        assert_eq!(
            whole.propose(next.clone(), 4, 1.0).unwrap(),
            resumed.propose(next, 4, 1.0).unwrap()
        );
        let saved = whole.saved();
        for damaged in [
            &saved[..saved.len() - 1],
            &[0.0],
            &[-1.0, 2.0],
            &[f32::NAN, 2.0],
        ] {
            assert_eq!(resumed.restore(damaged).unwrap_err().exit_code(), 3);
        }
    }
}
