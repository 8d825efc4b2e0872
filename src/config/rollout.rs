//! `[rollout]`: how the engine that samples completions works. What it samples is in `[grpo]`.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// The `[rollout]` section.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// Most sequences decoded at once; unset: 64, fewer where memory is short. It changes memory and
    /// speed; on the CPU never the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch_size: Option<usize>,
}

impl RolloutConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let size = self.max_batch_size.unwrap_or(1);
        check(size >= 1, "rollout.max_batch_size", size, || {
            "must be at least 1".into()
        })
    }
}
