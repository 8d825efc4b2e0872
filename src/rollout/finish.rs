//! Where a completion ends.

use super::{FinishReason, SamplingParams};
use crate::model::Tokenizer;

/// Whether a completion ends with the last of these tokens, why, and its text then.
pub(super) fn finished_at(
    tokenizer: &Tokenizer,
    tokens: &[u32],
    params: &SamplingParams,
) -> Option<(FinishReason, String)> {
    let last = *tokens.last()?;
    let whole = || tokenizer.decode(tokens, true);
    if params.eos.contains(&last) {
        return Some((FinishReason::Eos, whole()));
    }
    if stopped(tokenizer, tokens, &params.stop) {
        let mut text = whole();
        if let Some(end) = params.stop.iter().filter_map(|s| text.find(s)).min() {
            text.truncate(end);
        }
        return Some((FinishReason::Stop, text));
    }
    (tokens.len() >= params.max_tokens).then(|| (FinishReason::Length, whole()))
}

/// Whether the text of the last tokens, long enough for any stop string, holds one.
fn stopped(tokenizer: &Tokenizer, tokens: &[u32], stop: &[String]) -> bool {
    let Some(longest) = stop.iter().map(String::len).max() else {
        return false;
    };
    let tail = &tokens[tokens.len().saturating_sub(longest + 8)..];
    let text = tokenizer.decode(tail, true);
    stop.iter().any(|s| text.contains(s))
}
