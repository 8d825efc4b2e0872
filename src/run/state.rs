//! What training needs to go on bit for bit where it stopped.

use serde::{Deserialize, Serialize};

use crate::optim::OptimizerState;

/// State between two steps. Every random draw is a function of the seed and of these numbers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Problems drawn from the data so far, over all passes.
    pub position: u64,
    /// Prompt and completion tokens seen so far (metric `num_tokens`).
    pub num_tokens: u64,
    /// The adapter's f32 master parameters.
    pub parameters: Vec<f32>,
    pub optimizer: OptimizerState,
}
