//! Supervised fine-tuning: next-token loss on the data set's own solutions.

mod examples;
mod trainer;

pub use examples::{Example, end_of_turn};
pub use trainer::SftTrainer;

#[cfg(test)]
mod tests;
