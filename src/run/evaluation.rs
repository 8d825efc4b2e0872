//! Evaluation before, during and after training.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::fs;
use super::job::Place;
use super::progress::Progress;
use super::training::Evaluation;
use crate::adapter::Adapter;
use crate::config::Config;
use crate::eval::{self, CompletionLog, EvalOptions, EvalResult, EvalSet, SetOptions};
use crate::model::{Model, Tokenizer};
use crate::ranks::Ranks;
use crate::rollout::{Engines, SharedEngine};
use crate::{Error, Result};

/// The data sets of `[eval]` with their prompts.
pub struct Evaluator<'a> {
    sets: &'a [EvalSet],
    /// Greedy or as configured, and at temperature 1 when that is asked for as well.
    passes: Vec<Pass>,
    engines: &'a Engines<'a>,
    /// Where the root keeps completions.
    folder: PathBuf,
    ranks: Ranks,
    /// Where completions of the untrained model are shared with other runs.
    shared: Option<PathBuf>,
    progress: Progress,
}

/// Completions of the untrained model that a run in lockstep sees to, by their file.
pub type Claimed = Mutex<HashSet<PathBuf>>;

struct Pass {
    /// In front of the metrics' names.
    prefix: &'static str,
    options: EvalOptions,
}

impl<'a> Evaluator<'a> {
    /// Reads the data sets; `None` when there are none.
    ///
    /// # Errors
    /// An unknown benchmark, unreadable data, a prompt the checkpoint has no chat template for.
    pub fn load(config: &Config, tokenizer: &Tokenizer) -> Result<Vec<EvalSet>> {
        // Before and after are asked the way training asks.
        let template = match config.data.prompt.as_str() {
            "auto" => None,
            given => Some(given.parse()?),
        };
        let options = SetOptions {
            template,
            stop: (!config.grpo.stop.is_empty()).then(|| config.grpo.stop.clone()),
            data_dir: config.data.data_dir.clone(),
            limit: config.eval.limit,
            fields: config.data.fields.clone(),
            on_bad_row: config.data.on_bad_row,
            ..SetOptions::default()
        };
        // A prompt given for training holds for evaluation on the same data, or it would not show
        // what was learnt.
        let own = |name: &String| match config.data.prompt.as_str() {
            "auto" => Ok(None),
            given if *name == config.data.train => given.parse().map(Some),
            _ => Ok(None),
        };
        let load = |name: &String| {
            let template = own(name)?;
            let options = SetOptions {
                template,
                ..options.clone()
            };
            EvalSet::load(name, tokenizer, &options)
        };
        config.eval.data.iter().map(load).collect()
    }

    /// Makes ready to evaluate into `evaluations/` of the run.
    pub fn new(
        config: &Config,
        sets: &'a [EvalSet],
        model: &Model,
        place: &Place<'_>,
        engines: &'a Engines<'a>,
    ) -> Result<Self> {
        let context = model.decoder.config.max_position_embeddings;
        let base = EvalOptions {
            max_tokens: Some(
                config
                    .eval
                    .max_tokens
                    .unwrap_or(config.grpo.max_completion_length),
            ),
            seed: config.train.seed,
            ..EvalOptions::greedy(model.tokenizer.eos_ids(), context)
        };
        let mut passes = vec![Pass {
            prefix: "",
            options: EvalOptions {
                temperature: config.eval.temperature,
                samples_per_problem: config.eval.samples_per_problem,
                ..base.clone()
            },
        }];
        if config.eval.sampled {
            let options = EvalOptions {
                temperature: 1.0,
                ..base
            };
            passes.push(Pass {
                prefix: "sampled_",
                options,
            });
        }
        let folder = match place.directory {
            Some(directory) => {
                let folder = evaluations(directory.path());
                fs::create_dir_all(&folder)?;
                fs::remove_temporaries(&folder)?;
                for set in sets {
                    write_problems(&folder, set)?;
                }
                folder
            }
            None => PathBuf::new(),
        };
        Ok(Self {
            sets,
            passes,
            engines,
            folder,
            shared: None,
            ranks: place.ranks.clone(),
            progress: place.progress,
        })
    }

    /// Takes the untrained model's completions from `folder` when another run has left them there,
    /// and leaves them there otherwise. The caller sees to it that the runs have one model, and
    /// that their adapters start without an effect.
    pub fn share_untrained(&mut self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        self.shared = Some(folder.to_owned());
        Ok(())
    }

    /// Evaluates the untrained model where that is shared and nobody has claimed it.
    pub fn evaluate_untrained(&self, adapter: &Adapter, claimed: &Claimed) -> Result<()> {
        for set in self.sets {
            for pass in &self.passes {
                let Some(file) = self.shared_file(0, set, &configuration(0, set, pass)) else {
                    continue;
                };
                let mut claimed = claimed.lock().unwrap_or_else(PoisonError::into_inner);
                let is_ours = !file.exists() && claimed.insert(file);
                drop(claimed);
                if is_ours {
                    self.run(0, set, pass, adapter)?;
                }
            }
        }
        Ok(())
    }

    /// Where completions are shared, for an evaluation after `step`.
    fn shared_file(
        &self,
        step: u64,
        set: &EvalSet,
        configuration: &Map<String, Value>,
    ) -> Option<PathBuf> {
        let folder = self.shared.as_ref().filter(|_| step == 0)?;
        Some(folder.join(shared_name(set, configuration)))
    }

    /// Evaluates the adapter after `step` on every data set.
    ///
    /// Completions go to `evaluations/` as they finish, so that an interrupted evaluation goes on
    /// where it stopped.
    pub fn evaluate(&self, step: u64, adapter: &Adapter) -> Result<Evaluation> {
        let mut evaluation = Evaluation {
            step,
            ..Evaluation::default()
        };
        for set in self.sets {
            let mut scores = Map::new();
            for pass in &self.passes {
                let result = self.run(step, set, pass, adapter)?;
                if evaluation.score.is_none() {
                    evaluation.score = result.metrics.first().map(|m| m.value);
                }
                evaluation.seconds += result.seconds;
                for metric in &result.metrics {
                    let name = metric.name.trim_end_matches(",none");
                    let name = format!("{}{name}", pass.prefix);
                    if let Some(stderr) = metric.stderr {
                        scores.insert(format!("{name}_stderr"), stderr.into());
                    }
                    scores.insert(name, metric.value.into());
                }
            }
            evaluation
                .scores
                .insert(set.name.clone(), Value::Object(scores));
        }
        Ok(evaluation)
    }

    fn run(&self, step: u64, set: &EvalSet, pass: &Pass, adapter: &Adapter) -> Result<EvalResult> {
        let name = format!("step-{step:06}-{}{}.jsonl", pass.prefix, set.name);
        let path = self.folder.join(name);
        let configuration = configuration(step, set, pass);
        let shared = self.shared_file(step, set, &configuration);
        if let Some(shared) = shared.as_deref().filter(|s| s.exists() && !path.exists()) {
            fs::write_atomic(&path, &fs::read(shared)?)?;
        }
        let mut log = CompletionLog::of_ranks(&self.ranks, &path, &configuration)?;
        let mut engine = SharedEngine::new(self.engines.engine(), &self.ranks);
        let total = set.problems.len() * pass.options.samples_per_problem;
        let label = format!("evaluating {}{}", pass.prefix.replace('_', " "), set.name);
        let bar = self.progress.bar(&label, total as u64);
        let result = eval::evaluate(
            &mut engine,
            Some(adapter),
            set,
            &pass.options,
            Some(&mut log),
            &mut |state| {
                let rate = state.tokens as f64 / state.seconds.max(1e-9);
                bar.set_message(format!("score {:.3} · {rate:.0} tok/s", state.score));
                bar.set_position(state.done as u64);
            },
        );
        bar.finish();
        if let (Ok(_), Some(shared)) = (&result, shared) {
            fs::write_atomic(&shared, &fs::read(&path)?)?;
        }
        result
    }
}

/// Tells apart what differs in problems, prompts or sampling.
fn shared_name(set: &EvalSet, configuration: &Map<String, Value>) -> String {
    let mut hasher = Sha256::new();
    hasher.update(Value::Object(configuration.clone()).to_string());
    for text in &set.stop {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    for prompt in &set.prompts {
        hasher.update((prompt.tokens.len() as u64).to_le_bytes());
        prompt
            .tokens
            .iter()
            .for_each(|t| hasher.update(t.to_le_bytes()));
    }
    let digest = format!("{:x}", hasher.finalize());
    format!("{}-{}.jsonl", set.name, &digest[..16])
}

/// Where the completions of a run's evaluations lie.
pub fn evaluations(run: &Path) -> PathBuf {
    run.join("evaluations")
}

/// The file with the problems of a data set that is evaluated on: `problems-<data set>.jsonl`.
pub fn problems_file(folder: &Path, set: &str) -> PathBuf {
    folder.join(format!("problems-{set}.jsonl"))
}

/// The first line of [`problems_file`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ProblemsHeader {
    /// Version of the format.
    pub tinylora_problems: u64,
    /// The metric that decides what is right, and the grader it goes by.
    pub metric: String,
    pub grader: String,
}

/// Any further line of [`problems_file`], in the order of the data set. Completions name a problem
/// by its `index`.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProblemRow {
    pub index: usize,
    pub id: String,
    pub problem: String,
    /// The reference answer.
    pub answer: String,
}

/// Version of [`problems_file`].
pub const PROBLEMS_VERSION: u64 = 1;

/// Completions alone do not say what was asked: this makes a run readable without its data set.
fn write_problems(folder: &Path, set: &EvalSet) -> Result<()> {
    let Some(metric) = set.metrics.first() else {
        return Ok(());
    };
    let internal = |e: serde_json::Error| Error::Internal(format!("cannot write problems: {e}"));
    let header = ProblemsHeader {
        tinylora_problems: PROBLEMS_VERSION,
        metric: metric.key(),
        grader: metric.grader.name().to_owned(),
    };
    let mut text = serde_json::to_string(&header).map_err(internal)?;
    text.push('\n');
    for (index, problem) in set.problems.iter().enumerate() {
        let row = ProblemRow {
            index,
            id: problem.id.clone(),
            problem: problem.problem.clone(),
            answer: problem.answer.clone(),
        };
        text.push_str(&serde_json::to_string(&row).map_err(internal)?);
        text.push('\n');
    }
    fs::write_atomic(&problems_file(folder, &set.name), text.as_bytes())
}

/// What decides the completions of an evaluation within its run.
fn configuration(step: u64, set: &EvalSet, pass: &Pass) -> Map<String, Value> {
    let options = &pass.options;
    let value = json!({
        "step": step,
        "data": set.name,
        "problems": set.problems.len(),
        "temperature": options.temperature,
        "samples_per_problem": options.samples_per_problem,
        "max_tokens": options.max_tokens,
        // Greedy completions are the same for every seed.
        "seed": (options.temperature > 0.0).then_some(options.seed),
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
