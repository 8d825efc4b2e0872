//! Problems with solutions → token sequences to learn from.

use crate::data::Problem;
use crate::model::{ChatMessage, Tokenizer};
use crate::{Error, Result};

/// One prompt with the completion to learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub prompt: Vec<u32>,
    /// The solution's tokens and the id that ends a turn.
    pub completion: Vec<u32>,
}

impl Example {
    /// The solution of `problem` after its prompt: encoded on its own, as generation would go on,
    /// and ended with `end`. What is beyond `max_length` tokens is cut off.
    ///
    /// # Errors
    /// Without a solution, or when the prompt leaves no room for one.
    pub fn new(
        problem: &Problem,
        prompt: &[u32],
        tokenizer: &Tokenizer,
        end: u32,
        max_length: Option<usize>,
    ) -> Result<Self> {
        let id = &problem.id;
        let solution = problem.solution.as_deref().ok_or_else(|| {
            Error::data(format!(
                "problem {id} has no solution to learn from; \
                 method \"sft\" needs one for every problem (data.fields.solution)"
            ))
        })?;
        let mut completion = tokenizer.encode(solution, false)?;
        completion.push(end);
        if let Some(limit) = max_length {
            if prompt.len() >= limit {
                return Err(Error::data(format!(
                    "the prompt of problem {id} has {} tokens, \
                     which leaves no room for a solution within sft.max_length = {limit}",
                    prompt.len()
                )));
            }
            completion.truncate(limit - prompt.len());
        }
        Ok(Self {
            prompt: prompt.to_vec(),
            completion,
        })
    }
}

/// The id that ends the assistant's turn: what the chat template writes after it, else the first
/// end-of-sequence id of the checkpoint.
pub fn end_of_turn(tokenizer: &Tokenizer) -> Result<u32> {
    let eos = tokenizer.eos_ids();
    let written = if tokenizer.has_chat_template() {
        let turns = [
            ChatMessage::new("user", "a"),
            ChatMessage::new("assistant", "b"),
        ];
        let text = tokenizer.apply_chat_template(&turns, false)?;
        let ids = tokenizer.encode(&text, false)?;
        ids.into_iter().rev().find(|id| eos.contains(id))
    } else {
        None
    };
    written.or(eos.first().copied()).ok_or_else(|| {
        Error::data("the checkpoint names no end-of-sequence token, so completions could not end")
    })
}
