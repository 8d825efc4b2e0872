//! The logs of a run, written together and taken back together.
//!
//! `metrics.jsonl` and `completions.jsonl` hold only what the configuration decides, so that a run
//! that was interrupted and resumed ends with the same bytes as one that was not. What the clock
//! says (`step_time` and the like) is in `timings.jsonl`. All of it is also in an event file for
//! TensorBoard.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::directory::RunDirectory;
use super::fs;
use super::jsonl::JsonLines;
use super::metrics::StepMetrics;
use super::tensorboard::{self, EventFile};
use crate::Result;
use crate::rollout::FinishReason;

/// One line of `completions.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompletionRow {
    pub step: u64,
    /// Identifies the problem in its data set.
    pub problem: String,
    /// As the model sees it.
    pub prompt: String,
    pub completion: String,
    /// The reference answer.
    pub answer: String,
    /// The answer found in the completion.
    pub extracted: Option<String>,
    pub reward: f64,
    pub advantage: f64,
    pub num_tokens: usize,
    pub finish: FinishReason,
}

/// The open logs of a run.
#[derive(Debug)]
pub struct Logs {
    metrics: JsonLines,
    timings: JsonLines,
    completions: JsonLines,
    events: EventFile,
}

const METRICS: &str = "metrics.jsonl";
const TIMINGS: &str = "timings.jsonl";
const COMPLETIONS: &str = "completions.jsonl";
const STEP: &str = "step";

impl Logs {
    /// Opens the logs and takes them back to `lengths` (0 where a name is missing).
    pub fn open(directory: &RunDirectory, lengths: &BTreeMap<String, u64>) -> Result<Self> {
        let length = |name: &str| lengths.get(name).copied().unwrap_or(0);
        let open = |name: &str| JsonLines::open(&directory.path().join(name), length(name));
        let events = directory.path().join(tensorboard::FILE);
        fs::create_dir_all(fs::parent(&events))?;
        Ok(Self {
            metrics: open(METRICS)?,
            timings: open(TIMINGS)?,
            completions: open(COMPLETIONS)?,
            events: EventFile::open(&events, length(tensorboard::FILE))?,
        })
    }

    /// Whether the logs still hold what a checkpoint counts on.
    pub fn long_enough(directory: &RunDirectory, lengths: &BTreeMap<String, u64>) -> bool {
        lengths.iter().all(|(name, length)| {
            let found = std::fs::metadata(directory.path().join(name));
            found.is_ok_and(|m| m.len() >= *length)
        })
    }

    /// Writes the metrics of a step, those of the clock to their own file.
    pub fn step(&mut self, step: u64, metrics: &StepMetrics) -> Result<()> {
        let (mut plain, mut clock) = (row(step), row(step));
        for (name, value) in metrics.to_json() {
            let to = if is_timing(&name) {
                &mut clock
            } else {
                &mut plain
            };
            to.insert(name, value);
        }
        self.metrics.append(&plain)?;
        if clock.len() > 1 {
            self.timings.append(&clock)?;
        }
        let values: Vec<_> = metrics.iter().map(|(n, v)| (n.to_owned(), v)).collect();
        self.events.scalars(step, &values)
    }

    /// Writes the scores of an evaluation after `step`, each under `eval_<data set>/<metric>`.
    pub fn evaluation(
        &mut self,
        step: u64,
        scores: &Map<String, Value>,
        seconds: f64,
    ) -> Result<()> {
        let mut line = row(step);
        for (set, metrics) in scores {
            for (metric, value) in metrics.as_object().into_iter().flatten() {
                line.insert(format!("eval_{set}/{metric}"), value.clone());
            }
        }
        self.metrics.append(&line)?;
        let mut clock = row(step);
        clock.insert("eval_runtime".to_owned(), seconds.into());
        self.timings.append(&clock)?;
        let numbers = line.iter().chain(&clock).filter(|(name, _)| *name != STEP);
        let values: Vec<_> = numbers
            .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
            .collect();
        self.events.scalars(step, &values)
    }

    /// Writes completions of a step.
    pub fn completions(&mut self, step: u64, rows: &[CompletionRow]) -> Result<()> {
        for row in rows {
            self.completions.append(row)?;
        }
        self.events.completions(step, rows)
    }

    /// Makes everything durable and gives the lengths for a checkpoint to remember.
    pub fn sync(&mut self) -> Result<BTreeMap<String, u64>> {
        Ok(BTreeMap::from([
            (METRICS.to_owned(), self.metrics.sync()?),
            (TIMINGS.to_owned(), self.timings.sync()?),
            (COMPLETIONS.to_owned(), self.completions.sync()?),
            (tensorboard::FILE.to_owned(), self.events.sync()?),
        ]))
    }
}

fn row(step: u64) -> Map<String, Value> {
    Map::from_iter([(STEP.to_owned(), step.into())])
}

/// Whether a metric depends on the clock, or on how the work was divided, rather than on the
/// configuration.
pub fn is_timing(name: &str) -> bool {
    let prefixes = ["time/", "bytes/"];
    name == "step_time"
        || name.ends_with("_per_second")
        || prefixes.iter().any(|prefix| name.starts_with(prefix))
}
