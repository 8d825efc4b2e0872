//! Data sets, benchmarks, prompt templates, downloads.

pub mod answers;
pub mod benchmarks;
pub mod dataset;
pub mod hub;
pub mod mini;
pub mod order;
pub mod parquet;
pub mod prompts;
pub mod rows;

use std::path::{Path, PathBuf};

pub use benchmarks::{BENCHMARKS, Benchmark, BenchmarkOptions, Metric, benchmark};
pub use dataset::{Dataset, LoadReport};
pub use order::DataOrder;

use crate::config::DataConfig;
use crate::{Error, Result};

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

/// The training problems of a configuration: a benchmark by name, else a file.
///
/// # Errors
/// Neither a benchmark nor a file; no usable problem; a bad row, unless those are skipped.
pub fn load(config: &DataConfig, quiet: bool) -> Result<Dataset> {
    if let Some(benchmark) = benchmarks::find(&config.train) {
        let options = BenchmarkOptions {
            data_dir: config.data_dir.clone(),
            limit: config.limit,
            levels: config.levels.clone(),
            fields: config.fields.clone(),
            quiet,
        };
        return benchmark.load(&config.split, &options);
    }
    let path = PathBuf::from(&config.train);
    if !path.exists() {
        let looks_like_file = path.components().count() > 1 || path.extension().is_some();
        return Err(if looks_like_file {
            Error::data(format!("there is no data file {}", path.display()))
        } else {
            match benchmark(&config.train) {
                Err(error) => error,
                Ok(_) => Error::config(format!("there is no data file {}", path.display())),
            }
        });
    }
    let options = dataset::ReadOptions {
        columns: dataset::Columns::usual().mapped(&config.fields),
        on_bad_row: config.on_bad_row,
        limit: config.limit,
        levels: config.levels.clone(),
        ..dataset::ReadOptions::default()
    };
    load_file(&path, &options)
}

/// [`load`], with `count` worked examples for a few-shot prompt. The examples are the first of the
/// training data, and none of them is among the problems.
pub fn load_with_shots(
    config: &DataConfig,
    count: usize,
    quiet: bool,
) -> Result<(Dataset, Vec<Problem>)> {
    if count == 0 {
        return Ok((load(config, quiet)?, Vec::new()));
    }
    let more = DataConfig {
        limit: config.limit.map(|limit| limit + count),
        ..config.clone()
    };
    let mut dataset = load(&more, quiet)?;
    let shots = match benchmarks::find(&config.train) {
        Some(benchmark) => {
            let options = BenchmarkOptions {
                data_dir: config.data_dir.clone(),
                fields: config.fields.clone(),
                quiet,
                ..BenchmarkOptions::default()
            };
            benchmark.shots(count, &options)?
        }
        None => dataset.problems.iter().take(count).cloned().collect(),
    };
    dataset.problems.retain(|problem| !shots.contains(problem));
    dataset
        .problems
        .truncate(config.limit.unwrap_or(usize::MAX));
    if dataset.problems.is_empty() {
        return Err(Error::config(format!(
            "{}: {count} few-shot examples leave no problem",
            config.train
        )));
    }
    Ok((dataset, shots))
}

/// The problems of one user file, named after it.
pub fn load_file(path: &Path, options: &dataset::ReadOptions) -> Result<Dataset> {
    let name = path
        .file_stem()
        .map_or_else(|| "data".to_string(), |s| s.to_string_lossy().into_owned());
    dataset::read_files(&name, "all", &[path.to_path_buf()], options)
}
