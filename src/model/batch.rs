//! Packed batches of prompts and completions: which rows there are, and which tokens are scored.

use candle_core::Tensor;

use super::decoder::{Decoder, Keep};
use super::layer_inputs::BatchInputs;
use super::spread::Spread;
use crate::adapter::{Adapter, Gradients};
use crate::ops::head::{self, Scores};
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

/// The transpose of [`Batch::gather`]: dL/dhidden `[T, h]` from that of the gathered rows.
fn scatter(dgathered: &Tensor, rows: &[u32], tokens: usize) -> Result<Tensor> {
    let at = Tensor::new(rows, dgathered.device())?;
    let shape = (tokens, dgathered.dim(1)?);
    let zeros = Tensor::zeros(shape, dgathered.dtype(), dgathered.device())?;
    Ok(zeros.index_add(&at, dgathered, 0)?)
}

impl Decoder {
    /// Log-probabilities and entropies of the targets of `batch` at `temperature`.
    pub fn score(
        &self,
        adapter: Option<&Adapter>,
        batch: &Batch,
        temperature: f64,
    ) -> Result<Scores> {
        let hidden = self.forward_batch(adapter, batch)?;
        head::forward(
            &batch.gather(&hidden)?,
            self.head(adapter),
            &batch.targets,
            temperature,
        )
    }

    /// Adds to `gradients` the gradient of L = Σ_n coefficients[n] · logp(target n), and gives the
    /// scores of the targets. The caller's coefficients are dL/dlogp at the current parameters.
    ///
    /// With a row for every sequence, completion `i` of the batch is sequence `i`, and its row is the
    /// gradient of its own part of the sum, also through a prompt that it shares with others.
    ///
    /// `coefficients` is called with the scores when they are needed to know the loss; when it is
    /// known without them, [`Coefficients::Known`] saves a pass over the head.
    pub fn accumulate_gradients(
        &self,
        adapter: &Adapter,
        batch: &Batch,
        temperature: f64,
        inputs: BlockInputs,
        coefficients: Coefficients<'_>,
        gradients: &mut Gradients,
    ) -> Result<Scores> {
        let (tokens, layout) = (&batch.tokens, &batch.layout);
        let tape = match inputs {
            BlockInputs::Computed(keep) => {
                self.forward_train(Some(adapter), tokens, layout, keep)?
            }
            BlockInputs::Recorded(inputs) => {
                self.recorded(Some(adapter), tokens, layout, inputs)?
            }
        };
        let hidden = batch.gather(&tape.hidden)?;
        let matrix = self.head(Some(adapter));
        let coefficients = match coefficients {
            Coefficients::Known(values) => values,
            Coefficients::OfScores(loss) => {
                let scores = head::forward(&hidden, matrix, &batch.targets, temperature)?;
                loss(&scores)?
            }
        };
        let mut train_head =
            |dlogits: &Tensor, hidden: &Tensor| gradients.add_head(dlogits, hidden);
        let (dgathered, scores) = head::backward(
            &hidden,
            matrix,
            &batch.targets,
            temperature,
            &coefficients,
            match adapter.trains_weights() {
                true => Some(&mut train_head),
                false => None,
            },
        )?;
        let spread = match gradients.is_per_sequence() {
            true => Some(Spread::new(batch, &self.placement.device)?),
            false => None,
        };
        let (rows, layout) = match &spread {
            Some(spread) => (&spread.predicting, &spread.layout),
            None => (&batch.rows, &batch.layout),
        };
        let dhidden = scatter(&dgathered, rows, layout.tokens())?;
        self.backward(adapter, tape, &dhidden, spread.as_ref(), gradients)?;
        Ok(scores)
    }

    /// Hidden states of all rows of a batch, keeping nothing.
    fn forward_batch(&self, adapter: Option<&Adapter>, batch: &Batch) -> Result<Tensor> {
        let mut cache = self.new_cache();
        let mut spans = batch.layout.spans();
        for (segment, span) in batch.layout.segments.iter().zip(&mut spans) {
            let parent = segment.parent.map(|p| (p, batch.layout.segments[p].len));
            span.slot = cache.alloc(parent, segment.len);
        }
        self.forward(adapter, &batch.tokens, &spans, &mut cache, None)
    }
}

/// Where the inputs of the blocks come from.
#[derive(Debug)]
pub enum BlockInputs {
    /// A forward pass which keeps this.
    Computed(Keep),
    /// The rollout at the same parameters recorded them.
    Recorded(BatchInputs),
}

impl From<Keep> for BlockInputs {
    fn from(keep: Keep) -> Self {
        Self::Computed(keep)
    }
}

/// Where the gradient of the loss with respect to the log-probabilities comes from.
pub enum Coefficients<'a> {
    /// Known beforehand: on-policy first iterations, and next-token loss.
    Known(Vec<f64>),
    /// A function of the scores at the current parameters.
    OfScores(&'a mut dyn FnMut(&Scores) -> Result<Vec<f64>>),
}
