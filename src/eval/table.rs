//! Scores as a text table.

use std::fmt::Write;

use super::compare::compare;
use super::lm_eval::{RunReport, TaskReport};
use super::runner::{EvalResult, MetricValue};

/// Every task with every metric, score ± standard error, and where the base model was run too,
/// its scores and the difference.
pub fn table(report: &RunReport) -> String {
    let mut rows = vec![
        ["task", "metric", "n", "score", "± stderr"]
            .map(String::from)
            .to_vec(),
    ];
    let with_base = report.tasks.iter().any(|t| t.base.is_some());
    if with_base {
        let more = ["base", "± stderr", "difference", "± stderr", "McNemar p"];
        rows[0].extend(more.map(String::from));
    }
    for task in &report.tasks {
        rows.extend(task_rows(task));
    }
    let mut text = align(&rows, 2);
    for task in &report.tasks {
        let _ = writeln!(text, "{}: {}", task.set.name, speed(&task.result));
        if let Some(base) = &task.base {
            let _ = writeln!(text, "{} base: {}", task.set.name, speed(base));
        }
    }
    text
}

fn task_rows(task: &TaskReport) -> Vec<Vec<String>> {
    let comparisons = task
        .base
        .as_ref()
        .map(|base| compare(&task.set, base, &task.result))
        .unwrap_or_default();
    let mut rows = Vec::new();
    for (index, metric) in task.result.metrics.iter().enumerate() {
        let first = if index == 0 {
            task.set.name.as_str()
        } else {
            ""
        };
        let mut row = vec![
            first.to_string(),
            metric.name.clone(),
            task.set.problems.len().to_string(),
            score(metric),
            stderr(metric.stderr, metric),
        ];
        if let Some(base) = task.base.as_ref().and_then(|b| b.metric(&metric.name)) {
            row.extend([score(base), stderr(base.stderr, metric)]);
        }
        if let Some(comparison) = comparisons.iter().find(|c| c.name == metric.name) {
            row.push(format!("{:+.4}", comparison.difference));
            row.push(stderr(comparison.stderr, metric));
            row.push(match comparison.mcnemar {
                Some(test) => format!(
                    "{} ({} lost, {} won)",
                    p_value(test.p_value),
                    test.only_base,
                    test.only_adapter
                ),
                None => String::new(),
            });
        }
        rows.push(row);
    }
    rows
}

/// Counts of tokens want no four decimals.
fn decimals(metric: &MetricValue) -> usize {
    if metric.name.starts_with("completion_tokens") {
        1
    } else {
        4
    }
}

fn score(metric: &MetricValue) -> String {
    format!("{:.*}", decimals(metric), metric.value)
}

fn stderr(value: Option<f64>, metric: &MetricValue) -> String {
    match value {
        Some(value) => format!("{value:.*}", decimals(metric)),
        None => "-".to_string(),
    }
}

fn p_value(p: f64) -> String {
    if p < 1e-4 {
        format!("{p:.1e}")
    } else {
        format!("{p:.4}")
    }
}

fn speed(result: &EvalResult) -> String {
    let mut text = format!(
        "{} tokens in {:.1} s ({:.0} tok/s)",
        result.tokens,
        result.seconds,
        result.tokens_per_second()
    );
    if result.read_back > 0 {
        let _ = write!(text, ", {} completions read back", result.read_back);
    }
    text
}

/// Columns padded to their widest cell, two spaces apart, a rule under the head. The first `names`
/// columns are flush left, the others right.
pub fn align(rows: &[Vec<String>], names: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let pad = widths[column] - cell.chars().count();
            if column < names {
                line.push_str(cell);
                line.push_str(&" ".repeat(pad));
            } else {
                line.push_str(&" ".repeat(pad));
                line.push_str(cell);
            }
            line.push_str("  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
        if index == 0 {
            let total = widths.iter().sum::<usize>() + 2 * (columns.max(1) - 1);
            text.push_str(&"─".repeat(total));
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["task".to_string(), "n".to_string(), "score".to_string()],
            vec!["größer".to_string(), "1".to_string(), "0.5".to_string()],
        ];
        assert_eq!(
            align(&rows, 2),
            "task    n  score\n────────────────\ngrößer  1    0.5\n"
        );
    }
}
