//! `[train]` and `[eval]`: how long, how often, what is kept.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// How the adapter is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Reinforcement learning on sampled completions.
    #[default]
    Grpo,
    /// Next-token loss on the data set's own solutions.
    Sft,
}

impl Method {
    /// Name as written in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpo => "grpo",
            Self::Sft => "sft",
        }
    }
}

/// The `[train]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Name of the run directory after its time stamp; unset takes the configuration's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_name: Option<String>,
    /// Steps (generation batches of GRPO, updates of SFT); unset takes `num_train_epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Passes over the training data when `max_steps` is unset.
    pub num_train_epochs: f64,
    /// Key of every random draw: data order, completions, random weights.
    pub seed: u64,
    /// Evaluate every so many steps, besides before and after; unset does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<u64>,
    /// Save a checkpoint every so many steps.
    pub save_steps: u64,
    /// Checkpoints kept, besides the one that evaluates best; 0 keeps all.
    pub save_total_limit: usize,
    /// Completions of a step written to `completions.jsonl`; unset writes all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_completions_to_log: Option<usize>,
    /// Stop (exit code 4) after so many steps in a row in which no group had two different
    /// rewards, since nothing is learnt from them; 0 never stops.
    pub max_dead_steps: u64,
    /// Seconds that a process waits for others of the run that are alive but behind (with several,
    /// under mpirun); one that is gone is noticed in 15 seconds.
    pub ddp_timeout: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            run_name: None,
            max_steps: None,
            num_train_epochs: 3.0,
            seed: 42,
            eval_steps: None,
            save_steps: 1,
            save_total_limit: 3,
            num_completions_to_log: None,
            max_dead_steps: 50,
            ddp_timeout: 1800,
        }
    }
}

impl TrainConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let least_one = || "must be at least 1".to_owned();
        for (key, value) in [
            ("train.max_steps", self.max_steps.unwrap_or(1)),
            ("train.eval_steps", self.eval_steps.unwrap_or(1)),
            ("train.save_steps", self.save_steps),
            ("train.ddp_timeout", self.ddp_timeout),
        ] {
            check(value >= 1, key, value, least_one)?;
        }
        let epochs = self.num_train_epochs;
        check(
            epochs > 0.0 && epochs <= 1e6,
            "train.num_train_epochs",
            epochs,
            || "must be above 0 and at most 1000000".into(),
        )?;
        if let Some(name) = &self.run_name {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            check(
                !name.is_empty() && name.chars().all(plain) && !name.starts_with('.'),
                "train.run_name",
                format_args!("{name:?}"),
                || "letters, digits, '-', '_' and '.' make a folder name on every system".into(),
            )?;
        }
        Ok(())
    }
}

/// The `[eval]` section: evaluation before, during and after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Benchmarks by name, or `.jsonl` files; empty: no evaluation.
    pub data: Vec<String>,
    /// Problems taken of each data set; unset takes all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Most tokens of a completion; unset takes `grpo.max_completion_length`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// 0 is greedy.
    pub temperature: f64,
    /// Completions of each problem.
    pub samples_per_problem: usize,
    /// Also measure one completion of each problem at temperature 1.
    pub sampled: bool,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            data: Vec::new(),
            limit: None,
            max_tokens: None,
            temperature: 0.0,
            samples_per_problem: 1,
            sampled: false,
        }
    }
}

impl EvalConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("eval.limit", self.limit.unwrap_or(1)),
            ("eval.max_tokens", self.max_tokens.unwrap_or(1)),
            ("eval.samples_per_problem", self.samples_per_problem),
        ] {
            check(value >= 1, key, value, || "must be at least 1".into())?;
        }
        let temperature = self.temperature;
        check(
            temperature.is_finite() && temperature >= 0.0,
            "eval.temperature",
            temperature,
            || "must be 0 (greedy) or more".into(),
        )?;
        check(
            temperature > 0.0 || self.samples_per_problem == 1,
            "eval.samples_per_problem",
            self.samples_per_problem,
            || "greedy completions of one problem are all the same: set eval.temperature".into(),
        )
    }
}
