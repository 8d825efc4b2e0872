//! An adapter and the optimizer that trains it.

use super::natural::MAX_PARAMETERS;
use super::{Direction, Optimizer, ScoredBatch, Update};
use crate::Result;
use crate::adapter::{Adapter, Gradients};
use crate::config::{OptimConfig, OptimizerKind};
use crate::run::TrainState;

/// What both training methods do with a gradient.
#[derive(Debug, Clone)]
pub struct Learner {
    adapter: Adapter,
    optimizer: Optimizer,
}

impl Learner {
    /// For a run of `total_updates` optimizer updates. The natural gradient is for adapters of at
    /// most [`MAX_PARAMETERS`] parameters with a gradient for every sequence; for others it is AdamW,
    /// with a warning.
    pub fn new(adapter: Adapter, config: &OptimConfig, total_updates: u64) -> Self {
        let count = adapter.num_parameters();
        let mut config = config.clone();
        let is_small = count <= MAX_PARAMETERS && adapter.has_sequence_gradients();
        if config.kind == OptimizerKind::Natural && !is_small {
            config.kind = OptimizerKind::Adamw;
            tracing::warn!(
                "optim.type = \"natural\" is for tinylora and lora-xs with at most {MAX_PARAMETERS} \
                 parameters, {} has {count}: adamw with optim.learning_rate = {}",
                adapter.spec().kind.name(),
                config.learning_rate
            );
        }
        let optimizer =
            Optimizer::new(&config, count, total_updates).without_decay(adapter.without_decay());
        Self { adapter, optimizer }
    }

    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    pub fn into_adapter(self) -> Adapter {
        self.adapter
    }

    /// One update along the accumulated gradient.
    ///
    /// # Errors
    /// [`crate::Error::Diverged`] when the gradient or a parameter is not finite.
    pub fn update(&mut self, gradients: &Gradients) -> Result<Update> {
        let mut parameters = self.adapter.parameters().to_vec();
        let update = self
            .optimizer
            .update(&mut parameters, &mut gradients.sum())?;
        self.adapter.set_parameters(&parameters)?;
        Ok(update)
    }

    /// See [`Optimizer::is_natural`].
    pub fn is_natural(&self) -> bool {
        self.optimizer.is_natural()
    }

    /// See [`Optimizer::propose`]; the parameters stay where they are.
    pub fn propose(&mut self, batch: ScoredBatch) -> Result<Direction> {
        self.optimizer.propose(batch)
    }

    /// Puts the adapter somewhere else.
    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        self.adapter.set_parameters(parameters)
    }

    /// Writes parameters and optimizer into `state`.
    pub fn save(&self, state: &mut TrainState) {
        state.parameters = self.adapter.parameters().to_vec();
        state.optimizer = self.optimizer.state();
    }

    /// Takes parameters and optimizer from `state`.
    pub fn restore(&mut self, state: &TrainState) -> Result<()> {
        self.optimizer.restore(state.optimizer.clone())?;
        self.adapter.set_parameters(&state.parameters)
    }
}
