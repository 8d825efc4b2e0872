//! Group-relative policy optimization: advantages, losses, trainer.

pub mod advantages;
pub mod importance;
pub mod loss;

#[cfg(test)]
mod fixture;
