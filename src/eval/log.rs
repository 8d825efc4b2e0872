//! Completions of an evaluation in a file, as they finish, so that a stopped run can go on.
//!
//! One JSON object a line. The first line says what was run; a file of another configuration is
//! refused, since mixing the two would give a score of neither.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::runner::EvalOptions;
use super::set::EvalSet;
use crate::adapter::Adapter;
use crate::ranks::Ranks;
use crate::rollout::{Completion, FinishReason};
use crate::run::fs;
use crate::{Error, Result};

/// What is kept of a completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoggedCompletion {
    pub text: String,
    pub num_tokens: usize,
    pub finish: FinishReason,
}

impl From<&Completion> for LoggedCompletion {
    fn from(completion: &Completion) -> Self {
        Self {
            text: completion.text.clone(),
            num_tokens: completion.tokens.len(),
            finish: completion.finish,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    problem: usize,
    sample: usize,
    #[serde(flatten)]
    completion: LoggedCompletion,
}

/// The file and what was found in it.
#[derive(Debug)]
pub struct CompletionLog {
    path: PathBuf,
    /// On other ranks than the root there is none.
    file: Option<File>,
    found: HashMap<(usize, usize), LoggedCompletion>,
}

const VERSION: u64 = 1;
/// How the first line starts.
const START: &[u8] = b"{\"tinylora_eval\"";
/// A completion of a million tokens is a few megabytes of text.
const MAX_LINE: u64 = 64 << 20;

impl CompletionLog {
    /// Opens the file to go on with, or makes it. `configuration` is everything that decides what
    /// completions look like.
    ///
    /// # Errors
    /// The file is of another configuration (the message names what differs), or no log at all.
    pub fn open(path: &Path, configuration: &Map<String, Value>) -> Result<Self> {
        let fail = |e: std::io::Error| Error::file("open", path, e);
        let mut file = fs::open_to_write(path)?;
        let content = read_log(&file, path)?;
        if let Some(earlier) = content.configuration {
            check_same(path, &earlier, configuration)?;
            // A line torn by a crash is cut off, so that the next one starts clean.
            fs::set_len(&file, path, content.whole)?;
            file.seek(SeekFrom::End(0)).map_err(fail)?;
        } else {
            fs::set_len(&file, path, 0)?;
            file.seek(SeekFrom::Start(0)).map_err(fail)?;
            let header = json!({"tinylora_eval": VERSION, "configuration": configuration});
            write_line(&file, path, &header)?;
        }
        Ok(Self {
            path: path.to_path_buf(),
            file: Some(file),
            found: content.found,
        })
    }

    /// The root's log, as [`Self::open`] gives it, and what was found in it on every rank.
    pub fn of_ranks(
        ranks: &Ranks,
        path: &Path,
        configuration: &Map<String, Value>,
    ) -> Result<Self> {
        let mut log = None;
        let found: Vec<_> = ranks.from_root(|| {
            let opened = log.insert(Self::open(path, configuration)?);
            Ok(opened.found.clone().into_iter().collect())
        })?;
        Ok(log.unwrap_or_else(|| Self {
            path: path.to_path_buf(),
            file: None,
            found: found.into_iter().collect(),
        }))
    }

    /// Number of completions found when the file was opened.
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether the file was new.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// All `k` completions of a problem if every one is there. A problem that is only partly
    /// there is run again as a whole: its draws do not depend on when they are made.
    pub fn take_problem(&mut self, problem: usize, k: usize) -> Option<Vec<LoggedCompletion>> {
        if !(0..k).all(|sample| self.found.contains_key(&(problem, sample))) {
            return None;
        }
        (0..k)
            .map(|sample| self.found.remove(&(problem, sample)))
            .collect()
    }

    /// Adds a completion; it is with the operating system when this returns.
    pub fn append(
        &mut self,
        problem: usize,
        sample: usize,
        completion: &LoggedCompletion,
    ) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let line = Line {
            problem,
            sample,
            completion: completion.clone(),
        };
        write_line(file, &self.path, &line)
    }
}

/// Everything that decides what the completions of a task look like, for [`CompletionLog::open`].
/// Graders are not part of it: completions read back are graded again.
pub fn configuration(
    set: &EvalSet,
    options: &EvalOptions,
    model_hash: &str,
    adapter: Option<&Adapter>,
) -> Result<Map<String, Value>> {
    let sampling = options.sampling(set)?;
    let mut prompts = Sha256::new();
    for prompt in &set.prompts {
        prompts.update((prompt.tokens.len() as u64).to_le_bytes());
        for token in &prompt.tokens {
            prompts.update(token.to_le_bytes());
        }
    }
    let adapter = adapter
        .map(|adapter| -> Result<Value> {
            let mut parameters = Sha256::new();
            for value in adapter.rounded_parameters() {
                parameters.update(value.to_le_bytes());
            }
            Ok(json!({
                "spec": serde_json::to_value(adapter.spec())
                    .map_err(|e| Error::Internal(e.to_string()))?,
                "parameters": format!("{:x}", parameters.finalize()),
            }))
        })
        .transpose()?;
    let value = json!({
        "task": set.name,
        "problems": set.problems.len(),
        "prompts": format!("{:x}", prompts.finalize()),
        "model": model_hash,
        "adapter": adapter,
        "samples_per_problem": options.samples_per_problem,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop": sampling.stop,
        "eos": sampling.eos,
        "seed": sampling.seed,
    });
    match value {
        Value::Object(map) => Ok(map),
        other => Err(Error::Internal(format!("{other} is no object"))),
    }
}

fn write_line(file: &File, path: &Path, line: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec(line).map_err(|e| Error::Internal(e.to_string()))?;
    bytes.push(b'\n');
    // One call a line: a kill leaves whole lines and at most one torn at the end.
    fs::write_all(file, path, &bytes)
}

/// What a file holds.
#[derive(Default)]
struct Content {
    /// `None` in a new file, or one whose first line is torn.
    configuration: Option<Map<String, Value>>,
    found: HashMap<(usize, usize), LoggedCompletion>,
    /// Bytes of the part made of whole lines.
    whole: u64,
}

fn read_log(file: &File, path: &Path) -> Result<Content> {
    let bad = |number: usize, why: &str| {
        Error::data(format!(
            "{} line {number} {why}: it is not a log of completions; move it away or choose another folder",
            path.display()
        ))
    };
    let mut reader = BufReader::new(file);
    let mut content = Content::default();
    let (mut number, mut line) = (0usize, Vec::new());
    loop {
        line.clear();
        number += 1;
        (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .map_err(|e| Error::file("read", path, e))?;
        if line.last() != Some(&b'\n') {
            if line.len() as u64 == MAX_LINE {
                return Err(bad(number, "is too long"));
            }
            // The end of the file, or a line torn by a crash. A torn first line belongs to a log
            // only if it starts as one.
            if content.configuration.is_none()
                && !START.starts_with(&line)
                && !line.starts_with(START)
            {
                return Err(bad(number, "is incomplete"));
            }
            return Ok(content);
        }
        if content.configuration.is_none() {
            let value: Value =
                serde_json::from_slice(&line).map_err(|_| bad(number, "is not valid JSON"))?;
            if value["tinylora_eval"] != json!(VERSION) {
                return Err(bad(number, "has no known version"));
            }
            content.configuration = Some(
                value["configuration"]
                    .as_object()
                    .cloned()
                    .ok_or_else(|| bad(number, "has no configuration"))?,
            );
        } else {
            let line: Line =
                serde_json::from_slice(&line).map_err(|_| bad(number, "is not a completion"))?;
            content
                .found
                .insert((line.problem, line.sample), line.completion);
        }
        content.whole += line.len() as u64;
    }
}

fn check_same(path: &Path, old: &Map<String, Value>, new: &Map<String, Value>) -> Result<()> {
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let value = |map: &Map<String, Value>, key: &str| map.get(key).cloned().unwrap_or_default();
    let differences: Vec<String> = keys
        .into_iter()
        .map(|key| (key, value(old, key), value(new, key)))
        .filter(|(_, was, is)| was != is)
        .map(|(key, was, is)| format!("{key} was {was}, is {is}"))
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::config(format!(
        "{} holds completions of another evaluation ({}): choose another folder, or move it away",
        path.display(),
        differences.join("; ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(temperature: f64) -> Map<String, Value> {
        json!({"model": "m", "temperature": temperature})
            .as_object()
            .cloned()
            .unwrap()
    }

    fn completion(text: &str) -> LoggedCompletion {
        LoggedCompletion {
            text: text.to_string(),
            num_tokens: 3,
            finish: FinishReason::Eos,
        }
    }

    #[test]
    fn what_was_written_is_found_again_problem_by_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = CompletionLog::open(&path, &configuration(0.5)).unwrap();
        assert!(log.is_empty());
        for (problem, sample) in [(0, 0), (0, 1), (1, 1)] {
            let text = format!("{problem}\n{sample}");
            log.append(problem, sample, &completion(&text)).unwrap();
        }
        drop(log);
        let mut log = CompletionLog::open(&path, &configuration(0.5)).unwrap();
        assert_eq!(log.len(), 3);
        let first = log.take_problem(0, 2).unwrap();
        assert_eq!(first[1], completion("0\n1"));
        assert!(log.take_problem(1, 2).is_none());
        assert!(log.take_problem(2, 2).is_none());
    }

    #[test]
    fn a_torn_line_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = CompletionLog::open(&path, &configuration(0.0)).unwrap();
        log.append(0, 0, &completion("a")).unwrap();
        log.append(1, 0, &completion("b")).unwrap();
        drop(log);
        let content = std::fs::read(&path).unwrap();
        // Every possible length of a file that a kill could leave.
        for length in 0..content.len() {
            std::fs::write(&path, &content[..length]).unwrap();
            let mut log = CompletionLog::open(&path, &configuration(0.0)).unwrap();
            let found = log.len();
            assert_eq!(
                found,
                content[..length]
                    .iter()
                    .filter(|&&b| b == b'\n')
                    .count()
                    .saturating_sub(1)
            );
            log.append(7, 0, &completion("c")).unwrap();
            drop(log);
            let log = CompletionLog::open(&path, &configuration(0.0)).unwrap();
            assert_eq!(log.len(), found + 1, "{length}");
        }
    }

    #[test]
    fn another_configuration_is_refused_with_its_difference() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        drop(CompletionLog::open(&path, &configuration(0.0)).unwrap());
        let error = CompletionLog::open(&path, &configuration(1.0)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains("temperature was 0.0, is 1.0"),
            "{error}"
        );
    }

    #[test]
    fn foreign_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        for content in ["{\"a\":1}\n", "hello", "\n", "{\"tinylora_eval\":9}\n"] {
            std::fs::write(&path, content).unwrap();
            assert!(CompletionLog::open(&path, &configuration(0.0)).is_err());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
    }
}
