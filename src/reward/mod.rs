//! Answer graders and rewards: extraction of an answer from a completion, and its comparison with
//! the reference answer.
//!
//! [`Grader`] is the one list of graders by name; the `grade` command, the trainer and the
//! evaluation all go through it. [`RewardSet`] is what the trainer maximises: graders, the form of a
//! completion, an external program. One file a family of rules.

mod command;
mod equiv;
mod extract;
mod final_answer;
mod gsm8k;
mod hendrycks;
mod lm_eval;
mod set;
mod shaping;

use std::str::FromStr;

use crate::{Error, Result};
use equiv::Notation;

pub use command::CommandReward;
pub use set::{RewardSet, Sample, Scores};
pub use shaping::{Format, Length, SoftOverlong};

/// What a grader found in a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graded {
    /// The answer as the grader's extraction took it from the completion; `None` if there is none.
    pub extracted: Option<String>,
    /// Whether that answer equals the reference answer by the grader's rules.
    pub correct: bool,
}

/// A named way to extract and compare answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grader {
    /// verl's GSM8K reward, method "strict": the last `#### n` in the last 300 characters.
    Gsm8k,
    /// verl's GSM8K reward, method "flexible": the last number in the last 300 characters.
    Gsm8kFlexible,
    /// lm-evaluation-harness `gsm8k`, filter "strict-match": the first `#### n`.
    LmEvalStrict,
    /// lm-evaluation-harness `gsm8k`, filter "flexible-extract": the last number.
    LmEvalFlexible,
    /// The last `\boxed` and the string equality of the Hendrycks MATH code, as verl rewards MATH.
    Math,
    /// Mathematical equality of the final answer, wherever the completion states it.
    Equiv,
    /// As [`Self::Equiv`], and it also reads notation that the graders in common use do not.
    EquivWide,
}

impl Grader {
    pub const ALL: [Self; 7] = [
        Self::Gsm8k,
        Self::Gsm8kFlexible,
        Self::LmEvalStrict,
        Self::LmEvalFlexible,
        Self::Math,
        Self::Equiv,
        Self::EquivWide,
    ];

    /// The name on the command line, in configurations and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gsm8k => "gsm8k",
            Self::Gsm8kFlexible => "gsm8k-flexible",
            Self::LmEvalStrict => "lm-eval-strict",
            Self::LmEvalFlexible => "lm-eval-flexible",
            Self::Math => "math",
            Self::Equiv => "equiv",
            Self::EquivWide => "equiv-wide",
        }
    }

    /// Extracts the answer of `completion` and compares it with `gold`.
    ///
    /// For the GSM8K graders `gold` may be the answer alone or the whole reference solution with
    /// its `#### n` line.
    pub fn grade(self, gold: &str, completion: &str) -> Graded {
        let extracted = self.extract(completion);
        let correct = extracted
            .as_deref()
            .is_some_and(|answer| self.equal(gold, answer));
        Graded { extracted, correct }
    }

    /// The answer that this grader takes from a completion.
    pub fn extract(self, completion: &str) -> Option<String> {
        match self {
            Self::Gsm8k => gsm8k::extract_strict(completion),
            Self::Gsm8kFlexible => gsm8k::extract_flexible(completion),
            Self::LmEvalStrict => lm_eval::extract_strict(completion),
            Self::LmEvalFlexible => lm_eval::extract_flexible(completion),
            Self::Math => extract::last_boxed(completion),
            Self::Equiv | Self::EquivWide => final_answer::final_answer(completion),
        }
    }

    /// Compares an extracted answer with `gold`, by the grader's own notion of equality.
    pub fn equal(self, gold: &str, pred: &str) -> bool {
        match self {
            Self::Gsm8k | Self::Gsm8kFlexible => gsm8k::equal(gold, pred),
            Self::LmEvalStrict | Self::LmEvalFlexible => lm_eval::equal(gold, pred),
            Self::Math => hendrycks::is_equiv(gold, pred),
            Self::Equiv => equiv::equal(gold, pred, Notation::Standard),
            Self::EquivWide => equiv::equal(gold, pred, Notation::Wide),
        }
    }
}

impl FromStr for Grader {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|grader| grader.name() == name)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::name).join(", ");
                Error::config(format!("unknown reward '{name}': use one of {known}"))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_names_list_the_known_ones() {
        for grader in Grader::ALL {
            assert_eq!(grader.name().parse::<Grader>().unwrap(), grader);
        }
        let message = "gsm9k".parse::<Grader>().unwrap_err().to_string();
        assert!(
            message.contains("'gsm9k'") && message.contains("lm-eval-strict"),
            "{message}"
        );
    }

    #[test]
    fn a_completion_without_an_answer_is_wrong() {
        for grader in Grader::ALL {
            let graded = grader.grade("", "");
            assert_eq!(
                graded,
                Graded {
                    extracted: None,
                    correct: false
                },
                "{}",
                grader.name()
            );
        }
    }
}
