//! Sizes that cost memory and give speed: those of the configuration, or what they are when unset.
//!
//! On the CPU none of them changes a bit of a result, so that a run may take them from the memory of
//! the machine it is on. Two roles of `micro_batch_tokens` are therefore apart: where a group that is
//! large by itself is cut ([`cut_tokens`](super::GrpoConfig::cut_tokens), which has a say in the bits
//! and is never chosen), and how many of the pieces go into one pass ([`Sizes::pass_tokens`]).

use super::{Config, GrpoConfig, LossType, Method, SftConfig};
use crate::adapter::AdapterKind;

/// Rows of a pass, and of a piece of a group, when nothing else is said.
const MICRO_BATCH_TOKENS: usize = 2048;
/// Sequences decoded at once when nothing else is said: more give a CPU no more speed.
const MAX_BATCH_SIZE: usize = 64;
/// Bytes kept for updates when nothing else is said.
const ACTIVATION_MEMORY: usize = 2_000_000_000;

/// Sizes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Rows up to which pieces are packed into one forward/backward pass.
    pub pass_tokens: usize,
    /// Most sequences decoded at once.
    pub max_batch_size: usize,
    /// Bytes for the inputs of blocks that sampling keeps, or for the activations of a pass.
    pub activation_memory: usize,
}

impl Sizes {
    /// As configured, the usual ones where nothing is.
    pub fn of(config: &Config) -> Self {
        let tokens = match config.method {
            Method::Grpo => config.grpo.micro_batch_tokens,
            Method::Sft => config.sft.micro_batch_tokens,
        };
        let memory = config.grpo.activation_memory_gb;
        Self {
            pass_tokens: tokens.unwrap_or(MICRO_BATCH_TOKENS),
            max_batch_size: config.rollout.max_batch_size.unwrap_or(MAX_BATCH_SIZE),
            activation_memory: memory.map_or(ACTIVATION_MEMORY, |gb| (gb * 1e9) as usize),
        }
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self::of(&Config::default())
    }
}

impl GrpoConfig {
    /// Rows from which on a group is cut into pieces, each with the prompt.
    pub fn cut_tokens(&self) -> usize {
        self.micro_batch_tokens.unwrap_or(MICRO_BATCH_TOKENS)
    }
}

impl SftConfig {
    /// Rows of a pass when memory has no say.
    pub fn pass_tokens(&self) -> usize {
        self.micro_batch_tokens.unwrap_or(MICRO_BATCH_TOKENS)
    }
}

impl Config {
    /// Whether passes may be packed in any way without a change of the gradient: it is summed piece by
    /// piece in f64, and no loss is divided by the tokens of a pass.
    pub fn packing_is_free(&self) -> bool {
        let summed_by_piece = matches!(
            self.adapter.kind,
            AdapterKind::TinyLora | AdapterKind::LoraXs
        );
        summed_by_piece && (self.method == Method::Sft || self.grpo.loss_type != LossType::Bnpo)
    }
}
