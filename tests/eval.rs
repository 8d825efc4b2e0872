//! Evaluation with an engine whose completions are written down.

use std::collections::HashMap;
use std::path::Path;
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use tinylora::adapter::Adapter;
use tinylora::data::prompts::{Prompt, Template};
use tinylora::data::{LoadReport, Metric, Problem};
use tinylora::eval::{
    CompletionLog, EvalOptions, EvalProgress, EvalResult, EvalSet, RunReport, TaskReport, compare,
    evaluate, metrics_object, table,
};
use tinylora::reward::Grader;
use tinylora::rollout::{Completion, Engine, FinishReason, Request, SamplingParams};
use tinylora::{Error, Result};

/// Gives the written completions, samples of later requests first, and notes what was asked.
struct Scripted {
    completions: HashMap<(u64, usize), String>,
    asked: Vec<u64>,
    /// Fail after so many completions, as a killed run would stop.
    fail_after: Option<usize>,
}

impl Scripted {
    fn new(texts: &[&[&str]]) -> Self {
        let mut completions = HashMap::new();
        for (problem, samples) in texts.iter().enumerate() {
            for (sample, text) in samples.iter().enumerate() {
                completions.insert((problem as u64, sample), text.to_string());
            }
        }
        Self {
            completions,
            asked: Vec::new(),
            fail_after: None,
        }
    }
}

impl Engine for Scripted {
    fn generate(
        &mut self,
        _adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        _on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        let mut results: Vec<Vec<Completion>> = requests.iter().map(|_| Vec::new()).collect();
        let mut finished = 0;
        for (index, request) in requests.iter().enumerate().rev() {
            self.asked.push(request.id);
            for sample in 0..request.n {
                if self.fail_after == Some(finished) {
                    return Err(Error::Internal("killed".to_string()));
                }
                finished += 1;
                let text = self.completions[&(request.id, sample)].clone();
                let length = text.split_whitespace().count();
                let completion = Completion {
                    tokens: vec![7; length.min(params.max_tokens)],
                    logprobs: vec![0.0; length.min(params.max_tokens)],
                    text,
                    finish: if length >= params.max_tokens {
                        FinishReason::Length
                    } else {
                        FinishReason::Eos
                    },
                };
                on_finished(index, sample, &completion);
                results[index].push(completion);
            }
        }
        Ok(results)
    }
}

fn set(answers: &[&str]) -> EvalSet {
    let problems: Vec<Problem> = answers
        .iter()
        .enumerate()
        .map(|(i, answer)| Problem {
            id: format!("test/{i}"),
            problem: format!("problem {i}?"),
            answer: answer.to_string(),
            solution: None,
        })
        .collect();
    EvalSet {
        name: "made".to_string(),
        split: "test".to_string(),
        source: "made/up".to_string(),
        prompts: problems
            .iter()
            .map(|p| Prompt {
                text: p.problem.clone(),
                tokens: vec![1, 2, 3],
            })
            .collect(),
        report: LoadReport {
            rows: answers.len() + 1,
            empty_answers: 1,
            ..LoadReport::default()
        },
        problems,
        template: Template::Gsm8k,
        stop: Vec::new(),
        metrics: [Grader::LmEvalStrict, Grader::LmEvalFlexible]
            .map(Metric::of)
            .to_vec(),
        max_tokens: 100,
    }
}

fn options(samples: usize) -> EvalOptions {
    EvalOptions {
        samples_per_problem: samples,
        temperature: if samples > 1 { 1.0 } else { 0.0 },
        ..EvalOptions::greedy(&[0], 1000)
    }
}

fn run(engine: &mut Scripted, set: &EvalSet, samples: usize) -> EvalResult {
    evaluate(engine, None, set, &options(samples), None, &mut |_| {}).unwrap()
}

fn value(result: &EvalResult, name: &str) -> f64 {
    result
        .metric(name)
        .unwrap_or_else(|| panic!("no {name} in {:?}", result.metrics))
        .value
}

#[test]
fn strict_and_flexible_stand_side_by_side() {
    let set = set(&["18", "3", "1200", "5"]);
    let mut engine = Scripted::new(&[
        &["so it is\n#### 18"],
        &["the answer is 3"],
        &["#### 1,200"],
        &["I do not know"],
    ]);
    let mut seen: Vec<EvalProgress> = Vec::new();
    let result = evaluate(&mut engine, None, &set, &options(1), None, &mut |p| {
        seen.push(*p);
    })
    .unwrap();
    assert_eq!(value(&result, "exact_match,strict-match"), 0.5);
    assert_eq!(value(&result, "exact_match,flexible-extract"), 0.75);
    let strict = result.metric("exact_match,strict-match").unwrap();
    assert!((strict.stderr.unwrap() - (0.25f64 / 3.0).sqrt()).abs() < 1e-12);
    assert_eq!(seen.len(), 5);
    assert_eq!((seen[0].done, seen[4].done, seen[4].total), (0, 4, 4));
    assert_eq!(seen[4].score, 0.5);
    assert_eq!(result.tokens, 5 + 4 + 2 + 4);
    assert!((value(&result, "completion_tokens,none") - 15.0 / 4.0).abs() < 1e-12);
    assert_eq!(value(&result, "truncated,none"), 0.0);
}

#[test]
fn several_samples_give_avg_and_pass() {
    let set = set(&["1", "2"]);
    let (right, wrong) = ("#### 1", "#### 9");
    let mut engine = Scripted::new(&[&[right, wrong, wrong, wrong], &[wrong, wrong, wrong, wrong]]);
    let result = run(&mut engine, &set, 4);
    assert_eq!(value(&result, "exact_match,strict-match"), 0.125);
    assert_eq!(value(&result, "avg@4,strict-match"), 0.125);
    assert_eq!(value(&result, "pass@1,strict-match"), 0.125);
    assert_eq!(value(&result, "pass@2,strict-match"), 0.25);
    assert_eq!(value(&result, "pass@4,strict-match"), 0.5);
    // Two problems of 0.25 and 0: the error counts problems, not completions.
    let stderr = result.metric("avg@4,strict-match").unwrap().stderr.unwrap();
    assert!((stderr - 0.125).abs() < 1e-12);
}

#[test]
fn impossible_options_are_refused() {
    let set = set(&["1"]);
    let mut engine = Scripted::new(&[&["#### 1"]]);
    let mut refuse = |change: &dyn Fn(&mut EvalOptions), what: &str| {
        let mut options = options(1);
        change(&mut options);
        let error = evaluate(&mut engine, None, &set, &options, None, &mut |_| {}).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{what}: {error}");
    };
    refuse(&|o| o.samples_per_problem = 2, "greedy repeats");
    refuse(&|o| o.samples_per_problem = 0, "no sample");
    refuse(&|o| o.temperature = -1.0, "negative temperature");
    refuse(&|o| o.temperature = f64::NAN, "no temperature");
    refuse(&|o| o.context_length = 3, "no room");
    refuse(&|o| o.max_tokens = Some(0), "no tokens");
    // The context bounds what the task would allow.
    let mut short = options(1);
    short.context_length = 10;
    assert_eq!(short.sampling(&set).unwrap().max_tokens, 7);
}

fn configuration() -> Map<String, Value> {
    json!({"model": "m"}).as_object().cloned().unwrap()
}

#[test]
fn a_stopped_run_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("completions.jsonl");
    let set = set(&["1", "2", "3"]);
    let texts: [&[&str]; 3] = [&["#### 1", "#### 1"], &["#### 2", "x"], &["x", "#### 3"]];
    let whole = run(&mut Scripted::new(&texts), &set, 2);

    let mut engine = Scripted::new(&texts);
    engine.fail_after = Some(3);
    let mut log = CompletionLog::open(&path, &configuration()).unwrap();
    evaluate(
        &mut engine,
        None,
        &set,
        &options(2),
        Some(&mut log),
        &mut |_| {},
    )
    .unwrap_err();
    drop(log);
    assert_eq!(engine.asked, [2, 1]);

    // Problem 2 is complete, problem 1 has one of two completions.
    let mut engine = Scripted::new(&texts);
    let mut log = CompletionLog::open(&path, &configuration()).unwrap();
    let result = evaluate(
        &mut engine,
        None,
        &set,
        &options(2),
        Some(&mut log),
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(engine.asked, [1, 0]);
    assert_eq!(result.samples, whole.samples);
    assert_eq!(result.metrics, whole.metrics);
    assert_eq!(result.tokens, 4 + 3);

    // A finished run is only read back.
    let mut engine = Scripted::new(&texts);
    let mut log = CompletionLog::open(&path, &configuration()).unwrap();
    let again = evaluate(
        &mut engine,
        None,
        &set,
        &options(2),
        Some(&mut log),
        &mut |_| {},
    )
    .unwrap();
    assert!(engine.asked.is_empty());
    assert_eq!(again.metrics, whole.metrics);
    assert_eq!(again.tokens, 0);
}

fn report(folder: &Path) -> (RunReport, Value, Vec<Value>) {
    let set = set(&["1", "2", "3", "4"]);
    let base = run(
        &mut Scripted::new(&[&["#### 1"], &["x"], &["x"], &["x"]]),
        &set,
        1,
    );
    let result = run(
        &mut Scripted::new(&[&["x"], &["#### 2"], &["#### 3"], &["#### 4"]]),
        &set,
        1,
    );
    let report = RunReport {
        model: "org/name".to_string(),
        adapter: Some("runs/a".to_string()),
        dtype: "f32".to_string(),
        device: "cpu".to_string(),
        seed: 7,
        limit: Some(4),
        started: SystemTime::UNIX_EPOCH,
        seconds: 1.5,
        tasks: vec![TaskReport {
            set,
            result,
            base: Some(base),
        }],
    };
    let results = report.write(folder).unwrap();
    let results: Value = serde_json::from_str(&std::fs::read_to_string(results).unwrap()).unwrap();
    let samples = folder.join("samples_made_1970-01-01T00-00-00.000000.jsonl");
    let samples = std::fs::read_to_string(samples).unwrap();
    let samples = samples
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    (report, results, samples)
}

#[test]
fn results_have_the_harness_shape() {
    let dir = tempfile::tempdir().unwrap();
    let (report, results, samples) = report(dir.path());
    let made = &results["results"]["made"];
    assert_eq!(made["alias"], "made");
    assert_eq!(made["exact_match,strict-match"], 0.75);
    assert_eq!(made["exact_match_stderr,strict-match"], 0.25);
    assert!(made["exact_match,flexible-extract"].is_number());
    assert_eq!(results["n-shot"]["made"], 0);
    assert_eq!(
        results["n-samples"]["made"],
        json!({"original": 5, "effective": 4})
    );
    assert_eq!(results["versions"]["made"], 1);
    assert_eq!(
        results["configs"]["made"]["generation_kwargs"]["do_sample"],
        false
    );
    assert_eq!(results["model_name"], "org/name");
    assert_eq!(results["model_name_sanitized"], "org_name");
    assert_eq!(results["total_evaluation_time_seconds"], "1.5");
    let extra = &results["tinylora"]["tasks"]["made"];
    assert_eq!(extra["rows_without_answer"], 1);
    assert_eq!(extra["base"]["exact_match,strict-match"], 0.25);
    let strict = &extra["comparison"]["exact_match,strict-match"];
    assert_eq!(strict["difference"], 0.5);
    assert_eq!(
        (&strict["only_base"], &strict["only_adapter"]),
        (&json!(1), &json!(3))
    );
    assert_eq!(strict["mcnemar_p"], 0.625);

    assert_eq!(samples.len(), 8, "one line a document and filter");
    assert_eq!(samples[1]["doc_id"], 1);
    assert_eq!(samples[1]["filter"], "strict-match");
    assert_eq!(samples[1]["resps"], json!([["#### 2"]]));
    assert_eq!(samples[1]["filtered_resps"], json!(["2"]));
    assert_eq!(samples[1]["exact_match"], 1.0);
    assert_eq!(samples[0]["filtered_resps"], json!(["[invalid]"]));
    assert_eq!(samples[7]["filter"], "flexible-extract");

    let text = table(&report);
    let line = text.lines().find(|l| l.contains("strict-match")).unwrap();
    for cell in [
        "made",
        "0.7500",
        "0.2500",
        "+0.5000",
        "0.6250 (1 lost, 3 won)",
    ] {
        assert!(line.contains(cell), "{cell} not in {line}");
    }
    let result = &report.tasks[0].result;
    assert_eq!(
        metrics_object(&result.metrics)["exact_match,strict-match"],
        0.75
    );
}

#[test]
fn several_samples_are_compared_without_mcnemar() {
    let set = set(&["1", "2"]);
    let base = run(
        &mut Scripted::new(&[&["x", "#### 1"], &["x", "x"]]),
        &set,
        2,
    );
    let better = run(
        &mut Scripted::new(&[&["#### 1", "#### 1"], &["x", "x"]]),
        &set,
        2,
    );
    let strict = &compare(&set, &base, &better)[0];
    assert_eq!(strict.difference, 0.25);
    assert!(strict.mcnemar.is_none());
}
