//! `[optim]`: AdamW or the natural gradient, gradient clipping and the learning-rate schedule, under
//! transformers' names.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// Shape of the learning rate over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    Constant,
    ConstantWithWarmup,
    /// Down to 0 at the last update.
    Linear,
    /// Half a cosine wave down to 0 at the last update.
    Cosine,
}

/// How a gradient becomes a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    Adamw,
    /// Exact natural gradient of few parameters, steps of a given divergence.
    Natural,
}

/// The `[optim]` section; defaults are those of TRL's GRPO trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// `adamw`, or `natural`: the exact natural gradient of up to 1024 parameters, which needs no
    /// learning rate (with more parameters, and for `lora` and `full`, it is `adamw`).
    #[serde(rename = "type")]
    pub kind: OptimizerKind,
    /// Largest learning rate of the schedule.
    pub learning_rate: f64,
    /// Shape of the learning rate over the run.
    pub lr_scheduler_type: LrSchedulerType,
    /// Updates of linear warm-up; a value below 1 is a share of all updates.
    pub warmup_steps: f64,
    /// Share of all updates spent on warm-up; `warmup_steps` wins when both are given.
    pub warmup_ratio: f64,
    /// Decay of the running mean of the gradient.
    pub adam_beta1: f64,
    /// Decay of the running mean of the squared gradient.
    pub adam_beta2: f64,
    /// Added to the root of the latter.
    pub adam_epsilon: f64,
    /// Decoupled weight decay: each update shrinks a parameter by `learning_rate` × this.
    pub weight_decay: f64,
    /// Largest Euclidean norm of the gradient; larger ones are scaled down to it. 0 = no limit.
    pub max_grad_norm: f64,
    /// `natural`: divergence of the policy that a step may make, nats per completion. The schedule
    /// scales the step's length.
    pub kl_per_step: f64,
    /// `natural`: damping of the Fisher matrix, relative to the mean of its diagonal.
    pub damping: f64,
    /// `natural`: weight of an earlier generation batch in the Fisher matrix and the gradient, to the
    /// power of its age.
    pub momentum: f64,
    /// `natural`: earlier generation batches that count again, importance-weighted to the policy of now.
    pub reuse: usize,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::Adamw,
            learning_rate: 1e-6,
            lr_scheduler_type: LrSchedulerType::Linear,
            warmup_steps: 0.0,
            warmup_ratio: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            kl_per_step: 0.1,
            damping: 1.0,
            momentum: 1.0,
            reuse: 20,
        }
    }
}

impl OptimConfig {
    /// Whether the learning rate of a step does not depend on how many steps there will be.
    pub fn is_independent_of_length(&self) -> bool {
        match self.lr_scheduler_type {
            LrSchedulerType::Constant => true,
            LrSchedulerType::ConstantWithWarmup => self.warmup_steps >= 1.0,
            LrSchedulerType::Linear | LrSchedulerType::Cosine => false,
        }
    }

    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("optim.learning_rate", self.learning_rate),
            ("optim.adam_epsilon", self.adam_epsilon),
            ("optim.weight_decay", self.weight_decay),
            ("optim.max_grad_norm", self.max_grad_norm),
            ("optim.warmup_steps", self.warmup_steps),
            ("optim.damping", self.damping),
        ] {
            check(value.is_finite() && value >= 0.0, key, value, || {
                "must be 0 or more".into()
            })?;
        }
        check(
            self.warmup_steps < 1.0 || self.warmup_steps.fract() == 0.0,
            "optim.warmup_steps",
            self.warmup_steps,
            || "must be a whole number of updates, or a share of them below 1".into(),
        )?;
        for (key, value) in [
            ("optim.adam_beta1", self.adam_beta1),
            ("optim.adam_beta2", self.adam_beta2),
            ("optim.warmup_ratio", self.warmup_ratio),
        ] {
            check((0.0..1.0).contains(&value), key, value, || {
                "must be in [0, 1)".into()
            })?;
        }
        check(
            (0.0..=1.0).contains(&self.momentum),
            "optim.momentum",
            self.momentum,
            || "must be from 0 to 1".into(),
        )?;
        check(
            self.kl_per_step > 0.0 && self.kl_per_step <= 10.0,
            "optim.kl_per_step",
            self.kl_per_step,
            || "must be above 0 and at most 10".into(),
        )
    }

    /// Updates of warm-up in a run of `total` updates.
    pub fn warmup_updates(&self, total: u64) -> u64 {
        let share = if self.warmup_steps >= 1.0 {
            return self.warmup_steps as u64;
        } else if self.warmup_steps > 0.0 {
            self.warmup_steps
        } else {
            self.warmup_ratio
        };
        (total as f64 * share).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_is_a_number_or_a_share_of_the_run() {
        let with = |steps, ratio| OptimConfig {
            warmup_steps: steps,
            warmup_ratio: ratio,
            ..OptimConfig::default()
        };
        assert_eq!(with(0.0, 0.0).warmup_updates(100), 0);
        assert_eq!(with(7.0, 0.5).warmup_updates(100), 7);
        assert_eq!(with(0.05, 0.5).warmup_updates(101), 6);
        assert_eq!(with(0.0, 0.05).warmup_updates(101), 6);
    }

    #[test]
    fn wrong_values_name_their_key() {
        type Break = fn(&mut OptimConfig);
        let cases: [(&str, Break); 5] = [
            ("optim.learning_rate", |c| c.learning_rate = f64::NAN),
            ("optim.adam_beta2", |c| c.adam_beta2 = 1.0),
            ("optim.warmup_steps", |c| c.warmup_steps = 1.5),
            ("optim.warmup_ratio", |c| c.warmup_ratio = 5.0),
            ("optim.max_grad_norm", |c| c.max_grad_norm = -1.0),
        ];
        OptimConfig::default().validate().unwrap();
        for (key, change) in cases {
            let mut config = OptimConfig::default();
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(key), "{key}: {message}");
        }
    }

    #[test]
    fn whole_numbers_and_shares_are_both_read() {
        let config: OptimConfig = toml::from_str("warmup_steps = 10").unwrap();
        assert_eq!(config.warmup_steps, 10.0);
        let config: OptimConfig = toml::from_str("warmup_steps = 0.1").unwrap();
        assert_eq!(config.warmup_steps, 0.1);
    }
}
