//! An adapter and the optimizer that trains it.

use super::{Direction, Optimizer, Update};
use crate::Result;
use crate::adapter::{Adapter, Gradients};
use crate::config::OptimConfig;
use crate::run::TrainState;

/// What both training methods do with a gradient.
#[derive(Debug, Clone)]
pub struct Learner {
    adapter: Adapter,
    optimizer: Optimizer,
}

impl Learner {
    /// For a run of `total_updates` optimizer updates.
    pub fn new(adapter: Adapter, config: &OptimConfig, total_updates: u64) -> Self {
        let optimizer = Optimizer::new(config, adapter.num_parameters(), total_updates)
            .without_decay(adapter.without_decay());
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

    /// See [`Optimizer::kl_per_step`].
    pub fn kl_per_step(&self) -> f64 {
        self.optimizer.kl_per_step()
    }

    /// See [`Optimizer::propose`]; the parameters stay where they are.
    pub fn propose(&mut self, scores: &[f64], coefficients: &[f64]) -> Result<Direction> {
        self.optimizer.propose(scores, coefficients)
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
