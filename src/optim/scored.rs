//! A generation batch as the natural gradient sees it, and what it says at parameters other than those
//! that sampled it.
//!
//! Scores are all that is needed for that, to first order. With Δ the way from the parameters that
//! sampled a completion to those of now, log π_now(y_i) − log π_then(y_i) = s_i·Δ + O(Δ²), and the part of
//! the second order that is the same for all completions of a prompt leaves weights which are normalised
//! within it alone:
//!
//! - ŵ_i = exp(s_i·Δ) / mean over the prompt's completions, the importance weight;
//! - g = −Σ_i ŵ_i (A_i − b) ω_i s_i, b the mean of A under ŵ over the prompt's completions: the gradient
//!   of the loss at the parameters of now (a change of all scores of a prompt by the same vector drops
//!   out where ω is the same for all);
//! - F = 1/n Σ ŵ_i s_i s_iᵀ.
//!
//! At Δ = 0 all ŵ are 1 and b is 0.

/// The completions of one generation batch, those of a prompt following one another.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredBatch {
    /// Parameters that sampled it, `[p]`.
    pub parameters: Vec<f32>,
    /// s_i = ∇_v log π(y_i), `[n, p]`.
    pub scores: Vec<f32>,
    /// A_i, `[n]`; their mean over a prompt's completions is 0.
    pub advantages: Vec<f32>,
    /// ω_i, share of each token of the completion in the loss, `[n]`; 0 where it takes no part.
    pub weights: Vec<f32>,
    /// Completions of a prompt.
    pub group: usize,
}

/// What a batch says at some parameters.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    /// g, `[p]`.
    pub gradient: Vec<f64>,
    /// F, `[p, p]`.
    pub fisher: Vec<f64>,
    /// What each prompt gives, `[p]` each; their sum is g.
    pub pulls: Vec<Vec<f64>>,
    /// Effective number of a prompt's completions, (Σ ŵ)² / Σ ŵ², from one alone (0) to all alike (1);
    /// the mean over prompts.
    pub effective_share: f64,
}

impl Moments {
    /// Covariance of g over draws of prompts and completions, `[p, p]`: prompts are drawn independently,
    /// so that it is their number times the covariance between what they give.
    pub fn noise(&self) -> Vec<f64> {
        let (p, prompts) = (self.gradient.len(), self.pulls.len().max(1) as f64);
        let mut noise = vec![0.0; p * p];
        for pull in &self.pulls {
            let apart = pull
                .iter()
                .zip(&self.gradient)
                .map(|(x, g)| x - g / prompts);
            add_outer(
                &mut noise,
                &apart.collect::<Vec<_>>(),
                prompts / (prompts - 1.0).max(1.0),
            );
        }
        noise
    }
}

/// The mean of vectors with these weights.
pub(super) fn weighted_mean<'a>(vectors: impl Iterator<Item = (f64, &'a Vec<f64>)>) -> Vec<f64> {
    let (mut total, mut sum) = (0.0, Vec::new());
    for (weight, vector) in vectors {
        total += weight;
        sum.resize(vector.len(), 0.0);
        let pairs = sum.iter_mut().zip(vector);
        pairs.for_each(|(sum, x)| *sum += weight * x);
    }
    sum.iter_mut().for_each(|x| *x /= total);
    sum
}

impl ScoredBatch {
    /// Appends everything to `numbers`, for [`Self::unflatten`].
    pub(super) fn flatten(&self, numbers: &mut Vec<f32>) {
        numbers.extend([self.len() as f32, self.group as f32]);
        let parts = [
            &self.parameters,
            &self.scores,
            &self.advantages,
            &self.weights,
        ];
        parts.into_iter().for_each(|part| numbers.extend(part));
    }

    /// Takes a batch of `p` parameters from the front of `numbers`; `None` when that is none.
    pub(super) fn unflatten(numbers: &mut &[f32], p: usize) -> Option<Self> {
        let mut take = |len: usize| {
            let (own, rest) = numbers.split_at_checked(len)?;
            *numbers = rest;
            Some(own.to_vec())
        };
        let counts = take(2)?;
        let whole = |x: f32| (x >= 1.0 && x.fract() == 0.0 && x < 1e7).then_some(x as usize);
        let (n, group) = (whole(counts[0])?, whole(counts[1])?);
        Some(Self {
            parameters: take(p)?,
            scores: take(n.checked_mul(p)?)?,
            advantages: take(n)?,
            weights: take(n)?,
            group,
        })
    }

    /// Number of completions.
    pub fn len(&self) -> usize {
        self.advantages.len()
    }

    /// Whether there are no completions.
    pub fn is_empty(&self) -> bool {
        self.advantages.is_empty()
    }

    pub(super) fn is_finite(&self) -> bool {
        let parts = [&self.scores, &self.advantages, &self.weights];
        parts.into_iter().flatten().all(|x| x.is_finite())
    }

    pub(super) fn moments_at(&self, parameters: &[f32]) -> Moments {
        let (p, n) = (self.parameters.len(), self.len().max(1) as f64);
        let way: Vec<f64> = parameters
            .iter()
            .zip(&self.parameters)
            .map(|(now, then)| f64::from(*now) - f64::from(*then))
            .collect();
        let mut fisher = vec![0.0; p * p];
        let (mut gradient, mut pulls, mut effective) = (vec![0.0; p], Vec::new(), 0.0);
        for group in 0..self.len().div_ceil(self.group) {
            let own = group * self.group..((group + 1) * self.group).min(self.len());
            let rows: Vec<Vec<f64>> = self.scores[own.start * p..own.end * p]
                .chunks_exact(p)
                .map(|row| row.iter().copied().map(f64::from).collect())
                .collect();
            let ratios = importance(&rows, &way);
            let squares: f64 = ratios.iter().map(|w| w * w).sum();
            let others = (ratios.len() - 1).max(1) as f64;
            effective += (ratios.len() as f64 * ratios.len() as f64 / squares - 1.0) / others;
            let advantages = &self.advantages[own.clone()];
            let weighted = ratios
                .iter()
                .zip(advantages)
                .map(|(w, a)| w * f64::from(*a));
            let baseline = weighted.sum::<f64>() / ratios.len() as f64;
            let mut pull = vec![0.0; p];
            for (i, (row, ratio)) in rows.iter().zip(&ratios).enumerate() {
                add_outer(&mut fisher, row, ratio / n);
                let advantage = f64::from(advantages[i]) - baseline;
                let c = -ratio * advantage * f64::from(self.weights[own.start + i]);
                pull.iter_mut()
                    .zip(row)
                    .for_each(|(pull, s)| *pull += c * s);
            }
            gradient.iter_mut().zip(&pull).for_each(|(g, x)| *g += x);
            pulls.push(pull);
        }
        Moments {
            gradient,
            fisher,
            effective_share: effective / pulls.len().max(1) as f64,
            pulls,
        }
    }
}

/// exp(s_i·Δ) of a prompt's completions, with mean 1.
fn importance(scores: &[Vec<f64>], way: &[f64]) -> Vec<f64> {
    let dot = |s: &Vec<f64>| s.iter().zip(way).map(|(s, d)| s * d).sum::<f64>();
    let logs: Vec<f64> = scores.iter().map(dot).collect();
    let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let ratios: Vec<f64> = logs.iter().map(|l| (l - largest).exp()).collect();
    let mean = ratios.iter().sum::<f64>() / ratios.len().max(1) as f64;
    ratios.into_iter().map(|w| w / mean).collect()
}

/// `matrix += weight · x xᵀ`.
fn add_outer(matrix: &mut [f64], x: &[f64], weight: f64) {
    for (row, a) in matrix.chunks_exact_mut(x.len()).zip(x) {
        let a = a * weight;
        row.iter_mut().zip(x).for_each(|(entry, b)| *entry += a * b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A softmax over four answers with p = 2 features, its samples drawn by hand.
    const FEATURES: [[f64; 2]; 4] = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]];
    const REWARDS: [f64; 4] = [1.0, 0.0, 2.0, 0.5];

    fn probabilities(v: [f64; 2]) -> [f64; 4] {
        let weights = FEATURES.map(|f| (f[0] * v[0] + f[1] * v[1]).exp());
        weights.map(|w| w / weights.iter().sum::<f64>())
    }

    fn mean(p: [f64; 4], of: impl Fn(usize) -> f64) -> f64 {
        (0..4).map(|y| p[y] * of(y)).sum()
    }

    /// One prompt with every answer as often as the policy at `v` gives it, in a thousand.
    fn batch(v: [f64; 2]) -> ScoredBatch {
        let p = probabilities(v);
        let centre = [0, 1].map(|i| mean(p, |y| FEATURES[y][i]));
        let reward = mean(p, |y| REWARDS[y]);
        let answers: Vec<usize> = (0..4)
            .flat_map(|y| std::iter::repeat_n(y, (1000.0 * p[y]).round() as usize))
            .collect();
        let score = |y: &usize| [0, 1].map(|i| (FEATURES[*y][i] - centre[i]) as f32);
        ScoredBatch {
            parameters: v.map(|x| x as f32).to_vec(),
            scores: answers.iter().flat_map(score).collect(),
            advantages: answers
                .iter()
                .map(|&y| (REWARDS[y] - reward) as f32)
                .collect(),
            weights: vec![1.0 / answers.len() as f32; answers.len()],
            group: answers.len(),
        }
    }

    #[test]
    fn an_earlier_batch_gives_the_gradient_of_now() {
        let (then, now) = ([0.1, -0.2], [0.6, 0.3]);
        let p = probabilities(now);
        let reward = mean(p, |y| REWARDS[y]);
        let expected = [0, 1].map(|i| {
            let centre = mean(p, |y| FEATURES[y][i]);
            -mean(p, |y| (REWARDS[y] - reward) * (FEATURES[y][i] - centre))
        });
        let batch = batch(then);
        let own = batch.moments_at(&batch.parameters);
        let moved = batch.moments_at(&now.map(|x| x as f32));
        let near = |got: &[f64]| {
            let pairs = got.iter().zip(expected);
            pairs.map(|(g, e)| (g - e).abs()).fold(0.0, f64::max)
        };
        // In a softmax the change of scores is the same for all answers: the reuse is exact but for
        // the whole numbers of answers.
        assert!(
            near(&moved.gradient) < 2e-3,
            "{:?} {expected:?}",
            moved.gradient
        );
        assert!(
            near(&own.gradient) > 0.02,
            "{:?} {expected:?}",
            own.gradient
        );
        assert!((own.effective_share - 1.0).abs() < 1e-12);
        let squares: f64 = (0..4).map(|y| p[y] * p[y] / probabilities(then)[y]).sum();
        assert!((moved.effective_share - 1.0 / squares).abs() < 5e-3);
    }

    #[test]
    fn the_noise_is_that_between_prompts() {
        // Ten prompts of two completions: pulls ±1 in turn, and a common 0.5.
        let n = 20;
        let pull = |g: usize| 0.5 + if g.is_multiple_of(2) { 1.0 } else { -1.0 };
        let batch = ScoredBatch {
            parameters: vec![0.0],
            scores: (0..n)
                .map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })
                .collect(),
            advantages: (0..n)
                .map(|i| {
                    if i % 2 == 0 {
                        -pull(i / 2)
                    } else {
                        pull(i / 2)
                    }
                })
                .collect(),
            weights: vec![0.5; n],
            group: 2,
        };
        let moments = batch.moments_at(&[0.0]);
        assert!((moments.gradient[0] - 5.0).abs() < 1e-6);
        assert!((moments.noise()[0] - 10.0 * 10.0 / 9.0).abs() < 1e-5);
        assert!((moments.fisher[0] - 1.0).abs() < 1e-6);
    }
}
