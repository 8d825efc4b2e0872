//! `[sft]`: supervised fine-tuning on the data set's own solutions.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// The `[sft]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Examples of one optimizer update.
    pub examples_per_step: usize,
    /// Longest example in tokens, prompt included; what follows is cut off. Absent: no limit.
    pub max_length: Option<usize>,
    /// Loss on the solution only; `false` trains on the prompt's tokens too.
    pub completion_only_loss: bool,
    /// Tokens of one forward/backward pass; examples are packed into it without padding. Unset: 2048,
    /// fewer where memory is short, as `grpo.micro_batch_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<usize>,
    /// Compute each block's activations again on the way back instead of keeping them; absent: when
    /// they would be large.
    pub gradient_checkpointing: Option<bool>,
}

impl Default for SftConfig {
    fn default() -> Self {
        Self {
            examples_per_step: 32,
            max_length: Some(1024),
            completion_only_loss: true,
            micro_batch_tokens: None,
            gradient_checkpointing: None,
        }
    }
}

impl SftConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("sft.examples_per_step", self.examples_per_step),
            (
                "sft.micro_batch_tokens",
                self.micro_batch_tokens.unwrap_or(1),
            ),
        ] {
            check(value >= 1, key, value, || "must be at least 1".into())?;
        }
        if let Some(length) = self.max_length {
            check(length >= 2, "sft.max_length", length, || {
                "must be at least 2".into()
            })?;
        }
        Ok(())
    }
}
