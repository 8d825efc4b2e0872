//! The reward functions of a training run.

use std::time::Duration;

use super::command::CommandReward;
use super::shaping::{Format, Length, SoftOverlong};
use super::{Graded, Grader};
use crate::config::RewardConfig;
use crate::{Error, Result};

/// What a reward function may look at.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// The prompt as the model saw it.
    pub prompt: &'a str,
    pub completion: &'a str,
    /// The reference answer.
    pub gold: &'a str,
    /// Length of the completion.
    pub tokens: usize,
}

/// One way to value a completion.
#[derive(Debug)]
enum RewardFunction {
    /// 1 for a right answer, 0 otherwise.
    Grader(Grader),
    Format(Format),
    SoftOverlong(SoftOverlong),
    Length(Length),
    Command(CommandReward),
}

/// The rewards of a batch.
#[derive(Debug, Default, PartialEq)]
pub struct Scores {
    /// By reward function, then completion.
    pub rewards: Vec<Vec<f64>>,
    /// The answer that the first grader found in each completion.
    pub extracted: Vec<Option<String>>,
}

/// Reward functions in the order of the configuration.
#[derive(Debug)]
pub struct RewardSet {
    functions: Vec<RewardFunction>,
}

impl RewardSet {
    /// Names of the functions that are no graders.
    pub const OTHERS: [&'static str; 4] = ["format", "overlong", "length", "command"];

    /// The functions that the configuration names, or `default` alone. `max_tokens` is the length at
    /// which completions are cut off. Starts the external program, if one is named.
    pub fn from_config(config: &RewardConfig, default: Grader, max_tokens: usize) -> Result<Self> {
        if config.funcs.is_empty() {
            return Ok(Self::from(vec![default]));
        }
        let function = |name: &String| {
            Ok(match name.as_str() {
                "format" => RewardFunction::Format(Format::new(&config.format_pattern)?),
                "overlong" => {
                    let buffer = config.overlong_buffer;
                    RewardFunction::SoftOverlong(SoftOverlong { max_tokens, buffer })
                }
                "length" => RewardFunction::Length(Length { max_tokens }),
                "command" => {
                    let timeout = Duration::from_secs_f64(config.command_timeout);
                    RewardFunction::Command(CommandReward::start(&config.command, timeout)?)
                }
                name => RewardFunction::Grader(Self::grader(name)?),
            })
        };
        let functions = config.funcs.iter().map(function).collect::<Result<_>>()?;
        Ok(Self { functions })
    }

    /// The grader of that name; the error lists all reward functions.
    pub fn grader(name: &str) -> Result<Grader> {
        name.parse().map_err(|_| {
            let known = Grader::ALL
                .map(Grader::name)
                .into_iter()
                .chain(Self::OTHERS);
            let known: Vec<_> = known.collect();
            Error::config(format!("unknown reward '{name}': use {}", known.join(", ")))
        })
    }

    /// The names under which the functions stand in configurations and metrics.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.functions.iter().map(|function| match function {
            RewardFunction::Grader(grader) => grader.name(),
            RewardFunction::Format(_) => "format",
            RewardFunction::SoftOverlong(_) => "overlong",
            RewardFunction::Length(_) => "length",
            RewardFunction::Command(_) => "command",
        })
    }

    /// Whether a function gains from hearing of completions before the batch is complete: an external
    /// program does, the others take microseconds.
    pub fn listens(&self) -> bool {
        let mut functions = self.functions.iter();
        functions.any(|function| matches!(function, RewardFunction::Command(_)))
    }

    /// Tells the functions that listen of a completion of the next batch. Completions are announced in
    /// the order of the batch, from its first on.
    pub fn announce(&mut self, sample: &Sample) {
        for function in &mut self.functions {
            if let RewardFunction::Command(command) = function {
                command.announce(sample);
            }
        }
    }

    /// Values every completion with every function. Only an external program can fail.
    pub fn score(&mut self, samples: &[Sample]) -> Result<Scores> {
        let mut scores = Scores {
            rewards: Vec::new(),
            extracted: vec![None; samples.len()],
        };
        let mut graded_before = false;
        for function in &mut self.functions {
            let each = |value: &dyn Fn(&Sample) -> f64| samples.iter().map(value).collect();
            let rewards: Vec<f64> = match function {
                RewardFunction::Grader(grader) => {
                    let graded = samples.iter().map(|s| grader.grade(s.gold, s.completion));
                    let graded: Vec<Graded> = graded.collect();
                    let rewards = graded
                        .iter()
                        .map(|g| f64::from(u8::from(g.correct)))
                        .collect();
                    if !graded_before {
                        graded_before = true;
                        scores.extracted = graded.into_iter().map(|g| g.extracted).collect();
                    }
                    rewards
                }
                RewardFunction::Format(format) => each(&|s| format.score(s.completion)),
                RewardFunction::SoftOverlong(soft) => each(&|s| soft.score(s.tokens)),
                RewardFunction::Length(length) => each(&|s| length.score(s.tokens)),
                RewardFunction::Command(command) => command.score(samples)?,
            };
            scores.rewards.push(rewards);
        }
        Ok(scores)
    }
}

impl From<Vec<Grader>> for RewardSet {
    fn from(graders: Vec<Grader>) -> Self {
        Self {
            functions: graders.into_iter().map(RewardFunction::Grader).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_score_in_their_order_and_the_first_grader_extracts() {
        let config = RewardConfig {
            funcs: ["format", "gsm8k", "equiv", "overlong", "length"]
                .map(str::to_owned)
                .to_vec(),
            overlong_buffer: 10,
            ..RewardConfig::default()
        };
        let mut set = RewardSet::from_config(&config, Grader::Math, 20).unwrap();
        assert!(
            set.names()
                .eq(["format", "gsm8k", "equiv", "overlong", "length"])
        );
        let sample = |completion, tokens| Sample {
            prompt: "",
            completion,
            gold: "4",
            tokens,
        };
        let scores = set
            .score(&[sample("#### 4", 5), sample("\\boxed{8/2}", 15)])
            .unwrap();
        let expected = [
            [1.0, 0.0],
            [1.0, 0.0],
            [1.0, 1.0],
            [0.0, -0.5],
            [-0.25, -0.75],
        ];
        assert_eq!(scores.rewards, expected.map(Vec::from));
        assert_eq!(scores.extracted, [Some("4".to_owned()), None]);
    }

    #[test]
    fn nothing_named_means_the_default_and_unknown_names_list_all() {
        let set = RewardSet::from_config(&RewardConfig::default(), Grader::Math, 9).unwrap();
        assert!(set.names().eq(["math"]));
        let message = RewardSet::grader("gsm9k").unwrap_err().to_string();
        assert!(
            message.contains("'gsm9k'") && message.contains("overlong"),
            "{message}"
        );
    }
}
