//! Group-relative policy optimization: advantages, losses, trainer.

pub mod advantages;
pub mod importance;
pub mod loss;
pub mod metrics;
mod natural;
mod owners;
mod passes;
mod rollouts;
mod scores;
mod trainer;

pub use rollouts::{Group, Rollouts, Sampler};
pub use trainer::GrpoTrainer;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod natural_tests;
#[cfg(test)]
pub(crate) mod tests;
