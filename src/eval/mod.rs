//! Benchmark running, statistics, result files.
//!
//! [`EvalSet`] is a task, [`evaluate`] runs it, [`RunReport`] writes what came out.

mod compare;
mod lm_eval;
mod log;
mod runner;
mod set;
pub mod stats;
mod table;

pub use compare::{Comparison, McNemar, compare};
pub use lm_eval::{RunReport, TaskReport, metrics_object};
pub use log::{CompletionLog, LoggedCompletion, configuration};
pub use runner::{EvalOptions, EvalProgress, EvalResult, EvalSample, MetricValue, evaluate};
pub use set::{EvalSet, SetOptions};
pub use table::{align, table};
