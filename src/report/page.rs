//! The page: what the template is given, and the rules that keep it safe to open.
//!
//! Everything from a run is text that the template escapes; the data of the charts stands in a
//! script block that is never run, with `<` written as `\u003c`. The page's policy allows no
//! network, and no script or style but those whose hashes it names.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minijinja::Environment;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::adapter::{Drawing, TrainedNumbers};
use super::catalog::Group;
use super::charts;
use super::health::{Finding, Level};
use super::history::Score;
use super::numbers::{count, duration, number, score};
use super::reading::{Run, Status};
use super::samples::{Answer, Change, Comparison, TrainingGroup};
use crate::run::plan;
use crate::{Error, Result};

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Colours the style has for runs.
const COLOURS: usize = 8;
/// Rows of the table of trained numbers.
const MAX_LISTED: usize = 64;

/// The page about the runs.
///
/// # Errors
/// Only a mistake in the template.
pub fn render(runs: &[Run]) -> Result<String> {
    let internal = |e: minijinja::Error| Error::Internal(format!("cannot make the report: {e:#}"));
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    // The name's ending turns escaping on.
    environment
        .add_template("page.html", TEMPLATE)
        .map_err(internal)?;
    let template = environment.get_template("page.html").map_err(internal)?;
    let title = match runs {
        [run] => run.name.clone(),
        _ => format!("{} runs", runs.len()),
    };
    let labels: Vec<String> = runs
        .iter()
        .filter_map(Run::main_score)
        .map(|s| label(&s))
        .collect();
    let context = json!({
        "title": title,
        "score_label": labels.first().filter(|first| labels.iter().all(|l| l == *first)),
        "version": env!("CARGO_PKG_VERSION"),
        "style": STYLE,
        "style_hash": policy_hash(STYLE),
        "script": SCRIPT,
        "script_hash": policy_hash(SCRIPT),
        "charts": script_data(&charts::charts(runs))?,
        "single": runs.len() == 1,
        "runs": runs.iter().enumerate().map(|(i, run)| run_context(i, run)).collect::<Vec<_>>(),
        "metrics": metric_table(runs),
    });
    template.render(context).map_err(internal)
}

/// JSON that can stand inside a script element.
fn script_data(value: &Value) -> Result<String> {
    let text = serde_json::to_string(value)
        .map_err(|e| Error::Internal(format!("cannot write the report's data: {e}")))?;
    Ok(text
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029"))
}

/// A source expression of a content security policy.
fn policy_hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

fn run_context(index: usize, run: &Run) -> Value {
    let findings = run.history.findings();
    let warnings = findings
        .iter()
        .filter(|f| f.level == Level::Warning)
        .count();
    let scores = run.history.scores();
    json!({
        "index": index,
        "colour": index % COLOURS,
        "name": run.name,
        "status": run.status.text(),
        "status_class": match run.status {
            Status::Finished => "good",
            Status::InProgress => "busy",
            Status::Stopped => "warn",
        },
        "resume": (run.status == Status::Stopped).then_some("tinylora train --resume goes on from its last checkpoint"),
        "model": run.model(),
        "method": run.method_name(),
        "steps": run.steps(),
        "time": duration(run.history.seconds),
        "tokens": run.history.metric("num_tokens").map(|s| count(s.last as usize)),
        "learning_rate": run.configuration.get("optim.learning_rate"),
        "seed": run.configuration.get("train.seed"),
        "reward": run.history.metric("reward").map(|s| json!([number(s.first), number(s.last)])),
        "loss": run.history.metric("loss").map(|s| json!([number(s.first), number(s.last)])),
        "numbers": run.numbers.as_ref().map(numbers_context),
        "main": run.main_score().map(|s| score_context(&s)),
        "sampled": run.sampled_score().map(|s| score_context(&s)),
        "evaluated": run.history.evaluations.first().map(|e| e.step)
            .zip(run.history.evaluations.last().map(|e| e.step)),
        "accuracies": accuracies(&scores),
        "other_scores": scores.iter().filter(|s| !s.is_accuracy()).map(score_context).collect::<Vec<_>>(),
        "only_scores": match run.history.evaluations.as_slice() {
            [only] => json!({"step": only.step, "scores": only.scores.iter()
                .map(|(name, value, stderr)| json!([name, score(*value, *stderr)])).collect::<Vec<_>>()}),
            _ => Value::Null,
        },
        "findings": findings.iter().map(finding_context).collect::<Vec<_>>(),
        "warnings": warnings,
        "watched": run.history.watched(),
        "comparisons": run.comparisons.iter().enumerate().map(comparison_context).collect::<Vec<_>>(),
        "training": run.training.iter().map(group_context).collect::<Vec<_>>(),
        "changed": run.configuration.changed().collect::<Vec<_>>(),
        "configuration": run.configuration.lines.iter()
            .map(|line| json!({"text": line.text, "changed": line.changed.is_some()})).collect::<Vec<_>>(),
        "environment": run.environment,
        "remarks": run.remarks,
    })
}

/// Shares of right answers. Readings of the same answers that agree stand in one row.
fn accuracies(scores: &[Score]) -> Vec<Value> {
    let mut rows: Vec<(&Score, Vec<&str>)> = Vec::new();
    for found in scores.iter().filter(|s| s.is_accuracy()) {
        let (family, reading) = found.metric.split_once(',').unwrap_or((&found.metric, ""));
        let agrees = |row: &&mut (&Score, Vec<&str>)| {
            let same = row.0.metric.split(',').next() == Some(family) && row.0.set == found.set;
            same && (row.0.before, row.0.after) == (found.before, found.after)
        };
        match rows.iter_mut().find(agrees) {
            Some((_, also)) => also.push(reading),
            None => rows.push((found, Vec::new())),
        }
    }
    let context = |(found, also): &(&Score, Vec<&str>)| {
        let mut context = score_context(found);
        context["also"] = json!(also.join(", "));
        context
    };
    rows.iter().map(context).collect()
}

fn score_context(found: &Score) -> Value {
    let percent = |(value, stderr): (f64, Option<f64>)| {
        let clamp = |x: f64| (100.0 * x).clamp(0.0, 100.0);
        let stderr = stderr.unwrap_or(0.0);
        let (from, to) = (clamp(value - stderr), clamp(value + stderr));
        json!({
            "text": score(value, stderr_of(stderr)),
            "value": format!("{value:.3}"),
            "at": fixed(clamp(value)), "from": fixed(from), "width": fixed(to - from),
        })
    };
    let is_count = !found.is_accuracy() && found.metric.ends_with("tokens");
    let text = |(value, stderr): (f64, Option<f64>)| {
        let text = match (is_count, stderr.filter(|&stderr| stderr > 0.0)) {
            (true, Some(stderr)) => format!("{value:.1} ± {stderr:.1}"),
            (true, None) => format!("{value:.1}"),
            (false, stderr) => score(value, stderr),
        };
        // On a narrow screen the line breaks before the sign, not after it.
        text.replace("± ", "±\u{a0}")
    };
    json!({
        "set": found.set,
        "metric": found.metric,
        "label": label(found),
        "before": percent(found.before),
        "after": percent(found.after),
        "before_text": text(found.before),
        "after_text": text(found.after),
        "change": match is_count {
            true => format!("{:+.1}", found.change()),
            false => format!("{:+.3}", found.change()),
        },
        "change_stderr": found.change_stderr().map(|se| match is_count {
            true => format!("{se:.1}"),
            false => format!("{se:.3}"),
        }),
        "direction": match found.change() {
            change if change > 0.0 => "up",
            change if change < 0.0 => "down",
            _ => "same",
        },
    })
}

fn label(found: &Score) -> String {
    format!("{} {}", found.set, found.metric)
}

fn stderr_of(stderr: f64) -> Option<f64> {
    (stderr > 0.0).then_some(stderr)
}

/// A length or place in a drawing.
fn fixed(value: f64) -> String {
    format!("{value:.2}")
}

fn finding_context(finding: &Finding) -> Value {
    json!({
        "level": match finding.level {
            Level::Warning => "warning",
            Level::Note => "note",
        },
        "subject": finding.subject,
        "what": finding.what,
        "advice": finding.advice,
    })
}

/// Size of the drawing of the trained numbers, in its own units.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 150.0;

fn numbers_context(numbers: &TrainedNumbers) -> Value {
    let (bars, zero, ends, kind) = match &numbers.drawing {
        Drawing::Bars(values) => {
            let largest = values
                .iter()
                .fold(0.0f64, |m, (_, v)| m.max(f64::from(v.abs())));
            let scale = (HEIGHT / 2.0 - 2.0) / largest.max(f64::MIN_POSITIVE);
            let slot = WIDTH / values.len().max(1) as f64;
            let bar = |(i, (label, value)): (usize, &(String, f32))| {
                let height = (f64::from(value.abs()) * scale).max(0.5);
                let top = if *value >= 0.0 {
                    HEIGHT / 2.0 - height
                } else {
                    HEIGHT / 2.0
                };
                json!({
                    "x": fixed(slot * (i as f64 + 0.12)), "width": fixed(slot * 0.76),
                    "y": fixed(top), "height": fixed(height),
                    "class": if *value >= 0.0 { "plus" } else { "minus" },
                    "label": label, "value": number(f64::from(*value)),
                })
            };
            let bars: Vec<Value> = values.iter().enumerate().map(bar).collect();
            let ends = [format!("−{}", number(largest)), number(largest)];
            (bars, HEIGHT / 2.0, ends, "bars")
        }
        Drawing::Histogram { low, high, counts } => {
            let most = counts.iter().copied().max().unwrap_or(0).max(1) as f64;
            let slot = WIDTH / counts.len().max(1) as f64;
            let width = (f64::from(*high) - f64::from(*low)) / counts.len().max(1) as f64;
            let bar = |(i, n): (usize, &usize)| {
                let height = *n as f64 / most * (HEIGHT - 4.0);
                let from = f64::from(*low) + width * i as f64;
                json!({
                    "x": fixed(slot * i as f64), "width": fixed(slot * 0.92),
                    "y": fixed(HEIGHT - height), "height": fixed(height), "class": "plus",
                    "label": format!("{} to {}", number(from), number(from + width)),
                    "value": format!("{} numbers", count(*n)),
                })
            };
            let bars: Vec<Value> = counts.iter().enumerate().map(bar).collect();
            (
                bars,
                HEIGHT,
                [number(f64::from(*low)), number(f64::from(*high))],
                "histogram",
            )
        }
    };
    let listed = matches!(&numbers.drawing, Drawing::Bars(values) if values.len() <= MAX_LISTED);
    let spec = &numbers.spec;
    json!({
        "origin": numbers.origin,
        "kind": spec.kind.name(),
        "r": spec.r, "u": spec.u, "n_tie": spec.n_tie,
        "count": count(numbers.count),
        "size": plan::bytes(numbers.bytes),
        "norm": number(numbers.norm),
        "drawing": kind, "bars": bars, "zero": fixed(zero), "ends": ends,
        "width": WIDTH, "height": HEIGHT, "listed": listed,
    })
}

fn comparison_context((index, comparison): (usize, &Comparison)) -> Value {
    let shown = |change: Change| {
        comparison
            .pairs
            .iter()
            .filter(|p| p.change == change)
            .count()
    };
    let kinds = Change::ALL.iter().zip(comparison.counts).map(|(change, all)| {
        json!({"class": change.class(), "title": change.title(), "count": all, "shown": shown(*change)})
    });
    let answer = |answer: &Answer| {
        json!({
            "text": answer.text,
            "tokens": answer.num_tokens,
            "truncated": answer.truncated,
            "extracted": answer.graded.extracted,
            "correct": answer.graded.correct,
        })
    };
    let pairs = comparison.pairs.iter().map(|pair| {
        json!({
            "id": pair.id, "problem": pair.problem, "gold": pair.gold,
            "class": pair.change.class(), "title": pair.change.title(),
            "before": answer(&pair.before), "after": answer(&pair.after),
        })
    });
    let set = match comparison.set.strip_prefix("sampled_") {
        Some(set) => format!("{set}, temperature 1"),
        None => comparison.set.clone(),
    };
    json!({
        "index": index,
        "set": set,
        "metric": comparison.metric,
        "steps": comparison.steps,
        "total": comparison.counts.iter().sum::<usize>(),
        "shown": comparison.pairs.len(),
        "kinds": kinds.collect::<Vec<_>>(),
        "pairs": pairs.collect::<Vec<_>>(),
    })
}

fn group_context(group: &TrainingGroup) -> Value {
    let rows = group.rows.iter().map(|row| {
        let reward = row.reward.unwrap_or(0.0);
        json!({
            "completion": row.completion,
            "extracted": row.extracted,
            "tokens": row.num_tokens,
            "truncated": row.finish == "length",
            "reward": row.reward.map(number),
            "advantage": row.advantage.map(|a| match a > 0.0 {
                true => format!("+{}", number(a)),
                false => number(a),
            }),
            "class": if reward > 0.0 { "good" } else { "bad" },
        })
    });
    let first = group.rows.first();
    json!({
        "step": first.map(|row| row.step),
        "problem": first.map(|row| &row.problem),
        "prompt": first.map(|row| &row.prompt),
        "gold": first.map(|row| &row.answer),
        "size": group.size,
        "mean": number(group.mean_reward),
        "rows": rows.collect::<Vec<_>>(),
    })
}

/// First, last, smallest and largest value of every metric: what the charts say, without a script.
fn metric_table(runs: &[Run]) -> Vec<Value> {
    let mut rows = Vec::new();
    for group in Group::ALL {
        for run in runs {
            for metric in run.history.of_group(group).filter(|m| m.series.count > 0) {
                let series = &metric.series;
                let numbers = [series.first, series.last, series.min, series.max];
                let mean = series.sum / series.count as f64;
                rows.push(json!({
                    "group": group.title(),
                    "name": metric.name,
                    "run": run.name,
                    "values": numbers.iter().chain([&mean]).map(|v| number(*v)).collect::<Vec<_>>(),
                }));
            }
        }
    }
    // Runs of one metric stand together.
    rows.sort_by_key(|row| {
        let place = Group::ALL.iter().position(|g| row["group"] == g.title());
        (place, row["name"].as_str().unwrap_or_default().to_owned())
    });
    rows
}
