//! Results in the shape of lm-evaluation-harness: one results file a run, one line a document and
//! filter in the samples files. What the harness has no place for is under `tinylora`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::compare::compare;
use super::runner::{EvalResult, MetricValue};
use super::set::EvalSet;
use crate::run::directory::civil_date;
use crate::run::fs;
use crate::{Error, Result};

/// One task of a run: with an adapter, or the base model alone.
#[derive(Debug)]
pub struct TaskReport {
    pub set: EvalSet,
    /// The model that was asked about: with the adapter if there is one.
    pub result: EvalResult,
    /// The base model on the same problems, where both were run.
    pub base: Option<EvalResult>,
}

/// A run of several tasks.
#[derive(Debug)]
pub struct RunReport {
    pub model: String,
    pub adapter: Option<String>,
    pub dtype: String,
    pub device: String,
    pub seed: u64,
    pub limit: Option<usize>,
    pub started: SystemTime,
    pub seconds: f64,
    pub tasks: Vec<TaskReport>,
}

/// `{"exact_match,strict-match": …, "exact_match_stderr,strict-match": …}`: the value of a task
/// in `results`. A standard error that does not exist is "N/A", as in the harness.
pub fn metrics_object(metrics: &[MetricValue]) -> Map<String, Value> {
    let mut object = Map::new();
    for metric in metrics {
        let (name, filter) = metric
            .name
            .split_once(',')
            .unwrap_or((&metric.name, "none"));
        object.insert(metric.name.clone(), json!(metric.value));
        object.insert(
            format!("{name}_stderr,{filter}"),
            metric.stderr.map_or(json!("N/A"), |s| json!(s)),
        );
    }
    object
}

impl RunReport {
    /// The results object.
    pub fn to_json(&self) -> Value {
        let per_task = |value: &dyn Fn(&TaskReport) -> Value| -> Value {
            let entries = self.tasks.iter().map(|t| (t.set.name.clone(), value(t)));
            Value::Object(entries.collect())
        };
        let results = |metrics: &[MetricValue], name: &str| {
            let mut object = Map::new();
            object.insert("alias".to_string(), json!(name));
            object.extend(metrics_object(metrics));
            Value::Object(object)
        };
        let mut model_args = format!("pretrained={},dtype={}", self.model, self.dtype);
        if let Some(adapter) = &self.adapter {
            model_args.push_str(&format!(",adapter={adapter}"));
        }
        json!({
            "results": per_task(&|t| results(&t.result.metrics, &t.set.name)),
            "group_subtasks": per_task(&|_| json!([])),
            "configs": per_task(&|t| self.task_config(t)),
            "versions": per_task(&|_| json!(TASK_VERSION)),
            "n-shot": per_task(&|t| json!(t.set.template.num_shots())),
            "higher_is_better": per_task(&|_| json!({"exact_match": true})),
            "n-samples": per_task(&|t| json!({
                "original": t.set.report.rows,
                "effective": t.set.problems.len(),
            })),
            "config": {
                "model": "tinylora",
                "model_args": model_args,
                "device": self.device,
                "limit": self.limit,
                "random_seed": self.seed,
            },
            "date": seconds_since_epoch(self.started),
            "model_source": "tinylora",
            "model_name": self.model,
            "model_name_sanitized": sanitized(&self.model),
            // The harness writes this one as a text.
            "total_evaluation_time_seconds": self.seconds.to_string(),
            "tinylora": {
                "version": env!("CARGO_PKG_VERSION"),
                "adapter": self.adapter,
                "tasks": per_task(&|t| extras(t)),
            },
        })
    }

    fn task_config(&self, task: &TaskReport) -> Value {
        let sampling = &task.result.sampling;
        json!({
            "task": task.set.name,
            "dataset_path": task.set.source,
            "test_split": task.set.split,
            "output_type": "generate_until",
            "num_fewshot": task.set.template.num_shots(),
            "repeats": task.result.samples.first().map_or(1, Vec::len),
            "doc_to_text": task.set.template.to_string(),
            "generation_kwargs": generation(task),
            "metric_list": task.set.metrics.iter().map(|m| json!({
                "metric": "exact_match",
                "filter": m.filter,
                "grader": m.grader.name(),
                "aggregation": "mean",
                "higher_is_better": true,
            })).collect::<Vec<_>>(),
            "should_decontaminate": false,
            "metadata": {"version": TASK_VERSION, "seed": sampling.seed},
        })
    }

    /// Writes `results_<date>.json` and `samples_<task>_<date>.jsonl` (and those of the base
    /// model) into a folder. Gives the path of the results file.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder)?;
        let date = file_date(self.started);
        for task in &self.tasks {
            let name = &task.set.name;
            let path = folder.join(format!("samples_{name}_{date}.jsonl"));
            write_samples(&path, &task.set, &task.result)?;
            if let Some(base) = &task.base {
                let path = folder.join(format!("samples_{name}_base_{date}.jsonl"));
                write_samples(&path, &task.set, base)?;
            }
        }
        let path = folder.join(format!("results_{date}.json"));
        let mut text = serde_json::to_string_pretty(&self.to_json())
            .map_err(|e| Error::Internal(e.to_string()))?;
        text.push('\n');
        fs::write_atomic(&path, text.as_bytes())?;
        Ok(path)
    }
}

/// Version of the tasks' definitions: counts up when scores stop being comparable.
const TASK_VERSION: u32 = 1;

fn generation(task: &TaskReport) -> Value {
    let sampling = &task.result.sampling;
    json!({
        "until": sampling.stop,
        "do_sample": sampling.temperature > 0.0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_gen_toks": sampling.max_tokens,
    })
}

/// What the harness has no place for: speed, skipped rows, the base model and the comparison.
fn extras(task: &TaskReport) -> Value {
    let speed = |result: &EvalResult| {
        json!({
            "seconds": result.seconds,
            "tokens": result.tokens,
            "tokens_per_second": result.tokens_per_second(),
            "completions_read_back": result.read_back,
        })
    };
    let report = &task.set.report;
    let mut object = json!({
        "speed": speed(&task.result),
        "rows": report.rows,
        "rows_without_answer": report.empty_answers,
        "rows_not_usable": report.bad,
    });
    if let Some(base) = &task.base {
        let comparison: Map<String, Value> = compare(&task.set, base, &task.result)
            .into_iter()
            .map(|c| {
                let mut value = json!({
                    "base": c.base,
                    "adapter": c.adapter,
                    "difference": c.difference,
                    "difference_stderr": c.stderr,
                });
                if let Some(test) = c.mcnemar {
                    value["only_base"] = json!(test.only_base);
                    value["only_adapter"] = json!(test.only_adapter);
                    value["mcnemar_p"] = json!(test.p_value);
                }
                (c.name, value)
            })
            .collect();
        object["base"] = Value::Object(metrics_object(&base.metrics));
        object["base_speed"] = speed(base);
        object["comparison"] = Value::Object(comparison);
    }
    object
}

fn write_samples(path: &Path, set: &EvalSet, result: &EvalResult) -> Result<()> {
    let mut text = String::new();
    for (index, metric) in set.metrics.iter().enumerate() {
        for (doc, samples) in result.samples.iter().enumerate() {
            let problem = &set.problems[doc];
            let prompt = &set.prompts[doc].text;
            let document = json!(problem);
            let share = samples.iter().filter(|s| s.graded[index].correct).count() as f64
                / samples.len().max(1) as f64;
            let filtered: Vec<&str> = samples
                .iter()
                .map(|s| s.graded[index].extracted.as_deref().unwrap_or("[invalid]"))
                .collect();
            let line = json!({
                "doc_id": doc,
                "doc": document,
                "target": problem.answer,
                "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {
                    "until": result.sampling.stop,
                    "temperature": result.sampling.temperature,
                    "max_gen_toks": result.sampling.max_tokens,
                }}},
                "resps": [samples.iter().map(|s| s.text.as_str()).collect::<Vec<_>>()],
                "filtered_resps": filtered,
                "filter": metric.filter,
                "metrics": ["exact_match"],
                "doc_hash": hash(&document.to_string()),
                "prompt_hash": hash(prompt),
                "target_hash": hash(&problem.answer),
                "exact_match": share,
                "finish": samples.iter().map(|s| s.finish).collect::<Vec<_>>(),
                "num_tokens": samples.iter().map(|s| s.num_tokens).collect::<Vec<_>>(),
            });
            text.push_str(&line.to_string());
            text.push('\n');
        }
    }
    fs::write_atomic(path, text.as_bytes())
}

fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The harness's folder-safe model name.
fn sanitized(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '/' | '\\' => '_',
            c => c,
        })
        .collect::<String>()
        .replace("__", "_")
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn seconds_since_epoch(time: SystemTime) -> f64 {
    since_epoch(time).as_secs_f64()
}

/// `2026-02-03T04-05-06.789012` (UTC), the harness's date in file names.
fn file_date(time: SystemTime) -> String {
    let elapsed = since_epoch(time);
    let seconds = elapsed.as_secs();
    let (year, month, day) = civil_date(seconds / 86_400);
    let of_day = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}-{:02}-{:02}.{:06}",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        elapsed.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        let at = |seconds| file_date(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00-00-00.000000");
        assert_eq!(at(951_782_400), "2000-02-29T00-00-00.000000");
        assert_eq!(at(1_767_225_599), "2025-12-31T23-59-59.000000");
        assert_eq!(at(1_767_225_600), "2026-01-01T00-00-00.000000");
    }

    #[test]
    fn a_missing_standard_error_is_said_as_the_harness_does() {
        let metrics = [MetricValue {
            name: "exact_match,strict-match".to_string(),
            value: 1.0,
            stderr: None,
        }];
        let object = metrics_object(&metrics);
        assert_eq!(object["exact_match_stderr,strict-match"], "N/A");
        assert_eq!(object["exact_match,strict-match"], 1.0);
    }
}
