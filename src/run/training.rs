//! The loop around a trainer: evaluation, logs, checkpoints, interruption.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::checkpoint::{Checkpoint, Identity, Store};
use super::logs::{CompletionRow, Logs};
use super::metrics::StepMetrics;
use super::progress::{Bar, Progress};
use super::signals;
use super::state::TrainState;
use crate::adapter::Adapter;
use crate::config::TrainConfig;
use crate::ranks::Ranks;
use crate::{Error, Result};

/// What one step gives.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    pub metrics: StepMetrics,
    /// Completions of the step; none under SFT.
    pub completions: Vec<CompletionRow>,
}

/// GRPO or SFT, one step at a time.
pub trait Trainer {
    /// One generation batch (GRPO) or one update (SFT). `on_progress(done, total)` counts parts
    /// of it. A step that fails may leave the trainer anywhere between two states.
    fn step(&mut self, on_progress: &mut dyn FnMut(usize, usize)) -> Result<StepOutput>;

    fn adapter(&self) -> &Adapter;

    /// Steps done.
    fn step_number(&self) -> u64;

    /// Everything needed to go on from here.
    fn state(&self) -> TrainState;

    /// Goes to a saved state.
    fn restore(&mut self, state: &TrainState) -> Result<()>;
}

/// The scores of all data sets after a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: u64,
    /// Data set → metric → value, `<metric>_stderr` beside it.
    pub scores: Map<String, Value>,
    /// The first metric of the first data set: what "best" is about.
    pub score: Option<f64>,
    pub seconds: f64,
}

/// Evaluates an adapter after a step.
pub type Evaluate<'a> = dyn FnMut(u64, &Adapter) -> Result<Evaluation> + 'a;

/// The files that grow while a run goes on.
pub struct Records {
    pub store: Store,
    pub logs: Logs,
}

/// What the loop needs besides the trainer.
pub struct Session<'a> {
    pub config: &'a TrainConfig,
    /// Steps of the whole run.
    pub total_steps: u64,
    pub identity: Identity,
    pub ranks: Ranks,
    /// What is written; on other ranks than the root nothing.
    pub records: Option<Records>,
    pub progress: Progress,
    /// Counts the steps of this run and of others beside it.
    pub of_all: Option<&'a Bar>,
    /// Those of a resumed run are there from the start.
    pub evaluations: Vec<Evaluation>,
    /// Steps in a row from which nothing was learnt, as of the checkpoint gone on from.
    pub dead_steps: u64,
    /// `None` when there is nothing to evaluate on.
    pub evaluate: Option<&'a mut Evaluate<'a>>,
    /// Writes an adapter's file.
    pub write_adapter: &'a dyn Fn(&Adapter, &Path) -> Result<()>,
    /// Mean reward (GRPO) or loss (SFT) of every step of this process, for the plot.
    pub curve: Vec<f64>,
}

impl Session<'_> {
    /// Trains to the end: evaluates, logs and saves on the way.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after a signal, with a checkpoint of the last whole step saved;
    /// [`Error::Diverged`] when there is nothing to learn from or numbers are no longer finite,
    /// with the checkpoints of the steps before untouched.
    pub fn run(&mut self, trainer: &mut dyn Trainer) -> Result<()> {
        let bar = self.progress.bar("training", self.total_steps);
        let mut state = trainer.state();
        bar.set_position(state.step);
        loop {
            let step = state.step;
            let last = step >= self.total_steps;
            let evaluate = self.evaluation_is_due(step);
            if last || evaluate || step.is_multiple_of(self.config.save_steps) {
                // Before the evaluation, which may take longer than all steps so far.
                self.save(trainer, &state)?;
            }
            if evaluate {
                match self.evaluate(step, trainer.adapter()) {
                    Err(Error::Interrupted(_)) => return Err(self.interrupted(trainer, &state)),
                    result => result?,
                }
            }
            if last {
                break;
            }
            match self.step(trainer, &bar) {
                Ok(metrics) => {
                    self.dead_steps = match metrics.get("frac_reward_zero_std") {
                        Some(share) if share >= 1.0 => self.dead_steps + 1,
                        _ => 0,
                    };
                    state = trainer.state();
                    bar.set_position(state.step);
                    self.of_all.inspect(|bar| bar.inc(1));
                    self.check_alive(&metrics, state.step)?;
                }
                Err(error) => return Err(self.abandoned(trainer, &state, error)),
            }
            if let Err(error) = self.agree(&state) {
                // What the ranks do not have in common is not worth a checkpoint.
                return Err(match error {
                    Error::Interrupted(_) => self.interrupted(trainer, &state),
                    other => other,
                });
            }
        }
        bar.finish();
        Ok(())
    }

    /// Whether a signal has asked to stop, and all ranks are at the same state of the same run.
    fn agree(&self, state: &TrainState) -> Result<()> {
        if self.ranks.is_alone() {
            return signals::check();
        }
        let bytes = serde_json::to_vec(&(&self.identity, state))
            .map_err(|e| Error::Internal(format!("cannot compare ranks: {e}")))?;
        let what = format!("state after step {}", state.step);
        self.ranks.agree(&what, &bytes)
    }

    /// What to say of a step that was not finished. Where the cause lies outside (a signal, a rank or a
    /// server that is gone), the state in which it began is saved.
    fn abandoned(&mut self, trainer: &mut dyn Trainer, state: &TrainState, error: Error) -> Error {
        let saved = |why: String| format!("{why}; saved after step {}", state.step);
        let after_saving: &dyn Fn(String) -> Error = match error {
            Error::Interrupted(_) => &|why| Error::Interrupted(saved(why)),
            Error::Lost(_) => &|why| Error::Lost(saved(why)),
            other => return other,
        };
        // The step in flight is abandoned: back to where it began.
        match trainer
            .restore(state)
            .and_then(|()| self.save(trainer, state))
        {
            Ok(()) => after_saving(error.to_string()),
            Err(other) => other,
        }
    }

    /// One step with its lines in the logs.
    fn step(&mut self, trainer: &mut dyn Trainer, bar: &Bar) -> Result<StepMetrics> {
        let summary = bar.message();
        let output = trainer.step(&mut |done, total| {
            bar.set_message(format!("{summary} ({})", percent(done, total)));
        })?;
        let step = trainer.step_number();
        let StepOutput {
            metrics,
            completions,
        } = output;
        let limit = self.config.num_completions_to_log.unwrap_or(usize::MAX);
        if let Some(Records { logs, .. }) = &mut self.records {
            logs.step(step, &metrics)?;
            logs.completions(step, &completions[..limit.min(completions.len())])?;
        }
        self.curve
            .extend(metrics.get("reward").or(metrics.get("loss")));
        bar.set_message(one_line(&metrics));
        Ok(metrics)
    }

    fn check_alive(&self, metrics: &StepMetrics, step: u64) -> Result<()> {
        for name in ["loss", "grad_norm", "reward"] {
            if metrics.get(name).is_some_and(|v| !v.is_finite()) {
                return Err(Error::Diverged(format!(
                    "{name} is not finite after step {step}: lower optim.learning_rate; \
                     the checkpoints are from steps before"
                )));
            }
        }
        let limit = self.config.max_dead_steps;
        if limit > 0 && self.dead_steps >= limit {
            let reward = metrics.get("reward").unwrap_or(f64::NAN);
            return Err(Error::Diverged(format!(
                "no group had two different rewards in the last {limit} steps (mean reward \
                 {reward:.3}), so nothing is learnt: take harder or easier problems, another \
                 prompt or reward, or raise train.max_dead_steps"
            )));
        }
        Ok(())
    }

    fn interrupted(&mut self, trainer: &dyn Trainer, state: &TrainState) -> Error {
        match self.save(trainer, state) {
            Ok(()) => Error::Interrupted(format!("interrupted; saved after step {}", state.step)),
            Err(error) => error,
        }
    }

    fn save(&mut self, trainer: &dyn Trainer, state: &TrainState) -> Result<()> {
        let Some(Records { store, logs }) = &mut self.records else {
            return Ok(());
        };
        if store.has(state.step) {
            // A kill may have come between its saving and the removal of older ones.
            return store.prune();
        }
        let checkpoint = Checkpoint {
            identity: self.identity.clone(),
            state: state.clone(),
            logs: logs.sync()?,
            evaluations: self.evaluations.clone(),
            dead_steps: self.dead_steps,
        };
        let write = self.write_adapter;
        store.save(&checkpoint, |path| write(trainer.adapter(), path))
    }

    fn evaluation_is_due(&self, step: u64) -> bool {
        let every = self.config.eval_steps.unwrap_or(u64::MAX);
        self.evaluate.is_some()
            && (step.is_multiple_of(every) || step >= self.total_steps)
            && self.evaluations.iter().all(|e| e.step != step)
    }

    fn evaluate(&mut self, step: u64, adapter: &Adapter) -> Result<()> {
        let Some(evaluate) = &mut self.evaluate else {
            return Ok(());
        };
        let evaluation = evaluate(step, adapter)?;
        if let Some(Records { store, logs }) = &mut self.records {
            logs.evaluation(step, &evaluation.scores, evaluation.seconds)?;
            store.set_score(step, evaluation.score)?;
        }
        self.evaluations.push(evaluation);
        Ok(())
    }
}

fn percent(done: usize, total: usize) -> String {
    format!("{:.0} %", 100.0 * done as f64 / total.max(1) as f64)
}

/// What the bar says of a step: `reward 0.41 · 96 tokens · 830 tok/s`.
fn one_line(metrics: &StepMetrics) -> String {
    let mut parts = Vec::new();
    match (metrics.get("reward"), metrics.get("loss")) {
        (Some(reward), _) => parts.push(format!("reward {reward:.3}")),
        (None, Some(loss)) => parts.push(format!("loss {loss:.4}")),
        (None, None) => {}
    }
    if let Some(length) = metrics.get("completions/mean_length") {
        parts.push(format!("{length:.0} tokens"));
    }
    if let Some(kl) = metrics.get("natural/kl") {
        parts.push(format!("step of {kl:.3} nats"));
    }
    if let Some(rate) = metrics.get("tokens_per_second") {
        parts.push(format!("{rate:.0} tok/s"));
    }
    parts.join(" · ")
}
