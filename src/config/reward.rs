//! `[reward]`: what a completion is worth.

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;
use crate::reward::{Format, RewardSet};

/// The `[reward]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// Reward functions by name, weighed by `grpo.reward_weights`. Graders are 1 for a right answer
    /// and 0 otherwise: `gsm8k`, `gsm8k-flexible`, `lm-eval-strict`, `lm-eval-flexible`, `math`,
    /// `equiv`, `equiv-wide`. `format`: 1 where `format_pattern` occurs. `overlong`: soft
    /// overlong punishment, 0 to -1. `length`: minus the share of the longest completion used.
    /// `command`: an external program. Empty: `math` where the prompt asks for a box, else
    /// `gsm8k`.
    pub funcs: Vec<String>,
    /// Regular expression of `format`.
    pub format_pattern: String,
    /// Tokens before the longest completion over which `overlong` falls from 0 to -1.
    pub overlong_buffer: usize,
    /// Program and arguments of `command`. It is kept running, reads one JSON object a line with
    /// `prompt`, `completion` and `gold`, and answers each with a line that is one number.
    pub command: Vec<String>,
    /// Seconds that `command` may take for the completions of one step, after the last of them: it gets them as they
    /// finish.
    pub command_timeout: f64,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            funcs: Vec::new(),
            format_pattern: "#### -?[0-9.,]+".to_owned(),
            overlong_buffer: 128,
            command: Vec::new(),
            command_timeout: 60.0,
        }
    }
}

impl RewardConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let funcs = format!("{:?}", self.funcs);
        for (i, name) in self.funcs.iter().enumerate() {
            check(
                !self.funcs[..i].contains(name),
                "reward.funcs",
                &funcs,
                || format!("{name} stands twice; use grpo.reward_weights to weigh it"),
            )?;
            if !RewardSet::OTHERS.contains(&name.as_str())
                && let Err(error) = RewardSet::grader(name)
            {
                return check(false, "reward.funcs", &funcs, || error.to_string());
            }
        }
        let runs_command = self.funcs.iter().any(|name| name == "command");
        let command = format!("{:?}", self.command);
        check(
            runs_command != self.command.is_empty(),
            "reward.command",
            command,
            || match runs_command {
                true => "must name the program of the reward \"command\"".to_owned(),
                false => "is not used: name \"command\" in reward.funcs".to_owned(),
            },
        )?;
        check(
            self.command_timeout > 0.0 && self.command_timeout <= 86_400.0,
            "reward.command_timeout",
            self.command_timeout,
            || "must be more than 0 and at most 86400 seconds".to_owned(),
        )?;
        Format::new(&self.format_pattern).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_named() {
        let with = |change: &dyn Fn(&mut RewardConfig)| {
            let mut config = RewardConfig::default();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        for (message, part) in [
            (
                with(&|c| c.funcs = vec!["gsm9k".to_owned()]),
                "unknown reward 'gsm9k'",
            ),
            (
                with(&|c| c.funcs = vec!["math".to_owned(); 2]),
                "math stands twice",
            ),
            (
                with(&|c| c.funcs = vec!["command".to_owned()]),
                "reward.command",
            ),
            (
                with(&|c| c.command = vec!["true".to_owned()]),
                "is not used",
            ),
            (with(&|c| c.command_timeout = 0.0), "reward.command_timeout"),
            (
                with(&|c| c.format_pattern = "[".to_owned()),
                "reward.format_pattern",
            ),
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(RewardConfig::default().validate().is_ok());
    }
}
