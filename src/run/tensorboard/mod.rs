//! TensorBoard's event file of a run: every number of `metrics.jsonl` and `timings.jsonl` as a scalar,
//! and some completions of each step as text.
//!
//! It is a view of those logs for `tensorboard --logdir runs`, and taken back with them when a run is
//! resumed, so that no step is in it twice.

mod event;
mod record;

use std::path::Path;
use std::time::UNIX_EPOCH;

use event::What;

use super::append::AppendFile;
use super::clock;
use super::logs::CompletionRow;
use crate::Result;

/// Where it lies in a run directory. TensorBoard looks for `tfevents` in names.
pub const FILE: &str = "tensorboard/events.out.tfevents.tinylora";

/// Completions of a step that are shown.
const SHOWN: usize = 4;
/// Characters of a prompt or completion that are shown.
const LONGEST: usize = 2000;

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile(AppendFile);

impl EventFile {
    /// Opens the file, in a folder that exists, and takes it back to `length`.
    ///
    /// # Errors
    /// As [`AppendFile::open`].
    pub fn open(path: &Path, length: u64) -> Result<Self> {
        let mut events = Self(AppendFile::open(path, length)?);
        if events.0.is_empty() {
            events.append(0, &What::Version)?;
        }
        Ok(events)
    }

    /// Numbers of a step.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        match values {
            [] => Ok(()),
            values => self.append(step, &What::Scalars(values)),
        }
    }

    /// The first completions of a step, each with its prompt and reward.
    pub fn completions(&mut self, step: u64, rows: &[CompletionRow]) -> Result<()> {
        let texts: Vec<(String, String)> = rows
            .iter()
            .take(SHOWN)
            .enumerate()
            .map(|(number, row)| (format!("completions/{}", number + 1), markdown(row)))
            .collect();
        match &texts[..] {
            [] => Ok(()),
            texts => self.append(step, &What::Texts(texts)),
        }
    }

    /// See [`AppendFile::sync`].
    pub fn sync(&mut self) -> Result<u64> {
        self.0.sync()
    }

    fn append(&mut self, step: u64, what: &What<'_>) -> Result<()> {
        let since = clock::now().duration_since(UNIX_EPOCH);
        let event = event::event(since.map_or(0.0, |s| s.as_secs_f64()), step, what);
        self.0.append(&record::frame(&event))
    }
}

/// A completion as TensorBoard shows it. Texts are indented as code: nothing in them is markup.
fn markdown(row: &CompletionRow) -> String {
    let code = |text: &str| -> String {
        let lines = text.lines().map(|line| format!("    {line}\n"));
        lines.collect()
    };
    let cut = |text: &str| -> String {
        match text.char_indices().nth(LONGEST) {
            Some((at, _)) => format!("{} …", &text[..at]),
            None => text.to_owned(),
        }
    };
    format!(
        "reward {:.3}, advantage {:.3}, answer `{}`, found `{}`\n\nPrompt\n\n{}\nCompletion\n\n{}",
        row.reward,
        row.advantage,
        row.answer,
        row.extracted.as_deref().unwrap_or("nothing"),
        code(&cut(&row.prompt)),
        code(&cut(&row.completion)),
    )
}

#[cfg(test)]
mod tests;
