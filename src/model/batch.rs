//! Packed batches of prompts and completions: which rows there are, and which tokens are scored.

use std::borrow::Cow;

use candle_core::Tensor;

use crate::ops::{Layout, Segment};
use crate::{Error, Result};

/// Sequences packed into one batch without padding.
///
/// A prompt with several completions is one segment, computed once, and the parent of theirs. The
/// last token of a completion is scored but never an input, so it has no row.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Input token of each row.
    pub tokens: Vec<u32>,
    pub layout: Layout,
    /// The scored tokens, completion after completion.
    pub targets: Vec<u32>,
    /// Row of the hidden state that predicts each target.
    pub rows: Vec<u32>,
    /// Number of targets of each completion.
    pub lengths: Vec<usize>,
}

impl Batch {
    /// Adds a prompt and its completions.
    ///
    /// # Errors
    /// When the prompt or a completion is empty.
    pub fn push_group(&mut self, prompt: &[u32], completions: &[&[u32]]) -> Result<()> {
        if prompt.is_empty() || completions.iter().any(|c| c.is_empty()) {
            return Err(Error::Internal(
                "an empty prompt or completion cannot be scored".into(),
            ));
        }
        let parent = self.push_segment(prompt, None);
        let last_prompt_row = self.tokens.len() - 1;
        for completion in completions {
            let inputs = &completion[..completion.len() - 1];
            let start = self.tokens.len();
            if !inputs.is_empty() {
                self.push_segment(inputs, Some(parent));
            }
            self.rows.push(last_prompt_row as u32);
            self.rows
                .extend((start..start + inputs.len()).map(|row| row as u32));
            self.targets.extend_from_slice(completion);
            self.lengths.push(completion.len());
        }
        Ok(())
    }

    /// Adds one prompt with one completion as a single segment.
    pub fn push_sequence(&mut self, prompt: &[u32], completion: &[u32]) -> Result<()> {
        if prompt.is_empty() || completion.is_empty() {
            return Err(Error::Internal(
                "an empty prompt or completion cannot be scored".into(),
            ));
        }
        let start = self.tokens.len();
        let tokens: Vec<u32> = prompt
            .iter()
            .chain(&completion[..completion.len() - 1])
            .copied()
            .collect();
        self.push_segment(&tokens, None);
        let first = start + prompt.len() - 1;
        self.rows
            .extend((first..first + completion.len()).map(|row| row as u32));
        self.targets.extend_from_slice(completion);
        self.lengths.push(completion.len());
        Ok(())
    }

    /// Several batches as one, one after the other.
    pub(crate) fn joined<'a>(batches: &[&'a Self]) -> Cow<'a, Self> {
        if let [only] = batches {
            return Cow::Borrowed(*only);
        }
        let mut all = Self::default();
        for batch in batches {
            let (rows, segments) = (all.tokens.len(), all.layout.segments.len());
            let moved = batch.layout.segments.iter().map(|segment| Segment {
                start: segment.start + rows,
                parent: segment.parent.map(|parent| parent + segments),
                ..*segment
            });
            all.layout.segments.extend(moved);
            all.tokens.extend_from_slice(&batch.tokens);
            all.targets.extend_from_slice(&batch.targets);
            let moved = batch.rows.iter().map(|row| row + rows as u32);
            all.rows.extend(moved);
            all.lengths.extend_from_slice(&batch.lengths);
        }
        Cow::Owned(all)
    }

    /// Values of all targets cut into one slice per completion.
    pub fn by_completion<'a, T>(&'a self, values: &'a [T]) -> impl Iterator<Item = &'a [T]> {
        let mut rest = values;
        self.lengths.iter().map(move |&len| {
            let (own, others) = rest.split_at(len);
            rest = others;
            own
        })
    }

    fn push_segment(&mut self, tokens: &[u32], parent: Option<usize>) -> usize {
        let start = self.tokens.len();
        let len = tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.layout.segments.push(Segment { start, len, parent });
        self.layout.segments.len() - 1
    }

    /// Hidden states `[targets, h]` that predict the targets.
    pub(crate) fn gather(&self, hidden: &Tensor) -> Result<Tensor> {
        let rows = Tensor::new(&self.rows[..], hidden.device())?;
        Ok(hidden.index_select(&rows, 0)?)
    }
}
