//! The run directory and what is written into it.

pub mod metrics;

pub use metrics::StepMetrics;
