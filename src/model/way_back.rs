//! The rows of a backward pass: those of the forward pass, or where every completion's own gradient is
//! wanted, each completion behind a prompt of its own.
//!
//! A prompt that several completions share is computed once, but on the way back what one completion
//! changes in it is that completion's own: the gradient of log π(y_i) runs through the keys and
//! values of the prompt's rows down to the parameters. The way back is linear and mixes what arrives
//! from different completions, so that each needs rows of its own there, and there alone: the results of
//! the forward pass, which are the same for all, are copied.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::batch::Batch;
use crate::Result;
use crate::ops::{Layout, Segment};

/// See the module; T' rows, those of several batches one after the other.
#[derive(Debug, Default)]
pub(super) struct WayBack {
    pub layout: Layout,
    /// Completion of each row in its own batch; read where its own gradient is wanted.
    pub sequences: Vec<u32>,
    /// Rows of each batch.
    pub parts: Vec<Range<usize>>,
    /// Row that predicts each target.
    predicting: Vec<u32>,
    /// Row of the forward pass that each is a copy of.
    from: Vec<u32>,
    /// The same on the device; absent where it is the same row.
    copied: Option<Tensor>,
}

impl WayBack {
    /// For batches with whether each completion's own gradient is wanted.
    pub fn new(batches: &[(&Batch, bool)], device: &Device) -> Result<Self> {
        let (mut rows, mut first) = (Self::default(), 0);
        for (batch, apart) in batches {
            let start = rows.from.len();
            match apart {
                true => rows.push_apart(batch, first),
                false => rows.push(batch, first),
            }
            rows.parts.push(start..rows.from.len());
            first += batch.tokens.len() as u32;
        }
        let is_same = |(to, from): (usize, &u32)| to == *from as usize;
        if rows.from.len() != first as usize || !rows.from.iter().enumerate().all(is_same) {
            rows.copied = Some(Tensor::new(&rows.from[..], device)?);
        }
        Ok(rows)
    }

    /// A batch, which begins at row `first` of the forward pass, as it is.
    fn push(&mut self, batch: &Batch, first: u32) {
        let (start, segments) = (self.from.len(), self.layout.segments.len());
        let moved = batch.layout.segments.iter().map(|segment| Segment {
            start: segment.start + start,
            parent: segment.parent.map(|parent| parent + segments),
            ..*segment
        });
        self.layout.segments.extend(moved);
        self.from.extend(first..first + batch.tokens.len() as u32);
        self.sequences.resize(self.from.len(), 0);
        let moved = batch.rows.iter().map(|row| row + start as u32);
        self.predicting.extend(moved);
    }

    /// A batch with a prompt for every completion.
    fn push_apart(&mut self, batch: &Batch, first: u32) {
        for (sequence, rows) in batch.by_completion(&batch.rows).enumerate() {
            let Some((&last_of_prompt, others)) = rows.split_first() else {
                continue;
            };
            let start = self.from.len();
            let prompt = batch.layout.segment_of(last_of_prompt as usize).start as u32;
            let own = (prompt..=last_of_prompt).chain(others.iter().copied());
            self.from.extend(own.map(|row| row + first));
            self.layout.segments.push(Segment {
                start,
                len: self.from.len() - start,
                parent: None,
            });
            self.sequences.resize(self.from.len(), sequence as u32);
            let ahead = start + (last_of_prompt - prompt) as usize;
            let predicting = ahead..ahead + rows.len();
            self.predicting.extend(predicting.map(|row| row as u32));
        }
    }

    /// Whether rows are copies at all.
    pub fn is_copied(&self) -> bool {
        self.copied.is_some()
    }

    /// The rows of `x` `[T, …]`, `[T', …]`.
    pub fn copy(&self, x: Tensor) -> Result<Tensor> {
        match &self.copied {
            Some(from) => Ok(x.index_select(from, 0)?),
            None => Ok(x),
        }
    }

    /// dL/dhidden `[T', h]` from that of the rows that predict the targets, `[targets, h]`.
    pub fn scatter(&self, dgathered: &Tensor) -> Result<Tensor> {
        let at = Tensor::new(&self.predicting[..], dgathered.device())?;
        let shape = (self.from.len(), dgathered.dim(1)?);
        let zeros = Tensor::zeros(shape, dgathered.dtype(), dgathered.device())?;
        Ok(zeros.index_add(&at, dgathered, 0)?)
    }
}
