//! `[reward]`: what a completion is worth.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;
use crate::reward::Grader;

/// The `[reward]` section.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// Graders by name (`gsm8k`, `gsm8k-flexible`, `math`, …), each 1 for a right answer and 0
    /// otherwise, weighed by `grpo.reward_weights`; empty: `math` where the prompt asks for a
    /// box, else `gsm8k`.
    pub funcs: Vec<String>,
}

impl RewardConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        for (i, name) in self.funcs.iter().enumerate() {
            check(
                !self.funcs[..i].contains(name),
                "reward.funcs",
                format_args!("{:?}", self.funcs),
                || format!("{name} stands twice; use grpo.reward_weights to weigh it"),
            )?;
            if let Err(error) = name.parse::<Grader>() {
                return check(
                    false,
                    "reward.funcs",
                    format_args!("{:?}", self.funcs),
                    || error.to_string(),
                );
            }
        }
        Ok(())
    }

    /// The graders, in order; empty when the prompt decides.
    pub fn graders(&self) -> Result<Vec<Grader>> {
        self.funcs.iter().map(|name| name.parse()).collect()
    }
}
