//! Rewards of a batch of groups → advantages, as TRL computes them.
//!
//! R_i = Σ_k w_k r_ik over the functions that scored completion i;
//! A_i = (R_i − mean of its group) / (std + 1e-4), std with n − 1.
//! A reward function gives NaN where it does not apply. A completion that no function scored counts
//! in no mean or deviation and gets advantage 0.

use crate::config::ScaleRewards;
use crate::{Error, Result};

/// TRL's guard in the denominator.
const EPSILON: f64 = 1e-4;

/// What [`advantages`] finds; one entry a completion unless said otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    pub values: Vec<f64>,
    /// Weighted sums of the rewards, NaN where nothing was scored.
    pub rewards: Vec<f64>,
    /// Per group: whether two of its rewards differ. Without that nothing is learnt from it.
    pub spread: Vec<bool>,
    /// Share of completions whose scaling deviation is 0 (metric `frac_reward_zero_std`).
    pub frac_zero_std: f64,
}

/// Advantages of consecutive groups of `group_size` completions.
///
/// `rewards[k][i]` is what function `k` gave completion `i`.
///
/// # Errors
/// When a reward is infinite, or the shapes do not fit.
pub fn advantages(
    rewards: &[Vec<f64>],
    weights: &[f64],
    group_size: usize,
    scale: ScaleRewards,
) -> Result<Advantages> {
    let count = rewards.first().map_or(0, Vec::len);
    let fits = rewards.iter().all(|r| r.len() == count) && rewards.len() == weights.len();
    if !fits || group_size == 0 || !count.is_multiple_of(group_size) {
        return Err(Error::Internal(format!(
            "{} reward functions with {} weights over {count} completions in groups of {group_size}",
            rewards.len(),
            weights.len(),
        )));
    }
    if let Some(infinite) = rewards.iter().flatten().find(|r| r.is_infinite()) {
        return Err(Error::Internal(format!(
            "a reward function returned {infinite}"
        )));
    }
    let total = weighted_sums(rewards, weights);

    let batch_std = std(&total);
    let mut values = Vec::with_capacity(count);
    let mut spread = Vec::with_capacity(count / group_size);
    let mut zero_std = 0;
    for group in total.chunks_exact(group_size) {
        let varies = has_spread(group);
        let mean = mean(group);
        let std = match scale {
            ScaleRewards::Batch => batch_std,
            ScaleRewards::Group | ScaleRewards::None => std(group),
        };
        let divisor = match scale {
            ScaleRewards::None => 1.0,
            ScaleRewards::Group | ScaleRewards::Batch => std + EPSILON,
        };
        // Equal rewards leave exactly 0, not the rounding error of their mean.
        values.extend(group.iter().map(|r| match (r - mean) / divisor {
            a if a.is_nan() || !varies => 0.0,
            a => a,
        }));
        zero_std += usize::from(std.abs() <= 1e-8) * group_size;
        spread.push(varies);
    }
    Ok(Advantages {
        values,
        rewards: total,
        spread,
        frac_zero_std: zero_std as f64 / count.max(1) as f64,
    })
}

/// Σ_k weights[k] · rewards[k][i] of every completion i, over the functions that scored it; NaN
/// where none did.
pub fn weighted_sums(rewards: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let count = rewards.first().map_or(0, Vec::len);
    let of = |i: usize| {
        let all = rewards.iter().zip(weights).map(|(r, w)| w * r[i]);
        let scored = all.filter(|r| !r.is_nan());
        scored.reduce(|a, b| a + b).unwrap_or(f64::NAN)
    };
    (0..count).map(of).collect()
}

fn has_spread(group: &[f64]) -> bool {
    let mut scored = group.iter().filter(|r| !r.is_nan());
    let first = scored.next();
    scored.any(|r| Some(r) != first)
}

/// Mean of the values that are not NaN (NaN without any).
pub fn mean(values: &[f64]) -> f64 {
    let (sum, n) = scored_sum(values.iter().copied());
    sum / n
}

/// Standard deviation with n − 1 of the values that are not NaN (NaN for fewer than two).
pub fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    let (sum, n) = scored_sum(values.iter().map(|v| (v - mean) * (v - mean)));
    if n < 2.0 {
        return f64::NAN;
    }
    // Equal values have deviation 0, whatever rounding made of their mean.
    if has_spread(values) {
        (sum / (n - 1.0)).sqrt()
    } else {
        0.0
    }
}

fn scored_sum(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values
        .filter(|v| !v.is_nan())
        .fold((0.0, 0.0), |(sum, n), v| (sum + v, n + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::fixture::{assert_close, numbers, parse};
    use serde_json::Value;

    fn scale(case: &Value) -> ScaleRewards {
        serde_json::from_value(case["scale_rewards"].clone()).unwrap()
    }

    #[test]
    fn agrees_with_trl() {
        let fixture = parse(include_str!("../../tests/fixtures/trl_advantages.json"));
        let group_size = fixture["num_generations"].as_u64().unwrap() as usize;
        let cases = fixture["advantages"].as_array().unwrap();
        assert_eq!(cases.len(), 21);
        for case in cases {
            let name = format!("{} {}", case["name"], case["scale_rewards"]);
            let rewards: Vec<Vec<f64>> = case["rewards"]
                .as_array()
                .unwrap()
                .iter()
                .map(numbers)
                .collect();
            let weights = numbers(&case["weights"]);
            let got = advantages(&rewards, &weights, group_size, scale(case)).unwrap();
            // TRL computes these in f32.
            assert_close(&name, &got.values, &numbers(&case["advantages"]), 1e-6);
            let metrics = &case["metrics"];
            let ours = [mean(&got.rewards), std(&got.rewards), got.frac_zero_std];
            let theirs = ["reward", "reward_std", "frac_reward_zero_std"].map(|k| &metrics[k]);
            assert_close(
                &name,
                &ours,
                &theirs.map(|v| v.as_f64().unwrap_or(f64::NAN)),
                1e-6,
            );
            for (k, function) in rewards.iter().enumerate() {
                let theirs = ["mean", "std"].map(|s| &metrics[format!("rewards/f{k}/{s}")]);
                assert_close(
                    &name,
                    &[mean(function), std(function)],
                    &theirs.map(|v| v.as_f64().unwrap_or(f64::NAN)),
                    1e-6,
                );
            }
        }
    }

    #[test]
    fn equal_rewards_give_exactly_zero() {
        let rewards = [vec![0.1, 0.1, 0.1, 0.7, 0.1, 0.1]];
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            let got = advantages(&rewards, &[1.0], 3, scale).unwrap();
            assert_eq!(got.values[..3], [0.0; 3]);
            assert_eq!(got.spread, [false, true]);
        }
    }

    #[test]
    fn an_infinite_reward_is_refused() {
        let error = advantages(&[vec![0.0, f64::INFINITY]], &[1.0], 2, ScaleRewards::Group);
        assert!(error.unwrap_err().to_string().contains("inf"));
    }
}
