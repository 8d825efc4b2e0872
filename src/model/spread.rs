//! The rows of a batch with every completion behind a prompt of its own.
//!
//! A prompt that several completions share is computed once, but on the way back what one completion
//! changes in it is that completion's own: the gradient of log π(y_i) runs through the keys and
//! values of the prompt's rows down to the parameters. The way back is linear and mixes what arrives
//! from different completions, so that each needs rows of its own there, and there alone: the forward
//! pass, whose results are the same for all, is copied instead of being done again.

use candle_core::{Device, Tensor};

use super::batch::Batch;
use crate::Result;
use crate::ops::{Layout, Segment};

/// See the module; T' rows.
#[derive(Debug)]
pub(super) struct Spread {
    pub layout: Layout,
    /// Completion of each row.
    pub sequences: Vec<u32>,
    /// Row that predicts each target.
    pub predicting: Vec<u32>,
    /// Row of the batch that each is a copy of, `[T']`; absent where that is the same row.
    from: Option<Tensor>,
}

impl Spread {
    pub fn new(batch: &Batch, device: &Device) -> Result<Self> {
        let mut from: Vec<u32> = Vec::new();
        let (mut segments, mut sequences, mut predicting) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, rows) in batch.by_completion(&batch.rows).enumerate() {
            let start = from.len();
            let Some((&first, others)) = rows.split_first() else {
                continue;
            };
            let prompt = batch.layout.segment_of(first as usize).start as u32;
            from.extend((prompt..=first).chain(others.iter().copied()));
            let len = from.len() - start;
            segments.push(Segment {
                start,
                len,
                parent: None,
            });
            sequences.resize(from.len(), sequence as u32);
            let ahead = start + (first - prompt) as usize;
            predicting.extend((ahead..ahead + rows.len()).map(|row| row as u32));
        }
        let is_same = from.iter().enumerate().all(|(to, &row)| to == row as usize);
        Ok(Self {
            layout: Layout::new(segments)?,
            sequences,
            predicting,
            from: match is_same && from.len() == batch.tokens.len() {
                true => None,
                false => Some(Tensor::new(&from[..], device)?),
            },
        })
    }

    /// The rows of `x` `[T, …]`, `[T', …]`.
    pub fn copy(&self, x: Tensor) -> Result<Tensor> {
        match &self.from {
            Some(from) => Ok(x.index_select(from, 0)?),
            None => Ok(x),
        }
    }
}
