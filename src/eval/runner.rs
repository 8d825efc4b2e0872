//! Runs a task: completions of every problem, their grades, and the scores with standard errors.

use std::time::Instant;

use super::log::{CompletionLog, LoggedCompletion};
use super::set::EvalSet;
use super::stats::{mean_and_stderr, pass_at_k, pass_ks};
use crate::adapter::Adapter;
use crate::reward::Graded;
use crate::rollout::{Completion, Engine, FinishReason, Request, SamplingParams};
use crate::{Error, Result};

/// How completions are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalOptions {
    /// Completions of each problem; more than one needs a temperature.
    pub samples_per_problem: usize,
    /// 0 is greedy.
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: usize,
    pub min_p: f64,
    /// Most tokens of a completion; `None` takes the task's own number.
    pub max_tokens: Option<usize>,
    /// Token ids that end a completion.
    pub eos: Vec<u32>,
    /// Positions the model knows; prompt and completion have to fit.
    pub context_length: usize,
    pub seed: u64,
}

impl EvalOptions {
    /// One greedy completion a problem.
    pub fn greedy(eos: &[u32], context_length: usize) -> Self {
        Self {
            samples_per_problem: 1,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_tokens: None,
            eos: eos.to_vec(),
            context_length,
            seed: 0,
        }
    }

    /// The engine's parameters for a task.
    ///
    /// # Errors
    /// Several greedy completions of a problem; a prompt that leaves no room for a completion.
    pub fn sampling(&self, set: &EvalSet) -> Result<SamplingParams> {
        if self.samples_per_problem == 0 {
            return Err(Error::config("samples per problem = 0: take at least 1"));
        }
        if self.samples_per_problem > 1 && self.temperature == 0.0 {
            return Err(Error::config(format!(
                "{} greedy completions of one problem are all the same: set a temperature",
                self.samples_per_problem
            )));
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::config(format!(
                "temperature = {}: must be 0 (greedy) or more",
                self.temperature
            )));
        }
        let longest = set.longest_prompt();
        let room = self.context_length.saturating_sub(longest);
        if room == 0 {
            return Err(Error::config(format!(
                "{}: the longest prompt has {longest} tokens, the model's context {}",
                set.name, self.context_length
            )));
        }
        let wanted = self.max_tokens.unwrap_or(set.max_tokens);
        if wanted == 0 {
            return Err(Error::config("max tokens = 0: allow at least 1"));
        }
        Ok(SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            max_tokens: wanted.min(room),
            stop: set.stop.clone(),
            eos: self.eos.clone(),
            seed: self.seed,
            step: 0,
        })
    }
}

/// How far an evaluation is; given to the caller after every completion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvalProgress {
    /// Completions done, those read back from an earlier run included.
    pub done: usize,
    pub total: usize,
    /// Tokens generated in this run.
    pub tokens: u64,
    pub seconds: f64,
    /// Share of the completions so far that the task's first metric accepts.
    pub score: f64,
}

/// One score of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricValue {
    /// `metric,filter` as in lm-evaluation-harness.
    pub name: String,
    pub value: f64,
    /// `None` for fewer than two problems.
    pub stderr: Option<f64>,
}

/// One graded completion.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalSample {
    pub text: String,
    pub num_tokens: usize,
    pub finish: FinishReason,
    /// One a metric of the task, in its order.
    pub graded: Vec<Graded>,
}

/// Scores of a task and all that they came from.
#[derive(Debug, Clone)]
pub struct EvalResult {
    /// In the order they should be shown.
    pub metrics: Vec<MetricValue>,
    /// `[problem][sample]`.
    pub samples: Vec<Vec<EvalSample>>,
    /// Wall-clock seconds of this run.
    pub seconds: f64,
    /// Tokens generated in this run, without those read back.
    pub tokens: u64,
    /// Completions of an earlier run that were read back.
    pub read_back: usize,
    /// As the engine was asked.
    pub sampling: SamplingParams,
}

impl EvalResult {
    /// Mean score of each problem by one metric: 0 or 1 with one completion.
    pub fn problem_scores(&self, metric: usize) -> Vec<f64> {
        let correct = |s: &EvalSample| f64::from(u8::from(s.graded[metric].correct));
        self.samples
            .iter()
            .map(|s| s.iter().map(correct).sum::<f64>() / s.len() as f64)
            .collect()
    }

    /// The score of that name.
    pub fn metric(&self, name: &str) -> Option<&MetricValue> {
        self.metrics.iter().find(|m| m.name == name)
    }

    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 {
            self.tokens as f64 / self.seconds
        } else {
            0.0
        }
    }
}

/// Evaluates the engine's model with an adapter (or without one) on a task.
///
/// All problems go to the engine at once, so that completions of unequal length leave no row of
/// the batch idle. With a `log`, finished problems found in it are not run again and new
/// completions are added to it as they finish.
pub fn evaluate(
    engine: &mut dyn Engine,
    adapter: Option<&Adapter>,
    set: &EvalSet,
    options: &EvalOptions,
    mut log: Option<&mut CompletionLog>,
    progress: &mut dyn FnMut(&EvalProgress),
) -> Result<EvalResult> {
    let start = Instant::now();
    let params = options.sampling(set)?;
    let k = options.samples_per_problem;
    let mut samples: Vec<Vec<Option<EvalSample>>> = vec![vec![None; k]; set.problems.len()];
    let mut state = EvalProgress {
        done: 0,
        total: set.problems.len() * k,
        tokens: 0,
        seconds: 0.0,
        score: 0.0,
    };
    let mut correct = 0usize;
    let mut keep = |problem: usize, sample: usize, found: LoggedCompletion, done: &mut usize| {
        let graded = grade(set, problem, &found.text);
        correct += usize::from(graded.first().is_some_and(|g| g.correct));
        *done += 1;
        samples[problem][sample] = Some(EvalSample {
            text: found.text,
            num_tokens: found.num_tokens,
            finish: found.finish,
            graded,
        });
        correct as f64 / *done as f64
    };

    let mut waiting: Vec<usize> = Vec::new();
    for problem in 0..set.problems.len() {
        match log.as_mut().and_then(|log| log.take_problem(problem, k)) {
            Some(completions) => {
                for (sample, completion) in completions.into_iter().enumerate() {
                    state.score = keep(problem, sample, completion, &mut state.done);
                }
            }
            None => waiting.push(problem),
        }
    }
    let read_back = state.done;
    progress(&state);

    let requests: Vec<Request> = waiting
        .iter()
        .map(|&problem| Request {
            id: problem as u64,
            prompt: set.prompts[problem].tokens.clone(),
            n: k,
        })
        .collect();
    let mut failure: Option<Error> = None;
    let mut on_finished = |request: usize, sample: usize, completion: &Completion| {
        let problem = waiting[request];
        let found = LoggedCompletion::from(completion);
        if let Some(log) = log.as_mut()
            && failure.is_none()
            && let Err(error) = log.append(problem, sample, &found)
        {
            failure = Some(error);
        }
        state.tokens += completion.tokens.len() as u64;
        state.score = keep(problem, sample, found, &mut state.done);
        state.seconds = start.elapsed().as_secs_f64();
        progress(&state);
    };
    if !requests.is_empty() {
        engine.generate(
            adapter,
            &requests,
            &params,
            &mut |_, _, _| {},
            &mut on_finished,
        )?;
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let tokens = state.tokens;
    let samples = samples
        .into_iter()
        .map(|group| group.into_iter().collect::<Option<Vec<_>>>())
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| {
            Error::Internal("the engine ended without finishing every completion".to_string())
        })?;
    let mut result = EvalResult {
        metrics: Vec::new(),
        samples,
        seconds: start.elapsed().as_secs_f64(),
        tokens,
        read_back,
        sampling: params,
    };
    result.metrics = scores(set, &result, k);
    Ok(result)
}

fn grade(set: &EvalSet, problem: usize, text: &str) -> Vec<Graded> {
    let gold = &set.problems[problem].answer;
    set.metrics
        .iter()
        .map(|metric| metric.grader.grade(gold, text))
        .collect()
}

/// Every metric's mean; pass@k where there are several completions; lengths.
fn scores(set: &EvalSet, result: &EvalResult, k: usize) -> Vec<MetricValue> {
    let score = |name: String, per_problem: &[f64]| {
        let (value, stderr) = mean_and_stderr(per_problem);
        MetricValue {
            name,
            value,
            stderr,
        }
    };
    let mut scores = Vec::new();
    for (index, metric) in set.metrics.iter().enumerate() {
        let means = result.problem_scores(index);
        scores.push(score(metric.key(), &means));
        if k == 1 {
            continue;
        }
        scores.push(score(format!("avg@{k},{}", metric.filter), &means));
        for at in pass_ks(k) {
            let passes: Vec<f64> = result
                .samples
                .iter()
                .map(|s| pass_at_k(k, s.iter().filter(|s| s.graded[index].correct).count(), at))
                .collect();
            scores.push(score(format!("pass@{at},{}", metric.filter), &passes));
        }
    }
    let per_problem = |value: &dyn Fn(&EvalSample) -> f64| -> Vec<f64> {
        result
            .samples
            .iter()
            .map(|s| s.iter().map(value).sum::<f64>() / s.len() as f64)
            .collect()
    };
    scores.push(score(
        "completion_tokens,none".to_string(),
        &per_problem(&|s| s.num_tokens as f64),
    ));
    scores.push(score(
        "truncated,none".to_string(),
        &per_problem(&|s| f64::from(u8::from(s.finish == FinishReason::Length))),
    ));
    scores
}
