//! The run directory and what is written into it.

pub mod append;
pub mod checkpoint;
pub mod clock;
pub mod directory;
pub mod environment;
pub mod evaluation;
#[cfg(debug_assertions)]
pub mod faults;
pub mod fs;
pub mod job;
pub mod jsonl;
pub mod lock;
pub mod logs;
pub mod memory;
pub mod metrics;
pub mod plan;
pub mod plot;
pub mod problems;
pub mod progress;
pub mod signals;
pub mod state;
pub mod tensorboard;
pub mod tensors;
pub mod training;

pub use metrics::StepMetrics;
pub use state::TrainState;
