//! What is known of metrics by their names: where they are shown, what they mean, their healthy range.

use crate::config::Method;

/// Charts stand together by what they are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    Evaluation,
    Reward,
    Length,
    Entropy,
    Clipping,
    Sampling,
    Optimisation,
    Time,
    Other,
}

impl Group {
    /// In the order of the page.
    pub const ALL: [Self; 9] = [
        Self::Evaluation,
        Self::Reward,
        Self::Length,
        Self::Entropy,
        Self::Clipping,
        Self::Sampling,
        Self::Optimisation,
        Self::Time,
        Self::Other,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Self::Evaluation => "Evaluation",
            Self::Reward => "Reward",
            Self::Length => "Length",
            Self::Entropy => "Entropy and KL",
            Self::Clipping => "Clipping",
            Self::Sampling => "Sampler against trainer",
            Self::Optimisation => "Optimisation",
            Self::Time => "Time",
            Self::Other => "Other",
        }
    }

    /// The group a metric belongs to.
    pub fn of(name: &str) -> Self {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|p| name.starts_with(p));
        match name {
            "loss" | "grad_norm" | "learning_rate" | "epoch" | "num_tokens" => Self::Optimisation,
            "step_time" | "eval_runtime" => Self::Time,
            _ if starts(&["eval_"]) => Self::Evaluation,
            _ if starts(&["time/"]) || name.ends_with("_per_second") => Self::Time,
            _ if starts(&["reward", "frac_reward", "advantage"]) => Self::Reward,
            _ if starts(&["completions/", "completion_"]) => Self::Length,
            _ if starts(&["entropy", "kl"]) => Self::Entropy,
            _ if name.contains("clip_ratio") => Self::Clipping,
            _ if starts(&["sampling/"]) => Self::Sampling,
            _ if starts(&["optim", "natural", "trust", "fisher"]) => Self::Optimisation,
            _ => Self::Other,
        }
    }
}

/// A few words on a metric.
pub fn meaning(name: &str) -> &'static str {
    match name {
        "reward" => "mean reward of the step's completions",
        "reward_std" => "standard deviation of the rewards",
        "frac_reward_zero_std" => "share of groups whose rewards are all equal: nothing learnt",
        "completions/mean_length" => "tokens of a completion",
        "completions/clipped_ratio" => "share of completions cut off at the length limit",
        "completions/mean_terminated_length" => "tokens of completions that ended by themselves",
        "entropy" => "mean entropy of the next token, in nats",
        "kl" => "divergence from the model without the adapter (k3)",
        "clip_ratio/region_mean" => "share of tokens whose ratio was clipped",
        "clip_ratio/low_mean" => "share of tokens clipped from below",
        "clip_ratio/high_mean" => "share of tokens clipped from above",
        "sampling/sampling_logp_difference/mean" => {
            "mean |log-probability, sampler − trainer| of a token"
        }
        "sampling/sampling_logp_difference/max" => "largest such difference",
        "loss" => "mean loss of the step's updates",
        "grad_norm" => "Euclidean norm of the gradient before clipping",
        "learning_rate" => "of the last update",
        "natural/kl" => "divergence of the step taken, in nats a completion",
        "natural/improvement" => {
            "what the step improved the objective by, on the step's completions"
        }
        "natural/predicted_improvement" => "what the gradient promised for the same step",
        "natural/step_scale" => "share of the proposed step that the line search took",
        "natural/effective_sample_size" => {
            "share of the completions that still count after the step, by importance weights"
        }
        "natural/reused" => "completions of earlier steps that counted again",
        "natural/gradient_noise_scale" => {
            "completions a step at which the gradient is as large as its noise"
        }
        "natural/condition_number" => {
            "largest over smallest eigenvalue of the damped Fisher matrix"
        }
        "num_tokens" => "prompt and completion tokens seen so far",
        "epoch" => "passes over the training data",
        "step_time" => "seconds a step",
        "tokens_per_second" => "completion tokens a second of sampling and training",
        "eval_runtime" => "seconds an evaluation",
        _ => "",
    }
}

/// A healthy range and what to do outside it.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub metric: &'static str,
    /// Smallest healthy value.
    pub low: Option<f64>,
    pub high: Option<High>,
    /// Only where completions are sampled.
    pub grpo_only: bool,
    pub below: &'static str,
    pub above: &'static str,
}

/// The upper end of a range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum High {
    /// Healthy values are smaller.
    Below(f64),
    /// Healthy values are not larger.
    UpTo(f64),
}

impl High {
    pub fn value(self) -> f64 {
        match self {
            Self::Below(value) | Self::UpTo(value) => value,
        }
    }
}

/// Ranges in common use for GRPO. The one of the sampling difference is this project's: on a CPU it
/// is exactly 0, and at 0.1 the average token's probability is already off by a tenth.
pub const RULES: &[Rule] = &[
    Rule {
        metric: "frac_reward_zero_std",
        low: None,
        high: Some(High::Below(0.8)),
        grpo_only: true,
        below: "",
        above: "Most groups have equal rewards and teach nothing. Take problems the model solves \
                sometimes, raise grpo.num_generations or grpo.temperature, or set \
                grpo.dynamic_sampling.",
    },
    Rule {
        metric: "grad_norm",
        low: Some(0.001),
        high: Some(High::UpTo(1.0)),
        grpo_only: false,
        below: "The gradient is almost nothing. Check that rewards differ within groups; a larger \
                adapter.scaling or adapter.projection_std makes the same numbers act more.",
        above: "The gradient is large and is scaled down to optim.max_grad_norm. Lower \
                optim.learning_rate, or raise the number of prompts a step.",
    },
    Rule {
        metric: "entropy",
        low: Some(0.05),
        high: Some(High::UpTo(0.5)),
        grpo_only: true,
        below: "The model hardly varies its completions, so there is little to choose from. Lower \
                optim.learning_rate, raise grpo.temperature or grpo.epsilon_high, or stop earlier.",
        above: "Completions are close to random. Lower optim.learning_rate or grpo.temperature, or \
                set grpo.beta to stay near the model without the adapter.",
    },
    Rule {
        metric: "completions/clipped_ratio",
        low: None,
        high: Some(High::Below(0.3)),
        grpo_only: true,
        below: "",
        above: "Many completions are cut off before their answer. Raise \
                grpo.max_completion_length, or set grpo.mask_truncated_completions.",
    },
    Rule {
        metric: "clip_ratio/region_mean",
        low: None,
        high: Some(High::Below(0.1)),
        grpo_only: true,
        below: "",
        above: "Updates move further than the clip range allows. Lower optim.learning_rate, \
                grpo.num_iterations or grpo.steps_per_generation.",
    },
    Rule {
        metric: "sampling/sampling_logp_difference/mean",
        low: None,
        high: Some(High::Below(0.1)),
        grpo_only: true,
        below: "",
        above: "Sampler and trainer disagree about the same tokens. Use the same dtype in both, \
                check that the sampler has the current adapter, and keep \
                grpo.importance_sampling_correction on.",
    },
];

impl Rule {
    pub fn of(metric: &str) -> Option<&'static Self> {
        RULES.iter().find(|rule| rule.metric == metric)
    }

    pub fn applies_to(&self, method: Method) -> bool {
        !self.grpo_only || method == Method::Grpo
    }

    pub fn is_below(&self, value: f64) -> bool {
        self.low.is_some_and(|low| value < low)
    }

    pub fn is_above(&self, value: f64) -> bool {
        match self.high {
            Some(High::Below(high)) => value >= high,
            Some(High::UpTo(high)) => value > high,
            None => false,
        }
    }

    /// `0.05–0.5`, `< 0.8`.
    pub fn range(&self) -> String {
        match (self.low, self.high) {
            (Some(low), Some(high)) => format!("{low}–{}", high.value()),
            (None, Some(high)) => format!("< {}", high.value()),
            (Some(low), None) => format!("≥ {low}"),
            (None, None) => String::new(),
        }
    }
}
