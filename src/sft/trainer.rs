//! The SFT step: a batch of examples → packed passes → gradient → update.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Example;
use crate::adapter::{Adapter, Gradients};
use crate::config::{OptimConfig, SftConfig};
use crate::data::DataOrder;
use crate::model::{
    ACTIVATION_MEMORY, Batch, Coefficients, Decoder, GradientPass, Keep, Passes, pack,
};
use crate::ops::head::Scores;
use crate::optim::Learner;
use crate::ranks::Ranks;
use crate::run::training::{StepOutput, Trainer};
use crate::run::{StepMetrics, TrainState, signals};
use crate::{Error, Result};

/// Trains an adapter on examples, one step at a time.
pub struct SftTrainer<'a> {
    config: &'a SftConfig,
    decoder: &'a Decoder,
    /// What computes the passes: the decoder, or one that other runs share.
    passes: &'a dyn Passes,
    examples: &'a [Example],
    /// Rows up to which examples are packed into one pass.
    pass_tokens: usize,
    order: DataOrder,
    learner: Learner,
    step: u64,
    position: u64,
    num_tokens: u64,
    ranks: Ranks,
}

/// What the pass over one example gave.
#[derive(Serialize, Deserialize)]
struct Piece {
    gradient: Vec<f64>,
    logprobs: Vec<f64>,
    entropies: Vec<f64>,
}

/// Sums over the examples of a step.
struct Sums {
    gradients: Gradients,
    loss: f64,
    entropy: f64,
}

impl Sums {
    /// One by one: the sums must not depend on what was packed together.
    fn add(&mut self, logprobs: &[f64], entropies: &[f64]) {
        logprobs.iter().for_each(|logp| self.loss -= logp);
        entropies.iter().for_each(|e| self.entropy += e);
    }
}

impl<'a> SftTrainer<'a> {
    /// A run of `total_steps` updates; `seed` fixes the order of the examples.
    ///
    /// # Errors
    /// Without examples.
    pub fn new(
        config: &'a SftConfig,
        optim: &OptimConfig,
        decoder: &'a Decoder,
        adapter: Adapter,
        examples: &'a [Example],
        seed: u64,
        total_steps: u64,
    ) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::data("there are no examples to train on"));
        }
        Ok(Self {
            config,
            decoder,
            passes: decoder,
            examples,
            pass_tokens: config.pass_tokens(),
            order: DataOrder::new(seed, examples.len()),
            learner: Learner::new(adapter, optim, total_steps),
            step: 0,
            position: 0,
            num_tokens: 0,
            ranks: Ranks::alone(),
        })
    }

    /// Leaves its passes to something else than the decoder itself.
    pub fn with_passes(mut self, passes: &'a dyn Passes) -> Self {
        self.passes = passes;
        self
    }

    /// Packs examples into passes of up to so many rows.
    pub fn with_pass_tokens(mut self, pass_tokens: usize) -> Self {
        self.pass_tokens = pass_tokens;
        self
    }

    /// Shares the examples of every step with other ranks.
    pub fn with_ranks(mut self, ranks: Ranks) -> Self {
        self.ranks = ranks;
        self
    }

    /// Steps of a run over `epochs` passes of `num_examples`.
    pub fn steps(config: &SftConfig, num_examples: usize, epochs: f64) -> u64 {
        DataOrder::new(0, num_examples.max(1)).steps(epochs, config.examples_per_step)
    }

    /// The examples of the next step.
    fn chosen(&mut self) -> Vec<&'a Example> {
        (0..self.config.examples_per_step as u64)
            .map(|i| &self.examples[self.order.at(self.position + i)])
            .collect()
    }

    /// Tokens of an example that are learnt.
    fn targets_of(&self, example: &Example) -> usize {
        match self.config.completion_only_loss {
            true => example.completion.len(),
            false => rows_of(example),
        }
    }

    /// Examples packed into passes.
    fn batches(&self, chosen: &[&Example]) -> Result<Vec<Batch>> {
        let rows: Vec<usize> = chosen.iter().map(|e| rows_of(e)).collect();
        let mut batches = Vec::new();
        for run in pack(&rows, self.pass_tokens) {
            let mut batch = Batch::default();
            for example in &chosen[run] {
                if self.config.completion_only_loss {
                    batch.push_sequence(&example.prompt, &example.completion)?;
                } else {
                    let rest = [&example.prompt[1..], &example.completion].concat();
                    batch.push_sequence(&example.prompt[..1], &rest)?;
                }
            }
            batches.push(batch);
        }
        Ok(batches)
    }

    /// The sums of a step, which are the same on every rank: each passes over its share, and the
    /// examples are added up in order.
    fn sums(
        &self,
        chosen: &[&Example],
        targets: usize,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Sums> {
        let mut sums = Sums {
            gradients: self.adapter().gradients(),
            loss: 0.0,
            entropy: 0.0,
        };
        if !self.adapter().has_sequence_gradients() {
            self.pass_over(chosen, targets, on_progress, &mut |pass| {
                let scores = pass.accumulate(&mut sums.gradients)?;
                sums.add(&scores.logprobs, &scores.entropies);
                Ok(())
            })?;
            return Ok(sums);
        }
        let mut own = Vec::new();
        let share = &chosen[self.ranks.share(chosen.len())];
        let done = self.pass_over(share, targets, on_progress, &mut |pass| {
            own.extend(pass.pieces()?);
            Ok(())
        });
        for piece in self.ranks.gather(done.map(|()| own))?.iter().flatten() {
            sums.gradients.add_piece(&piece.gradient)?;
            sums.add(&piece.logprobs, &piece.entropies);
        }
        Ok(sums)
    }

    /// Hands `each` the passes over these examples.
    fn pass_over(
        &self,
        examples: &[&Example],
        targets: usize,
        on_progress: &mut dyn FnMut(usize, usize),
        each: &mut dyn FnMut(Pass<'_, '_>) -> Result<()>,
    ) -> Result<()> {
        let total = examples.iter().map(|e| rows_of(e)).sum();
        let mut done = 0;
        for batch in &self.batches(examples)? {
            signals::check()?;
            each(Pass {
                trainer: self,
                batch,
                targets,
            })?;
            done += batch.tokens.len();
            on_progress(done, total);
        }
        Ok(())
    }
}

/// Rows of an example in a pass: its last token has none.
fn rows_of(example: &Example) -> usize {
    example.prompt.len() + example.completion.len() - 1
}

/// One forward and backward pass of a step over `targets` scored tokens.
struct Pass<'p, 't> {
    trainer: &'p SftTrainer<'t>,
    batch: &'p Batch,
    targets: usize,
}

impl Pass<'_, '_> {
    fn accumulate(&self, gradients: &mut Gradients) -> Result<Scores> {
        let Self { trainer, batch, .. } = self;
        let weight = -1.0 / self.targets as f64;
        let keep = Keep::choose(
            trainer.config.gradient_checkpointing,
            &trainer.decoder.config,
            batch.tokens.len(),
            ACTIVATION_MEMORY,
        );
        trainer.passes.accumulate(GradientPass {
            adapter: trainer.adapter(),
            batch,
            temperature: 1.0,
            inputs: keep.into(),
            coefficients: Coefficients::Known(vec![weight; batch.targets.len()]),
            gradients,
        })
    }

    /// What the pass gives of each example.
    fn pieces(&self) -> Result<Vec<Piece>> {
        let mut gradients = self.trainer.adapter().gradients();
        gradients.keep_pieces();
        let scores = self.accumulate(&mut gradients)?;
        let logprobs = self.batch.by_completion(&scores.logprobs);
        let entropies = self.batch.by_completion(&scores.entropies);
        let pieces = gradients.take_pieces().into_iter();
        Ok(pieces
            .zip(logprobs.zip(entropies))
            .map(|(gradient, (logprobs, entropies))| Piece {
                gradient,
                logprobs: logprobs.to_vec(),
                entropies: entropies.to_vec(),
            })
            .collect())
    }
}

impl Trainer for SftTrainer<'_> {
    /// One update on the next `examples_per_step` examples. The loss is the mean over all their
    /// scored tokens. `on_progress(done, total)` counts tokens.
    fn step(&mut self, on_progress: &mut dyn FnMut(usize, usize)) -> Result<StepOutput> {
        let started = Instant::now();
        let chosen = self.chosen();
        let rows: usize = chosen.iter().map(|e| rows_of(e)).sum();
        let targets: usize = chosen.iter().map(|e| self.targets_of(e)).sum();
        let sums = self.sums(&chosen, targets, on_progress)?;
        let update = self.learner.update(&sums.gradients)?;

        self.step += 1;
        self.position += self.config.examples_per_step as u64;
        self.num_tokens += (rows + chosen.len()) as u64;
        let mut metrics = StepMetrics::default();
        for (name, value) in [
            ("loss", sums.loss / targets as f64),
            ("entropy", sums.entropy / targets as f64),
            ("grad_norm", update.grad_norm),
            ("num_tokens", self.num_tokens as f64),
            ("epoch", self.order.epochs(self.position)),
            ("step_time", started.elapsed().as_secs_f64()),
        ] {
            metrics.set(name, value);
        }
        if let Some(rate) = update.learning_rate {
            metrics.set("learning_rate", rate);
        }
        Ok(StepOutput {
            metrics,
            completions: Vec::new(),
        })
    }

    fn adapter(&self) -> &Adapter {
        self.learner.adapter()
    }

    fn step_number(&self) -> u64 {
        self.step
    }

    fn state(&self) -> TrainState {
        let mut state = TrainState {
            step: self.step,
            position: self.position,
            num_tokens: self.num_tokens,
            ..TrainState::default()
        };
        self.learner.save(&mut state);
        state
    }

    fn restore(&mut self, state: &TrainState) -> Result<()> {
        self.learner.restore(state)?;
        self.step = state.step;
        self.position = state.position;
        self.num_tokens = state.num_tokens;
        Ok(())
    }
}
