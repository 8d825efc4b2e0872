//! The folder of a sweep and what is known of its finished runs.
//!
//! ```text
//! runs/sweep-mini/
//!   sweep.toml      the description, as it was given
//!   sweep.json      what the runs are defined by; a sweep with another definition is not resumed
//!   results.jsonl   one line a finished run
//!   untrained/      completions of the untrained model, which all runs start from
//!   runs/<point>/   a run directory each, as `train` makes them
//!   table.txt, accuracy.svg, accuracy.png, …   what came out
//! ```

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::grid;
use crate::config::Method;
use crate::run::fs;
use crate::run::jsonl::JsonLines;
use crate::run::lock::Lock;
use crate::{Error, Result};

const FORMAT: &str = "tinylora-sweep";
const VERSION: u32 = 1;

const DESCRIPTION: &str = "sweep.toml";
const DEFINITION: &str = "sweep.json";
const RESULTS: &str = "results.jsonl";

/// A line of `results.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Name of the run directory under `runs/`.
    pub run: String,
    pub size: String,
    pub method: Method,
    pub axes: Map<String, Value>,
    /// `adapter.type`.
    pub adapter: String,
    pub trained_parameters: usize,
    /// 0 under the natural gradient, which has none.
    pub learning_rate: f64,
    pub seed: u64,
    pub steps: u64,
    /// Scores before training: data set → metric → value, `<metric>_stderr` beside it.
    pub before: Map<String, Value>,
    /// Scores after training; empty when the run diverged.
    pub after: Map<String, Value>,
    /// Evaluations included.
    pub seconds: f64,
    /// Why the run ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diverged: Option<String>,
}

/// What a sweep is defined by.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Definition {
    format: String,
    version: u32,
    /// Hash of the frozen weights.
    model: String,
    /// Hashes of the training problems.
    data: Vec<String>,
    runs: Map<String, Value>,
}

/// A sweep's folder, held by this process.
pub struct SweepDirectory {
    path: PathBuf,
    results: Vec<RunResult>,
    log: JsonLines,
    _lock: Lock,
}

/// What [`SweepDirectory::open`] makes or finds.
pub struct Opening<'a> {
    pub path: &'a Path,
    pub resume: bool,
    /// Text of the description.
    pub description: &'a str,
    pub model_hash: &'a str,
    pub data_hashes: Vec<String>,
    pub runs: Map<String, Value>,
}

impl SweepDirectory {
    /// Refuses a folder that a new sweep cannot use, before anything long is done.
    pub fn check(path: &Path, resume: bool) -> Result<()> {
        let exists = path.join(DEFINITION).is_file();
        let shown = path.display();
        match (resume, exists) {
            (false, true) => Err(Error::config(format!(
                "{shown} holds a sweep: go on with it by --resume, or choose another --sweep-dir"
            ))),
            (true, false) => Err(Error::config(format!(
                "no sweep to resume in {shown}: it has no {DEFINITION}"
            ))),
            (true, true) => Ok(()),
            (false, false) if is_used(path) => Err(Error::config(format!(
                "{shown} is not empty; choose another --sweep-dir"
            ))),
            (false, false) => Ok(()),
        }
    }

    /// Makes the folder, or opens that of an earlier sweep with the same definition.
    ///
    /// # Errors
    /// Another process is in it; its definition is another one; a damaged file.
    pub fn open(opening: Opening<'_>) -> Result<Self> {
        let Opening { path, resume, .. } = opening;
        fs::create_dir_all(path)?;
        let lock = Lock::acquire(path)?;
        Self::check(path, resume)?;
        let definition = Definition {
            format: FORMAT.to_owned(),
            version: VERSION,
            model: opening.model_hash.to_owned(),
            data: opening.data_hashes,
            runs: opening.runs,
        };
        if resume {
            check_same(path, &definition)?;
        }
        let (results, length) = read_results(&path.join(RESULTS))?;
        let log = JsonLines::open(&path.join(RESULTS), length)?;
        fs::write_atomic(&path.join(DESCRIPTION), opening.description.as_bytes())?;
        if !resume {
            // Last: from here on the folder holds a sweep.
            let text = serde_json::to_vec(&definition)
                .map_err(|e| Error::Internal(format!("cannot write {DEFINITION}: {e}")))?;
            fs::write_atomic(&path.join(DEFINITION), &text)?;
        }
        Ok(Self {
            path: path.to_owned(),
            results,
            log,
            _lock: lock,
        })
    }

    /// The run directory of a point.
    pub fn run(&self, name: &str) -> PathBuf {
        self.path.join("runs").join(name)
    }

    /// Where completions of the untrained model are shared.
    pub fn untrained(&self) -> PathBuf {
        self.path.join("untrained")
    }

    pub fn results(&self) -> &[RunResult] {
        &self.results
    }

    /// Names of the runs that are done.
    pub fn finished(&self) -> HashSet<String> {
        self.results.iter().map(|r| r.run.clone()).collect()
    }

    /// Adds a finished run; the line is on the disk when this returns.
    pub fn add(&mut self, result: RunResult) -> Result<()> {
        self.log.append(&result)?;
        self.log.sync()?;
        self.results.push(result);
        Ok(())
    }
}

fn is_used(path: &Path) -> bool {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    // What a process leaves that stopped before it had written the definition.
    let harmless = [".lock", DESCRIPTION, RESULTS].map(std::ffi::OsString::from);
    entries
        .into_iter()
        .any(|e| !harmless.contains(&e.file_name()))
}

fn check_same(path: &Path, now: &Definition) -> Result<()> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let file = path.join(DEFINITION);
    let bytes = fs::read(&file)?;
    let invalid = |e: serde_json::Error| Error::file("use", &file, e);
    let head: Head = serde_json::from_slice(&bytes).map_err(invalid)?;
    if head.format != FORMAT || head.version != VERSION {
        let found = format!(
            "format {} version {}, this program reads {FORMAT} version {VERSION}",
            head.format, head.version
        );
        return Err(Error::file("use", &file, found));
    }
    let before: Definition = serde_json::from_slice(&bytes).map_err(invalid)?;
    let refuse = |what: &str| {
        let shown = path.display();
        Err(Error::config(format!("cannot go on with {shown}: {what}")))
    };
    if let Some(what) = grid::differences(&before.runs, &now.runs) {
        return refuse(&what);
    }
    if before.model != now.model {
        return refuse("the model's weights are others");
    }
    if before.data != now.data {
        return refuse("the training problems are others");
    }
    Ok(())
}

/// The whole lines and their length in bytes; what a crash tore off is left out.
fn read_results(path: &Path) -> Result<(Vec<RunResult>, u64)> {
    if !path.exists() {
        return Ok((Vec::new(), 0));
    }
    let text = fs::read(path)?;
    let whole = text
        .iter()
        .rposition(|&b| b == b'\n')
        .map_or(0, |at| at + 1);
    let lines = text[..whole].split(|&b| b == b'\n');
    let results = lines
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(i, line)| {
            serde_json::from_slice(line)
                .map_err(|e| Error::file("use", path, format!("line {}: {e}", i + 1)))
        })
        .collect::<Result<_>>()?;
    Ok((results, whole as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(run: &str) -> RunResult {
        RunResult {
            run: run.to_owned(),
            size: "13".to_owned(),
            method: Method::Grpo,
            axes: Map::new(),
            adapter: "tinylora".to_owned(),
            trained_parameters: 13,
            learning_rate: 0.02,
            seed: 1,
            steps: 5,
            before: Map::new(),
            after: Map::new(),
            seconds: 1.5,
            diverged: None,
        }
    }

    fn open(path: &Path, resume: bool, rate: f64) -> Result<SweepDirectory> {
        SweepDirectory::open(Opening {
            path,
            resume,
            description: "base = \"mini\"\n",
            model_hash: "m",
            data_hashes: vec!["d".to_owned()],
            runs: Map::from_iter([("all runs: optim.learning_rate".to_owned(), rate.into())]),
        })
    }

    #[test]
    fn finished_runs_are_there_again_and_a_torn_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep");
        let mut sweep = open(&path, false, 0.1).unwrap();
        sweep.add(result("a")).unwrap();
        sweep.add(result("b")).unwrap();
        drop(sweep);
        let log = path.join(RESULTS);
        let text = std::fs::read_to_string(&log).unwrap();
        assert_eq!(text.lines().count(), 2);
        std::fs::write(&log, format!("{text}{{\"run\": \"c")).unwrap();
        let mut sweep = open(&path, true, 0.1).unwrap();
        assert_eq!(sweep.results(), [result("a"), result("b")]);
        sweep.add(result("c")).unwrap();
        drop(sweep);
        assert_eq!(open(&path, true, 0.1).unwrap().finished().len(), 3);
    }

    #[test]
    fn another_sweep_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep");
        let refused = |resume, rate, part: &str| {
            let error = open(&path, resume, rate).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        };
        refused(true, 0.1, "no sweep to resume");
        let held = open(&path, false, 0.1).unwrap();
        refused(true, 0.1, "in use by another process");
        drop(held);
        refused(false, 0.1, "go on with it by --resume");
        refused(true, 0.2, "all runs: optim.learning_rate was 0.1, is 0.2");
        std::fs::remove_file(path.join(DEFINITION)).unwrap();
        std::fs::write(path.join("notes.txt"), "").unwrap();
        refused(false, 0.1, "is not empty");
    }
}
