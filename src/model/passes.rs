//! Passes over packed batches: scores, and gradients of adapters. Batches of several runs, each with an
//! adapter of its own, may share a pass: the frozen products are then those of all their rows at once.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::batch::Batch;
use super::decoder::{Decoder, Keep, Tape};
use super::layer_inputs::BatchInputs;
use super::receiver::Receiver;
use super::way_back::WayBack;
use crate::adapter::{Adapter, AdapterSet, Gradients, RowAdapters};
use crate::ops::cpu;
use crate::ops::head::{self, Scores};
use crate::run::signals;
use crate::{Error, Result};

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

/// A batch to be scored with an adapter, or without one.
pub struct ScorePass<'a> {
    pub adapter: Option<&'a Adapter>,
    pub batch: &'a Batch,
    pub temperature: f64,
}

/// A batch whose share of the gradient of L = Σ_n coefficients[n] · logp(target n) is to be added to
/// `gradients`. The coefficients are dL/dlogp at the current parameters. With a row for every sequence,
/// completion `i` of the batch is sequence `i`, and its row is the gradient of its own part of L, also
/// through a prompt that it shares with others.
pub struct GradientPass<'a> {
    pub adapter: &'a Adapter,
    pub batch: &'a Batch,
    pub temperature: f64,
    pub inputs: BlockInputs,
    pub coefficients: Coefficients<'a>,
    pub gradients: &'a mut Gradients,
}

/// A batch whose gradient is wanted by itself, with coefficients that are known.
#[derive(Debug)]
pub struct ApartPass {
    pub batch: Batch,
    pub temperature: f64,
    pub inputs: BlockInputs,
    pub coefficients: Vec<f64>,
    /// Each completion's own gradient is wanted, not their sum.
    pub per_sequence: bool,
}

/// What an [`ApartPass`] gave.
#[derive(Debug)]
pub struct ApartScores {
    pub batch: Batch,
    pub scores: Scores,
    pub gradients: Gradients,
}

/// What the updates of a run ask a model for: of the decoder itself, or of one that several runs share.
pub trait Passes {
    /// Log-probabilities and entropies of the targets.
    fn score(&self, pass: ScorePass<'_>) -> Result<Scores>;

    /// Adds a gradient, and gives the scores of the targets.
    fn accumulate(&self, pass: GradientPass<'_>) -> Result<Scores>;

    /// Passes that are computed side by side, each on one thread: for small models.
    fn accumulate_apart(
        &self,
        adapter: &Adapter,
        passes: Vec<ApartPass>,
    ) -> Result<Vec<ApartScores>>;
}

impl Passes for Decoder {
    fn score(&self, pass: ScorePass<'_>) -> Result<Scores> {
        only(self.score_together(&[pass])?)
    }

    fn accumulate(&self, pass: GradientPass<'_>) -> Result<Scores> {
        only(self.accumulate_together(vec![pass])?)
    }

    fn accumulate_apart(
        &self,
        adapter: &Adapter,
        passes: Vec<ApartPass>,
    ) -> Result<Vec<ApartScores>> {
        let passes = passes.into_iter().map(|pass| (adapter, pass)).collect();
        self.accumulate_side_by_side(passes)
    }
}

fn only(scores: Vec<Scores>) -> Result<Scores> {
    let first = scores.into_iter().next();
    first.ok_or_else(|| Error::Internal("a pass gave no scores".into()))
}

impl Decoder {
    /// Log-probabilities and entropies of the targets of `batch` at `temperature`.
    pub fn score(
        &self,
        adapter: Option<&Adapter>,
        batch: &Batch,
        temperature: f64,
    ) -> Result<Scores> {
        Passes::score(
            self,
            ScorePass {
                adapter,
                batch,
                temperature,
            },
        )
    }

    /// Adds to `gradients` the gradient of L = Σ_n coefficients[n] · logp(target n), and gives the
    /// scores of the targets. The caller's coefficients are dL/dlogp at the current parameters.
    ///
    /// `coefficients` is called with the scores when they are needed to know the loss; when it is
    /// known without them, [`Coefficients::Known`] saves a pass over the head.
    pub fn accumulate_gradients<'a>(
        &self,
        adapter: &'a Adapter,
        batch: &'a Batch,
        temperature: f64,
        inputs: BlockInputs,
        coefficients: Coefficients<'a>,
        gradients: &'a mut Gradients,
    ) -> Result<Scores> {
        self.accumulate(GradientPass {
            adapter,
            batch,
            temperature,
            inputs,
            coefficients,
            gradients,
        })
    }

    /// Several scorings as one pass; each has the bits that it has by itself (on the CPU).
    pub fn score_together(&self, passes: &[ScorePass<'_>]) -> Result<Vec<Scores>> {
        let batches: Vec<&Batch> = passes.iter().map(|pass| pass.batch).collect();
        let set = AdapterSet::new(passes.iter().map(|pass| pass.adapter).collect())?;
        let adapters = set.rows(row_counts(&batches));
        let batch = Batch::joined(&batches);
        let hidden = batch.gather(&self.forward_batch(&adapters, &batch)?)?;
        let head = Head::new(self, &adapters, passes.iter().map(|pass| pass.temperature));
        head.scores(&hidden, &batches)
    }

    /// Several gradients as one pass; each has the bits that it has by itself (on the CPU). Their inputs
    /// are all recorded, or all computed.
    pub fn accumulate_together(&self, passes: Vec<GradientPass<'_>>) -> Result<Vec<Scores>> {
        let batches: Vec<&Batch> = passes.iter().map(|pass| pass.batch).collect();
        let set = AdapterSet::new(passes.iter().map(|pass| Some(pass.adapter)).collect())?;
        let adapters = set.rows(row_counts(&batches));
        let batch = Batch::joined(&batches);
        let temperatures: Vec<f64> = passes.iter().map(|pass| pass.temperature).collect();
        let (mut inputs, mut coefficients, mut receivers) = (Vec::new(), Vec::new(), Vec::new());
        let wanted = passes
            .iter()
            .map(|pass| (pass.batch, pass.gradients.is_per_sequence()));
        let way_back = WayBack::new(&wanted.collect::<Vec<_>>(), &self.placement.device)?;
        for (pass, rows) in passes.into_iter().zip(&way_back.parts) {
            inputs.push(pass.inputs);
            coefficients.push(pass.coefficients);
            receivers.push(Receiver {
                adapter: pass.adapter,
                rows: rows.clone(),
                row_sequences: &way_back.sequences[rows.clone()],
                gradients: pass.gradients,
            });
        }
        let tape = self.tape(&adapters, &batch, inputs)?;
        let hidden = batch.gather(&tape.hidden)?;
        let head = Head::new(self, &adapters, temperatures);
        let coefficients = head.coefficients(&hidden, &batches, coefficients)?;
        let trained = match &mut receivers[..] {
            [
                Receiver {
                    adapter, gradients, ..
                },
            ] if adapter.trains_weights() => Some(&mut **gradients),
            _ => None,
        };
        let (dgathered, scores) = head.backward(&hidden, &batches, &coefficients, trained)?;
        let dhidden = way_back.scatter(&dgathered)?;
        let adapters_back = set.rows(way_back.parts.iter().map(Range::len).enumerate());
        let adapters = (&adapters, &adapters_back);
        self.backward(adapters, tape, &way_back, &dhidden, &mut receivers)?;
        Ok(scores)
    }

    /// Passes of one thread each, side by side.
    pub fn accumulate_side_by_side(
        &self,
        passes: Vec<(&Adapter, ApartPass)>,
    ) -> Result<Vec<ApartScores>> {
        let run = |(adapter, pass): (&Adapter, ApartPass)| -> Result<ApartScores> {
            signals::check()?;
            let mut gradients = match pass.per_sequence {
                true => adapter.gradients_per_sequence(pass.batch.lengths.len())?,
                false => adapter.gradients(),
            };
            let scores = cpu::alone(|| {
                self.accumulate(GradientPass {
                    adapter,
                    batch: &pass.batch,
                    temperature: pass.temperature,
                    inputs: pass.inputs,
                    coefficients: Coefficients::Known(pass.coefficients),
                    gradients: &mut gradients,
                })
            })?;
            Ok(ApartScores {
                batch: pass.batch,
                scores,
                gradients,
            })
        };
        let passes = passes.into_par_iter().with_max_len(1).map(run);
        passes.collect::<Vec<_>>().into_iter().collect()
    }

    /// What the way back starts from.
    fn tape(
        &self,
        adapters: &RowAdapters<'_>,
        batch: &Batch,
        inputs: Vec<BlockInputs>,
    ) -> Result<Tape> {
        let (mut recorded, mut keep) = (None::<BatchInputs>, None);
        for inputs in inputs {
            match inputs {
                BlockInputs::Recorded(rows) => {
                    recorded.get_or_insert_default().append(rows);
                }
                BlockInputs::Computed(Keep::Inputs) => keep = Some(Keep::Inputs),
                BlockInputs::Computed(Keep::Activations) => {
                    keep = keep.or(Some(Keep::Activations));
                }
            }
        }
        let (tokens, layout) = (&batch.tokens, &batch.layout);
        match (recorded, keep) {
            (Some(inputs), None) => self.recorded(adapters, tokens, layout, inputs),
            (None, keep) => {
                self.forward_train(adapters, tokens, layout, keep.unwrap_or(Keep::Inputs))
            }
            (Some(_), Some(_)) => Err(Error::Internal(
                "recorded and computed inputs cannot share a pass".into(),
            )),
        }
    }

    /// Hidden states of all rows of a batch, keeping nothing.
    fn forward_batch(&self, adapters: &RowAdapters<'_>, batch: &Batch) -> Result<Tensor> {
        let mut cache = self.new_cache();
        let mut spans = batch.layout.spans();
        for (segment, span) in batch.layout.segments.iter().zip(&mut spans) {
            let parent = segment.parent.map(|p| (p, batch.layout.segments[p].len));
            span.slot = cache.alloc(parent, segment.len);
        }
        self.forward(adapters, &batch.tokens, &spans, &mut cache, None)
    }
}

/// (number of the adapter, rows) of every batch.
fn row_counts(batches: &[&Batch]) -> Vec<(usize, usize)> {
    let rows = batches.iter().map(|batch| batch.tokens.len());
    rows.enumerate().collect()
}

/// The output head over the targets of several batches, those of equal temperature together.
struct Head<'a> {
    matrix: &'a crate::ops::linear::Matrix,
    temperatures: Vec<f64>,
}

impl<'a> Head<'a> {
    fn new(
        decoder: &'a Decoder,
        adapters: &RowAdapters<'a>,
        temperatures: impl IntoIterator<Item = f64>,
    ) -> Self {
        Self {
            matrix: decoder.head(adapters),
            temperatures: temperatures.into_iter().collect(),
        }
    }

    /// Runs of batches with one temperature, and their rows of the gathered hidden states.
    fn runs(&self, batches: &[&Batch]) -> Vec<(Range<usize>, Range<usize>)> {
        let mut runs: Vec<(Range<usize>, Range<usize>)> = Vec::new();
        let mut first = 0;
        for (i, batch) in batches.iter().enumerate() {
            let end = first + batch.targets.len();
            match runs.last_mut() {
                Some((of, rows)) if self.temperatures[of.start] == self.temperatures[i] => {
                    (of.end, rows.end) = (i + 1, end);
                }
                _ => runs.push((i..i + 1, first..end)),
            }
            first = end;
        }
        runs
    }

    fn scores(&self, hidden: &Tensor, batches: &[&Batch]) -> Result<Vec<Scores>> {
        let mut all = Vec::with_capacity(batches.len());
        for (of, rows) in self.runs(batches) {
            let (temperature, own) = (self.temperatures[of.start], &batches[of]);
            let hidden = hidden.narrow(0, rows.start, rows.len())?;
            let scores = head::forward(&hidden, self.matrix, &targets(own), temperature)?;
            all.extend(scores.split(own.iter().map(|batch| batch.targets.len())));
        }
        Ok(all)
    }

    /// dL/dlogp of all targets.
    fn coefficients(
        &self,
        hidden: &Tensor,
        batches: &[&Batch],
        coefficients: Vec<Coefficients<'_>>,
    ) -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for (i, coefficients) in coefficients.into_iter().enumerate() {
            let own = match coefficients {
                Coefficients::Known(values) => values,
                Coefficients::OfScores(loss) => {
                    let targets = &batches[i].targets;
                    let hidden = hidden.narrow(0, all.len(), targets.len())?;
                    let temperature = self.temperatures[i];
                    loss(&head::forward(&hidden, self.matrix, targets, temperature)?)?
                }
            };
            all.extend(own);
        }
        Ok(all)
    }

    /// The gradient of the gathered hidden states, and the scores. `trained` gets that of the head.
    fn backward(
        &self,
        hidden: &Tensor,
        batches: &[&Batch],
        coefficients: &[f64],
        mut trained: Option<&mut Gradients>,
    ) -> Result<(Tensor, Vec<Scores>)> {
        let (mut parts, mut all) = (Vec::new(), Vec::with_capacity(batches.len()));
        for (of, rows) in self.runs(batches) {
            let (temperature, own) = (self.temperatures[of.start], &batches[of]);
            let mut add = trained.as_deref_mut().map(|gradients| {
                |dlogits: &Tensor, hidden: &Tensor| gradients.add_head(dlogits, hidden)
            });
            let (dhidden, scores) = head::backward(
                &hidden.narrow(0, rows.start, rows.len())?,
                self.matrix,
                &targets(own),
                temperature,
                &coefficients[rows],
                add.as_mut().map(|add| add as head::OnLogits<'_>),
            )?;
            parts.push(dhidden);
            all.extend(scores.split(own.iter().map(|batch| batch.targets.len())));
        }
        let dhidden = match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(&parts, 0)?,
        };
        Ok((dhidden, all))
    }
}

fn targets(batches: &[&Batch]) -> Vec<u32> {
    let all = batches.iter().flat_map(|batch| &batch.targets);
    all.copied().collect()
}
