//! How a problem is put to the model: templates by name, with or without the chat format.

use std::str::FromStr;

use super::Problem;
use crate::model::{ChatMessage, Tokenizer};
use crate::{Error, Result};

/// A way to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Template {
    /// verl's GSM8K prompt, one user turn: the reward wants `#### n`.
    Gsm8k,
    /// The boxed prompt of SimpleRL and Qwen's evaluation, one user turn.
    QwenBoxed,
    /// The problem alone as the user turn.
    Chat,
    /// The problem alone as raw text, without the chat format.
    Plain,
    /// lm-evaluation-harness's GSM8K prompt: raw `Question: … Answer: …` pairs before the problem.
    FewShot(usize),
    /// The user's own text around `{problem}`, as the user turn.
    CustomChat(String),
    /// The user's own text around `{problem}`, raw (written `raw:…`).
    CustomRaw(String),
}

const GSM8K_SUFFIX: &str = " Let's think step by step and output the final answer after \"####\".";
const BOXED_SUFFIX: &str =
    "\nPlease reason step by step, and put your final answer within \\boxed{}.";

/// Examples that fit any context; lm-evaluation-harness uses 5 or 8.
const MAX_SHOTS: usize = 64;

impl FromStr for Template {
    type Err = Error;

    /// `gsm8k`, `qwen-boxed`, `chat`, `plain`, `few-shot-N`, or a text with `{problem}`.
    fn from_str(text: &str) -> Result<Self> {
        let shots = text
            .strip_prefix("few-shot-")
            .and_then(|n| n.parse().ok())
            .filter(|n| *n <= MAX_SHOTS);
        match (text, shots) {
            ("gsm8k", _) => Ok(Self::Gsm8k),
            ("qwen-boxed", _) => Ok(Self::QwenBoxed),
            ("chat", _) => Ok(Self::Chat),
            ("plain", _) => Ok(Self::Plain),
            (_, Some(shots)) => Ok(Self::FewShot(shots)),
            _ if text.contains("{problem}") => Ok(match text.strip_prefix("raw:") {
                Some(raw) => Self::CustomRaw(raw.to_string()),
                None => Self::CustomChat(text.to_string()),
            }),
            _ => Err(Error::config(format!(
                "unknown prompt template {text:?}: use gsm8k, qwen-boxed, chat, plain, \
                 few-shot-N (N up to {MAX_SHOTS}), or a text that contains {{problem}}"
            ))),
        }
    }
}

impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gsm8k => f.write_str("gsm8k"),
            Self::QwenBoxed => f.write_str("qwen-boxed"),
            Self::Chat => f.write_str("chat"),
            Self::Plain => f.write_str("plain"),
            Self::FewShot(n) => write!(f, "few-shot-{n}"),
            Self::CustomChat(text) => f.write_str(text),
            Self::CustomRaw(text) => write!(f, "raw:{text}"),
        }
    }
}

/// A prompt ready for an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// As the model sees it, the chat format's special tokens included.
    pub text: String,
    pub tokens: Vec<u32>,
}

/// A problem and its prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptedProblem {
    pub problem: Problem,
    pub prompt: Prompt,
}

impl Template {
    /// Number of worked examples wanted before the problem.
    pub fn num_shots(&self) -> usize {
        match self {
            Self::FewShot(n) => *n,
            _ => 0,
        }
    }

    /// Strings at which a completion ends: a raw prompt's model runs on into the next question.
    pub fn stop(&self) -> Vec<String> {
        match self {
            Self::FewShot(_) => ["Question:", "</s>", "<|im_end|>"]
                .map(String::from)
                .to_vec(),
            _ => Vec::new(),
        }
    }

    /// Whether the text goes through the checkpoint's chat template, as one user turn.
    fn is_chat(&self) -> bool {
        match self {
            Self::Gsm8k | Self::QwenBoxed | Self::Chat | Self::CustomChat(_) => true,
            Self::Plain | Self::FewShot(_) | Self::CustomRaw(_) => false,
        }
    }

    /// The text around `problem`, before the chat format. `shots` are the worked examples, of
    /// which the first [`Self::num_shots`] are used.
    ///
    /// # Errors
    /// Fewer examples than the template wants.
    pub fn fill(&self, problem: &str, shots: &[Problem]) -> Result<String> {
        Ok(match self {
            Self::Gsm8k => format!("{problem}{GSM8K_SUFFIX}"),
            Self::QwenBoxed => format!("{problem}{BOXED_SUFFIX}"),
            Self::Chat | Self::Plain => problem.to_string(),
            Self::CustomChat(text) | Self::CustomRaw(text) => text.replace("{problem}", problem),
            Self::FewShot(n) => {
                let shots = shots.get(..*n).ok_or_else(|| {
                    Error::data(format!(
                        "{n} worked examples are wanted, but only {} are there",
                        shots.len()
                    ))
                })?;
                let mut text = String::new();
                for shot in shots {
                    let answer = shot.solution.as_deref().unwrap_or(&shot.answer);
                    text.push_str(&format!("Question: {}\nAnswer: {answer}\n\n", shot.problem));
                }
                text.push_str(&format!("Question: {problem}\nAnswer:"));
                text
            }
        })
    }

    /// The prompt as text and token ids.
    ///
    /// Chat text is encoded as it stands, since the chat template writes every special token;
    /// raw text gets what the tokenizer adds by itself.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        problem: &str,
        shots: &[Problem],
    ) -> Result<Prompt> {
        let filled = self.fill(problem, shots)?;
        let (text, add_special) = if self.is_chat() {
            let turn = [ChatMessage::new("user", filled)];
            (tokenizer.apply_chat_template(&turn, true)?, false)
        } else {
            (filled, true)
        };
        let tokens = tokenizer.encode(&text, add_special)?;
        Ok(Prompt { text, tokens })
    }

    /// The prompts of training problems, and how many were longer than `max_prompt_length` tokens
    /// and left out.
    pub fn render_all(
        &self,
        tokenizer: &Tokenizer,
        problems: Vec<Problem>,
        shots: &[Problem],
        max_prompt_length: usize,
    ) -> Result<(Vec<PromptedProblem>, usize)> {
        let total = problems.len();
        let mut prompted = Vec::with_capacity(total);
        for problem in problems {
            let prompt = self.render(tokenizer, &problem.problem, shots)?;
            if prompt.tokens.len() <= max_prompt_length {
                prompted.push(PromptedProblem { problem, prompt });
            }
        }
        let left_out = total - prompted.len();
        Ok((prompted, left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shot(problem: &str, answer: &str, solution: Option<&str>) -> Problem {
        Problem {
            id: "0".to_string(),
            problem: problem.to_string(),
            answer: answer.to_string(),
            solution: solution.map(String::from),
        }
    }

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for name in [
            "gsm8k",
            "qwen-boxed",
            "chat",
            "plain",
            "few-shot-8",
            "Q: {problem}",
            "raw:{problem} =",
        ] {
            assert_eq!(name.parse::<Template>().unwrap().to_string(), name);
        }
        for name in [
            "",
            "gsm8",
            "few-shot-",
            "few-shot-65",
            "few-shot--1",
            "{question}",
        ] {
            assert_eq!(
                name.parse::<Template>().unwrap_err().exit_code(),
                2,
                "{name}"
            );
        }
    }

    #[test]
    fn templates_fill_as_their_references_do() {
        let fill = |template: Template| template.fill("1+1?", &[]).unwrap();
        assert_eq!(
            fill(Template::Gsm8k),
            "1+1? Let's think step by step and output the final answer after \"####\"."
        );
        assert_eq!(
            fill(Template::QwenBoxed),
            "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
        );
        assert_eq!(fill(Template::CustomRaw("<{problem}>".into())), "<1+1?>");
    }

    #[test]
    fn few_shot_is_raw_question_and_answer() {
        let shots = [
            shot("a?", "1", Some("because\n#### 1")),
            shot("b?", "2", None),
            shot("c?", "3", None),
        ];
        let template = Template::FewShot(2);
        assert_eq!(
            template.fill("x?", &shots).unwrap(),
            "Question: a?\nAnswer: because\n#### 1\n\nQuestion: b?\nAnswer: 2\n\nQuestion: x?\nAnswer:"
        );
        assert!(Template::FewShot(4).fill("x?", &shots).is_err());
        assert_eq!(template.stop()[0], "Question:");
        assert_eq!(
            Template::FewShot(0).fill("x?", &[]).unwrap(),
            "Question: x?\nAnswer:"
        );
    }
}
