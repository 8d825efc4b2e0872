//! What a generation batch looks like, under TRL's metric names.

use super::advantages::{mean, std, weighted_sums};
use super::rollouts::{Group, rewards_by_function};
use crate::rollout::FinishReason;
use crate::run::StepMetrics;

/// Rewards of `groups` under reward functions with these names and weights.
pub fn rewards<'a>(
    groups: impl IntoIterator<Item = &'a Group> + Clone,
    names: &[&str],
    weights: &[f64],
    metrics: &mut StepMetrics,
) {
    let by_function = rewards_by_function(groups, names.len());
    let total = weighted_sums(&by_function, weights);
    metrics.set("reward", mean(&total));
    metrics.set("reward_std", std(&total));
    for (name, own) in names.iter().zip(&by_function) {
        metrics.set(format!("rewards/{name}/mean"), mean(own));
        metrics.set(format!("rewards/{name}/std"), std(own));
    }
}

/// Lengths of completions in tokens, and how many were cut off.
pub fn lengths<'a>(groups: impl IntoIterator<Item = &'a Group>, metrics: &mut StepMetrics) {
    let completions = groups.into_iter().flat_map(|group| &group.completions);
    let all: Vec<_> = completions
        .map(|c| (c.tokens.len() as f64, c.finish != FinishReason::Length))
        .collect();
    let terminated: Vec<_> = all.iter().copied().filter(|(_, ended)| *ended).collect();
    for (name, lengths) in [("", &all), ("terminated_", &terminated)] {
        // TRL reports 0 when nothing terminated.
        let lengths = lengths.iter().map(|(length, _)| *length);
        let of = |f: fn(f64, f64) -> f64| lengths.clone().reduce(f).unwrap_or(0.0);
        let average = lengths.clone().sum::<f64>() / lengths.len().max(1) as f64;
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
    /// Adds a completion; tokens whose sampler log-probability is unknown (NaN) do not count.
    pub fn add(&mut self, trainer: &[f64], sampler: &[f64]) {
        let differences = trainer.iter().zip(sampler).map(|(t, s)| (t - s).abs());
        for difference in differences.filter(|d| !d.is_nan()) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::fixture::{numbers, parse, rows};
    use crate::rollout::Completion;
    use serde_json::Value;

    fn completion(case: &Value) -> Completion {
        let length = case["length"].as_u64().unwrap() as usize;
        Completion {
            tokens: vec![5; length],
            logprobs: vec![-1.0; length],
            text: String::new(),
            finish: match case["truncated"].as_bool().unwrap() {
                true => FinishReason::Length,
                false => FinishReason::Eos,
            },
        }
    }

    fn assert_metrics(ours: &StepMetrics, theirs: &Value) {
        for (name, value) in ours.iter() {
            let expected = theirs[name].as_f64().unwrap_or(f64::NAN);
            let same = (value - expected).abs() < 1e-6 * expected.abs().max(1.0);
            assert!(
                same || (value.is_nan() && expected.is_nan()),
                "{name}: {value} {expected}"
            );
        }
    }

    #[test]
    fn rewards_and_lengths_agree_with_trl() {
        let fixture = parse(include_str!("../../tests/fixtures/trl_advantages.json"));
        let n = fixture["num_generations"].as_u64().unwrap() as usize;
        for case in fixture["advantages"].as_array().unwrap() {
            let rewards_of: Vec<Vec<f64>> = case["rewards"]
                .as_array()
                .unwrap()
                .iter()
                .map(numbers)
                .collect();
            let completions: Vec<Completion> = case["completions"]
                .as_array()
                .unwrap()
                .iter()
                .map(completion)
                .collect();
            let groups: Vec<Group> = (0..completions.len() / n)
                .map(|g| Group {
                    problem: g,
                    completions: completions[g * n..][..n].to_vec(),
                    rewards: rewards_of
                        .iter()
                        .map(|r| r[g * n..][..n].to_vec())
                        .collect(),
                    extracted: vec![None; n],
                    owner: 0,
                    inputs: None,
                })
                .collect();
            let names: Vec<String> = (0..rewards_of.len()).map(|k| format!("f{k}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut metrics = StepMetrics::default();
            rewards(&groups, &names, &numbers(&case["weights"]), &mut metrics);
            lengths(&groups, &mut metrics);
            assert_eq!(metrics.iter().count(), 9 + 2 * names.len());
            assert_metrics(&metrics, &case["metrics"]);
        }
    }

    #[test]
    fn the_sampler_difference_agrees_with_trl() {
        let fixture = parse(include_str!("../../tests/fixtures/trl_advantages.json"));
        let mut difference = SamplerDifference::default();
        for (trainer, sampler) in rows(&fixture["trainer_logps"])
            .iter()
            .zip(rows(&fixture["sampler_logps"]))
        {
            difference.add(trainer, &sampler);
        }
        difference.add(&[-1.0], &[f64::NAN]);
        let mut metrics = StepMetrics::default();
        difference.write(&mut metrics);
        assert_metrics(&metrics, &fixture["ratios"][0]["metrics"]);
    }
}
