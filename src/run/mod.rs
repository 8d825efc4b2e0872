//! The run directory and what is written into it.

pub mod fs;
pub mod lock;
pub mod metrics;
pub mod progress;
pub mod signals;

pub use metrics::StepMetrics;
