//! Rewards that look at the form of a completion, not at its answer.

use regex::Regex;

use crate::{Error, Result};

/// 1 where a pattern occurs in the completion, 0 elsewhere.
#[derive(Debug, Clone)]
pub struct Format(Regex);

impl Format {
    /// Fails on a pattern that is no regular expression.
    pub fn new(pattern: &str) -> Result<Self> {
        let pattern = Regex::new(pattern).map_err(|cause| {
            Error::config(format!(
                "reward.format_pattern is no regular expression: {cause}"
            ))
        })?;
        Ok(Self(pattern))
    }

    pub fn score(&self, completion: &str) -> f64 {
        f64::from(u8::from(self.0.is_match(completion)))
    }
}

/// Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to `max_tokens - buffer` tokens,
/// from there falling linearly to -1 at `max_tokens`, and -1 beyond.
#[derive(Debug, Clone, Copy)]
pub struct SoftOverlong {
    pub max_tokens: usize,
    /// Tokens over which the punishment grows; 0 punishes only what is longer than `max_tokens`.
    pub buffer: usize,
}

impl SoftOverlong {
    pub fn score(&self, tokens: usize) -> f64 {
        if tokens > self.max_tokens {
            return -1.0;
        }
        let free = self.max_tokens.saturating_sub(self.buffer);
        if tokens <= free {
            return 0.0;
        }
        (free as f64 - tokens as f64) / self.buffer as f64
    }
}

/// Length penalty: minus the share of `max_tokens` that the completion uses, at most 1.
#[derive(Debug, Clone, Copy)]
pub struct Length {
    pub max_tokens: usize,
}

impl Length {
    pub fn score(&self, tokens: usize) -> f64 {
        -(tokens as f64 / self.max_tokens.max(1) as f64).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlong_punishment_is_piecewise_linear() {
        let soft = SoftOverlong {
            max_tokens: 100,
            buffer: 20,
        };
        for (tokens, expected) in [
            (0, 0.0),
            (80, 0.0),
            (81, -0.05),
            (90, -0.5),
            (100, -1.0),
            (250, -1.0),
        ] {
            assert!((soft.score(tokens) - expected).abs() < 1e-12, "{tokens}");
        }
        let hard = SoftOverlong {
            max_tokens: 100,
            buffer: 0,
        };
        assert_eq!((hard.score(100), hard.score(101)), (0.0, -1.0));
        let all = SoftOverlong {
            max_tokens: 10,
            buffer: 50,
        };
        assert_eq!(all.score(5), -0.1);
    }

    #[test]
    fn length_costs_its_share() {
        let length = Length { max_tokens: 200 };
        assert_eq!(
            (length.score(0), length.score(50), length.score(400)),
            (0.0, -0.25, -1.0)
        );
    }

    #[test]
    fn format_wants_its_pattern() {
        let format = Format::new("#### -?[0-9.,]+").unwrap();
        assert_eq!(
            (format.score("so\n#### 42"), format.score("####42")),
            (1.0, 0.0)
        );
        let message = Format::new("(").unwrap_err().to_string();
        assert!(message.contains("reward.format_pattern"), "{message}");
    }
}
