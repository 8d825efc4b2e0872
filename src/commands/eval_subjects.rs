//! Who is asked in `tinylora eval`: the model with each adapter, and without one. All of them answer a task
//! together, on one pass of the model.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::adapter::Adapter;
use crate::config::Sizes;
use crate::eval::{CompletionLog, EvalOptions, EvalResult, EvalSet, configuration, evaluate};
use crate::lockstep::Lockstep;
use crate::model::Model;
use crate::ranks::Ranks;
use crate::rollout::{Engine, Engines, SharedEngine};
use crate::run::progress::Progress;
use crate::{Error, Result};

/// The model with one adapter or none.
pub(super) struct Subject<'a> {
    pub adapter: Option<&'a Adapter>,
    /// Behind the name of a task, in files and beside bars.
    pub suffix: &'static str,
    /// What tells it from others beside bars.
    pub label: String,
    /// Where its completions go.
    pub folder: Option<PathBuf>,
}

/// Asks all subjects the same.
pub(super) struct Questioner<'a> {
    pub model: &'a Model,
    pub options: &'a EvalOptions,
    pub progress: Progress,
    pub batch_size: usize,
    pub ranks: &'a Ranks,
}

impl Questioner<'_> {
    /// Results of a task, one a subject.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after a signal; completions that cannot be written or belong to another
    /// evaluation.
    pub fn ask(
        &self,
        subjects: &[Subject<'_>],
        set: &EvalSet,
        engines: &Engines<'_>,
    ) -> Result<Vec<EvalResult>> {
        let mut results: Vec<Option<EvalResult>> = subjects.iter().map(|_| None).collect();
        // A model whose weights are trained has no product in common with others; other processes take
        // one policy at a time.
        let here = self.ranks.is_alone() && matches!(engines, Engines::Native(..));
        let by_itself = |s: &Subject<'_>| !here || s.adapter.is_some_and(Adapter::trains_weights);
        let (alone, together): (Vec<usize>, Vec<usize>) =
            (0..subjects.len()).partition(|&i| by_itself(&subjects[i]));
        let (alone, together) = match &together[..] {
            [_, _, ..] => (alone, together),
            _ => ((0..subjects.len()).collect(), Vec::new()),
        };
        let Model {
            decoder, tokenizer, ..
        } = self.model;
        for i in alone {
            let mut engine = SharedEngine::new(engines.engine(), self.ranks);
            results[i] = Some(self.evaluate(&subjects[i], set, &mut engine)?);
        }
        let shared = Lockstep {
            decoder,
            tokenizer,
            max_batch_size: self.batch_size,
            pass_tokens: Sizes::default().pass_tokens,
        };
        let answers = shared.run(together.len(), |number, seat| {
            self.evaluate(&subjects[together[number]], set, &mut seat.engine())
        });
        for (i, result) in together.into_iter().zip(crate::lockstep::all(answers)?) {
            results[i] = Some(result);
        }
        Ok(results.into_iter().flatten().collect())
    }

    fn evaluate(
        &self,
        subject: &Subject<'_>,
        set: &EvalSet,
        engine: &mut dyn Engine,
    ) -> Result<EvalResult> {
        let Subject {
            adapter,
            suffix,
            label,
            folder,
        } = subject;
        let mut log = match folder {
            Some(folder) => {
                let path = folder.join(format!("completions_{}{suffix}.jsonl", set.name));
                let known = configuration(set, self.options, &self.model.hash, *adapter)?;
                Some(CompletionLog::of_ranks(self.ranks, &path, &known)?)
            }
            None => None,
        };
        let name = format!("{}{label}", set.name);
        if let Some(found) = log.as_ref().map(CompletionLog::len).filter(|n| *n > 0) {
            self.progress
                .line(&format!("{name}: {found} completions are there already"));
        }
        let total = set.problems.len() * self.options.samples_per_problem;
        let bar = self.progress.bar(&name, total as u64);
        let result = evaluate(
            engine,
            *adapter,
            set,
            self.options,
            log.as_mut(),
            &mut |state| {
                let rate = state.tokens as f64 / state.seconds.max(1e-9);
                bar.set_message(format!("score {:.3} · {rate:.0} tok/s", state.score));
                bar.set_position(state.done as u64);
            },
        );
        bar.finish();
        result.map_err(|error| match (error, folder) {
            (Error::Interrupted(_), Some(folder)) => Error::Interrupted(format!(
                "interrupted; the same command goes on from the completions in {}",
                folder.display()
            )),
            (error, _) => error,
        })
    }
}

/// A folder name for each of several adapters: the last part of what the user called them, with a number
/// where that is not enough.
pub(super) fn folder_names(adapters: &[String]) -> Vec<String> {
    let mut taken = HashSet::new();
    let plain = |c: char| match c.is_ascii_alphanumeric() || "-_.".contains(c) {
        true => c,
        false => '_',
    };
    adapters
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let path = Path::new(name);
            // Files of adapters are all called the same; their runs are not.
            let parts = path
                .components()
                .rev()
                .filter_map(|c| c.as_os_str().to_str());
            let part = parts
                .map(|part| part.trim_end_matches(".safetensors"))
                .find(|part| !GENERIC.contains(part) && !part.starts_with("step-"));
            let text: String = part
                .unwrap_or("adapter")
                .chars()
                .map(plain)
                .take(60)
                .collect();
            match taken.insert(text.clone()) {
                true => text,
                false => {
                    let numbered = format!("{text}-{}", i + 1);
                    taken.insert(numbered.clone());
                    numbered
                }
            }
        })
        .collect()
}

/// Parts of a path that say nothing about a run.
const GENERIC: [&str; 3] = ["adapter", "checkpoints", "."];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_called_after_runs_and_are_different() {
        let names = [
            "runs/a/checkpoints/step-000003/adapter.safetensors",
            "runs/b/adapter.safetensors",
            "b",
            "tinylora1:gQAB",
        ];
        assert_eq!(
            folder_names(&names.map(String::from)),
            ["a", "b", "b-3", "tinylora1_gQAB"]
        );
    }
}
