//! Inputs of the blocks that a rollout computed, kept for the way back.
//!
//! On the CPU decoding gives a row the same bits as scoring, so that the backward pass may start
//! from what sampling left behind: no second forward pass, and a fourteenth of the memory that all
//! activations would take.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::config::ModelConfig;
use crate::ops::{cpu_slice, from_cpu};
use crate::{Error, Result};

/// Takes the inputs of every block, and of the final norm, for some rows of a forward pass.
#[derive(Debug)]
pub struct Recorder {
    /// Rows of the pass, in order.
    ranges: Vec<Range<usize>>,
    pass: PassInputs,
}

/// `[layers + 1][rows][h]`.
#[derive(Debug, Default)]
struct PassInputs {
    rows: usize,
    width: usize,
    values: Vec<f32>,
}

/// Consecutive rows of a pass.
#[derive(Debug, Clone)]
pub struct InputRows {
    pass: Arc<PassInputs>,
    first: usize,
    len: usize,
}

/// What a prompt and its completions left behind: all rows of the prompt, and of each completion
/// all but its last token, which was never an input.
#[derive(Debug, Clone, Default)]
pub struct GroupInputs {
    pub prompt: Vec<InputRows>,
    pub completions: Vec<Vec<InputRows>>,
}

/// The rows of a whole batch, put together from those of its prompts and completions.
#[derive(Debug, Clone, Default)]
pub struct BatchInputs {
    rows: Vec<InputRows>,
}

impl ModelConfig {
    /// Bytes of the inputs of all blocks and of the final norm for one token, in f32.
    pub fn input_bytes(&self) -> usize {
        (self.num_hidden_layers + 1) * self.hidden_size * size_of::<f32>()
    }
}

impl Recorder {
    /// For these rows of a pass, which ascend.
    pub fn new(config: &ModelConfig, ranges: Vec<Range<usize>>) -> Self {
        let rows = ranges.iter().map(ExactSizeIterator::len).sum();
        let layers = config.num_hidden_layers + 1;
        Self {
            pass: PassInputs {
                rows,
                width: config.hidden_size,
                values: Vec::with_capacity(layers * rows * config.hidden_size),
            },
            ranges,
        }
    }

    /// The input `[T, h]` of the next block, or at last of the final norm.
    pub(super) fn add(&mut self, x: &Tensor) -> Result<()> {
        let width = self.pass.width;
        let x = cpu_slice(x)?;
        for range in &self.ranges {
            let rows = &x[range.start * width..range.end * width];
            self.pass.values.extend_from_slice(rows);
        }
        Ok(())
    }

    /// The recorded rows, range after range.
    pub fn finish(self) -> Vec<InputRows> {
        let pass = Arc::new(self.pass);
        let mut first = 0;
        let ranges = self.ranges.iter().map(ExactSizeIterator::len);
        ranges
            .map(|len| {
                let rows = InputRows {
                    pass: Arc::clone(&pass),
                    first,
                    len,
                };
                first += len;
                rows
            })
            .collect()
    }
}

impl BatchInputs {
    pub fn push(&mut self, rows: &[InputRows]) {
        self.rows.extend_from_slice(rows);
    }

    /// A prompt and all of its completions.
    pub fn push_group(&mut self, group: &GroupInputs) {
        self.push(&group.prompt);
        group.completions.iter().for_each(|rows| self.push(rows));
    }

    /// The rows of another batch behind its own.
    pub fn append(&mut self, other: Self) {
        self.rows.extend(other.rows);
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.iter().map(|rows| rows.len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Inputs `[T, h]` of a block; those of the final norm behind the last one.
    pub(super) fn layer(&self, layer: usize) -> Result<Tensor> {
        let width = self.rows.first().map_or(0, |rows| rows.pass.width);
        let mut values = Vec::with_capacity(self.len() * width);
        for InputRows { pass, first, len } in &self.rows {
            let start = (layer * pass.rows + first) * width;
            let rows = pass.values.get(start..start + len * width);
            values.extend_from_slice(rows.ok_or_else(|| {
                Error::Internal(format!("the inputs of layer {layer} were not recorded"))
            })?);
        }
        from_cpu(values, (self.len(), width))
    }
}
