//! `[rollout]`: how the engine that samples completions works. What it samples is in `[grpo]`.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// The `[rollout]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// Most sequences decoded at once. It changes memory and speed, never the result.
    pub max_batch_size: usize,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self { max_batch_size: 64 }
    }
}

impl RolloutConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let size = self.max_batch_size;
        check(size >= 1, "rollout.max_batch_size", size, || {
            "must be at least 1".into()
        })
    }
}
