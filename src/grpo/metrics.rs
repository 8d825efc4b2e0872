//! What a generation batch looks like, under TRL's metric names.

use super::advantages::{mean, std};
use super::rollouts::Rollouts;
use crate::rollout::FinishReason;
use crate::run::StepMetrics;

/// Rewards and lengths of a generation batch.
pub fn of_rollouts<'a>(
    rollouts: &Rollouts,
    reward_names: impl Iterator<Item = &'a str>,
    metrics: &mut StepMetrics,
) {
    let advantages = &rollouts.advantages;
    let group_size = rollouts.groups.first().map_or(1, |g| g.completions.len());
    let groups = advantages.rewards.chunks_exact(group_size);
    let group_stds: Vec<f64> = groups.map(std).collect();
    metrics.set("reward", mean(&advantages.rewards));
    metrics.set("reward_std", mean(&group_stds));
    metrics.set("frac_reward_zero_std", advantages.frac_zero_std);
    for (k, name) in reward_names.enumerate() {
        let own: Vec<f64> = rollouts
            .groups
            .iter()
            .flat_map(|group| group.rewards[k].iter().copied())
            .collect();
        metrics.set(format!("rewards/{name}/mean"), mean(&own));
        metrics.set(format!("rewards/{name}/std"), std(&own));
    }

    let lengths = |terminated: bool| -> Vec<f64> {
        rollouts
            .completions()
            .filter(|c| !terminated || c.finish != FinishReason::Length)
            .map(|c| c.tokens.len() as f64)
            .collect()
    };
    let (all, terminated) = (lengths(false), lengths(true));
    for (name, lengths) in [("", &all), ("terminated_", &terminated)] {
        // TRL reports 0 when nothing terminated.
        let of = |f: fn(f64, f64) -> f64| lengths.iter().copied().reduce(f).unwrap_or(0.0);
        let average = lengths.iter().sum::<f64>() / lengths.len().max(1) as f64;
        metrics.set(format!("completions/mean_{name}length"), average);
        metrics.set(format!("completions/min_{name}length"), of(f64::min));
        metrics.set(format!("completions/max_{name}length"), of(f64::max));
    }
    let clipped = 1.0 - terminated.len() as f64 / all.len().max(1) as f64;
    metrics.set("completions/clipped_ratio", clipped);
}

/// How far the sampler's log-probabilities were from the trainer's own, over the tokens scored.
#[derive(Debug, Default)]
pub struct SamplerDifference {
    sum: f64,
    max: f64,
    tokens: usize,
}

impl SamplerDifference {
    pub fn add(&mut self, trainer: &[f64], sampler: &[f64]) {
        for (t, s) in trainer.iter().zip(sampler) {
            let difference = (t - s).abs();
            self.sum += difference;
            self.max = self.max.max(difference);
            self.tokens += 1;
        }
    }

    /// Nothing when no token was scored.
    pub fn write(&self, metrics: &mut StepMetrics) {
        if self.tokens > 0 {
            let mean = self.sum / self.tokens as f64;
            metrics.set("sampling/sampling_logp_difference/mean", mean);
            metrics.set("sampling/sampling_logp_difference/max", self.max);
        }
    }
}
