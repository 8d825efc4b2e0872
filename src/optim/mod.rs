//! Gradient → parameters: clipping, learning-rate schedule, AdamW.

pub mod adamw;
pub mod clip;
mod learner;
mod metric;
pub mod natural;
pub mod schedule;
mod scored;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use adamw::AdamW;
pub use learner::Learner;
pub use natural::{Direction, Natural, NaturalParams};
pub use schedule::Schedule;
pub use scored::ScoredBatch;

use crate::config::{OptimConfig, OptimizerKind};
use crate::{Error, Result};

/// A rule on one flat vector of parameters, with its schedule.
///
/// The same gradients give the same bits, whatever the number of threads.
#[derive(Debug, Clone)]
pub struct Optimizer {
    rule: Rule,
    schedule: Schedule,
    max_grad_norm: f64,
    updates: u64,
}

#[derive(Debug, Clone)]
enum Rule {
    AdamW(AdamW),
    Natural(Natural),
}

/// Everything an [`Optimizer`] needs to go on where it stopped, besides its configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OptimizerState {
    /// Updates made so far.
    pub updates: u64,
    /// Running mean of the gradient, per parameter; under `natural` the earlier batches.
    pub first_moment: Vec<f32>,
    /// Running mean of the squared gradient, per parameter; nothing under `natural`.
    pub second_moment: Vec<f32>,
}

/// What one update did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Euclidean norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Absent under the natural gradient, which has none.
    pub learning_rate: Option<f64>,
}

impl Optimizer {
    /// For `num_parameters` values, in a run of `total_updates` updates.
    pub fn new(config: &OptimConfig, num_parameters: usize, total_updates: u64) -> Self {
        let rule = match config.kind {
            OptimizerKind::Natural => {
                Rule::Natural(Natural::new(NaturalParams::from(config), num_parameters))
            }
            OptimizerKind::Adamw => Rule::AdamW(AdamW::new(config, num_parameters)),
        };
        Self {
            rule,
            schedule: Schedule::new(config, total_updates),
            max_grad_norm: config.max_grad_norm,
            updates: 0,
        }
    }

    /// Leaves weight decay out for these parameters (biases and norms).
    pub fn without_decay(mut self, ranges: Vec<Range<usize>>) -> Self {
        if let Rule::AdamW(adamw) = self.rule {
            self.rule = Rule::AdamW(adamw.without_decay(ranges));
        }
        self
    }

    /// One update of `parameters` along `gradient`, which is scaled down to the largest norm.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the gradient is not finite; nothing is changed then.
    /// [`Error::Internal`] under the rule that takes scores.
    pub fn update(&mut self, parameters: &mut [f32], gradient: &mut [f64]) -> Result<Update> {
        let Rule::AdamW(adamw) = &mut self.rule else {
            return Err(Error::Internal(
                "the natural gradient needs every completion's scores".into(),
            ));
        };
        let grad_norm = clip::clip_grad_norm(gradient, self.max_grad_norm);
        if !grad_norm.is_finite() {
            return Err(Error::Diverged(format!(
                "the gradient of update {} is not finite ({grad_norm}); lower optim.learning_rate",
                self.updates + 1
            )));
        }
        let learning_rate = self.schedule.rate(self.updates);
        self.updates += 1;
        adamw.step(parameters, gradient, learning_rate, self.updates);
        Ok(Update {
            grad_norm,
            learning_rate: Some(learning_rate),
        })
    }

    /// Whether it takes the scores of every completion ([`Self::propose`]), not their sum.
    pub fn is_natural(&self) -> bool {
        matches!(self.rule, Rule::Natural(_))
    }

    /// The natural-gradient step of the next update, its length following the schedule.
    ///
    /// # Errors
    /// As [`Natural::propose`]; [`Error::Internal`] under AdamW.
    pub fn propose(&mut self, batch: ScoredBatch) -> Result<Direction> {
        let factor = self.schedule.factor(self.updates);
        let Rule::Natural(natural) = &mut self.rule else {
            return Err(Error::Internal("AdamW takes the sum of gradients".into()));
        };
        let direction = natural.propose(batch, self.updates + 1, factor)?;
        self.updates += 1;
        Ok(direction)
    }

    pub fn state(&self) -> OptimizerState {
        let mut state = OptimizerState {
            updates: self.updates,
            ..OptimizerState::default()
        };
        match &self.rule {
            Rule::AdamW(adamw) => {
                let (first, second) = adamw.moments();
                state.first_moment = first.to_vec();
                state.second_moment = second.to_vec();
            }
            Rule::Natural(natural) => state.first_moment = natural.saved(),
        }
        state
    }

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// [`Error::Data`] when it belongs to another number of parameters.
    pub fn restore(&mut self, state: OptimizerState) -> Result<()> {
        let OptimizerState {
            updates,
            first_moment,
            second_moment,
        } = state;
        match &mut self.rule {
            Rule::AdamW(adamw) => {
                let expected = adamw.moments().0.len();
                let found = [first_moment.len(), second_moment.len()];
                if found != [expected; 2] {
                    return Err(Error::data(format!(
                        "the saved optimizer state has {found:?} values where the adapter needs \
                         {expected} each"
                    )));
                }
                adamw.set_moments(first_moment, second_moment);
            }
            Rule::Natural(natural) => natural.restore(&first_moment)?,
        }
        self.updates = updates;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(optimizer: &mut Optimizer, parameters: &mut [f32], from: usize, to: usize) {
        for i in from..to {
            let mut gradient: Vec<f64> = (0..parameters.len())
                .map(|p| ((i * 31 + p * 7) % 11) as f64 - 5.0 + f64::from(parameters[p]))
                .collect();
            optimizer.update(parameters, &mut gradient).unwrap();
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let config = OptimConfig {
            learning_rate: 0.01,
            weight_decay: 0.1,
            ..OptimConfig::default()
        };
        let new = || Optimizer::new(&config, 3, 20);
        let (mut whole, mut straight) = (new(), [0.5f32, -1.0, 2.0]);
        let mut resumed = straight;
        run(&mut whole, &mut straight, 0, 20);

        let mut first = new();
        run(&mut first, &mut resumed, 0, 9);
        let saved = serde_json::to_string(&first.state()).unwrap();
        let mut second = new();
        second
            .restore(serde_json::from_str(&saved).unwrap())
            .unwrap();
        run(&mut second, &mut resumed, 9, 20);
        assert_eq!(straight, resumed);
        assert_eq!(whole.state(), second.state());
    }

    #[test]
    fn a_gradient_that_is_not_finite_stops_the_run() {
        let mut optimizer = Optimizer::new(&OptimConfig::default(), 2, 1);
        let mut parameters = [1.0, 2.0];
        let error = optimizer
            .update(&mut parameters, &mut [f64::NAN, 0.0])
            .unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert_eq!(parameters, [1.0, 2.0]);
    }

    #[test]
    fn a_state_of_another_size_is_refused() {
        let mut optimizer = Optimizer::new(&OptimConfig::default(), 2, 1);
        let other = Optimizer::new(&OptimConfig::default(), 3, 1).state();
        assert!(optimizer.restore(other).is_err());
    }
}
