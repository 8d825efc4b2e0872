//! `[grpo]`: rollout, advantages and loss, under TRL's names and with TRL's defaults.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// How token losses are put together; names and formulas are TRL's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Mean over the tokens of a sequence, then over sequences.
    Grpo,
    /// Sum over active tokens / active tokens of the optimizer step.
    Dapo,
    /// Sum over active tokens / active tokens of the micro-batch.
    Bnpo,
    /// Sum over active tokens / (sequences × `max_completion_length`).
    DrGrpo,
    /// REINFORCE with a clamped, detached ratio as weight; aggregated like `dapo`.
    Cispo,
}

/// Whether a probability ratio belongs to a token or to a whole completion (GSPO).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingLevel {
    Token,
    Sequence,
}

/// What the centred rewards are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// Standard deviation within the group of one prompt.
    Group,
    /// Standard deviation over all completions of the step.
    Batch,
    None,
}

/// How the ratio trainer/sampler weighs the loss when another engine sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingMode {
    /// One ratio a token, clamped to the bounds.
    TokenTruncate,
    /// One ratio a token, 0 outside the bounds.
    TokenMask,
    /// One ratio a completion (product over its tokens), clamped to the bounds.
    SequenceTruncate,
    /// One ratio a completion, 0 outside the bounds.
    SequenceMask,
}

/// The `[grpo]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoConfig {
    /// Completions sampled for each prompt (the group).
    pub num_generations: usize,
    /// Prompts of one generation batch; TRL's `generation_batch_size` / `num_generations`.
    pub prompts_per_step: usize,
    /// Optimizer updates one generation batch is split into, by whole groups.
    pub steps_per_generation: usize,
    /// Passes over one generation batch (μ).
    pub num_iterations: usize,
    /// Most tokens sampled for a completion.
    pub max_completion_length: usize,
    /// Softmax temperature, of sampling and of the log-probabilities in the loss.
    pub temperature: f64,
    /// Nucleus mass kept when sampling; 1 keeps all.
    pub top_p: f64,
    /// Tokens kept when sampling; 0 keeps all.
    pub top_k: usize,
    /// Smallest probability kept, relative to the largest; 0 keeps all.
    pub min_p: f64,
    /// Strings that end a completion.
    pub stop: Vec<String>,

    /// How token losses are put together.
    pub loss_type: LossType,
    /// Whether a probability ratio belongs to a token or to a completion (GSPO).
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// Lower clip distance, and the upper one unless `epsilon_high` is given.
    pub epsilon: f64,
    /// Upper clip distance; for `cispo` the largest ratio itself.
    pub epsilon_high: Option<f64>,
    /// Upper bound of the unclipped ratio (two-sided clipping of INTELLECT-2).
    pub delta: Option<f64>,
    /// Weight of the KL term to the model with the adapter off.
    pub beta: f64,
    /// Multiply the KL term by the ratio, so that its gradient is that of the reverse KL (TRL's
    /// default); `false` is the plain k3 estimate.
    pub use_bias_correction_kl: bool,

    /// What centred rewards are divided by.
    pub scale_rewards: ScaleRewards,
    /// One weight a reward function; all 1 when absent.
    pub reward_weights: Option<Vec<f64>>,
    /// Completions cut off at `max_completion_length` take no part in the loss.
    pub mask_truncated_completions: bool,
    /// Replace groups whose rewards are all equal by groups of further prompts.
    pub dynamic_sampling: bool,
    /// Most additional rollouts of one step for that.
    pub dynamic_sampling_max_rounds: usize,

    /// Weigh by trainer/sampler probability when the rollouts come from another engine.
    #[serde(alias = "vllm_importance_sampling_correction")]
    pub importance_sampling_correction: bool,
    /// What that weight is.
    #[serde(alias = "vllm_importance_sampling_mode")]
    pub importance_sampling_mode: ImportanceSamplingMode,
    /// Its upper bound.
    #[serde(alias = "vllm_importance_sampling_clip_max")]
    pub importance_sampling_clip_max: Option<f64>,
    /// Its lower bound.
    #[serde(alias = "vllm_importance_sampling_clip_min")]
    pub importance_sampling_clip_min: Option<f64>,

    /// Tokens of one forward/backward pass. Groups stay together unless one alone is larger. Unset:
    /// 2048, and where memory is short fewer, but whole groups: on the CPU with the same bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<usize>,
    /// Memory, in GB, for what updates need of a forward pass: the inputs of all blocks, kept while
    /// sampling, or a pass's activations. What does not fit is computed again; the gradient is the
    /// same to the bit on the CPU. Unset: 2, less where memory is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_memory_gb: Option<f64>,
    /// Compute each block's activations again on the way back instead of keeping them; absent: when
    /// they would be large.
    pub gradient_checkpointing: Option<bool>,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            num_generations: 8,
            prompts_per_step: 8,
            steps_per_generation: 1,
            num_iterations: 1,
            max_completion_length: 512,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            stop: Vec::new(),
            loss_type: LossType::Dapo,
            importance_sampling_level: ImportanceSamplingLevel::Token,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            beta: 0.0,
            use_bias_correction_kl: true,
            scale_rewards: ScaleRewards::Group,
            reward_weights: None,
            mask_truncated_completions: false,
            dynamic_sampling: false,
            dynamic_sampling_max_rounds: 3,
            importance_sampling_correction: true,
            importance_sampling_mode: ImportanceSamplingMode::TokenTruncate,
            importance_sampling_clip_max: Some(2.0),
            importance_sampling_clip_min: None,
            micro_batch_tokens: None,
            activation_memory_gb: None,
            gradient_checkpointing: None,
        }
    }
}

impl GrpoConfig {
    /// Optimizer updates made from one generation batch.
    pub fn updates_per_step(&self) -> usize {
        self.steps_per_generation * self.num_iterations
    }

    /// Checks every value and combination; the message names the key.
    pub fn validate(&self) -> Result<()> {
        check(
            self.num_generations >= 2,
            "grpo.num_generations",
            self.num_generations,
            || "advantages compare completions of one prompt: use 2 or more".into(),
        )?;
        for (key, value) in [
            ("grpo.prompts_per_step", self.prompts_per_step),
            ("grpo.steps_per_generation", self.steps_per_generation),
            ("grpo.num_iterations", self.num_iterations),
            ("grpo.max_completion_length", self.max_completion_length),
            (
                "grpo.micro_batch_tokens",
                self.micro_batch_tokens.unwrap_or(1),
            ),
        ] {
            check(value >= 1, key, value, || "must be at least 1".into())?;
        }
        let memory = self.activation_memory_gb.unwrap_or(0.0);
        check(
            memory >= 0.0 && memory.is_finite(),
            "grpo.activation_memory_gb",
            memory,
            || "must be 0 or more".into(),
        )?;
        check(
            self.prompts_per_step
                .is_multiple_of(self.steps_per_generation),
            "grpo.steps_per_generation",
            self.steps_per_generation,
            || {
                format!(
                    "must divide grpo.prompts_per_step = {}",
                    self.prompts_per_step
                )
            },
        )?;
        self.validate_sampling()?;
        self.validate_loss()?;
        self.validate_rewards()
    }

    fn validate_sampling(&self) -> Result<()> {
        check(
            self.temperature.is_finite() && self.temperature > 0.0,
            "grpo.temperature",
            self.temperature,
            || "must be positive: greedy completions of one prompt are all the same".into(),
        )?;
        check(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "grpo.top_p",
            self.top_p,
            || "must be in (0, 1]".into(),
        )?;
        check(
            (0.0..=1.0).contains(&self.min_p),
            "grpo.min_p",
            self.min_p,
            || "must be in [0, 1]".into(),
        )?;
        check(
            !self.stop.iter().any(String::is_empty),
            "grpo.stop",
            "[.., \"\", ..]",
            || "an empty string would end every completion at once".into(),
        )
    }

    fn validate_loss(&self) -> Result<()> {
        check(
            self.epsilon.is_finite() && self.epsilon >= 0.0,
            "grpo.epsilon",
            self.epsilon,
            || "must be 0 or more".into(),
        )?;
        if let Some(high) = self.epsilon_high {
            check(
                high.is_finite() && high >= 0.0,
                "grpo.epsilon_high",
                high,
                || "must be 0 or more".into(),
            )?;
        }
        check(
            self.loss_type != LossType::Cispo || self.epsilon_high.is_some(),
            "grpo.epsilon_high",
            "(absent)",
            || "loss_type \"cispo\" clamps the ratio itself at this value: set it, e.g. 5.0".into(),
        )?;
        if let Some(delta) = self.delta {
            let floor = 1.0 + self.epsilon_high.unwrap_or(self.epsilon);
            check(
                delta.is_finite() && delta > floor,
                "grpo.delta",
                delta,
                || format!("must be above 1 + epsilon_high = {floor}"),
            )?;
        }
        check(
            self.beta.is_finite() && self.beta >= 0.0,
            "grpo.beta",
            self.beta,
            || "must be 0 or more".into(),
        )
    }

    fn validate_rewards(&self) -> Result<()> {
        if let Some(weights) = &self.reward_weights {
            check(
                !weights.is_empty() && weights.iter().all(|w| w.is_finite()),
                "grpo.reward_weights",
                format_args!("{weights:?}"),
                || "must be one finite number for each reward function".into(),
            )?;
        }
        check(
            !self.dynamic_sampling || self.dynamic_sampling_max_rounds >= 1,
            "grpo.dynamic_sampling_max_rounds",
            self.dynamic_sampling_max_rounds,
            || "must be at least 1 when dynamic_sampling is on".into(),
        )?;
        let (min, max) = (
            self.importance_sampling_clip_min,
            self.importance_sampling_clip_max,
        );
        for (key, bound) in [
            ("grpo.importance_sampling_clip_min", min),
            ("grpo.importance_sampling_clip_max", max),
        ] {
            if let Some(value) = bound {
                check(value.is_finite() && value >= 0.0, key, value, || {
                    "must be 0 or more".into()
                })?;
            }
        }
        if let (Some(min), Some(max)) = (min, max) {
            check(min < max, "grpo.importance_sampling_clip_min", min, || {
                format!("must be less than importance_sampling_clip_max = {max}")
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_survive_toml() {
        let config = GrpoConfig::default();
        config.validate().unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<GrpoConfig>(&text).unwrap(), config);
    }

    #[test]
    fn trl_spellings_are_read() {
        let config: GrpoConfig = toml::from_str(
            "loss_type = \"dr_grpo\"\nscale_rewards = \"none\"\nimportance_sampling_level = \"sequence\"\n\
             epsilon_high = 0.28\nvllm_importance_sampling_mode = \"sequence_mask\"",
        )
        .unwrap();
        assert_eq!(config.loss_type, LossType::DrGrpo);
        assert_eq!(config.scale_rewards, ScaleRewards::None);
        assert_eq!(
            config.importance_sampling_level,
            ImportanceSamplingLevel::Sequence
        );
        assert_eq!(
            config.importance_sampling_mode,
            ImportanceSamplingMode::SequenceMask
        );
    }

    #[test]
    fn wrong_values_name_their_key() {
        type Break = fn(&mut GrpoConfig);
        let cases: [(&str, Break); 10] = [
            ("grpo.num_generations", |c| c.num_generations = 1),
            ("grpo.steps_per_generation", |c| c.steps_per_generation = 3),
            ("grpo.temperature", |c| c.temperature = 0.0),
            ("grpo.top_p", |c| c.top_p = f64::NAN),
            ("grpo.epsilon", |c| c.epsilon = -0.1),
            ("grpo.epsilon_high", |c| c.loss_type = LossType::Cispo),
            ("grpo.delta", |c| c.delta = Some(1.1)),
            ("grpo.beta", |c| c.beta = f64::INFINITY),
            ("grpo.reward_weights", |c| c.reward_weights = Some(vec![])),
            ("grpo.importance_sampling_clip_min", |c| {
                c.importance_sampling_clip_min = Some(3.0)
            }),
        ];
        for (key, change) in cases {
            let mut config = GrpoConfig::default();
            change(&mut config);
            let error = config.validate().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().starts_with(key), "{key}: {error}");
        }
    }
}
