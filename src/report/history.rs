//! `metrics.jsonl` and `timings.jsonl`: series, findings, evaluations.

use std::path::Path;

use serde_json::{Map, Value};

use super::catalog::{Group, Rule};
use super::health::{Finding, Level, Monitor, NotFinite};
use super::lines::Lines;
use super::series::Series;
use crate::config::Method;

/// Metrics read; a run of this program has about forty.
const MAX_METRICS: usize = 300;
/// Bytes of a metric's name.
const MAX_NAME: usize = 160;
/// Evaluations kept: the first ones and the last.
const MAX_EVALUATIONS: usize = 400;

/// One metric with its findings.
#[derive(Debug, Clone)]
pub struct Metric {
    pub name: String,
    pub series: Series,
    monitor: Option<Monitor>,
    not_finite: NotFinite,
}

/// The scores after one step, each as `<data set>/<metric>` with its standard error.
#[derive(Debug, Clone, Default)]
pub struct Evaluation {
    pub step: u64,
    pub scores: Vec<(String, f64, Option<f64>)>,
}

/// Everything that was measured during a run.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// In the order in which they first appear.
    pub metrics: Vec<Metric>,
    pub evaluations: Vec<Evaluation>,
    /// The last step that was trained.
    pub last_step: u64,
    /// Seconds of training and evaluation.
    pub seconds: f64,
}

/// One score before and after training.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    pub set: String,
    pub metric: String,
    pub before: (f64, Option<f64>),
    pub after: (f64, Option<f64>),
}

impl Score {
    /// Whether it is a share of right answers.
    pub fn is_accuracy(&self) -> bool {
        ["exact_match", "pass@", "avg@"]
            .iter()
            .any(|name| self.metric.contains(name))
    }

    pub fn change(&self) -> f64 {
        self.after.0 - self.before.0
    }

    /// Standard error of the change as if the two were independent: on the same problems the true
    /// one is smaller.
    pub fn change_stderr(&self) -> Option<f64> {
        Some(self.before.1?.hypot(self.after.1?))
    }
}

impl History {
    /// Adds a log; the remark says what of it could not be read.
    pub fn read(&mut self, path: &Path, method: Method) -> std::io::Result<Option<String>> {
        let mut lines = Lines::open(path)?;
        while let Some((_, row)) = lines.read::<Map<String, Value>>()? {
            self.row(&row, method);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(lines.remark(&name))
    }

    fn row(&mut self, row: &Map<String, Value>, method: Method) {
        let Some(step) = row.get("step").and_then(Value::as_u64) else {
            return;
        };
        let mut evaluation = Evaluation {
            step,
            ..Evaluation::default()
        };
        let mut trained = false;
        for (name, value) in row {
            if name == "step" || name.len() > MAX_NAME || !(value.is_number() || value.is_null()) {
                continue;
            }
            let value = value.as_f64().filter(|v| v.is_finite());
            if let Some(score) = name.strip_prefix("eval_").filter(|s| s.contains('/')) {
                if !score.ends_with("_stderr")
                    && evaluation.scores.len() < MAX_METRICS
                    && let Some(value) = value
                {
                    let stderr = row.get(&format!("{name}_stderr")).and_then(Value::as_f64);
                    evaluation.scores.push((score.to_owned(), value, stderr));
                }
                continue;
            }
            if name == "step_time" || name == "eval_runtime" {
                self.seconds += value.unwrap_or(0.0);
            }
            trained |= name != "eval_runtime";
            self.value(name, step, value, method);
        }
        if trained {
            self.last_step = self.last_step.max(step);
        }
        if !evaluation.scores.is_empty() {
            // The last one always counts, since it is the "after".
            self.evaluations.truncate(MAX_EVALUATIONS - 1);
            self.evaluations.push(evaluation);
        }
    }

    fn value(&mut self, name: &str, step: u64, value: Option<f64>, method: Method) {
        let index = match self.metrics.iter().position(|m| m.name == name) {
            Some(index) => index,
            None if self.metrics.len() >= MAX_METRICS => return,
            None => {
                let rule = Rule::of(name).filter(|rule| rule.applies_to(method));
                self.metrics.push(Metric {
                    name: name.to_owned(),
                    series: Series::default(),
                    monitor: rule.map(Monitor::new),
                    not_finite: NotFinite::default(),
                });
                self.metrics.len() - 1
            }
        };
        let metric = &mut self.metrics[index];
        metric.not_finite.push(step, value.is_some());
        if let Some(value) = value {
            metric.series.push(step, value);
            if let Some(monitor) = &mut metric.monitor {
                monitor.push(step, value);
            }
        }
    }

    /// The first evaluation and the last, metric by metric. Empty with fewer than two.
    pub fn scores(&self) -> Vec<Score> {
        let [before, .., after] = self.evaluations.as_slice() else {
            return Vec::new();
        };
        let found = after.scores.iter().filter_map(|(name, value, stderr)| {
            let (_, old, old_stderr) = before.scores.iter().find(|(n, ..)| n == name)?;
            let (set, metric) = name.split_once('/')?;
            Some(Score {
                set: set.to_owned(),
                metric: metric.to_owned(),
                before: (*old, *old_stderr),
                after: (*value, *stderr),
            })
        });
        found.collect()
    }

    /// A score over the evaluations: (step, value, standard error).
    pub fn score_points(&self, name: &str) -> Vec<(f64, f64, f64)> {
        let of = |e: &Evaluation| {
            let (_, value, stderr) = e.scores.iter().find(|(n, ..)| n == name)?;
            Some((e.step as f64, *value, stderr.unwrap_or(0.0)))
        };
        self.evaluations.iter().filter_map(of).collect()
    }

    /// Every finding, warnings first.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for metric in &self.metrics {
            findings.extend(metric.not_finite.finding(&metric.name));
            findings.extend(metric.monitor.iter().flat_map(Monitor::findings));
        }
        findings.extend(score_findings(&self.scores()));
        findings.sort_by_key(|finding| finding.level);
        findings
    }

    /// The metrics that were looked at for health, for saying that nothing was found.
    pub fn watched(&self) -> Vec<&str> {
        let watched = self.metrics.iter().filter(|m| m.monitor.is_some());
        watched.map(|m| m.name.as_str()).collect()
    }

    pub fn metric(&self, name: &str) -> Option<&Series> {
        self.metrics
            .iter()
            .find(|m| m.name == name)
            .map(|m| &m.series)
    }

    /// The metrics of a group in the order of the log.
    pub fn of_group(&self, group: Group) -> impl Iterator<Item = &Metric> {
        self.metrics
            .iter()
            .filter(move |m| Group::of(&m.name) == group)
    }
}

/// Share of answers that only the lenient reading finds, from which on it deserves a word.
const FORM_GAP: f64 = 0.1;

fn score_findings(scores: &[Score]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for score in scores.iter().filter(|s| s.is_accuracy()) {
        let subject = format!("{} {}", score.set, score.metric);
        let fell = score
            .change_stderr()
            .is_some_and(|se| score.change() < -2.0 * se);
        if fell {
            findings.push(Finding {
                level: Level::Warning,
                subject: subject.clone(),
                what: format!(
                    "fell from {:.3} to {:.3}, by more than two standard errors",
                    score.before.0, score.after.0
                ),
                advice:
                    "Training made the model worse here. Lower optim.learning_rate, or look at \
                         the completions below for what changed."
                        .to_owned(),
            });
        }
        if !score.metric.contains("strict-match") {
            continue;
        }
        let lenient = score.metric.replace("strict-match", "flexible-extract");
        let lenient = scores
            .iter()
            .find(|s| s.set == score.set && s.metric == lenient);
        if let Some(lenient) = lenient.filter(|l| l.before.0 - score.before.0 >= FORM_GAP) {
            findings.push(Finding {
                level: Level::Note,
                subject,
                what: format!(
                    "before training {:.3} by the strict reading and {:.3} by the lenient one",
                    score.before.0, lenient.before.0
                ),
                advice: "Part of what training gains is the form of the answer: compare the \
                         lenient scores before and after as well."
                    .to_owned(),
            });
        }
    }
    findings
}
