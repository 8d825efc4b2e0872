//! The policy losses and their gradient with respect to each token's log-probability.
//!
//! Pure functions on one completion's tokens, in f64, without padding. With ρ_t = exp(logp − old)
//! (or, at sequence level, the exponential of its mean over the completion), advantage A and
//! d_t = ref − logp, the loss of a token is
//!
//! | loss | policy term |
//! |---|---|
//! | grpo, dapo, bnpo, dr_grpo | −min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A) |
//! | cispo | −min(ρ, ε_high)·A·logp, the ratio held constant |
//!
//! times the sampler's ratio, plus β·(exp(d) − d − 1), times ρ with the bias correction. A loss type
//! is then only a question of how tokens are weighed: [`token_weights`].

use crate::config::{GrpoConfig, ImportanceSamplingLevel, LossType};
use crate::grpo::importance::SamplerRatio;

/// The part of the configuration that defines the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct LossParams {
    pub loss_type: LossType,
    pub level: ImportanceSamplingLevel,
    pub epsilon_low: f64,
    pub epsilon_high: f64,
    pub delta: Option<f64>,
    pub beta: f64,
    pub use_bias_correction_kl: bool,
}

impl From<&GrpoConfig> for LossParams {
    fn from(config: &GrpoConfig) -> Self {
        Self {
            loss_type: config.loss_type,
            level: config.importance_sampling_level,
            epsilon_low: config.epsilon,
            epsilon_high: config.epsilon_high.unwrap_or(config.epsilon),
            delta: config.delta,
            beta: config.beta,
            use_bias_correction_kl: config.use_bias_correction_kl,
        }
    }
}

/// One completion: natural log-probabilities of its tokens, and what weighs them.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    pub logps: &'a [f64],
    /// When the completion was sampled.
    pub old_logps: &'a [f64],
    /// Under the reference model; needed when β ≠ 0.
    pub ref_logps: Option<&'a [f64]>,
    pub advantage: f64,
    pub ratio: &'a SamplerRatio,
    /// Share of each of its tokens in the loss of the update.
    pub weight: f64,
}

/// Which completions of an optimizer update are weighed together.
#[derive(Debug, Clone, Copy)]
pub struct Normalizer<'a> {
    /// Tokens of each completion that take part in the loss; 0 for a masked one.
    pub active_tokens: &'a [usize],
    /// Micro-batch of each completion, from 0 (`bnpo` depends on it).
    pub micro_batch: &'a [usize],
    /// Active tokens of the generation batch / its number of updates (`dapo`, `cispo`).
    pub tokens_per_update: f64,
    pub max_completion_length: usize,
}

/// Weight of each token of every completion of an update, such that the loss of the update is
/// Σ weight · token loss.
pub fn token_weights(loss_type: LossType, n: Normalizer<'_>) -> Vec<f64> {
    let sequences = n.active_tokens.len() as f64;
    let micro_batches = n.micro_batch.iter().max().map_or(0, |m| m + 1);
    let mut tokens_of = vec![0usize; micro_batches];
    for (&m, &tokens) in n.micro_batch.iter().zip(n.active_tokens) {
        tokens_of[m] += tokens;
    }
    n.active_tokens
        .iter()
        .zip(n.micro_batch)
        .map(|(&tokens, &m)| match loss_type {
            LossType::Grpo => 1.0 / (tokens.max(1) as f64 * sequences),
            LossType::Bnpo => 1.0 / (tokens_of[m].max(1) as f64 * micro_batches as f64),
            LossType::DrGrpo => 1.0 / (sequences * n.max_completion_length as f64),
            LossType::Dapo | LossType::Cispo => 1.0 / n.tokens_per_update.max(1.0),
        })
        .collect()
}

/// dL/dlogp, the same for all tokens of a completion, where it is known without a forward pass:
/// when the policy is still the one that sampled (ρ = 1), its own sampler was used and β = 0.
pub fn on_policy_coefficient(params: &LossParams, advantage: f64, weight: f64) -> Option<f64> {
    let ratio = match params.loss_type {
        LossType::Cispo => params.epsilon_high.min(1.0),
        // δ > 1 by validation, so that neither clip is active.
        _ => 1.0,
    };
    (params.beta == 0.0).then_some(-advantage * weight * ratio)
}

/// The loss of one completion, Σ_t weight · loss_t. Writes dL/dlogp of its tokens to `gradient` and
/// adds to `stats`.
pub fn sequence_loss(
    params: &LossParams,
    sequence: Sequence<'_>,
    gradient: &mut [f64],
    stats: &mut LossStats,
) -> f64 {
    let Sequence {
        logps, old_logps, ..
    } = sequence;
    let n = logps.len() as f64;
    let log_ratios = logps.iter().zip(old_logps).map(|(new, old)| new - old);
    let shared = match params.level {
        ImportanceSamplingLevel::Token => None,
        ImportanceSamplingLevel::Sequence => Some((log_ratios.sum::<f64>() / n).exp()),
    };

    let (mut loss, mut through_shared_ratio, mut kl_sum) = (0.0, 0.0, 0.0);
    let mut clipped = Clipped::default();
    for (t, gradient) in gradient.iter_mut().enumerate() {
        let ratio = shared.unwrap_or_else(|| (logps[t] - old_logps[t]).exp());
        let sampler = sequence.ratio.at(t);
        let policy = policy_term(params, ratio, sequence.advantage, logps[t]);
        let kl = sequence
            .ref_logps
            .map_or(Kl::default(), |r| Kl::new(r[t] - logps[t]));
        let (kl, by_ratio) = match params.use_bias_correction_kl {
            true => (kl.times(ratio), kl.value),
            false => (kl, 0.0),
        };
        kl_sum += kl.value;
        loss += sampler * policy.value + params.beta * kl.value;
        let by_log_ratio = ratio * (sampler * policy.by_ratio + params.beta * by_ratio);
        *gradient = sampler * policy.by_logp + params.beta * kl.by_logp;
        match params.level {
            ImportanceSamplingLevel::Token => *gradient += by_log_ratio,
            ImportanceSamplingLevel::Sequence => through_shared_ratio += by_log_ratio / n,
        }
        clipped.add(params, ratio, sequence.advantage);
    }
    for gradient in gradient {
        *gradient = (*gradient + through_shared_ratio) * sequence.weight;
    }
    stats.add(params, logps.len(), &clipped, kl_sum);
    loss * sequence.weight
}

/// A token's policy loss and its derivatives with respect to ρ and, directly, to logp.
struct PolicyTerm {
    value: f64,
    by_ratio: f64,
    by_logp: f64,
}

fn policy_term(params: &LossParams, ratio: f64, advantage: f64, logp: f64) -> PolicyTerm {
    if params.loss_type == LossType::Cispo {
        let weight = -ratio.min(params.epsilon_high) * advantage;
        return PolicyTerm {
            value: weight * logp,
            by_ratio: 0.0,
            by_logp: weight,
        };
    }
    let (low, high) = (1.0 - params.epsilon_low, 1.0 + params.epsilon_high);
    let delta = params.delta.unwrap_or(f64::INFINITY);
    let free = (ratio.min(delta) * advantage, ratio <= delta);
    let clipped = (
        ratio.clamp(low, high) * advantage,
        (low..=high).contains(&ratio),
    );
    // At a tie each side carries half of the gradient, as in torch.minimum.
    let share = if free.0 == clipped.0 {
        (f64::from(free.1) + f64::from(clipped.1)) / 2.0
    } else if free.0 < clipped.0 {
        f64::from(free.1)
    } else {
        f64::from(clipped.1)
    };
    PolicyTerm {
        value: -free.0.min(clipped.0),
        by_ratio: -advantage * share,
        by_logp: 0.0,
    }
}

/// The k3 estimate of KL(policy ‖ reference) of a token and its derivative with respect to logp.
#[derive(Clone, Copy, Default)]
struct Kl {
    value: f64,
    by_logp: f64,
}

impl Kl {
    /// `d` = ref − logp.
    fn new(d: f64) -> Self {
        Self {
            value: d.exp_m1() - d,
            by_logp: -d.exp_m1(),
        }
    }

    fn times(self, factor: f64) -> Self {
        Self {
            value: self.value * factor,
            by_logp: self.by_logp * factor,
        }
    }
}

/// Clipped tokens of one completion.
#[derive(Default)]
struct Clipped {
    low: f64,
    high: f64,
}

impl Clipped {
    fn add(&mut self, params: &LossParams, ratio: f64, advantage: f64) {
        let (low, high) = match params.loss_type {
            LossType::Cispo => (false, ratio > params.epsilon_high),
            _ => {
                let ratio = ratio.min(params.delta.unwrap_or(f64::INFINITY));
                (
                    ratio < 1.0 - params.epsilon_low,
                    ratio > 1.0 + params.epsilon_high,
                )
            }
        };
        self.low += f64::from(low && advantage < 0.0);
        self.high += f64::from(high && advantage > 0.0);
    }
}

/// Sums for the loss metrics over any number of completions.
#[derive(Debug, Clone, PartialEq)]
pub struct LossStats {
    tokens: f64,
    kl: f64,
    /// Tokens, or completions at sequence level.
    units: f64,
    low: f64,
    high: f64,
    low_min: f64,
    high_max: f64,
}

impl Default for LossStats {
    fn default() -> Self {
        Self {
            tokens: 0.0,
            kl: 0.0,
            units: 0.0,
            low: 0.0,
            high: 0.0,
            low_min: f64::INFINITY,
            high_max: f64::NEG_INFINITY,
        }
    }
}

impl LossStats {
    fn add(&mut self, params: &LossParams, tokens: usize, clipped: &Clipped, kl: f64) {
        let tokens = tokens as f64;
        let (low, high) = (clipped.low / tokens, clipped.high / tokens);
        let units = match params.level {
            ImportanceSamplingLevel::Token => tokens,
            // All tokens share the ratio: the completion is clipped or it is not.
            ImportanceSamplingLevel::Sequence => 1.0,
        };
        self.tokens += tokens;
        self.kl += kl;
        self.units += units;
        self.low += low * units;
        self.high += high * units;
        self.low_min = self.low_min.min(low);
        self.high_max = self.high_max.max(high);
    }

    /// Counts a completion that has no part in the gradient, and therefore none clipped: one with
    /// advantage 0, or (`active_tokens` 0) a masked one.
    pub fn add_inactive(&mut self, params: &LossParams, active_tokens: usize) {
        if active_tokens > 0 {
            self.add(params, active_tokens, &Clipped::default(), 0.0);
        } else if params.level == ImportanceSamplingLevel::Sequence {
            self.units += 1.0;
            self.low_min = self.low_min.min(0.0);
            self.high_max = self.high_max.max(0.0);
        }
    }

    /// Metric names of TRL with their values.
    pub fn metrics(&self, params: &LossParams) -> Vec<(&'static str, f64)> {
        let mut metrics = Vec::new();
        if params.beta != 0.0 {
            metrics.push(("kl", self.kl / self.tokens.max(1.0)));
        }
        let units = self.units.max(1.0);
        if params.loss_type == LossType::Cispo {
            metrics.push(("cispo_clip_ratio", self.high / units));
            return metrics;
        }
        metrics.extend([
            ("clip_ratio/low_mean", self.low / units),
            ("clip_ratio/high_mean", self.high / units),
            ("clip_ratio/region_mean", (self.low + self.high) / units),
        ]);
        if self.units > 0.0 {
            metrics.extend([
                ("clip_ratio/low_min", self.low_min),
                ("clip_ratio/high_max", self.high_max),
            ]);
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::fixture::{assert_close, numbers, parse, rows};
    use serde_json::Value;

    fn params(case: &Value) -> LossParams {
        let epsilon = case["epsilon"].as_f64().unwrap();
        LossParams {
            loss_type: serde_json::from_value(case["loss_type"].clone()).unwrap(),
            level: serde_json::from_value(case["level"].clone()).unwrap(),
            epsilon_low: epsilon,
            epsilon_high: case["epsilon_high"].as_f64().unwrap_or(epsilon),
            delta: case["delta"].as_f64(),
            beta: case["beta"].as_f64().unwrap(),
            use_bias_correction_kl: case["use_bias_correction_kl"].as_bool().unwrap(),
        }
    }

    /// The inputs all cases of the fixture share: two micro-batches of four completions.
    struct Inputs {
        lengths: Vec<usize>,
        advantages: Vec<f64>,
        truncated: Vec<usize>,
        logps: Vec<Vec<f64>>,
        old: Vec<Vec<f64>>,
        reference: Vec<Vec<f64>>,
        token_ratios: Vec<Vec<f64>>,
        sequence_ratios: Vec<f64>,
        max_completion_length: usize,
    }

    impl Inputs {
        fn read(fixture: &Value) -> Self {
            let inputs = &fixture["inputs"];
            let indices = |v: &Value| numbers(v).iter().map(|n| *n as usize).collect();
            Self {
                lengths: indices(&inputs["lengths"]),
                advantages: numbers(&inputs["advantages"]),
                truncated: indices(&inputs["truncated"]),
                logps: rows(&inputs["logps"]),
                old: rows(&inputs["old_logps"]),
                reference: rows(&inputs["ref_logps"]),
                token_ratios: rows(&inputs["token_ratios"]),
                sequence_ratios: numbers(&inputs["sequence_ratios"]),
                max_completion_length: fixture["max_completion_length"].as_u64().unwrap() as usize,
            }
        }

        fn ratio(&self, case: &Value, i: usize) -> SamplerRatio {
            match case["ratios"].as_str() {
                None => SamplerRatio::One,
                Some("token") => SamplerRatio::Token(self.token_ratios[i].clone()),
                Some(_) => SamplerRatio::Sequence(self.sequence_ratios[i]),
            }
        }
    }

    #[test]
    fn loss_gradient_and_metrics_agree_with_trl() {
        let fixture = parse(include_str!("../../tests/fixtures/trl_losses.json"));
        let inputs = Inputs::read(&fixture);
        let cases = fixture["cases"].as_array().unwrap();
        assert!(cases.len() > 100);
        for case in cases {
            let params = params(case);
            let name = format!("{params:?} {} {}", case["masked"], case["ratios"]);
            let masked = |i: usize| case["masked"] == true && inputs.truncated.contains(&i);
            let active: Vec<usize> = (0..8)
                .map(|i| if masked(i) { 0 } else { inputs.lengths[i] })
                .collect();
            let weights = token_weights(
                params.loss_type,
                Normalizer {
                    active_tokens: &active,
                    micro_batch: &[0, 0, 0, 0, 1, 1, 1, 1],
                    tokens_per_update: active.iter().sum::<usize>() as f64,
                    max_completion_length: inputs.max_completion_length,
                },
            );
            let mut loss = 0.0;
            let mut stats = [LossStats::default(), LossStats::default()];
            let expected = rows(&case["gradient"]);
            for i in 0..8 {
                let stats = &mut stats[i / 4];
                let mut gradient = vec![0.0; inputs.lengths[i]];
                if active[i] == 0 {
                    stats.add_inactive(&params, 0);
                } else {
                    let off_policy = case["off_policy"] == true;
                    let sequence = Sequence {
                        logps: &inputs.logps[i],
                        old_logps: if off_policy {
                            &inputs.old[i]
                        } else {
                            &inputs.logps[i]
                        },
                        ref_logps: (params.beta != 0.0).then_some(&inputs.reference[i][..]),
                        advantage: inputs.advantages[i],
                        ratio: &inputs.ratio(case, i),
                        weight: weights[i],
                    };
                    loss += sequence_loss(&params, sequence, &mut gradient, stats);
                    if !off_policy && case["ratios"].is_null() {
                        let known =
                            on_policy_coefficient(&params, inputs.advantages[i], weights[i]);
                        assert_eq!(known.is_some(), params.beta == 0.0);
                        if let Some(known) = known {
                            assert_close(&name, &vec![known; gradient.len()], &expected[i], 1e-9);
                        }
                    }
                }
                assert_close(&name, &gradient, &expected[i], 1e-9);
            }
            assert_close(&name, &[loss], &[case["loss"].as_f64().unwrap()], 1e-9);
            for (m, stats) in stats.iter().enumerate() {
                for (metric, value) in stats.metrics(&params) {
                    let theirs = numbers(&case["metrics"][metric])[m];
                    assert_close(&format!("{name} {metric}"), &[value], &[theirs], 1e-9);
                }
            }
        }
    }

    #[test]
    fn gradient_is_the_slope_of_the_loss() {
        let fixture = parse(include_str!("../../tests/fixtures/trl_losses.json"));
        let inputs = Inputs::read(&fixture);
        for case in fixture["cases"].as_array().unwrap() {
            let params = params(case);
            // The ratio in cispo is held constant: its loss has another slope.
            if params.loss_type == LossType::Cispo || case["off_policy"] == false {
                continue;
            }
            let mut stats = LossStats::default();
            let mut loss_at = |logps: &[f64], gradient: &mut [f64]| {
                let sequence = Sequence {
                    logps,
                    old_logps: &inputs.old[0],
                    ref_logps: (params.beta != 0.0).then_some(&inputs.reference[0][..]),
                    advantage: inputs.advantages[0],
                    ratio: &inputs.ratio(case, 0),
                    weight: 0.25,
                };
                sequence_loss(&params, sequence, gradient, &mut stats)
            };
            let mut gradient = vec![0.0; inputs.lengths[0]];
            loss_at(&inputs.logps[0], &mut gradient);
            let mut scratch = gradient.clone();
            for (t, slope) in gradient.iter().enumerate() {
                let mut at = |step: f64| {
                    let mut logps = inputs.logps[0].clone();
                    logps[t] += step;
                    loss_at(&logps, &mut scratch)
                };
                let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (difference - slope).abs() < 1e-8,
                    "{params:?}: {difference} {slope}"
                );
            }
        }
    }

    #[test]
    fn printed_loss_is_zero_on_policy_with_balanced_advantages() {
        let params = LossParams::from(&GrpoConfig::default());
        let (mut stats, mut gradient) = (LossStats::default(), [0.0; 2]);
        let mut total = 0.0;
        for advantage in [0.7, -0.7] {
            let sequence = Sequence {
                logps: &[-1.0, -2.0],
                old_logps: &[-1.0, -2.0],
                ref_logps: None,
                advantage,
                ratio: &SamplerRatio::One,
                weight: 0.25,
            };
            total += sequence_loss(&params, sequence, &mut gradient, &mut stats);
            assert_eq!(gradient, [-advantage / 4.0; 2]);
        }
        assert_eq!(total, 0.0);
    }
}
