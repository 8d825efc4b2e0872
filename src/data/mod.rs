//! Data sets, benchmarks, prompt templates, downloads.

pub mod answers;
pub mod dataset;
pub mod parquet;
pub mod rows;

pub use dataset::{Dataset, LoadReport};

/// One problem of a data set.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Problem {
    /// Stable within its data set (the row's own id, else `<split>/<row number>`).
    pub id: String,
    /// The question as the user message states it, without the prompt template.
    pub problem: String,
    /// The reference answer alone, cleaned (no `####`, no thousands separators in numbers).
    pub answer: String,
    /// The worked reference solution, where the data set has one (SFT needs it).
    pub solution: Option<String>,
}
