//! A run directory, whatever state it is in.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::adapter::{self, Found, TrainedNumbers};
use super::configuration::Configuration;
use super::history::{History, Score};
use super::samples::{self, Comparison, TrainingGroup};
use crate::config::Method;
use crate::run::{directory, environment, evaluation};
use crate::{Error, Result};

/// Bytes of `config.toml` and `environment.json` that are read.
const MAX_SMALL_FILE: u64 = 1 << 20;

/// How far a run has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    Finished,
    /// A process holds the run directory.
    InProgress,
    /// No process does, and the end has not been reached.
    Stopped,
}

impl Status {
    pub fn text(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::InProgress => "in progress",
            Self::Stopped => "not finished",
        }
    }
}

/// How much of a run is read for the page.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Problems shown before and after, for each data set.
    pub pairs: usize,
    /// Places in the training completions.
    pub groups: usize,
}

/// Everything the page says of a run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The folder's name.
    pub name: String,
    pub status: Status,
    pub configuration: Configuration,
    /// Name and value, in the order of the file.
    pub environment: Vec<(String, String)>,
    pub history: History,
    pub numbers: Option<TrainedNumbers>,
    pub comparisons: Vec<Comparison>,
    pub training: Vec<TrainingGroup>,
    /// What is missing or could not be read.
    pub remarks: Vec<String>,
}

/// The run the user means: a folder with anything of a run in it, else one of that name in `runs/`.
///
/// # Errors
/// [`Error::Config`] when there is no such folder.
pub fn find(name: &Path) -> Result<PathBuf> {
    let in_runs = Path::new(directory::RUNS).join(name);
    for candidate in [name, &in_runs] {
        let parts = [
            "config.toml",
            "metrics.jsonl",
            "checkpoints",
            "adapter.safetensors",
        ];
        if parts.iter().any(|part| candidate.join(part).exists()) {
            return Ok(candidate.to_owned());
        }
    }
    Err(Error::config(format!(
        "no run {}: neither it nor {} has a config.toml or metrics.jsonl",
        name.display(),
        in_runs.display()
    )))
}

impl Run {
    /// Reads a run. What is missing or damaged becomes a remark.
    ///
    /// # Errors
    /// Nothing in the folder can make this fail; a bug in the defaults of the configuration can.
    pub fn read(path: &Path, limits: Limits) -> Result<Self> {
        let mut remarks = Vec::new();
        let text = small_file(path, "config.toml", &mut remarks).unwrap_or_default();
        let configuration = Configuration::parse(&text)?;
        if !text.is_empty() && !configuration.is_readable() {
            remarks.push("config.toml: not valid TOML".to_owned());
        }
        let environment = small_file(path, environment::FILE, &mut remarks)
            .map(|text| environment_rows(&text, &mut remarks))
            .unwrap_or_default();
        let method = configuration.method();
        let mut history = History::default();
        for name in ["metrics.jsonl", "timings.jsonl"] {
            match history.read(&path.join(name), method) {
                Ok(remark) => remarks.extend(remark),
                Err(e) => remarks.push(unreadable(name, &e)),
            }
        }
        let numbers = match adapter::find(path) {
            Found::Numbers(numbers) => Some(*numbers),
            Found::Nothing(why) => {
                remarks.push(why);
                None
            }
        };
        let folder = evaluation::evaluations(path);
        let comparisons = samples::comparisons(&folder, limits.pairs, &mut remarks);
        let mut training = Vec::new();
        match samples::training(&path.join("completions.jsonl"), limits.groups) {
            Ok((groups, remark)) => {
                training = groups;
                remarks.extend(remark);
            }
            Err(_) if method == Method::Sft => {} // it makes none
            Err(e) => remarks.push(unreadable("completions.jsonl", &e)),
        }
        let total = configuration
            .get("train.max_steps")
            .and_then(|text| text.parse().ok());
        let status = status(path, &history, total);
        if let (Status::Finished, Some(last)) = (&status, history.evaluations.last())
            && last.step < history.last_step
        {
            remarks.push(format!(
                "the last evaluation is that after step {}",
                last.step
            ));
        }
        Ok(Self {
            name: name_of(path),
            status,
            configuration,
            environment,
            history,
            numbers,
            comparisons,
            training,
            remarks,
        })
    }

    pub fn method(&self) -> Method {
        self.configuration.method()
    }

    /// The model's name, from whatever knows it.
    pub fn model(&self) -> String {
        let recorded = self
            .environment
            .iter()
            .find(|(name, _)| name == "model.name");
        match (&self.numbers, recorded) {
            (Some(numbers), _) => numbers.model.clone(),
            (None, Some((_, name))) => name.clone(),
            (None, None) => self.configuration.get("model.path").map_or_else(
                || "unknown model".to_owned(),
                |path| environment::public_name(&path),
            ),
        }
    }

    /// `GRPO` or `SFT`.
    pub fn method_name(&self) -> &'static str {
        match self.method() {
            Method::Grpo => "GRPO",
            Method::Sft => "SFT",
        }
    }

    /// The score to judge the run by: the first share of right answers.
    pub fn main_score(&self) -> Option<Score> {
        self.history.scores().into_iter().find(Score::is_accuracy)
    }

    /// The same of the temperature-1 evaluation.
    pub fn sampled_score(&self) -> Option<Score> {
        let scores = self.history.scores().into_iter();
        scores
            .filter(Score::is_accuracy)
            .find(|s| s.metric.starts_with("sampled_"))
    }

    /// Steps done, and of how many where the configuration says so.
    pub fn steps(&self) -> String {
        let done = self.history.last_step;
        match self.configuration.get("train.max_steps") {
            Some(total) => format!("{done} of {total}"),
            None => done.to_string(),
        }
    }
}

fn name_of(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real.file_name().map_or_else(
        || "run".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn status(path: &Path, history: &History, total: Option<u64>) -> Status {
    let reached = total.is_none_or(|total| history.last_step >= total);
    if reached && path.join("adapter.safetensors").is_file() {
        return Status::Finished;
    }
    // Asked without making the file, and given back at once.
    match File::open(path.join(".lock")).map(|lock| lock.try_lock_shared()) {
        Ok(Err(std::fs::TryLockError::WouldBlock)) => Status::InProgress,
        _ => Status::Stopped,
    }
}

fn small_file(run: &Path, name: &str, remarks: &mut Vec<String>) -> Option<String> {
    let mut bytes = Vec::new();
    let read = File::open(run.join(name))
        .and_then(|file| file.take(MAX_SMALL_FILE).read_to_end(&mut bytes));
    match read {
        Ok(_) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) => {
            remarks.push(unreadable(name, &e));
            None
        }
    }
}

/// An I/O error without the path of the folder.
fn unreadable(name: &str, error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => format!("{name} is missing"),
        _ => format!("{name} cannot be read: {error}"),
    }
}

fn environment_rows(text: &str, remarks: &mut Vec<String>) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    match serde_json::from_str::<Value>(text) {
        Ok(value) => flatten("", &value, &mut rows),
        Err(_) => remarks.push(format!("{}: not valid JSON", environment::FILE)),
    }
    rows.truncate(100);
    rows
}

fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = match prefix {
                    "" => key.clone(),
                    _ => format!("{prefix}.{key}"),
                };
                flatten(&name, value, rows);
            }
        }
        Value::Null => {}
        Value::String(text) => rows.push((prefix.to_owned(), text.clone())),
        other => rows.push((prefix.to_owned(), other.to_string())),
    }
}
