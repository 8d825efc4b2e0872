//! The SFT step: a batch of examples → packed passes → gradient → update.

use std::time::Instant;

use super::Example;
use crate::adapter::Adapter;
use crate::config::{OptimConfig, SftConfig};
use crate::data::DataOrder;
use crate::model::{
    ACTIVATION_MEMORY, Batch, Coefficients, Decoder, GradientPass, Keep, Passes, pack,
};
use crate::optim::Learner;
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

    /// Steps of a run over `epochs` passes of `num_examples`.
    pub fn steps(config: &SftConfig, num_examples: usize, epochs: f64) -> u64 {
        DataOrder::new(0, num_examples.max(1)).steps(epochs, config.examples_per_step)
    }

    /// The examples of the next step, packed.
    fn batches(&mut self) -> Result<Vec<Batch>> {
        let chosen: Vec<&Example> = (0..self.config.examples_per_step as u64)
            .map(|i| &self.examples[self.order.at(self.position + i)])
            .collect();
        let rows: Vec<usize> = chosen
            .iter()
            .map(|e| e.prompt.len() + e.completion.len() - 1)
            .collect();
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
}

impl Trainer for SftTrainer<'_> {
    /// One update on the next `examples_per_step` examples. The loss is the mean over all their
    /// scored tokens. `on_progress(done, total)` counts tokens.
    fn step(&mut self, on_progress: &mut dyn FnMut(usize, usize)) -> Result<StepOutput> {
        let started = Instant::now();
        let batches = self.batches()?;
        let targets: usize = batches.iter().map(|b| b.targets.len()).sum();
        let rows: usize = batches.iter().map(|b| b.tokens.len()).sum();
        let (mut loss, mut entropy, mut done) = (0.0, 0.0, 0);
        let mut gradients = self.adapter().gradients();
        for batch in &batches {
            signals::check()?;
            let tokens = batch.tokens.len();
            let keep = Keep::choose(
                self.config.gradient_checkpointing,
                &self.decoder.config,
                tokens,
                ACTIVATION_MEMORY,
            );
            let scores = self.passes.accumulate(GradientPass {
                adapter: self.adapter(),
                batch,
                temperature: 1.0,
                inputs: keep.into(),
                coefficients: Coefficients::Known(vec![-1.0 / targets as f64; batch.targets.len()]),
                gradients: &mut gradients,
            })?;
            // One by one: the sum must not depend on what was packed together.
            scores.logprobs.iter().for_each(|logp| loss -= logp);
            scores.entropies.iter().for_each(|e| entropy += e);
            done += tokens;
            on_progress(done, rows);
        }
        let update = self.learner.update(&gradients)?;

        self.step += 1;
        self.position += self.config.examples_per_step as u64;
        // The last token of an example has no row of its own.
        self.num_tokens += (rows + batches.iter().map(|b| b.lengths.len()).sum::<usize>()) as u64;
        let mut metrics = StepMetrics::default();
        for (name, value) in [
            ("loss", loss / targets as f64),
            ("entropy", entropy / targets as f64),
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
